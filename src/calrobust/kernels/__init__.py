"""The seam: all that a loss needs to know about a pair matrix, as vectors, so that nobody else sees the matrix."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from calrobust._checks import (
    check_choice,
    check_features,
    check_labels,
    check_logit_scale,
    check_nonnegative_integer,
    check_teacher,
)
from calrobust.kernels import dense, tiled

__all__ = ["IMPLS", "MEMORY_BUDGET", "Direction", "Impl", "PairStatistics", "Teacher", "pair_statistics"]

Impl = Literal["auto", "dense", "tiled"]
IMPLS: tuple[str, ...] = get_args(Impl)
MEMORY_BUDGET = 256 * 2**20  # bytes of temporary logits
Teacher = tuple[Tensor, Tensor, "Tensor | float"]


class Direction(NamedTuple):
    """Statistics of the logits ``s`` of each anchor against all its candidates, all of shape ``[N]``."""

    lse: Tensor  # log Σ_j exp s_ij
    positive: Tensor  # s_ii, or the mean of s_ij over the candidates of the same label
    mean: Tensor  # mean_j s_ij
    divergence: Tensor  # KL(teacher's softmax ‖ softmax of s_i), in nats; empty without a teacher


class PairStatistics(NamedTuple):
    """Rows are images against all texts, columns are texts against all images."""

    rows: Direction
    columns: Direction


def pair_statistics(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    teacher: Teacher | None = None,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    impl: Impl = "auto",
    memory_budget: int = MEMORY_BUDGET,
) -> PairStatistics:
    """The statistics of ``S = logit_scale / temperature · image_features · text_featuresᵀ`` along rows and columns.

    Softmax arithmetic runs in float32, or in float64 if an argument is float64. What is linear in ``S`` is a product of
    feature sums, O(N·D), and has autograd's own gradient; the softmax part is that of `dense` or of `tiled`.
    """
    check_features(image_features=image_features, text_features=text_features)
    check_logit_scale(logit_scale=logit_scale)
    if labels is not None:
        check_labels(len(image_features), image_features.device, labels=labels)
    if teacher is not None:
        check_teacher(image_features, teacher)
    check_choice(IMPLS, impl=impl)
    check_nonnegative_integer(memory_budget=memory_budget)
    with torch.autocast(image_features.device.type, enabled=False):
        dtype = torch.promote_types(image_features.dtype, torch.float32)
        if teacher is not None:
            dtype = torch.promote_types(dtype, teacher[0].dtype)
        x, y, scale = _factors(image_features, text_features, logit_scale, temperature, dtype)
        # Linear parts first: their small gradients then come after the tiles of backward, not beside them.
        if labels is None:
            row_positive = column_positive = scale * torch.linalg.vecdot(x, y)
        else:
            row_positive = scale * torch.linalg.vecdot(x, _class_means(y, labels))
            column_positive = scale * torch.linalg.vecdot(_class_means(x, labels), y)
        row_mean, column_mean = scale * (x @ y.mean(0)), scale * (y @ x.mean(0))
        frozen = None
        if teacher is not None:
            tx, ty, teacher_scale = _factors(*teacher, temperature, dtype)
            frozen = tx.detach(), ty.detach(), teacher_scale.detach()
        if impl == "dense":
            softmaxes = dense.softmax_statistics((x, y, scale), frozen)
        else:
            budget = memory_budget if impl == "auto" else 0
            softmaxes = tiled.softmax_statistics((x, y, scale), frozen, memory_budget=budget)
        return PairStatistics(
            Direction(softmaxes.row_lse, row_positive, row_mean, softmaxes.row_divergence),
            Direction(softmaxes.column_lse, column_positive, column_mean, softmaxes.column_divergence),
        )


def _factors(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float, temperature: float, dtype: torch.dtype
) -> dense.Factors:
    x, y = image_features.to(dtype), text_features.to(dtype)
    scale = logit_scale.reshape(()).to(x) if isinstance(logit_scale, Tensor) else x.new_full((), logit_scale)
    return x, y, scale / temperature


def _class_means(features: Tensor, labels: Tensor) -> Tensor:
    """For each row the mean of the rows with its label; no shape depends on values, so nothing waits for a device."""
    ordered, order = labels.sort()
    first = torch.ones_like(ordered)
    first[1:] = ordered[1:] != ordered[:-1]
    classes = torch.empty_like(order).scatter_(0, order, first.cumsum(0) - 1)
    sums = torch.zeros_like(features).index_add(0, classes, features)
    counts = torch.zeros_like(features[:, 0]).index_add(0, classes, torch.ones_like(features[:, 0]))
    return (sums / counts.clamp(min=1)[:, None])[classes]
