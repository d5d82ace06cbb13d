"""The seam: all that a loss needs to know about a pair matrix, as vectors, so that nobody else sees the matrix."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from calrobust._checks import (
    check_choice,
    check_features,
    check_flag,
    check_labels,
    check_logit_scale,
    check_nonnegative_integer,
    check_teacher,
    check_triton,
)
from calrobust.distributed import REFUSED, ProcessGroup, Ranks, agree
from calrobust.kernels import dense, operators

__all__ = ["IMPLS", "MEMORY_BUDGET", "Direction", "Impl", "PairStatistics", "Teacher", "pair_statistics"]

Impl = Literal["auto", "dense", "tiled", "triton"]
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
    """Rows are this rank's images against all texts, columns are its texts against all images."""

    rows: Direction
    columns: Direction
    ranks: Ranks  # that share out the batch


def pair_statistics(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    teacher: Teacher | None = None,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    gather: bool = False,
    group: ProcessGroup | None = None,
    impl: Impl = "auto",
    memory_budget: int = MEMORY_BUDGET,
) -> PairStatistics:
    """The statistics of ``S = logit_scale / temperature · image_features · text_featuresᵀ`` along rows and columns.

    Softmax arithmetic runs in float32, or in float64 if an argument is float64. What is linear in ``S`` is a product of
    feature sums, O(N·D), and has autograd's own gradient; the softmax part is that of `dense`, `tiled` or `triton`.

    With ``gather``, texts cross ranks once, and ``S`` is the strip of this rank's images against all of them. The
    statistics of columns are vectors that add up over strips; the gradients of texts come back by one reduce-scatter.
    """
    check_flag(gather=gather)
    try:
        check_features(image_features=image_features, text_features=text_features)
        check_logit_scale(logit_scale=logit_scale)
        if labels is not None:
            check_labels(len(image_features), image_features.device, labels=labels)
        if teacher is not None:
            check_teacher(image_features, teacher)
        check_choice(IMPLS, impl=impl)
        check_nonnegative_integer(memory_budget=memory_budget)
        if impl == "triton":
            check_triton(operators.obstacle_to_triton(image_features.device))
    except (TypeError, ValueError):
        if gather:
            agree(REFUSED, group, **_facts(None, None, None))  # the other ranks must not wait for this one
        raise
    n = len(image_features)
    ranks = agree(n, group, **_facts(image_features, teacher, labels)) if gather else Ranks([n])
    with torch.autocast(image_features.device.type, enabled=False):
        operands = image_features.dtype
        if teacher is not None:
            operands = torch.promote_types(operands, teacher[0].dtype)
        dtype = torch.promote_types(operands, torch.float32)
        image_features, text_features = _tracked(image_features), _tracked(text_features)
        x, scale = image_features.to(dtype), _scale(logit_scale, temperature, image_features.device, dtype)
        y = ranks.gather(text_features, dtype)
        # Linear parts first: their small gradients then come after the tiles of backward, not beside them.
        columns = scale * (y @ (x.sum(0) / ranks.total))
        if labels is None:
            row_positive = column_positive = scale * torch.linalg.vecdot(x, y[ranks.own])
            column_mean = ranks.scatter_sum(columns)
        else:
            classes, counts = _classes(ranks.gather(labels, labels.dtype))
            own = classes[ranks.own]
            row_positive = scale * torch.linalg.vecdot(x, _class_sums(y, classes, own)) / counts[ranks.own]
            texts = scale * torch.linalg.vecdot(y, _class_sums(x, own, classes)) / counts
            column_mean, column_positive = ranks.scatter_sum(torch.stack([columns, texts], 1)).T
        row_mean = scale * (x @ y.mean(0))
        student, frozen = (x, y, scale), None
        if teacher is not None:
            with torch.no_grad():
                tx, ty = _tracked(teacher[0]).to(dtype), ranks.gather(_tracked(teacher[1]), dtype)
                frozen = tx.detach(), ty.detach(), _scale(teacher[2], temperature, tx.device, dtype)
        if impl == "dense":
            strip = dense.softmax_statistics(student, frozen)
        else:
            strip = operators.softmax_statistics(
                student,
                frozen,
                impl=impl,
                memory_budget=memory_budget,
                operands=operands,
                first_partner=ranks.own.start,
            )
        column_lse, column_divergence = _merge_columns(strip, ranks)
        return PairStatistics(
            Direction(strip.row_lse, row_positive, row_mean, strip.row_divergence),
            Direction(column_lse, column_positive, column_mean, column_divergence),
            ranks,
        )


def _merge_columns(strip: dense.SoftmaxStatistics, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Column lse and divergence of this rank's own texts against the images of all ranks."""
    if len(ranks.sizes) == 1:
        return strip.column_lse, strip.column_divergence
    part, teacher_part = strip.column_lse, strip.teacher_column_lse
    parts = part[:, None] if not len(teacher_part) else torch.stack([part, teacher_part], 1)
    top = ranks.maximum(parts)
    share = (parts - top).exp()
    if len(teacher_part):  # Σ q̃ (t − s) over the strip, weighted by the strip's share in the teacher's softmax
        gap = strip.column_divergence - part + teacher_part
        share = torch.cat([share, share[:, 1:] * gap[:, None]], 1)
    sums = ranks.scatter_sum(share)
    lse = sums[:, : parts.shape[1]].log() + top[ranks.own]
    if not len(teacher_part):
        return lse[:, 0], strip.column_divergence
    return lse[:, 0], sums[:, 2] / sums[:, 1] + lse[:, 0] - lse[:, 1]


def _facts(image_features: Tensor | None, teacher: Teacher | None, labels: Tensor | None) -> dict[str, int]:
    """What ranks must have in common, for their collectives to fit."""
    return {
        "the width of the features": 0 if image_features is None else image_features.shape[1],
        "the width of the teacher's features": 0 if teacher is None else teacher[0].shape[1],
        "whether labels are given": int(labels is not None),
    }


def _scale(logit_scale: Tensor | float, temperature: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    if not isinstance(logit_scale, Tensor):
        scale = logit_scale / temperature
        # What the dtype cannot hold is infinite there, and the loss NaN; torch would raise an error of its own.
        return torch.full((), math.inf if scale > torch.finfo(dtype).max else scale, dtype=dtype, device=device)
    return _tracked(logit_scale).reshape(()).to(device, dtype) / temperature


def _tracked(tensor: Tensor) -> Tensor:
    """A copy of a tensor made in inference mode, a frozen tower's for example, that autograd may keep for backward."""
    if torch.compiler.is_compiling():  # which cannot ask
        return tensor
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor


def _classes(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Class indices from 0, and each row's class size; no shape depends on values, so nothing waits for a device."""
    ordered, order = labels.sort()
    first = torch.ones_like(ordered)
    first[1:] = ordered[1:] != ordered[:-1]
    classes = torch.empty_like(order).scatter_(0, order, first.cumsum(0) - 1)
    ones = torch.ones_like(labels)
    return classes, torch.zeros_like(ones).index_add(0, classes, ones)[classes]


def _class_sums(features: Tensor, classes: Tensor, wanted: Tensor) -> Tensor:
    """For each of the ``wanted`` classes the sum of its features, which there may be none of."""
    sums = features.new_zeros(max(len(classes), len(wanted)), features.shape[1]).index_add(0, classes, features)
    return sums.index_select(0, wanted)  # its backward adds rows, that of indexing entries
