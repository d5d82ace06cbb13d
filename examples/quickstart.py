"""From a pre-trained CLIP to a calibrated robust fine-tune and its report: ``python examples/quickstart.py``.

Takes under a minute on a CPU and downloads nothing. The pictures are scikit-learn's scanned digits. A small open_clip
model is pre-trained on them in five styles, fine-tuned on plain scans alone, and judged on all five styles.
"""

import copy

import open_clip
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset

import calrobust as cr

STYLES = ("scan", "inverted", "rotated", "noisy", "faint")
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("a photo of the digit {}.", "a picture of a {}.", "the number {}.")
VISION = {"image_size": 16, "patch_size": 4, "width": 64, "head_width": 16, "layers": 2}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 1}


def pictures(rows: Tensor, style: str) -> TensorDataset:
    """Scans in a style, ``[3, 16, 16]`` each, and the digits on them."""
    images = F.interpolate(scans[rows], scale_factor=2, mode="bilinear")
    if style == "inverted":
        images = 1 - images
    elif style == "rotated":
        angle = torch.empty(len(rows)).uniform_(-0.8, 0.8)  # in radians
        turn = torch.stack([angle.cos(), -angle.sin(), 0 * angle, angle.sin(), angle.cos(), 0 * angle], 1)
        grid = F.affine_grid(turn.view(-1, 2, 3), list(images.shape), align_corners=False)
        images = F.grid_sample(images, grid, align_corners=False)
    elif style == "noisy":
        images = images + 0.4 * torch.randn_like(images)
    elif style == "faint":
        images = 0.6 + 0.2 * images
    return TensorDataset(images.expand(-1, 3, -1, -1), digits[rows])


def train(
    model: nn.Module, criterion: nn.Module, data: Dataset, *, epochs: int, lr: float, teacher: nn.Module | None = None
) -> None:
    """A plain training loop on pictures and captions of their classes. Only the teacher is new."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0, fused=True)
    for _ in range(epochs):
        for images, target in DataLoader(data, batch_size=100, shuffle=True):
            texts = captions[target, torch.randint(len(TEMPLATES), target.shape)]
            distilled = teacher(images, texts) if teacher else ()
            loss = criterion(*model(images, texts), *distilled, labels=target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if teacher:
                teacher.update(model)


def logits(model: nn.Module, data: Dataset) -> tuple[Tensor, Tensor]:
    """Logits and labels. Contrastive fine-tuning keeps the zero-shot classifier."""
    weight = model.logit_scale.exp() * cr.zero_shot_classifier(model, tokenizer, NAMES, TEMPLATES)

    def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, target = batch
        return model.encode_image(images, normalize=True) @ weight.T, target

    return cr.collect_logits(model, DataLoader(data, batch_size=100), forward=classify, progress=False)


torch.manual_seed(0)
scans, digits = torch.tensor(load_digits().images).float()[:, None] / 16, torch.tensor(load_digits().target)
web, training, held_out, test = torch.randperm(len(digits)).split([700, 300, 200, 597])
tokenizer = open_clip.SimpleTokenizer(context_length=12)
captions = torch.stack([tokenizer([template.format(name) for template in TEMPLATES]) for name in NAMES])

# 1. Something pre-trained. Yours: open_clip.create_model_and_transforms("ViT-B-16-quickgelu", pretrained="openai")
model = open_clip.model.CLIP(embed_dim=32, vision_cfg=VISION, text_cfg=TEXT)
web_pictures = ConcatDataset([pictures(web, style) for style in STYLES])
train(model, cr.MultimodalContrastiveLoss(), web_pictures, epochs=12, lr=1e-3)

# 2. Fine-tune it twice. Yours: torchvision.datasets.ImageFolder("train", preprocess)
scan_pictures = pictures(training, "scan")
flyp, carot = copy.deepcopy(model), copy.deepcopy(model)
train(flyp, cr.MultimodalContrastiveLoss(), scan_pictures, epochs=50, lr=5e-4)
criterion = cr.MultimodalContrastiveLoss(label_smoothing=0.05) + 1.5 * cr.MultimodalDistillationLoss()
train(carot, criterion, scan_pictures, epochs=50, lr=5e-4, teacher=cr.EMATeacher(carot, decay=0.99))

# 3. Judge all three, where the data are as in training and where they have shifted.
report = cr.ShiftReport(id_domain="scan")
held_out_pictures = pictures(held_out, "scan")  # for the temperature; never trained on, never reported
tests = {style: pictures(test, style) for style in STYLES}
for name, tuned in (("zero-shot", model), ("FLYP", flyp), ("CaRot", carot)):
    report.fit_temperature(name, *logits(tuned, held_out_pictures))
    for style, data in tests.items():
        report.add(name, style, *logits(tuned, data))
print(report.to_markdown(intervals=False))
