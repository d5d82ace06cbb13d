"""The softmax statistics of a pair matrix by their definition: the oracle of every other form."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from calrobust.kernels.parts import Part, Strip, divergence_terms, exclude


class Factors(NamedTuple):
    """What a pair matrix ``S = scale · x yᵀ`` is made of."""

    x: Tensor  # [N, D]
    y: Tensor  # [M, D]
    scale: Tensor  # []


def softmax_statistics(student: Factors, teacher: Factors | None, partner: Tensor) -> Strip:
    """Log-sum-exp of rows and columns without own entries, and the divergences from a teacher's softmaxes there."""
    s = _logits(student, partner)
    if teacher is None:
        return Strip(Part(s.logsumexp(1)), Part(s.logsumexp(0)))
    t = _logits(teacher, partner)
    rows, columns = (
        Part(
            s.logsumexp(dim),
            t.logsumexp(dim),
            divergence_terms(t.log_softmax(dim), s.log_softmax(dim)).sum(dim).clamp(min=0),
        )
        for dim in (1, 0)
    )
    return Strip(rows, columns)


def _logits(factors: Factors, partner: Tensor) -> Tensor:
    return exclude(factors.scale * factors.x @ factors.y.T, partner)
