"""FLYP-style fine-tuning with CaRot: the teacher and the loss in place of ``ClipLoss`` (CPU, seconds)."""

import open_clip
import torch

import calrobust as cr

COLORS = {"red": (0.8, 0.1, 0.1), "green": (0.1, 0.6, 0.2), "blue": (0.2, 0.2, 0.8)}
TEMPLATES = ["a photo of a {} square.", "a {} square.", "something {}."]
VISION = {"image_size": 32, "patch_size": 16, "layers": 1, "width": 32, "head_width": 16}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}

torch.manual_seed(0)
target = torch.randint(len(COLORS), (512,))
colors = torch.tensor(list(COLORS.values()))
images = colors[target, :, None, None] + 2 * torch.randn(512, 3, 32, 32)
tokenizer = open_clip.SimpleTokenizer(context_length=12)
captions = torch.stack([tokenizer([t.format(name) for t in TEMPLATES]) for name in COLORS])

# Yours: open_clip.create_model("ViT-B-16-quickgelu", pretrained="openai")
model = open_clip.model.CLIP(embed_dim=32, vision_cfg=VISION, text_cfg=TEXT)
teacher = cr.EMATeacher(model, decay=0.9)
criterion = cr.CaRotLoss(label_smoothing=0.05, distillation_weight=1.5)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20 * 8)

for _ in range(20):
    for batch in torch.randperm(512).split(64):
        texts = captions[target[batch], torch.randint(len(TEMPLATES), (len(batch),))]
        image_features, text_features, logit_scale = model(images[batch], texts)
        distilled = teacher(images[batch], texts)
        loss = criterion(image_features, text_features, logit_scale, *distilled)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teacher.update(model)
        scheduler.step()

with torch.no_grad():
    prototypes = torch.stack([model.encode_text(t, normalize=True).mean(0) for t in captions])
    logits = model.encode_image(images, normalize=True) @ prototypes.T
print(f"accuracy {(logits.argmax(1) == target).float().mean():.3f}")
