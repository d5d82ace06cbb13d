"""From a value for each pair to what the caller asked for, in torch's words."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)


def reduce(values: Tensor, reduction: Reduction) -> Tensor:
    """The mean or the sum over pairs, or the values themselves."""
    return values if reduction == "none" else values.mean() if reduction == "mean" else values.sum()
