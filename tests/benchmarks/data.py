"""The classifier that metrics and scaler are measured on."""

from __future__ import annotations

import torch
from torch import Tensor

SPREAD = 4.0  # standard deviation of a logit: confidences then lie all over [0, 1]
OVERCONFIDENCE = 1.8  # the temperature that calibrates


def classifier(rows: int, classes: int) -> tuple[Tensor, Tensor]:
    """float32 logits ``[rows, classes]`` of an overconfident model, and labels."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.empty(rows, classes)
    target = torch.empty(rows, dtype=torch.int64)
    for block, labels in zip(logits.split(1024), target.split(1024), strict=True):
        block.normal_(generator=generator).mul_(SPREAD)
        noise = torch.rand(block.shape, generator=generator, dtype=torch.float64).log().neg().log().neg()
        labels.copy_((block + noise).argmax(1))  # Gumbel's trick: a sample from the softmax
    return logits.mul_(OVERCONFIDENCE), target
