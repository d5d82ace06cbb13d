"""The softmax statistics of a pair matrix as they are defined: the oracle of every other implementation."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SoftmaxStatistics(NamedTuple):
    """What is not linear in ``S = x yᵀ``; the divergences are empty without a teacher."""

    row_lse: Tensor
    column_lse: Tensor
    row_divergence: Tensor
    column_divergence: Tensor


def softmax_statistics(
    x: Tensor, y: Tensor, teacher_x: Tensor | None = None, teacher_y: Tensor | None = None
) -> SoftmaxStatistics:
    """Logsumexp of the rows and columns of ``x yᵀ`` and the Kullback-Leibler divergence from a teacher's softmaxes."""
    s = x @ y.T
    if teacher_x is None or teacher_y is None:
        return SoftmaxStatistics(s.logsumexp(1), s.logsumexp(0), x.new_empty(0), x.new_empty(0))
    t = teacher_x @ teacher_y.T
    return SoftmaxStatistics(s.logsumexp(1), s.logsumexp(0), _divergence(t, s, 1), _divergence(t, s, 0))


def _divergence(t: Tensor, s: Tensor, dim: int) -> Tensor:
    log_target, log_probability = t.log_softmax(dim), s.log_softmax(dim)
    return (log_target.exp() * (log_target - log_probability)).sum(dim)
