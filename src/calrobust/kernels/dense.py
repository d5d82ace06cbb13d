"""The softmax statistics by definition, and how they merge: see ``docs/derivations.md``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from calrobust._checks import WITHOUT_FLOAT64

EXCLUDED = -1e38  # the logit of what does not count; finite, so that two differ by 0


class Part(NamedTuple):
    """Statistics ``[length]`` of anchors over some candidates."""

    lse: Tensor
    divergence: Tensor  # from the teacher's softmax to the student's, in nats
    teacher_lse: Tensor  # [0] without a teacher, like the divergence

    @classmethod
    def without_teacher(cls, lse: Tensor) -> Part:
        """Statistics of a student alone."""
        return cls(lse, lse.new_empty(0), lse.new_empty(0))

    def to(self, dtype: torch.dtype) -> Part:
        """The same in another dtype."""
        return Part(*(vector.to(dtype) for vector in self))


class Strip(NamedTuple):
    """Of some rows and, over these, of the columns, without own entries."""

    rows: Part
    columns: Part  # [0] if not asked for


class Factors(NamedTuple):
    """What a pair matrix ``S = scale · x yᵀ`` is made of."""

    x: Tensor  # [N, D]
    y: Tensor  # [M, D]
    scale: Tensor  # []


def softmax_statistics(student: Factors, teacher: Factors | None, partner: Tensor, *, columns: bool = True) -> Strip:
    """Row i has its own entry in column ``partner[i]``, or none for -1."""
    s = _logits(student, partner)
    t = None if teacher is None else _logits(teacher, partner)
    return Strip(along(1, s, t), along(0, s, t) if columns else Part.without_teacher(s.new_empty(0)))


def along(dim: int, s: Tensor, t: Tensor | None) -> Part:
    """The statistics of logits along a dimension."""
    if t is None:
        return Part.without_teacher(s.logsumexp(dim))
    divergence = divergence_terms(t.log_softmax(dim), s.log_softmax(dim)).sum(dim)
    return Part(s.logsumexp(dim), divergence.clamp(min=0), t.logsumexp(dim))


def _logits(factors: Factors, partner: Tensor) -> Tensor:
    own = torch.arange(factors.y.shape[0], device=partner.device) == partner[:, None]
    return (factors.scale * factors.x @ factors.y.T).masked_fill(own, EXCLUDED)


def wide(device: torch.device) -> torch.dtype:
    """The dtype to merge statistics in."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def divergence_terms(log_target: Tensor, log_probability: Tensor) -> Tensor:
    """The summands ``p̃ δ + p − p̃`` of a divergence, none negative beyond rounding."""
    gap = log_target - log_probability
    target, probability = log_target.exp(), log_probability.exp()
    near = target * (torch.expm1(-gap.clamp(min=-1)) + gap)
    return torch.where(gap < -1, probability - target * (1 - gap), near)  # expm1 would overflow


def merge(several: Sequence[Part]) -> Part:
    """The statistics over the union of the parts' candidates."""
    return merge_rows(Part(*(torch.stack(vectors) for vectors in zip(*several, strict=True))))


def merge_rows(parts: Part) -> Part:
    """The same of parts ``[number, length]``."""
    lse, divergence, teacher_lse = parts
    total = lse.logsumexp(0)
    if teacher_lse.shape[-1] == 0:
        return Part.without_teacher(total)
    teacher_total = teacher_lse.logsumexp(0)
    log_target = teacher_lse - teacher_total
    terms = log_target.exp() * divergence + divergence_terms(log_target, lse - total)
    return Part(total, terms.sum(0), teacher_total)
