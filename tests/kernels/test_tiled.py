"""The tiled form against the dense definition: value, gradients, memory."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import assert_like_dense, factors, value_and_gradients
from strategies import class_labels, seeds, unit_rows
from torch import Tensor
from torch.testing import assert_close

from calrobust import kernels
from calrobust.kernels import operators, pair_statistics, tiled
from calrobust.kernels.dense import Factors

KEEP, RECOMPUTE = 2**40, 0


def tiled_with(memory_budget: int) -> Any:
    """The function under test at a budget; on a CPU ``"auto"`` is tiled."""
    return partial(operators.softmax_statistics, memory_budget=memory_budget)


@given(
    n=st.integers(1, 300),
    m=st.integers(1, 300),
    width=st.integers(1, 20),
    rows=st.integers(1, 300),
    scale=st.sampled_from([0.01, 1.0, 30.0, 100.0]),
    teacher=st.booleans(),
    budget=st.sampled_from([KEEP, RECOMPUTE]),
    seed=seeds(),
)
def test_equals_the_dense_definition_for_every_tile_size(
    n: int, m: int, width: int, rows: int, scale: float, teacher: bool, budget: int, seed: int
) -> None:
    """Value and gradients for any shape, tile and upstream gradient, with kept and with recomputed exponentials."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "_tile_rows", lambda *_: min(n, rows))
        assert_like_dense(tiled_with(budget), factors(n, m, width, seed, scale=scale, teacher=teacher), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("budget", [KEEP, RECOMPUTE])
@pytest.mark.parametrize("gap", [50.0, 85.0, 95.0, 100.0, 120.0, 700.0, 740.0, 1e3, 1e4])
def test_is_exact_where_rows_and_columns_cannot_share_an_exponential(
    dtype: torch.dtype, budget: int, gap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A column far below the maximum of its tile, a row far above a column: finite, and as the definition has it."""
    monkeypatch.setattr(tiled, "_tile_rows", lambda *_: 2)
    x = torch.tensor([[gap, 0.0], [0.0, 1.0], [-gap, 2.0], [0.5, -1.0], [gap / 2, gap]], dtype=dtype)
    y = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [0.5, 0.5], [-0.5, 0.1]], dtype=dtype)
    one = torch.tensor(1.0, dtype=dtype)
    inputs = [(x, y, one), (x.flip(0), y.flip(0), 0.5 * one)]
    outputs, gradients = value_and_gradients(tiled_with(budget), inputs)
    assert all(v.isfinite().all() for v in (*outputs, *gradients))
    assert_like_dense(tiled_with(budget), inputs, 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("budget", [KEEP, RECOMPUTE])
def test_passes_gradcheck(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against finite differences, so that dense and tiled are not wrong together."""
    monkeypatch.setattr(tiled, "_tile_rows", lambda *_: 2)
    student, *teacher = factors(5, 6, 3, 0, scale=3.0, teacher=True)
    for factor in student:
        factor.requires_grad_()
    assert torch.autograd.gradcheck(lambda *moved: tuple(tiled_with(budget)(moved, *teacher)), student)


# opcheck itself looks at the .grad of tensors that are no leaves
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_the_operator_passes_opcheck() -> None:
    """Schema, fake tensors, autograd registration and tracing, as torch.library checks them."""
    for teacher, impl in product((False, True), ("tiled", "kept")):
        inputs = [factor for model in factors(7, 5, 3, 0, scale=3.0, teacher=teacher) for factor in model]
        for student in inputs[:3]:
            student.requires_grad_()
        torch.library.opcheck(torch.ops.calrobust.softmax_statistics.default, (inputs, impl, torch.float64, 0))


def test_a_teacher_equal_to_the_student_gives_exactly_zero() -> None:
    """Value and gradient, in float32 too: both sides take the same steps (trap 2)."""
    x, y, scale = unit_rows(33, 8, 0, torch.float32), unit_rows(33, 8, 1, torch.float32), torch.tensor(50.0)
    for statistics in (tiled_with(KEEP), tiled_with(RECOMPUTE)):
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        result = statistics((a, b, scale), (x, y, scale))
        assert (result.row_divergence == 0).all()
        assert (result.column_divergence == 0).all()
        for gradient in torch.autograd.grad(result.row_divergence.sum() + result.column_divergence.sum(), (a, b)):
            assert (gradient == 0).all()


def largest_saved(memory_budget: int, inputs: list[Factors]) -> int:
    """Entries of the largest tensor that a forward pass keeps for backward."""
    sizes = [0]

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        operators.softmax_statistics(*inputs, memory_budget=memory_budget)
    return max(sizes)


@pytest.mark.parametrize("teacher", [False, True])
def test_no_matrix_outlives_forward_unless_it_fits_into_the_budget(teacher: bool) -> None:
    """Beyond it O(N·D) is saved; a teacher's matrix counts (trap 9)."""
    n, width = 64, 4
    inputs = factors(n, n, width, 0, scale=1.0, teacher=teacher)
    need = (1 + teacher) * 8 * n * n
    inputs[0][0].requires_grad_()
    assert largest_saved(need, inputs) == n * n
    assert largest_saved(need - 1, inputs) <= n * (width + 1)


@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
def test_exponentials_are_kept_only_for_a_backward_to_come(
    needs_gradient: bool, enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluating a loss, or under no_grad, costs no N×M matrix even where the budget has room for it."""
    kept: list[bool] = []
    original = tiled.forward

    def noted(factors: list[Tensor], operands: torch.dtype, *, keep: bool) -> Any:
        kept.append(keep)
        return original(factors, operands, keep=keep)

    monkeypatch.setattr(tiled, "forward", noted)
    ((x, y, scale),) = factors(9, 9, 3, 0, scale=1.0, teacher=False)
    with torch.set_grad_enabled(enabled):
        operators.softmax_statistics((x.requires_grad_(needs_gradient), y, scale), memory_budget=KEEP)
    assert kept == [needs_gradient and enabled]


@pytest.mark.parametrize(("budget", "times"), [(KEEP, 1), (RECOMPUTE, 2)])
def test_kept_exponentials_are_not_formed_again(budget: int, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of a tile are multiplied once, and once more in backward only if nothing was kept."""
    monkeypatch.setattr(tiled, "_tile_rows", lambda *_: 2)
    formed: list[slice] = []
    original = tiled._Matrix.logits

    def noted(matrix: Any, tile: slice, out: Tensor) -> Tensor:
        formed.append(tile)
        return original(matrix, tile, out)

    monkeypatch.setattr(tiled._Matrix, "logits", noted)
    value_and_gradients(tiled_with(budget), factors(6, 6, 3, 0, scale=1.0, teacher=False))
    assert len(formed) == 3 * times


@pytest.mark.parametrize(
    ("n", "m", "device", "dtype", "rows"),
    [
        (100_000, 1000, "cpu", torch.float32, 2**23 // 4000),
        (100_000, 1000, "cpu", torch.float64, 2**23 // 8000),
        (100_000, 1000, "meta", torch.float32, 2**26 // 4000),
        (100_000, 100_000, "cpu", torch.float32, 256),
        (5, 1000, "cpu", torch.float32, 5),
    ],
)
def test_a_tile_fits_the_cache_and_is_never_thin(n: int, m: int, device: str, dtype: torch.dtype, rows: int) -> None:
    """8 MiB of logits on the CPU and 64 MiB elsewhere, but 256 rows at least, as far as there are so many."""
    x, y = (torch.empty(length, 1, device=device, dtype=dtype) for length in (n, m))
    assert tiled._tile_rows(x, y) == rows


def test_the_form_gets_the_options_and_the_dtype_of_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the caller gave them; the dense definition is no form, and is asked for by its name."""
    got: list[dict[str, Any]] = []
    original = operators.softmax_statistics

    def noted(*models: Any, **options: Any) -> Any:
        got.append(options)
        return original(*models, **options)

    monkeypatch.setattr(operators, "softmax_statistics", noted)
    x, y = unit_rows(5, 3, 0, torch.bfloat16), unit_rows(5, 3, 1, torch.bfloat16)
    pair_statistics(x, y, 2.0, impl="dense")
    assert got == []
    pair_statistics(x, y, 2.0, impl="tiled", memory_budget=7)
    assert got == [{"impl": "tiled", "memory_budget": 7, "operands": torch.bfloat16, "first_partner": 0}]


def test_only_what_autograd_cannot_keep_is_copied() -> None:
    """A tensor made in inference mode, once outside of it; all others are taken as they are."""
    ordinary = torch.ones(2)
    with torch.inference_mode():
        frozen = torch.ones(2)
        assert kernels._tracked(frozen) is frozen
        assert kernels._tracked(ordinary) is ordinary
    assert kernels._tracked(ordinary) is ordinary
    assert not kernels._tracked(frozen).is_inference()


@pytest.mark.parametrize("impl", ["auto", "dense", "tiled"])
def test_a_nan_feature_gives_nan_statistics(impl: Any) -> None:
    """Never a finite wrong value."""
    x, y = unit_rows(9, 4, 0), unit_rows(9, 4, 1)
    x[3, 2] = torch.nan
    statistics = pair_statistics(x, y, 10.0, impl=impl)
    assert statistics.columns.lse.isnan().all()
    assert statistics.rows.lse[3].isnan()


@pytest.mark.parametrize("impl", ["auto", "dense", "tiled"])
def test_layout_of_the_features_does_not_matter(impl: Any) -> None:
    """Transposed and strided features give the statistics of their contiguous copies."""
    x, y = unit_rows(8, 12, 0)[:, ::2], unit_rows(6, 8, 1).T
    strided = pair_statistics(x, y, 3.0, impl=impl)
    contiguous = pair_statistics(x.clone(), y.contiguous(), 3.0, impl=impl)
    assert_close((*strided.rows, *strided.columns), (*contiguous.rows, *contiguous.columns))


def test_class_means_need_no_sorted_labels() -> None:
    """The positive logit with labels is the mean over the pairs of the same label, however labels are numbered."""
    x, y, labels = unit_rows(21, 5, 0), unit_rows(21, 5, 1), class_labels(21, 2)
    assert len(labels.unique()) < len(labels)
    s = 7.0 * x @ y.T
    same = labels[:, None] == labels[None, :]
    statistics = pair_statistics(x, y, 7.0, labels=labels)
    assert_close(statistics.rows.positive, (s * same).sum(1) / same.sum(1))
    assert_close(statistics.columns.positive, (s * same).sum(0) / same.sum(0))


def test_differentiating_the_tiled_form_twice_is_refused() -> None:
    """It has no second derivative, and says so instead of giving a wrong one."""
    (x, y, scale), *_ = factors(5, 5, 3, 0, scale=1.0, teacher=False)
    statistics = operators.softmax_statistics((x.requires_grad_(), y, scale))
    (gradient,) = torch.autograd.grad(statistics.row_lse.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r'^only the dense losses have a second derivative; pass impl="dense"$'):
        torch.autograd.grad(gradient.sum(), x)
