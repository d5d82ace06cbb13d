"""The softmax statistics by definition, and how they merge: see ``docs/derivations.md``."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from calrobust._checks import WITHOUT_FLOAT64

EXCLUDED = -1e38  # a logit that does not count; finite, so that two differ by 0


class Part(NamedTuple):
    """Statistics ``[length]`` of anchors over some candidates."""

    lse: Tensor
    divergence: Tensor  # from the teacher's softmax to the student's, in nats
    teacher_lse: Tensor  # [0] without a teacher, like the divergence

    @classmethod
    def without_teacher(cls, lse: Tensor) -> "Part":
        """Statistics of a student alone."""
        return cls(lse, lse.new_empty(0), lse.new_empty(0))

    def to(self, dtype: torch.dtype) -> "Part":
        """The same in another dtype."""
        return Part(*(vector.to(dtype) for vector in self))


class Pairing(NamedTuple):
    """Which rows and columns belong together."""

    partner: Tensor  # [N]: a column, or -1
    start: int = -1  # the first of columns that are the rows' partners in order, or -1
    classes: Sequence[Tensor] = ()  # of rows [N] and of columns [M], from 0 to M; or none

    def of_rows(self, features: Tensor) -> Tensor:
        """The features of the partners; without one, of any column."""
        if self.start < 0:
            return features.index_select(0, self.partner.clamp(min=0))
        return features[self.start : self.start + self.partner.shape[0]]

    def own(self, x: Tensor, y: Tensor) -> Tensor:
        """``[N]``: the entry of each row and its partner."""
        return _dot(x, self.of_rows(y))


class Factors(NamedTuple):
    """The factors of a pair matrix ``S = scale · x yᵀ``."""

    x: Tensor  # [N, D]
    y: Tensor  # [M, D]
    scale: Tensor  # []


class Statistics(NamedTuple):
    """Statistics of some rows and, over these, of the columns; then `linear_parts`, without the scale."""

    rows: Part  # without own entries, like the next
    columns: Part  # [0] if not asked for
    own: Tensor
    row_sums: Tensor
    column_sums: Tensor
    teacher_own: Tensor  # [0] without a teacher


def softmax_statistics(
    student: Factors, teacher: Factors | None, pairing: Pairing, *, columns: bool = True
) -> Statistics:
    """The statistics by definition."""
    x, y, scale = student
    s, t, teacher_own = _logits(student, pairing.partner), None, scale.new_empty(0)
    if teacher is not None:
        teacher = Factors(*(factor.to(scale.dtype) for factor in teacher))
        t, teacher_own = _logits(teacher, pairing.partner), pairing.own(*teacher[:2])
    of_columns = along(0, s, t) if columns else Part.without_teacher(s.new_empty(0))
    return Statistics(along(1, s, t), of_columns, *linear_parts(x, y, pairing, columns=columns), teacher_own)


def linear_parts(x: Tensor, y: Tensor, pairing: Pairing, *, columns: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Own entries, and the sums of rows ``[1 or 2, N]`` and of columns ``[0 to 2, M]``, as `totals` has them."""
    classes, m = pairing.classes, y.shape[0]
    of_rows = torch.stack([_dot(x, total) for total in totals(y, classes, m)])
    of_columns = x.new_empty(0, m)
    if columns:
        of_columns = torch.stack([_dot(y, total) for total in totals(x, classes[::-1], m)])
    return pairing.own(x, y), of_rows, of_columns


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return x @ y if y.ndim == 1 else torch.linalg.vecdot(x, y)


def totals(
    features: Tensor, classes: Sequence[Tensor], m: int, weights: Sequence[Tensor] | Tensor = ()
) -> Iterator[Tensor]:
    """The sum of all features and, with classes, those over the class of each anchor."""
    yield weights[0] @ features if len(weights) else features.sum(0)
    if classes:
        of_anchors, of_features = classes
        terms = weights[1][:, None] * features if len(weights) else features
        # Cheaper in backward than indexing.
        yield features.new_zeros(m + 1, features.shape[1]).index_add_(0, of_features, terms).index_select(0, of_anchors)


def along(dim: int, s: Tensor, t: Tensor | None) -> Part:
    """The statistics of logits along a dimension."""
    if t is None:
        return Part.without_teacher(s.logsumexp(dim))
    divergence = divergence_terms(t.log_softmax(dim), s.log_softmax(dim)).sum(dim)
    return Part(s.logsumexp(dim), not_negative(divergence), t.logsumexp(dim))


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
    # Beyond -1 expm1 would overflow. At -1 clamp has no gradient.
    return torch.where(gap <= -1, probability - target * (1 - gap), near)


def not_negative(rounded: Tensor) -> Tensor:
    """At least 0, with the derivatives of all orders, which ``clamp`` would cut."""
    return rounded - rounded.detach().clamp(max=0)


def merge(several: Sequence[Part]) -> Part:
    """The statistics over the union of the parts' candidates."""
    return merge_rows(Part(*(torch.stack(vectors) for vectors in zip(*several, strict=True))))


def merge_rows(parts: Part) -> Part:
    """`merge` of parts ``[number, length]``."""
    lse, divergence, teacher_lse = parts
    if lse.shape[0] == 1:
        return Part(*(vector.flatten() for vector in parts))
    total = lse.logsumexp(0)
    if teacher_lse.shape[-1] == 0:
        return Part.without_teacher(total)
    teacher_total = teacher_lse.logsumexp(0)
    log_target = teacher_lse - teacher_total
    terms = log_target.exp() * divergence + divergence_terms(log_target, lse - total)
    return Part(total, terms.sum(0), teacher_total)
