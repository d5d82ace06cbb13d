"""The softmax statistics of a pair matrix by their definition: the oracle of every other form."""

from typing import NamedTuple

import torch
from torch import Tensor

from calrobust.kernels.parts import EXCLUDED, Part, Strip, divergence_terms


class Factors(NamedTuple):
    """What a pair matrix ``S = scale · x yᵀ`` is made of."""

    x: Tensor  # [N, D]
    y: Tensor  # [M, D]
    scale: Tensor  # []


def softmax_statistics(student: Factors, teacher: Factors | None, partner: Tensor, *, columns: bool = True) -> Strip:
    """Of rows and maybe columns, without the own entry of row i in column ``partner[i]``; a partner of -1 is none."""
    s = _logits(student, partner)
    t = None if teacher is None else _logits(teacher, partner)
    return Strip(along(1, s, t), along(0, s, t) if columns else Part.without_teacher(s.new_empty(0)))


def along(dim: int, s: Tensor, t: Tensor | None) -> Part:
    """The statistics of the softmaxes of logits along a dimension."""
    if t is None:
        return Part.without_teacher(s.logsumexp(dim))
    divergence = divergence_terms(t.log_softmax(dim), s.log_softmax(dim)).sum(dim)
    return Part(s.logsumexp(dim), t.logsumexp(dim), divergence.clamp(min=0))


def _logits(factors: Factors, partner: Tensor) -> Tensor:
    own = torch.arange(factors.y.shape[0], device=partner.device) == partner[:, None]
    return (factors.scale * factors.x @ factors.y.T).masked_fill(own, EXCLUDED)
