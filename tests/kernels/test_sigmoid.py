"""The sums of the sigmoid losses: the tiled form against the definition, in value, gradient, digits and products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import NoFloat64, Products
from strategies import seeds, unit_rows
from torch import Tensor
from torch.testing import assert_close

from calrobust.kernels import dense, sigmoid, tiled
from calrobust.kernels.sigmoid import Classes, Model, sigmoid_sums


def models(n: int, m: int, seed: int, *, scale: float, bias: float, teacher: bool, width: int = 3) -> list[Model]:
    """A student whose factors ask for a gradient and maybe a teacher, of another width, scale and bias."""
    numbers = [torch.tensor(number, dtype=torch.float64) for number in (scale, bias, 0.9 * scale, bias + 0.3)]
    student = Model(unit_rows(n, width, seed), unit_rows(m, width, seed + 1), *numbers[:2])
    other = Model(unit_rows(n, width + 1, seed + 2), unit_rows(m, width + 1, seed + 3), *numbers[2:])
    return [Model(*(factor.requires_grad_() for factor in student)), *([other] if teacher else [])]


def classes(n: int, m: int, seed: int) -> Classes:
    """Some of them on one side only, some on both and several times."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randint(-1, 1 + max(n, m) // 2, (k,), generator=generator) for k in (n, m))
    return Classes(rows, columns)


def value_and_gradients(
    inputs: list[Model], of: Classes, seed: int, *, by_row: bool, total: bool, totalled: bool = True, **options: Any
) -> list[Tensor]:
    """Of both sums and of their total, and of a random combination of those that are asked for."""
    found, of_all = sigmoid_sums(inputs, of, [1.3, -0.4], totalled=totalled, **options)
    generator = torch.Generator().manual_seed(seed)
    sums = found[: len(inputs)]
    value = 0.7 * of_all if total else torch.zeros(())
    for each in sums if by_row else ():
        value = value + (torch.randn(each.shape, generator=generator, dtype=torch.float64) * each).sum()
    return [*sums, of_all, *torch.autograd.grad(value, inputs[0])]


@given(
    n=st.integers(1, 300),
    m=st.integers(1, 300),
    rows=st.integers(1, 300),
    band=st.sampled_from([1, 2**12, 2**17]),
    scale=st.sampled_from([0.01, 1.0, 10.0, 117.0]),
    bias=st.sampled_from([0.0, 3.0, -10.0, -17.0]),
    teacher=st.booleans(),
    by_row=st.booleans(),
    total=st.booleans(),
    totalled=st.booleans(),
    seed=seeds(),
)
def test_equals_the_definition_for_every_tile_size(
    n: int,
    m: int,
    rows: int,
    band: int,
    scale: float,
    bias: float,
    teacher: bool,
    by_row: bool,
    total: bool,
    totalled: bool,
    seed: int,
) -> None:
    """Value and gradients for any shape, tile, band and classes, by row and of the total."""
    inputs, of = models(n, m, seed, scale=scale, bias=bias, teacher=teacher), classes(n, m, seed)
    if not by_row and not total:
        return
    expected = value_and_gradients(inputs, of, seed, by_row=by_row, total=total, impl="dense")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "tiles_of", lambda x, _: tiled.slices(len(x), rows))
        patch.setattr(sigmoid, "BAND_BYTES", band)
        found = value_and_gradients(inputs, of, seed, by_row=by_row, total=total, totalled=totalled)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, rtol=1e-12, atol=1e-12 * max(1.0, float(theirs.detach().abs().max())))


@pytest.mark.parametrize("total", [False, True])
def test_passes_gradcheck(total: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against finite differences, so that the definition and the tiled form are not wrong together."""
    monkeypatch.setattr(tiled, "tiles_of", lambda x, _: tiled.slices(len(x), 2))
    student, teacher = models(5, 6, 0, scale=3.0, bias=-1.0, teacher=True)

    def sums(*factors: Tensor) -> tuple[Tensor, ...]:
        found, of_all = sigmoid_sums([Model(*factors), teacher], classes(5, 6, 0), [1.3, -0.4], totalled=total)
        return (of_all,) if total else found

    assert torch.autograd.gradcheck(sums, tuple(student))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [20.0, 90.0, 110.0, 700.0, 1e4])
def test_far_logits_are_finite_and_right(dtype: torch.dtype, gap: float) -> None:
    """On either side of zero, for positive and for negative pairs, and far from the teacher's."""
    x, one = torch.tensor([[gap], [-gap], [gap / 3], [0.0]], dtype=dtype), torch.tensor([[1.0], [-1.0]], dtype=dtype)
    number = torch.tensor(1.0, dtype=dtype)
    for teacher in (x.flip(0), x, 0.9 * x):
        found = []
        for impl in ("dense", "tiled"):
            student = Model(*(factor.clone().requires_grad_() for factor in (x, one, number, 0 * number)))
            inputs = [student, Model(teacher, one, number, 0 * number)]
            of = Classes(torch.tensor([0, 0, 1, 5]), torch.tensor([0, 1]))
            found.append(value_and_gradients(inputs, of, 0, by_row=True, total=True, impl=impl))
        for ours, theirs in zip(*found, strict=True):
            assert ours.isfinite().all()
            assert_close(ours, theirs, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["dense", "tiled"])
@pytest.mark.parametrize("bias", [-12.0, -16.0, -20.0])
def test_float32_sums_near_zero_keep_their_digits(impl: str, bias: float) -> None:
    """Pairs that a model tells apart: each sum and the divergence of a close teacher are right to 2e-5 (trap 43)."""
    x = unit_rows(64, 256, 0)
    y, near = (torch.nn.functional.normalize(x + 0.3 * unit_rows(64, 256, seed), dim=1).float() for seed in (1, 2))
    scale = torch.tensor(-2.0 * bias)
    student, teacher = Model(x.float(), y, scale, torch.tensor(bias)), Model(x.float(), near, scale, torch.tensor(bias))
    of = Classes(torch.arange(64), torch.arange(64))
    found, _ = sigmoid_sums([student, teacher], of, [1.0, 1.0], impl=impl)
    exact = sigmoid.dense_sums([Model(*(f.double() for f in model)) for model in (student, teacher)], of)
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours > 0).all()
        assert_close(ours, theirs, rtol=2e-5, atol=0)


def test_a_teacher_equal_to_the_student_gives_exactly_zero() -> None:
    """Value and gradient, in float32 too: both sides take the same steps (trap 2)."""
    x, y = unit_rows(33, 8, 0, torch.float32), unit_rows(33, 8, 1, torch.float32)
    numbers = torch.tensor(50.0), torch.tensor(-10.0)
    for impl in ("dense", "tiled"):
        student = Model(*(factor.clone().requires_grad_() for factor in (x, y, *numbers)))
        of = Classes(torch.arange(33), torch.arange(33))
        sums, total = sigmoid_sums([student, Model(x, y, *numbers)], of, [0.0, 1.0], impl=impl)
        assert (sums.divergence == 0).all()
        for value in (total, sums.divergence.sum()):
            for gradient in torch.autograd.grad(value, student, retain_graph=True):
                assert (gradient == 0).all()


@pytest.mark.parametrize("teacher", [False, True])
def test_the_operator_passes_opcheck(teacher: bool) -> None:
    """Schema and fake tensors, as torch.library checks them, for gradients of all sorts."""
    inputs = models(7, 5, 0, scale=3.0, bias=-1.0, teacher=teacher)
    factors = [factor.detach() for model in inputs for factor in model]
    weights = torch.ones(len(inputs), 7, dtype=torch.float64)
    for needs in (
        [True] * 4,
        [False] * 4,
        [True, False, False, True],
        [False, True, True, False],
        [False] * 3 + [True],
    ):
        more: Any = ([*factors, weights, *classes(7, 5, 0)], "tiled", torch.float64, needs)
        torch.library.opcheck(
            torch.ops.calrobust.sigmoid_sums.default, more, test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.parametrize("device", ["cpu", "elsewhere"])
@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("frozen", [(), ("x",), ("y",), ("x", "y", "scale"), ("x", "y", "scale", "bias")])
@pytest.mark.parametrize("total", [False, True])
def test_products_are_as_many_as_documented(
    device: str, teacher: bool, frozen: tuple[str, ...], total: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Units: 1 (2) for the sums, 2 more for gradients in the same sweep; by row the backward pass sweeps again."""
    for module in (tiled, sigmoid):
        monkeypatch.setattr(module, "can_read_values", lambda _: device == "cpu")
    monkeypatch.setattr(sigmoid, "_sums", sigmoid._sums._init_fn)  # a dispatch mode does not see into an operator
    inputs = models(6, 6, 0, scale=1.0, bias=0.0, teacher=teacher)
    for name in frozen:
        getattr(inputs[0], name).requires_grad_(False)
    of = Classes(torch.arange(6), torch.arange(6))
    counter: Any = Products()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    with counter:
        sums, of_all = sigmoid_sums(inputs, of, [1.0, 1.0], totalled=total)
        value = of_all if total else torch.stack([each.sum() for each in sums]).sum()
        if value.requires_grad:
            value.backward()
    sweep = 3 + 4 * teacher  # the teacher's features are one wider
    backward = 3 * (("x" not in frozen) + ("y" not in frozen))
    assert counter.width == sweep * (1 if total or len(frozen) == 4 else 2) + backward
    for name, factor in zip(Model._fields, inputs[0], strict=True):
        assert (factor.grad is None) == (name in frozen)


def test_no_matrix_outlives_the_forward_pass() -> None:
    """What is saved is O(N·D)."""
    sizes = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        sigmoid_sums(models(64, 64, 0, scale=1.0, bias=0.0, teacher=True), classes(64, 64, 0), [1.0, 1.0])
    assert max(sizes) <= 64 * 4


def test_works_where_there_is_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on MPS: no tensor is float64, and value and gradients are those of float32."""
    monkeypatch.setattr(sigmoid, "_sums", sigmoid._sums._init_fn)  # a dispatch mode does not see into an operator
    exact, of = models(40, 30, 0, scale=8.0, bias=-3.0, teacher=True), classes(40, 30, 0)
    expected, of_all = sigmoid_sums(exact, of, [1.3, -0.4], impl="dense")
    expected_gradients = torch.autograd.grad(of_all, exact[0], retain_graph=True)
    student, teacher = (Model(*(factor.detach().float() for factor in model)) for model in exact)
    inputs = [Model(*(factor.requires_grad_() for factor in student)), teacher]
    monkeypatch.setattr(dense, "WITHOUT_FLOAT64", ("cpu",))
    for impl in ("dense", "tiled"):
        with NoFloat64():  # type: ignore[no-untyped-call]  # torch leaves it untyped
            sums, total = sigmoid_sums(inputs, of, [1.3, -0.4], impl=impl)
            gradients = torch.autograd.grad(total, inputs[0])
        for ours, theirs in zip((*sums, *gradients), (*expected, *expected_gradients), strict=True):
            assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("total", [False, True])
def test_tiles_may_be_multiplied_in_low_precision(
    dtype: torch.dtype, total: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a CUDA device without Triton: sums within 5e-6, gradients within 2e-3 of float64's."""
    monkeypatch.setattr(tiled, "are_narrow", lambda x, operands: True)
    monkeypatch.setattr(tiled, "tiles_of", lambda x, _: tiled.slices(len(x), 40))
    drawn, of = models(150, 140, 0, scale=20.0, bias=-10.0, teacher=True, width=70), classes(150, 140, 0)
    narrow = [
        Model(x.detach().to(dtype).float(), y.detach().to(dtype).float(), s.float(), b.float()) for x, y, s, b in drawn
    ]
    exact = [Model(*(factor.double() for factor in model)) for model in narrow]
    found = []
    for student, teacher in (narrow, exact):
        student = Model(*(factor.detach().requires_grad_() for factor in student))
        options: Any = {"impl": "dense"} if student.x.dtype == torch.float64 else {"operands": dtype}
        found.append(value_and_gradients([student, teacher], of, 0, by_row=not total, total=total, **options))
    for k, (ours, theirs) in enumerate(zip(*found, strict=True)):
        assert (ours.double() - theirs).norm() <= (5e-6 if k < 3 else 2e-3) * theirs.norm()
