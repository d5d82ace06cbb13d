"""A ``LightningModule`` with calrobust's loss and teacher: ``python examples/lightning_module.py``.

Random tensors in place of data; CPU, seconds; ``pip install 'calrobust[lightning]'``. The module calls the criterion on
student and teacher; a callback moves the teacher after each optimiser step, saves it in Lightning's checkpoints and
lends its weights to validation. Lightning reports one module in eval mode: that is the teacher, which stays so.
"""

import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, TensorDataset

import calrobust as cr
from calrobust.integrations.lightning import EMATeacherCallback


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


class CaRot(LightningModule):
    """Fine-tunes a student beside its teacher."""

    def __init__(self, student: nn.Module, teacher: cr.EMATeacher, criterion: cr.losses.PairLoss) -> None:
        """Holds the teacher too, so that it moves and is saved with the module."""
        super().__init__()
        self.student, self.teacher, self.criterion = student, teacher, criterion

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """The criterion, and its terms for the logger."""
        terms = self.criterion.terms(*self.student(*batch), *self.teacher(*batch))
        self.log_dict(terms)
        return torch.stack(list(terms.values())).sum()

    def validation_step(self, batch: list[Tensor]) -> None:
        """How well the student, which here holds the averaged weights, finds the partner of each image."""
        image_features, text_features, _ = self.student(*batch)
        found = (image_features @ text_features.T).argmax(1)
        correct = found == torch.arange(len(found), device=self.device)
        self.log("accuracy", correct.float().mean(), batch_size=len(found))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """An optimiser of the student alone, since ``parameters()`` leaves out those of the teacher."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main(folder: Path) -> None:
    """Trains for ten epochs, two batches to a step."""
    torch.manual_seed(0)
    texts = torch.randn(1000, 48)
    images = texts @ torch.randn(48, 64) + 4 * torch.randn(1000, 64)
    train, validation = TensorDataset(images[:800], texts[:800]), TensorDataset(images[800:], texts[800:])

    student = TwoTowers()
    teacher = cr.EMATeacher(student, decay=0.9)
    criterion = cr.MultimodalContrastiveLoss(label_smoothing=0.05) + 1.5 * cr.MultimodalDistillationLoss()
    trainer = Trainer(
        max_epochs=10,
        accumulate_grad_batches=2,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        callbacks=[EMATeacherCallback(teacher, student, evaluate_teacher=True)],
    )
    loader = DataLoader(train, batch_size=50, shuffle=True)
    trainer.fit(CaRot(student, teacher, criterion), loader, DataLoader(validation, batch_size=200))
    accuracy = trainer.callback_metrics["accuracy"]
    print(f"accuracy of the averaged weights after {teacher.step} steps: {accuracy:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "lightning_run"))
