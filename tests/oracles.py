"""What things are by definition: naive, float64, from the papers, sharing no code with the library."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def contrastive(
    image: Tensor, text: Tensor, scale: Tensor | float, *, labels: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """MCL of each pair: torch's soft-target cross-entropy on the whole matrix, in both directions."""
    logits = scale * image @ text.T
    labels = torch.arange(len(logits)) if labels is None else labels
    same = (labels[:, None] == labels[None, :]).to(logits.dtype)
    target = (1 - smoothing) * same / same.sum(1, keepdim=True) + smoothing / len(logits)
    rows, columns = (F.cross_entropy(s, target, reduction="none") for s in (logits, logits.T))
    return (rows + columns) / 2


def distillation(
    student: tuple[Tensor, Tensor, Tensor | float],
    teacher: tuple[Tensor, Tensor, Tensor | float],
    temperature: float = 1.0,
) -> Tensor:
    """MKD of each pair: torch's KL on the whole matrices, in both directions."""
    s, t = (scale * image @ text.T / temperature for image, text, scale in (student, teacher))
    rows, columns = (
        F.kl_div(a.log_softmax(1), b.log_softmax(1), reduction="none", log_target=True).sum(1)
        for a, b in ((s, t), (s.T, t.T))
    )
    return temperature**2 * (rows + columns)


def gradients(value: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Of a scalar, without touching ``.grad``."""
    return list(torch.autograd.grad(value, inputs))
