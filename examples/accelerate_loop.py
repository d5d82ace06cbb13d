"""An Accelerate loop with calrobust's loss and teacher: ``python examples/accelerate_loop.py``.

Random tensors in place of data; CPU, seconds; ``pip install accelerate``. The loop needs no integration: the teacher
follows whatever ``prepare`` returns, ``accelerator.sync_gradients`` is False while gradients only accumulate, and
``register_for_checkpointing`` puts the teacher into ``save_state``. A second run resumes where the first ended.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, TensorDataset

import calrobust as cr


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


def main(folder: Path) -> None:
    """Trains for five epochs, two batches to a step."""
    torch.manual_seed(0)
    texts = torch.randn(1000, 48)
    images = texts @ torch.randn(48, 64) + 4 * torch.randn(1000, 64)
    loader = DataLoader(TensorDataset(images[:800], texts[:800]), batch_size=50, shuffle=True)

    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = TwoTowers()
    teacher = cr.EMATeacher(model, decay=0.9, device=accelerator.device)
    criterion = cr.MultimodalContrastiveLoss(label_smoothing=0.05) + 1.5 * cr.MultimodalDistillationLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_for_checkpointing(teacher)
    if folder.exists():
        accelerator.load_state(str(folder))

    for _ in range(5):
        for batch in loader:
            with accelerator.accumulate(model):
                with accelerator.autocast():  # mixed precision, which prepare gives the student alone
                    distilled = teacher(*batch)
                loss = criterion(*model(*batch), *distilled)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients and not optimizer.step_was_skipped:
                teacher.update(model)

    accelerator.save_state(str(folder))
    image_features, text_features, _ = teacher(*(side[800:].to(accelerator.device) for side in (images, texts)))
    found = (image_features @ text_features.T).argmax(1).cpu()
    accuracy = (found == torch.arange(200)).float().mean()
    accelerator.print(f"accuracy of the averaged weights after {teacher.step} steps: {accuracy:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "accelerate_run"))
