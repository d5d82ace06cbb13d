"""What Hypothesis draws: every new feature joins this file."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F


class Pairs(NamedTuple):
    """The first three arguments of every loss on pairs."""

    image: Tensor
    text: Tensor
    scale: float


def unit_rows(n: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """``[n, width]`` rows of norm one, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, width, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def seeds() -> st.SearchStrategy[int]:
    """For a torch generator."""
    return st.integers(0, 2**31)


def scales() -> st.SearchStrategy[float]:
    """Logit scales from nearly flat softmaxes to CLIP's clamp."""
    return st.sampled_from([0.01, 1.0, 14.3, 100.0])


def fractions() -> st.SearchStrategy[float]:
    """[0, 1), both easy ends included."""
    return st.one_of(st.just(0.0), st.floats(0.0, 0.99))


@st.composite
def paired_features(draw: st.DrawFn, max_pairs: int = 40, n: int | None = None) -> Pairs:
    """float64 features of 1 to ``max_pairs`` pairs, or of ``n``, of width 1 to 20."""
    size = draw(st.integers(1, max_pairs)) if n is None else n
    width, seed = draw(st.integers(1, 20)), draw(seeds())
    return Pairs(unit_rows(size, width, seed), unit_rows(size, width, seed + 1), draw(scales()))


@st.composite
def student_and_teacher(draw: st.DrawFn, max_pairs: int = 40) -> tuple[Pairs, Pairs]:
    """The same pairs seen by two models of different width and scale."""
    student = draw(paired_features(max_pairs))
    return student, draw(paired_features(n=len(student.image)))


def class_labels(n: int, seed: int) -> Tensor:
    """``[n]`` integers of which some repeat, neither sorted nor contiguous."""
    generator = torch.Generator().manual_seed(seed)
    return 7 * torch.randint(-2, 1 + n // 2, (n,), generator=generator)
