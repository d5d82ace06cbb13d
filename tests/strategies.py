"""What Hypothesis draws: every new feature joins this file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from calrobust import schedules


class Pairs(NamedTuple):
    """The first three arguments of every loss on pairs."""

    image: Tensor
    text: Tensor
    scale: float


def unit_rows(n: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """``[n, width]`` rows of norm one on the CPU, the same for the same seed, whatever the default device."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, width, generator=generator, dtype=torch.float64, device="cpu")
    return F.normalize(rows, dim=1).to(dtype)


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
    return 7 * torch.randint(-2, 1 + n // 2, (n,), generator=generator, device="cpu")


class Candidates(NamedTuple):
    """Images and texts that are no pairs, seen by two models."""

    image: Tensor
    text: Tensor
    scale: float
    teacher: tuple[Tensor, Tensor, float]
    labels: tuple[Tensor, Tensor]  # each image has a text, not each text an image


@st.composite
def candidates(draw: st.DrawFn, max_rows: int = 300) -> Candidates:
    """Of 1 to ``max_rows`` float64 images and of as many texts, more or fewer, with labels of both."""
    sizes = st.integers(1, max_rows)
    n, m = draw(sizes), draw(sizes)
    width, seed = draw(st.integers(1, 20)), draw(seeds())
    image, text, frozen_image, frozen_text = (unit_rows(k, width, seed + i) for i, k in enumerate((n, m, n, m)))
    of_texts = class_labels(m, seed) if draw(st.booleans()) else torch.arange(m).flip(0)
    chosen = torch.randint(0, m, (n,), generator=torch.Generator().manual_seed(seed), device="cpu")
    teacher = frozen_image, frozen_text, draw(scales())
    return Candidates(image, text, draw(scales()), teacher, (of_texts[chosen], of_texts))


class Predictions(NamedTuple):
    """What every metric and the temperature take."""

    logits: Tensor
    target: Tensor


def classifier(
    n: int,
    n_classes: int,
    seed: int,
    *,
    sharpness: float = 1.0,
    spread: float = 2.0,
    dtype: torch.dtype = torch.float32,
) -> Predictions:
    """Random logits, and labels drawn from the softmax of ``sharpness`` times them: below 1 they are overconfident."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(n, n_classes, generator=generator, dtype=torch.float64)
    probs = (sharpness * logits).softmax(1)
    target = torch.multinomial(probs, 1, generator=generator)[:, 0] if n else torch.empty(0, dtype=torch.int64)
    return Predictions(logits.to(dtype), target)


@st.composite
def predictions(draw: st.DrawFn, min_samples: int = 1, max_samples: int = 60, min_classes: int = 2) -> Predictions:
    """Of models from hesitant to saturated, calibrated or not, in float32 or float64."""
    return classifier(
        draw(st.integers(min_samples, max_samples)),
        draw(st.integers(min_classes, 8)),
        draw(seeds()),
        sharpness=draw(st.sampled_from([0.0, 0.3, 1.0])),
        spread=draw(st.sampled_from([0.1, 2.0, 30.0])),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
    )


@st.composite
def confidences_and_correct(draw: st.DrawFn, max_samples: int = 60) -> tuple[Tensor, Tensor]:
    """float64 ``[N]`` in [0, 1], some on common bin edges, some equal; and bool ``[N]``."""
    on_edges = st.builds(lambda k, n: min(k, n) / n, st.integers(0, 20), st.integers(1, 20))
    values = draw(st.lists(st.one_of(st.floats(0, 1), on_edges), min_size=1, max_size=max_samples))
    correct = draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    return torch.tensor(values, dtype=torch.float64), torch.tensor(correct)


def decay_schedules() -> st.SearchStrategy[Callable[[int], float]]:
    """Every schedule of the teacher, with arguments of all ranges."""
    decays, positive, updates = st.floats(0, 1), st.floats(0.01, 100), st.integers(1, 40)
    return st.one_of(
        st.builds(schedules.constant, decays),
        st.builds(schedules.linear_warmup, decays, decays, updates),
        st.builds(schedules.power, positive, positive, st.floats(0, 0.5), st.floats(0.5, 1)),
        st.builds(schedules.uniform),
        st.builds(schedules.beta, positive, positive, updates),
        st.builds(schedules.every, updates, st.one_of(decays, st.builds(schedules.constant, decays))),
    )


@st.composite
def state_dicts(draw: st.DrawFn, n_models: int) -> list[dict[str, Tensor]]:
    """``n_models`` of one architecture: a float64 weight, an integer counter and a bool."""
    generator = torch.Generator().manual_seed(draw(seeds()))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    return [
        {
            "weight": torch.randn(shape, generator=generator, dtype=torch.float64),
            "count": torch.randint(0, 100, (), generator=generator),
            "used": torch.randint(0, 2, (2,), generator=generator).bool(),
        }
        for _ in range(n_models)
    ]


DTYPES = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.complex64),
]
VALUES: list[Callable[[Tensor], Tensor]] = [
    torch.zeros_like,
    torch.ones_like,
    lambda x: x,
    lambda x: x.softmax(-1) if x.ndim else x,
    lambda x: 1e30 * x,
    lambda x: x.masked_fill(x > 1, torch.nan),
    lambda x: x.masked_fill(x > 1, torch.inf),
    lambda x: x.masked_fill(x > 0, -torch.inf),
]
LAYOUTS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x,
    lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
    lambda x: torch.stack([x, x], -1)[..., 0],
    lambda x: x[:1].expand(x.shape) if x.ndim and len(x) else x,
    lambda x: x.clone().requires_grad_() if x.is_floating_point() else x,
    lambda x: x.to_sparse() if x.ndim and x.dtype in (torch.float32, torch.int64) else x,
]


@st.composite
def any_tensors(draw: st.DrawFn) -> Tensor:
    """Of any dtype, rank and layout, often of a shape that others have too, with values of every kind."""
    shape = draw(st.one_of(st.sampled_from([(4,), (4, 3)]), st.lists(st.integers(0, 5), max_size=4).map(tuple)))
    generator = torch.Generator().manual_seed(draw(seeds()))
    values = draw(st.sampled_from(VALUES))(2 * torch.randn(shape, generator=generator))
    dtype = draw(st.sampled_from(DTYPES))
    tensor = values.to(dtype) if dtype.is_floating_point or dtype.is_complex else values.nan_to_num(0, 9, -9).to(dtype)
    return draw(st.sampled_from(LAYOUTS))(tensor)


def anything() -> st.SearchStrategy[Any]:
    """What may be passed by mistake."""
    return st.one_of(
        any_tensors(),
        st.floats(),
        st.integers(-100, 100),
        st.sampled_from([2**31, -(2**63), 2**63, 10**30, 10**400]),
        st.sampled_from(
            [None, True, "mean", "", b"l1", 1j, float, [], (), {}, [1.0], (torch.ones(2),) * 3, np.ones(3)]
        ),
    )
