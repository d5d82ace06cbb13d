"""The tiled form against the dense definition: value, gradients, memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import NoFloat64, Products, assert_like_dense, classes, factors, pairs, value_and_gradients, vectors
from strategies import seeds, unit_rows
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from calrobust import kernels
from calrobust.distributed import Ranks
from calrobust.functional import carot_loss, multimodal_contrastive_loss, multimodal_distillation_loss
from calrobust.kernels import dense, operators, tiled
from calrobust.kernels.dense import Factors, Pairing, linear_parts

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
    columns=st.booleans(),
    budget=st.sampled_from([KEEP, RECOMPUTE]),
    shift=st.integers(0, 9),
    labelled=st.booleans(),
    seed=seeds(),
)
def test_equals_the_dense_definition_for_every_tile_size(
    n: int,
    m: int,
    width: int,
    rows: int,
    scale: float,
    teacher: bool,
    columns: bool,
    budget: int,
    shift: int,
    labelled: bool,
    seed: int,
) -> None:
    """Value and gradients for any shape, tile, pairing and upstream gradient, with kept and recomputed exponentials."""
    inputs = factors(n, m, width, seed, scale=scale, teacher=teacher)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "tiles_of", lambda x, _: tiled.slices(len(x), rows))
        of = classes(n, m, seed) if labelled else ()
        assert_like_dense(tiled_with(budget), inputs, 1e-12, columns=columns, shift=shift, classes=of)


@pytest.mark.parametrize("shift", [0, 2, 4])  # from 3 on the last row has no partner
def test_linear_parts_are_entries_and_sums_of_the_matrix(shift: int) -> None:
    """Own entries where there are some, sums over all candidates, and over those of the anchor's class."""
    x, y, of = unit_rows(5, 3, 0), unit_rows(8, 3, 1), classes(5, 8, 0)
    matrix, same = x @ y.T, of[0][:, None] == of[1]
    own, of_rows, of_columns = linear_parts(x, y, pairs(5, 8, shift, of), columns=True)
    there = min(5, 8 - shift)
    assert_close(own[:there], matrix.diagonal(shift)[:there])
    assert_close(of_rows, torch.stack([matrix.sum(1), (matrix * same).sum(1)]))
    assert_close(of_columns, torch.stack([matrix.sum(0), (matrix * same).sum(0)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("budget", [KEEP, RECOMPUTE])
@pytest.mark.parametrize("gap", [50.0, 85.0, 95.0, 100.0, 120.0, 700.0, 740.0, 1e3, 1e4])
def test_is_exact_where_rows_and_columns_cannot_share_an_exponential(
    dtype: torch.dtype, budget: int, gap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A column far below the maximum of its tile, a row far above a column: finite, and as the definition has it."""
    monkeypatch.setattr(tiled, "tiles_of", lambda x, _: tiled.slices(len(x), 2))
    x = torch.tensor([[gap, 0.0], [0.0, 1.0], [-gap, 2.0], [0.5, -1.0], [gap / 2, gap]], dtype=dtype)
    y = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [0.5, 0.5], [-0.5, 0.1]], dtype=dtype)
    one = torch.tensor(1.0, dtype=dtype)
    inputs = [Factors(x, y, one), Factors(x.flip(0), y.flip(0), 0.5 * one)]
    outputs, gradients = value_and_gradients(tiled_with(budget), inputs)
    assert all(v.isfinite().all() for v in (*outputs, *gradients))
    assert_like_dense(tiled_with(budget), inputs, 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("factor", [1.0, 8.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_terms_that_underflow_are_not_lost(dtype: torch.dtype, factor: float) -> None:
    """In a row far above the first ones, an entry counts in its column although its share of the row underflows."""
    x = factor * torch.tensor([[-60, -86, -81], [-25, 57, 32], [-12, 90, 79]], dtype=dtype)
    y, scale = torch.eye(3, dtype=dtype), torch.ones([], dtype=dtype)
    for models in ([Factors(x, y, scale)], [Factors(x, y, scale), Factors(x.flip(1) + factor, y, scale)]):
        assert_like_dense(tiled_with(RECOMPUTE), models, 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ([[80], [-93], [-22], [35], [-28]], [[81], [-94], [-22], [32], [-35]]),
        ([[-13, -5], [-64, -65], [63, 67], [-78, -73]], [[-16, -8], [-62, -60], [64, 70], [-78, -76]]),
    ],
)
def test_sums_that_overflow_are_formed_again(student: list[list[int]], teacher: list[list[int]]) -> None:
    """The terms of a divergence may overflow where the sums of exponentials do not."""
    found = []
    for impl, dtype in (("tiled", torch.float32), ("dense", torch.float64)):
        options: Any = {"impl": impl}
        s, t = (torch.tensor(logits, dtype=dtype) for logits in (student, teacher))
        texts = torch.eye(s.shape[1], dtype=dtype)
        loss = multimodal_distillation_loss(s.requires_grad_(), texts, 1.0, t, texts, 1.0, **options)
        found.append([loss.double(), torch.autograd.grad(loss, s)[0].double()])
    for ours, theirs in zip(*found, strict=True):  # float32 rounds lse of 80 by 5e-6
        assert (ours - theirs).norm() <= 5e-5 * theirs.norm() + 1e-6


@pytest.mark.parametrize("number", [1, 30, 150, 299])
@pytest.mark.parametrize("gap", [5.0, -5.0, 30.0, -30.0])
def test_rows_far_from_the_teachers_leave_the_digits_of_columns(
    number: int, gap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All logits of some rows are larger or smaller than a teacher's. A few such rows are all that is formed again."""
    student, teacher = factors(300, 64, 8, 0, scale=10.0, teacher=True)
    shift = torch.zeros(300, 1, dtype=torch.float64)
    shift[:number] = gap / 10
    student = Factors(torch.cat([student.x, shift], 1), torch.cat([student.y, torch.ones(64, 1)], 1), student.scale)
    (single, taught), (exact_student, exact_teacher) = (
        [Factors(*(factor.float().to(dtype) for factor in model)) for model in (student, teacher)]
        for dtype in (torch.float32, torch.float64)
    )
    apart = Pairing(torch.full([300], -1))
    expected = dense.softmax_statistics(exact_student, exact_teacher, apart)
    formed, along = [0], dense.along

    def counted(dim: int, s: Tensor, t: Tensor | None) -> dense.Part:
        formed[0] += len(s) if s.shape[1] == 64 else 0
        return along(dim, s, t)

    monkeypatch.setattr(dense, "along", counted)
    found = operators.softmax_statistics(single, taught, apart, impl="tiled")
    for part, exact in zip((found.rows, found.columns), (expected.rows, expected.columns), strict=True):
        for vector, of_exact in zip(part, exact, strict=True):
            assert_close(vector.double(), of_exact, rtol=1e-5, atol=1e-7)
    assert formed[0] <= 100 or number == 150  # the mean of the first rows lies between the two kinds


@pytest.mark.parametrize("start", [1, 2])  # all rows have a partner, or the last has none
@pytest.mark.parametrize("budget", [KEEP, RECOMPUTE])
def test_passes_gradcheck(budget: int, start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against finite differences, so that dense and tiled are not wrong together."""
    monkeypatch.setattr(tiled, "tiles_of", lambda x, _: tiled.slices(len(x), 2))
    student, teacher = factors(5, 6, 3, 0, scale=3.0, teacher=True)
    for factor in student:
        factor.requires_grad_()

    def statistics(*moved: Tensor) -> tuple[Tensor, ...]:
        pairing = pairs(5, 6, start, classes(5, 6, 0))
        return tuple(v for v in vectors(tiled_with(budget)(Factors(*moved), teacher, pairing)) if v.requires_grad)

    assert len(statistics(*student)) == 7
    assert torch.autograd.gradcheck(statistics, tuple(student))


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
def test_the_operators_pass_opcheck(teacher: bool, keep: bool, columns: bool, labelled: bool) -> None:
    """Schema, fake tensors and tracing, as torch.library checks them."""
    each = [factor for model in factors(7, 5, 3, 0, scale=3.0, teacher=teacher) for factor in model]
    checks = ("test_schema", "test_faketensor")  # the derivative is that of an autograd function around them
    of = classes(7, 5, 0) if labelled else []
    inputs = ([*each, pairs(7, 5).partner, *of], "tiled", torch.float64, columns, keep, -1)
    torch.library.opcheck(torch.ops.calrobust.softmax_statistics.default, inputs, test_utils=checks)
    found = torch.ops.calrobust.softmax_statistics(*inputs)
    upstream = [torch.ones_like(result) for result in found[:7]]
    for needs in ([True, True, True], [True, False, True], [False, True, True], [False, False, True]):
        more: Any = ([*upstream, *found, *inputs[0]], needs, "tiled", torch.float64, -1)
        torch.library.opcheck(torch.ops.calrobust.softmax_statistics_backward.default, more, test_utils=checks)


def test_a_teacher_equal_to_the_student_gives_exactly_zero() -> None:
    """Value and gradient, in float32 too: both sides take the same steps (trap 2)."""
    x, y, scale = unit_rows(33, 8, 0, torch.float32), unit_rows(33, 8, 1, torch.float32), torch.tensor(50.0)
    for statistics in (tiled_with(KEEP), tiled_with(RECOMPUTE)):
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        rows, columns, *_ = statistics(Factors(a, b, scale), Factors(x, y, scale), pairs(33, 33))
        assert (rows.divergence == 0).all()
        assert (columns.divergence == 0).all()
        for gradient in torch.autograd.grad(rows.divergence.sum() + columns.divergence.sum(), (a, b)):
            assert (gradient == 0).all()


def largest_saved(memory_budget: int, inputs: list[Factors]) -> int:
    """Entries of the largest tensor that a forward pass keeps for backward."""
    sizes = [0]

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        value_and_gradients(tiled_with(memory_budget), inputs)
    return max(sizes)


@pytest.mark.parametrize("teacher", [False, True])
def test_no_matrix_outlives_forward_unless_it_fits_into_the_budget(teacher: bool) -> None:
    """Beyond it O(N·D) is saved; a teacher's matrix counts (trap 9)."""
    n, width = 64, 4
    inputs = factors(n, n, width, 0, scale=1.0, teacher=teacher)
    need = (1 + teacher) * 8 * n * n
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

    def noted(*inputs: Any, **options: Any) -> Any:
        kept.append(len(options["kept"][0]) > 0)
        return original(*inputs, **options)

    monkeypatch.setattr(tiled, "forward", noted)
    ((x, y, scale),) = factors(9, 9, 3, 0, scale=1.0, teacher=False)
    with torch.set_grad_enabled(enabled):
        student = Factors(x.requires_grad_(needs_gradient), y, scale)
        operators.softmax_statistics(student, None, pairs(9, 9), memory_budget=KEEP)
    assert kept == [needs_gradient and enabled]


@pytest.mark.parametrize(
    ("n", "m", "device", "dtype", "rows"),
    [
        (100_000, 1000, "cpu", torch.float32, 2**23 // 4000),
        (100_000, 1000, "cpu", torch.float64, 2**23 // 8000),
        (100_000, 1000, "meta", torch.float32, 2**26 // 4000),
        (100_000, 100_000, "cpu", torch.float32, 512),
        (5, 1000, "cpu", torch.float32, 5),
    ],
)
def test_a_tile_fits_the_cache_and_is_never_thin(n: int, m: int, device: str, dtype: torch.dtype, rows: int) -> None:
    """8 MiB of logits on the CPU and 64 MiB elsewhere, but 512 rows at least, as far as there are so many."""
    x, y = (torch.empty(length, 1, device=device, dtype=dtype) for length in (n, m))
    assert tiled.tiles_of(x, y)[0].stop == rows


def test_the_form_gets_the_options_and_the_dtype_of_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the caller gave them; the dense definition is asked for by its name."""
    got: list[dict[str, Any]] = []
    original = operators.softmax_statistics

    def noted(*models: Any, **options: Any) -> Any:
        got.append(options)
        return original(*models, **options)

    monkeypatch.setattr(operators, "softmax_statistics", noted)
    x, y = unit_rows(5, 3, 0, torch.bfloat16), unit_rows(5, 3, 1, torch.bfloat16)
    multimodal_contrastive_loss(x, y, 2.0, impl="dense")
    assert got == []
    multimodal_contrastive_loss(x, y, 2.0, impl="tiled", memory_budget=7)
    assert got == [{"columns": True, "impl": "tiled", "memory_budget": 7, "operands": torch.bfloat16}]


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
@pytest.mark.parametrize("place", ["image", "text"])
def test_a_nan_feature_gives_a_nan_loss_for_every_pair(impl: Any, place: str) -> None:
    """Each pair is compared with every image and every text, so none has a finite wrong value."""
    x, y = unit_rows(9, 4, 0), unit_rows(9, 4, 1)
    (x if place == "image" else y)[3, 2] = torch.nan
    student, teacher = (x, y, 10.0), (unit_rows(9, 4, 2), unit_rows(9, 4, 3), 10.0)
    for a, b in ((student, teacher), (teacher, student)):
        assert multimodal_distillation_loss(*a, *b, impl=impl, reduction="none").isnan().all()
    assert multimodal_contrastive_loss(*student, impl=impl, reduction="none").isnan().all()


@pytest.mark.parametrize("impl", ["auto", "dense", "tiled"])
def test_layout_of_the_features_does_not_matter(impl: Any) -> None:
    """Transposed and strided features give the loss of their contiguous copies."""
    x, y = unit_rows(8, 12, 0)[:, ::2], unit_rows(6, 8, 1).T
    strided = multimodal_contrastive_loss(x, y, 3.0, impl=impl, reduction="none")
    assert_close(strided, multimodal_contrastive_loss(x.clone(), y.contiguous(), 3.0, impl=impl, reduction="none"))


REFUSAL = r'first derivatives in reverse mode only.*pass impl="dense"$'


def twice(loss: Any, x: Tensor) -> Any:
    """The gradient of the sum of the gradient."""
    (gradient,) = torch.autograd.grad(loss(x.requires_grad_()), x, create_graph=True)
    return torch.autograd.grad(gradient.sum(), x)


def dual(loss: Any, x: Tensor) -> Any:
    """A directional derivative by torch's dual numbers."""
    with torch.autograd.forward_ad.dual_level():
        return loss(torch.autograd.forward_ad.make_dual(x, x))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # in torch's own forward mode
@pytest.mark.parametrize("impl", ["tiled", "auto"])
@pytest.mark.parametrize(
    "derivative",
    [
        twice,
        dual,
        lambda loss, x: torch.func.jvp(loss, (x,), (x,)),
        lambda loss, x: torch.func.jacfwd(loss)(x),
        lambda loss, x: torch.func.hessian(loss)(x),
        lambda loss, x: torch.func.vmap(loss)(x[None]),
        lambda loss, x: torch.func.grad(lambda z: torch.func.grad(loss)(z).sum())(x),
    ],
    ids=["twice", "dual", "jvp", "jacfwd", "hessian", "vmap", "grad of grad"],
)
def test_what_the_tiled_form_cannot_differentiate_is_refused(derivative: Any, impl: Any) -> None:
    """It says so instead of giving a wrong value, and names the form that can, which does (trap 44)."""
    x, y = unit_rows(5, 3, 0), unit_rows(5, 3, 1)
    teacher = unit_rows(5, 3, 2), unit_rows(5, 3, 3), 2.0

    def loss(form: Any) -> Any:
        options: Any = {"label_smoothing": 0.1, "distillation_weight": 1.0, "impl": form}
        return lambda z: carot_loss(z, y, 3.0, *teacher, **options)

    with pytest.raises(RuntimeError, match=REFUSAL):
        derivative(loss(impl), x.clone())
    derivative(loss("dense"), x.clone())


@pytest.mark.parametrize("impl", ["dense", "tiled", "auto"])
def test_reverse_mode_transforms_give_the_gradient_of_autograd(impl: Any) -> None:
    """``torch.func.grad`` and ``vjp``, also in the teacher's place, where it is zero."""
    x, y, t = unit_rows(7, 3, 0), unit_rows(7, 3, 1), unit_rows(7, 3, 2)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return carot_loss(a, y, 5.0, b, y, 4.0, label_smoothing=0.1, distillation_weight=1.5, impl=impl)

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, t), leaf)
    ours, teachers = torch.func.grad(loss, argnums=(0, 1))(x, t)
    assert_close(ours, expected)
    assert not teachers.any()
    assert_close(torch.func.vjp(lambda a: loss(a, t), x)[1](torch.tensor(2.0).double())[0], 2 * expected)


def test_activation_checkpointing_and_saved_tensor_hooks_see_each_tensor_once() -> None:
    """Without reentrance each saved tensor may be unpacked a single time."""
    x, y = unit_rows(9, 3, 0).requires_grad_(), unit_rows(9, 3, 1)
    teacher = unit_rows(9, 3, 2), unit_rows(9, 3, 3), 4.0
    expected = None
    for impl in ("dense", "tiled", "auto"):
        options: Any = {"label_smoothing": 0.1, "distillation_weight": 1.5, "impl": impl}

        def loss(images: Tensor, options: Any = options) -> Tensor:
            return carot_loss(images, y, 5.0, *teacher, **options)

        value: Any = checkpoint(loss, x, use_reentrant=False)
        (gradient,) = torch.autograd.grad(value, x)
        expected = gradient if expected is None else expected
        assert_close(gradient, expected)
        with torch.autograd.graph.save_on_cpu():
            value = loss(x)
        assert_close(torch.autograd.grad(value, x)[0], expected)


@pytest.mark.parametrize("impl", ["dense", "tiled", "auto"])
def test_exports_with_a_batch_of_any_size(impl: Any) -> None:
    """``torch.export`` with a dynamic batch gives a program for other sizes."""

    class Loss(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor, tx: Tensor, ty: Tensor) -> Tensor:
            return carot_loss(x, y, 5.0, tx, ty, 4.0, label_smoothing=0.1, distillation_weight=1.5, impl=impl)

    def inputs(n: int) -> tuple[Tensor, ...]:
        return tuple(unit_rows(n, 3, seed) for seed in range(4))

    shapes = tuple({0: torch.export.Dim("n", min=2, max=4096)} for _ in range(4))
    program = torch.export.export(Loss(), inputs(6), dynamic_shapes=shapes).module()
    for n in (2, 6, 11):
        assert_close(program(*inputs(n)), Loss()(*inputs(n)))


@pytest.mark.parametrize("budget", [KEEP, RECOMPUTE])
@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("frozen", ["", "x", "y"])
@pytest.mark.parametrize("device", ["cpu", "elsewhere"])
@pytest.mark.parametrize("columns", [True, False])
def test_products_are_as_many_as_documented(
    budget: int, teacher: bool, frozen: str, device: str, columns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Units: forward 1 (2), backward 2, again 1 (2) if nothing was kept, 1 less for a frozen tower; on a device too."""
    monkeypatch.setattr(tiled, "can_read_values", lambda _: device == "cpu")
    open_operators(monkeypatch)
    student, *others = factors(6, 6, 3, 0, scale=1.0, teacher=teacher)
    x, y, scale = student
    student = Factors(x.requires_grad_(frozen != "x"), y.requires_grad_(frozen != "y"), scale.requires_grad_())
    counter: Any = Products()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    with counter:
        strip = tiled_with(budget)(student, others[0] if others else None, pairs(6, 6), columns=columns)
        torch.stack([v.sum() for v in vectors(strip) if v.requires_grad]).sum().backward()
    widths = 3 + 4 * teacher  # the teacher's features are one wider
    assert counter.width == widths * (1 if budget else 2) + 3 * (1 if frozen else 2)
    for factor, name in ((x, "x"), (y, "y")):
        assert (factor.grad is None) == (frozen == name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("impl", ["dense", "tiled"])
def test_an_anchor_without_an_own_entry_is_known_in_every_dtype(dtype: torch.dtype, impl: Any) -> None:
    """Texts beyond the last image have no own entry: no likelihood of it, and the lse of all entries as their base."""
    image, text = unit_rows(3, 4, 0, dtype), unit_rows(5, 4, 1, dtype)
    batch = kernels.PairBatch((image, text, 5.0), None, None, (Ranks([3]), Ranks([5])), swapped=True)
    options: Any = {"temperature": 1.0, "distils": False, "columns": False, "impl": impl, "memory_budget": 0}
    [found] = kernels.pair_statistics(batch, **options)
    assert found.negative_log_likelihood[3:].tolist() == [0, 0]
    logits = 5 * (text @ image.T).double()
    assert_close(found.above_mean[3:], (logits.logsumexp(1) - logits.mean(1))[3:], rtol=1e-5, atol=0)


def test_works_where_there_is_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on MPS: no tensor of a loss is float64, and value and gradients are those of float32."""
    monkeypatch.setattr(dense, "WITHOUT_FLOAT64", ("cpu",))
    open_operators(monkeypatch)
    features: Any = [unit_rows(40, 8, seed, torch.float32).requires_grad_(seed < 2) for seed in range(4)]
    for impl in ("dense", "tiled", "auto"):
        options: Any = {"label_smoothing": 0.1, "distillation_weight": 1.5, "impl": impl}
        with NoFloat64():  # type: ignore[no-untyped-call]  # torch leaves it untyped
            value = carot_loss(*taught(features), **options)
            found = torch.autograd.grad(value, features[:2])
        exact: Any = [f.detach().double().requires_grad_(f.requires_grad) for f in features]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dense, "WITHOUT_FLOAT64", ())
            expected = carot_loss(*taught(exact), **{**options, "impl": "dense"})
        assert_close(value.double(), expected, rtol=1e-5, atol=0)
        for a, b in zip(found, torch.autograd.grad(expected, exact[:2]), strict=True):
            assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


def taught(features: list[Tensor]) -> Any:
    """The arguments of a loss from features of a student and of a teacher."""
    return *features[:2], 20.0, *features[2:], 15.0


def open_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the operators as plain functions, into which a dispatch mode sees."""
    for name in ("_forward", "_backward"):
        monkeypatch.setattr(operators, name, getattr(operators, name)._init_fn)
