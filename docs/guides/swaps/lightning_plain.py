"""A ``LightningModule`` that trains a CLIP by open_clip's loss (CPU, seconds, random tensors in place of data)."""

import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from open_clip.loss import ClipLoss
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, TensorDataset


class TwoTowers(nn.Module):
    """Stands in for CLIP: image features, text features and exponentiated logit scale, as open_clip returns them."""

    def __init__(self) -> None:
        """Two linear maps into one space."""
        super().__init__()
        self.visual, self.textual = nn.Linear(64, 32, bias=False), nn.Linear(48, 32, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit-norm features of a batch of pairs."""
        return normalize(self.visual(images), dim=1), normalize(self.textual(texts), dim=1), self.log_scale.exp()


class Contrast(LightningModule):
    """Fine-tunes a student."""

    def __init__(self, student: nn.Module, criterion: nn.Module) -> None:
        """Holds both."""
        super().__init__()
        self.student, self.criterion = student, criterion

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """The criterion, also for the logger."""
        loss: Tensor = self.criterion(*self.student(*batch))
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor]) -> None:
        """How well the student finds the partner of each image."""
        image_features, text_features, _ = self.student(*batch)
        found = (image_features @ text_features.T).argmax(1)
        correct = found == torch.arange(len(found), device=self.device)
        self.log("accuracy", correct.float().mean(), batch_size=len(found))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Of the student."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main(folder: Path) -> None:
    """Trains for ten epochs, two batches to a step."""
    torch.manual_seed(0)
    texts = torch.randn(1000, 48)
    images = texts @ torch.randn(48, 64) + 4 * torch.randn(1000, 64)
    train, validation = TensorDataset(images[:800], texts[:800]), TensorDataset(images[800:], texts[800:])

    student = TwoTowers()
    criterion = ClipLoss()
    trainer = Trainer(
        max_epochs=10,
        accumulate_grad_batches=2,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
    )
    loader = DataLoader(train, batch_size=50, shuffle=True)
    trainer.fit(Contrast(student, criterion), loader, DataLoader(validation, batch_size=200))
    accuracy = trainer.callback_metrics["accuracy"]
    print(f"accuracy of the student: {accuracy:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "lightning_run"))
