"""CaRot in a plain PyTorch loop, with random tensors in place of data: ``python examples/quickstart.py``."""

import torch
from torch import nn
from torch.nn.functional import normalize

import calrobust as cr


class TwoTowers(nn.Module):
    """Stands in for CLIP: image features, text features and exponentiated logit scale, as open_clip returns them."""

    def __init__(self) -> None:
        """Two linear maps into one space."""
        super().__init__()
        self.visual, self.textual = nn.Linear(64, 32, bias=False), nn.Linear(48, 32, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Unit-norm features of a batch of pairs."""
        return normalize(self.visual(images), dim=1), normalize(self.textual(texts), dim=1), self.log_scale.exp()


torch.manual_seed(0)
classes, mixing = torch.randn(10, 48), torch.randn(48, 64)  # one "caption" for each of ten classes
target = torch.randint(10, (1500,))
images = classes[target] @ mixing + 12 * torch.randn(1500, 64)
train, validation, test = slice(0, 500), slice(500, 1000), slice(1000, 1500)

model = TwoTowers()
teacher = cr.EMATeacher(model, decay=0.99)
criterion = cr.MultimodalContrastiveLoss(label_smoothing=0.05) + 1.5 * cr.MultimodalDistillationLoss()
orthogonality = cr.OrthogonalityLoss()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)  # a logit scale should never decay

for _ in range(30):
    for batch in torch.arange(1500)[train].split(50):
        inputs = (images[batch], classes[target[batch]])
        loss = criterion(*model(*inputs), *teacher(*inputs), labels=target[batch])
        loss = loss + 0.01 * orthogonality(model.visual)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teacher.update(model)

with torch.no_grad():
    image_features, class_features, scale = model(images, classes)
logits = scale * image_features @ class_features.T
scaler = cr.TemperatureScaler().fit(logits[validation], target[validation])
for name, outputs in (("as trained", logits[test]), ("temperature-scaled", scaler(logits[test]))):
    summary = cr.metrics.CalibrationSummary(n_bins=15)
    summary.update(outputs, target[test])
    values = summary.compute()
    print(f"{name:18} accuracy {values['accuracy']:.3f}  ECE {values['ece']:.3f}  NLL {values['nll']:.3f}")
