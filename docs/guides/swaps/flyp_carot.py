"""FLYP-style fine-tuning with CaRot: the teacher and the loss in place of ``ClipLoss`` (CPU, seconds)."""

import open_clip
import torch

import calrobust as cr

COLORS = {"red": (0.8, 0.1, 0.1), "green": (0.1, 0.6, 0.2), "blue": (0.2, 0.2, 0.8), "grey": (0.5, 0.5, 0.5)}
TEMPLATES = ["a photo of a {} square.", "a drawing of a {} square.", "a {} square.", "something {}."]
TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 1, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}

torch.manual_seed(0)
target = torch.randint(len(COLORS), (512,))
colors = torch.tensor(list(COLORS.values()))
images = colors[target, :, None, None] + 2 * torch.randn(512, 3, 32, 32)
tokenizer = open_clip.SimpleTokenizer(context_length=12)
captions = torch.stack([tokenizer([template.format(name) for template in TEMPLATES]) for name in COLORS])

model = open_clip.model.CLIP(**TINY)  # yours: open_clip.create_model("ViT-B-16", pretrained="openai")
teacher = cr.EMATeacher(model, decay=0.9)
criterion = cr.MultimodalContrastiveLoss(label_smoothing=0.05) + 1.5 * cr.MultimodalDistillationLoss()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20 * 8)

for _ in range(20):
    for batch in torch.randperm(512).split(64):
        texts = captions[target[batch], torch.randint(len(TEMPLATES), (len(batch),))]
        image_features, text_features, logit_scale = model(images[batch], texts)
        loss = criterion(image_features, text_features, logit_scale, *teacher(images[batch], texts))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teacher.update(model)
        scheduler.step()

with torch.no_grad():
    prototypes = torch.stack([model.encode_text(texts, normalize=True).mean(0) for texts in captions])
    logits = model.encode_image(images, normalize=True) @ prototypes.T
print(f"accuracy {(logits.argmax(1) == target).float().mean():.3f}")
