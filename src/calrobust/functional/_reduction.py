"""From a value for each pair to what the caller asked for, in torch's words."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from calrobust.distributed import Ranks

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)


def reduce(values: Tensor, reduction: Reduction, ranks: Ranks) -> Tensor:
    """The mean or the sum over the pairs of all ranks, or the values of this one's."""
    if reduction == "none":
        return values
    total = ranks.sum(values.sum())
    return total / ranks.total if reduction == "mean" else total
