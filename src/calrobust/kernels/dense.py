"""The softmax statistics of a pair matrix as they are defined: the oracle of every other implementation."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Factors = tuple[Tensor, Tensor, Tensor]  # x [N, D], y [M, D], scale []


class SoftmaxStatistics(NamedTuple):
    """What is not linear in ``S = scale · x yᵀ``; the last three are empty without a teacher."""

    row_lse: Tensor
    column_lse: Tensor
    row_divergence: Tensor
    column_divergence: Tensor
    teacher_column_lse: Tensor


def softmax_statistics(student: Factors, teacher: Factors | None = None) -> SoftmaxStatistics:
    """Logsumexp of the rows and columns of S and the Kullback-Leibler divergence from a teacher's softmaxes."""
    s = _logits(*student)
    if teacher is None:
        return SoftmaxStatistics(s.logsumexp(1), s.logsumexp(0), *(s.new_empty(0) for _ in range(3)))
    t = _logits(*teacher)
    divergences = _divergence(t, s, 1), _divergence(t, s, 0)
    return SoftmaxStatistics(s.logsumexp(1), s.logsumexp(0), *divergences, t.logsumexp(0))


def _logits(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    return scale * x @ y.T


def _divergence(t: Tensor, s: Tensor, dim: int) -> Tensor:
    log_target, log_probability = t.log_softmax(dim), s.log_softmax(dim)
    return (log_target.exp() * (log_target - log_probability)).sum(dim)
