"""Matrix products of low-precision features: what they round, and what they must not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import factors, value_and_gradients
from strategies import seeds, unit_rows
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from calrobust import MultimodalContrastiveLoss, MultimodalDistillationLoss
from calrobust.functional import carot_loss, multimodal_contrastive_loss
from calrobust.kernels import dense, operators, tiled
from calrobust.kernels.dense import Factors

ROUNDING = {torch.float64: 1e-14, torch.float16: 2**-11}


@given(
    n=st.integers(1, 40),
    m=st.integers(1, 40),
    rows=st.integers(1, 40),
    dtype=st.sampled_from(sorted(ROUNDING, key=str)),
    size=st.sampled_from([1e-30, 1e-6, 1.0, 1e6]),
    needs=st.sampled_from([[True, True, True], [True, False, True], [False, True, True], [False, False, True]]),
    seed=seeds(),
)
def test_tiles_of_any_size_give_the_gradients_of_the_factors(
    n: int, m: int, rows: int, dtype: torch.dtype, size: float, needs: list[bool], seed: int
) -> None:
    """Whatever tiles they come in and whichever are wanted, within the rounding of the products' dtype."""
    generator = torch.Generator().manual_seed(seed)
    x, y = unit_rows(n, 5, seed), 1000 * unit_rows(m, 5, seed + 1)
    if dtype != torch.float64:
        x, y = x.to(dtype).float(), y.to(dtype).float()
    scale = torch.tensor(30.0, dtype=x.dtype)
    signs = torch.randint(0, 2, (n, m), generator=generator) * 2 - 1
    gradient = size * signs * 1e-6 ** torch.rand(n, m, generator=generator, dtype=torch.float64)
    bound = torch.full((n,), size, dtype=x.dtype)
    found = tiled.FeatureGradients(Factors(x, y, scale), [bound], needs, dtype)
    for start in range(0, n, rows):
        tile = slice(start, min(start + rows, n))
        found.add(tile, (gradient[tile].to(x.dtype) * found.gain).to(dtype))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "SCALE_ROWS", rows)
        results = found.results()
    x, y = x.double(), y.double()
    expected = 30 * gradient @ y, 30 * gradient.T @ x, (gradient * (x @ y.T)).sum()
    terms = (
        30 * gradient.abs() @ y.abs(),
        30 * gradient.abs().T @ x.abs(),
        (gradient.abs() * (x.abs() @ y.abs().T)).sum(),
    )
    for a, b, sum_of_sizes, needed in zip(results, expected, terms, needs, strict=True):
        assert len(a.shape) == len(b.shape) if needed else not a.numel()
        assert not needed or ((a.double() - b).abs() <= ROUNDING[dtype] * sum_of_sizes).all()


@pytest.mark.parametrize("budget", [0, 2**40])
@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tiles_may_be_formed_in_low_precision(
    dtype: torch.dtype, teacher: bool, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a CUDA device: statistics within 5e-6, gradients within 1e-3 of float64's, with kept exponentials too."""
    monkeypatch.setattr(tiled, "tiles_of", lambda x, _: tiled.slices(len(x), 40))
    monkeypatch.setattr(tiled, "are_narrow", lambda x, operands: True)
    models = factors(150, 140, 70, 0, scale=20.0, teacher=teacher)
    models = [Factors(x.to(dtype).float(), y.to(dtype).float(), scale.float()) for x, y, scale in models]
    ours = partial(operators.softmax_statistics, memory_budget=budget, operands=dtype)
    exact = [Factors(x.double(), y.double(), scale.double()) for x, y, scale in models]
    expected, expected_gradients = value_and_gradients(dense.softmax_statistics, exact)
    outputs, gradients = value_and_gradients(ours, models)
    for a, b in zip(outputs, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=5e-6, atol=5e-6)
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert (a.double() - b).norm() <= 1e-3 * b.norm()


@pytest.mark.parametrize(("narrow", "dtype"), [(True, torch.float16), (False, torch.float32)])
def test_gradients_are_multiplied_in_float16_where_that_is_fast(
    narrow: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both factors of every product; elsewhere both are float32."""
    monkeypatch.setattr(tiled, "are_narrow", lambda x, operands: narrow)
    dtypes: set[torch.dtype] = set()
    original = tiled._multiply

    def noted(left: Sequence[Tensor], right: Sequence[Tensor], out: Tensor, *, add: bool) -> None:
        if out.shape != (9, 9):  # of a tile of logits
            dtypes.update(part.dtype for part in (*left, *right))
        original(left, right, out, add=add)

    monkeypatch.setattr(tiled, "_multiply", noted)
    models = [
        Factors(x.float(), y.float(), scale.float()) for x, y, scale in factors(9, 9, 3, 0, scale=1.0, teacher=True)
    ]
    value_and_gradients(partial(operators.softmax_statistics, operands=torch.bfloat16), models)
    assert dtypes == {dtype}


@pytest.mark.parametrize("bound", [1e-30, 1e-6, 0.5, 1 - 2**-24, 1.0, 1 + 2**-23, 3.7, 1e6])
def test_a_tile_fills_the_range_of_float16_and_never_leaves_it(bound: float) -> None:
    """Times its gain the largest entry lies in the last octave but one, and the gain is a power of two."""
    gain = tiled._gain(torch.tensor(bound))
    assert 2**14 <= bound * gain.item() < 2**15
    assert gain.frexp().mantissa == 0.5


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("budget", [0, 2**40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("scale", "margin"), [(10.0, 1.0), (15.0, 0.5)])  # p of the own pair is 0.75 and 0.995
def test_a_trained_model_gets_gradients_as_exact_as_its_dtype(
    scale: float, margin: float, dtype: torch.dtype, budget: int, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where p of the own pair is near 1, two parts of its gradient cancel; within 2e-3 of float64's all the same."""
    monkeypatch.setattr(tiled, "are_narrow", lambda x, operands: narrow)
    images, noise, common = (unit_rows(n, 64, seed) for n, seed in ((60, 0), (60, 1), (1, 2)))
    features = [F.normalize(0.5 * common + rows).to(dtype) for rows in (images, images + margin * noise)]
    exact = _gradients([each.double() for each in features], scale, impl="dense")
    found = _gradients(features, scale, impl="auto", memory_budget=budget)
    for a, b in zip(found, exact, strict=True):
        assert (a.double() - b).norm() <= 2e-3 * b.norm()


def _gradients(features: list[Tensor], scale: float, **options: Any) -> tuple[Tensor, ...]:
    image, text = (each.clone().requires_grad_() for each in features)
    return torch.autograd.grad(multimodal_contrastive_loss(image, text, scale, **options), (image, text))


@pytest.mark.parametrize(
    ("device", "capability", "operands", "expected"),
    [
        ("cuda", (8, 0), torch.bfloat16, True),
        ("cuda", (9, 0), torch.float16, True),
        ("cuda", (9, 0), torch.float32, False),
        ("cuda", (7, 5), torch.float16, False),
        ("cpu", (9, 0), torch.bfloat16, False),
        ("mps", (9, 0), torch.float16, False),
    ],
)
def test_low_precision_is_for_devices_that_have_it(
    device: str, capability: tuple[int, int], operands: torch.dtype, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere, and for float32 features, products are float32."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    features: Any = SimpleNamespace(device=torch.device(device))  # of a device that need not be there
    assert tiled.are_narrow(features, operands) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("labelled", [False, True])
def test_autograd_keeps_features_as_they_are_multiplied(
    dtype: torch.dtype, labelled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for each tower of student and teacher, whatever is asked of them."""
    monkeypatch.setattr(tiled, "are_narrow", lambda x, operands: operands == torch.bfloat16)
    n, width = 40, 1000
    features = [unit_rows(n, width, seed, dtype) for seed in range(4)]
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.numel() >= n * width:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    image, text, *teacher = features
    labels = torch.arange(n) // 2 if labelled else None
    options: Any = {"label_smoothing": 0.1, "distillation_weight": 1.0, "labels": labels, "impl": "tiled"}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = carot_loss(image.requires_grad_(), text.requires_grad_(), 20.0, teacher[0], teacher[1], 20.0, **options)
    loss.backward()
    assert sum(kept.values()) == 4 * n * width * dtype.itemsize


def test_gradients_of_several_passes_are_rounded_once() -> None:
    """Those of terms at different temperatures are added in float32, as of the same features in float32."""
    features = [unit_rows(60, 64, seed, torch.bfloat16) for seed in range(4)]
    loss = MultimodalContrastiveLoss(impl="tiled") + MultimodalDistillationLoss(temperature=2.0, impl="tiled")
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        image, text, *teacher = (each.to(dtype) for each in features)
        student = image.requires_grad_(), text.requires_grad_()
        found.append(torch.cat(torch.autograd.grad(loss(*student, 20.0, *teacher, 15.0), student)))
    assert torch.equal(found[0], found[1].to(torch.bfloat16))


@pytest.mark.parametrize("teacher", [False, True])
def test_a_step_in_low_precision_holds_few_copies_of_the_features(
    teacher: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a CUDA device: twelve times the bytes of a tower beyond the inputs, counted from all allocations."""
    monkeypatch.setattr(tiled, "are_narrow", lambda x, operands: True)
    monkeypatch.setattr(tiled, "tiles_of", lambda x, _: tiled.slices(len(x), 1))
    n, width = 32, 4096
    image, text, *others = (unit_rows(n, width, seed, torch.bfloat16) for seed in range(4))
    loss = MultimodalContrastiveLoss(impl="tiled")
    taught = loss + MultimodalDistillationLoss(impl="tiled")
    arguments = (image.requires_grad_(), text.requires_grad_(), torch.tensor(20.0, requires_grad=True))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        value = taught(*arguments, *others, 20.0) if teacher else loss(*arguments)
        value.backward()
    results: Any = seen.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    peak = max(itertools.accumulate(event.nbytes() for event in events))
    assert 10 * n * width * 2 < peak < 12.5 * n * width * 2
