"""The losses of sigmoid models: values, gradients, digits, models of other libraries."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_clip.loss import SigLipLoss
from strategies import Pairs, class_labels, paired_features, seeds, unit_rows
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from calrobust import MultimodalContrastiveLoss, SigmoidContrastiveLoss, SigmoidDistillationLoss, functional, kernels

IMPLS = ("auto", "dense", "tiled")
sigmoid_contrastive_loss: Any = functional.sigmoid_contrastive_loss  # of arguments that are unpacked
sigmoid_distillation_loss: Any = functional.sigmoid_distillation_loss


def student_of(pairs: Pairs, bias: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a sigmoid model returns, all of which asks for a gradient."""
    scale, offset = (torch.tensor(number, dtype=torch.float64, requires_grad=True) for number in (pairs.scale, bias))
    return pairs.image.requires_grad_(), pairs.text.requires_grad_(), scale, offset


def assert_same(ours: Tensor, theirs: Tensor, inputs: tuple[Tensor, ...], seed: int = 0) -> None:
    """In value, and in the gradients of a random combination of the values."""
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert_close(ours, theirs, rtol=1e-12, atol=1e-12 * max(1.0, float(theirs.detach().abs().max())))
    gradients = ((upstream * value).sum() for value in (ours, theirs))
    for a, b in zip(*(oracles.gradients(value, *inputs) for value in gradients), strict=True):
        assert_close(a, b, rtol=1e-12, atol=1e-12 * max(1.0, float(b.abs().max())))


@given(
    n=st.integers(1, 300),
    m=st.integers(1, 300),
    width=st.integers(1, 20),
    scale=st.sampled_from([0.01, 1.0, 10.0, 117.0]),
    bias=st.sampled_from([0.0, 2.0, -10.0, -17.0]),
    kind=st.sampled_from(["pairs", "labels", "labels of both"]),
    weight=st.floats(-3, 3),
    temperature=st.sampled_from([1.0, 0.5, 4.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    impl=st.sampled_from(IMPLS),
    apart=st.booleans(),
    seed=seeds(),
)
def test_is_the_plain_formula(
    n: int,
    m: int,
    width: int,
    scale: float,
    bias: float,
    kind: str,
    weight: float,
    temperature: float,
    reduction: Any,
    impl: Any,
    apart: bool,
    seed: int,
) -> None:
    """In float64 to 1e-12, for any numbers of images and texts, labels, teachers and sums, with all gradients."""
    n, m = (n, m) if kind == "labels of both" else (min(n, m), min(n, m) if kind == "labels" else max(n, m))
    student = student_of(Pairs(unit_rows(n, width, seed), unit_rows(m, width, seed + 1), scale), bias)
    teacher = unit_rows(n, 5, seed + 2), unit_rows(m, 5, seed + 3), 0.7 * scale, bias + 1
    labels: Any = None
    positive = torch.eye(n, m, dtype=torch.bool)
    if kind != "pairs":
        of_images = class_labels(n, seed)
        of_texts = of_images if kind == "labels" else class_labels(m, seed + 1)
        labels = of_images if kind == "labels" else (of_images, of_texts)
        positive = of_images[:, None] == of_texts
    options: Any = {"reduction": reduction, "impl": impl}
    criterion = 2 * SigmoidContrastiveLoss(**options) + weight * SigmoidDistillationLoss(
        temperature=temperature, **options
    )
    ours: Any = criterion(*student, *teacher, labels=labels)
    if apart:
        ours = sum(criterion.terms(*student, *teacher, labels=labels).values())
    rows = 2 * oracles.sigmoid_contrastive(*student, positive)
    rows = rows + weight * oracles.sigmoid_distillation(student, teacher, temperature)
    theirs = {"mean": rows.mean(), "sum": rows.sum(), "none": rows}[reduction]
    assert_same(ours, theirs, student, seed)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_modules_are_their_functions(impl: Any, reduction: Any) -> None:
    """Every argument reaches the function; a bias of None is one of 0."""
    student: Any = (unit_rows(7, 4, 0), unit_rows(9, 4, 1), 20.0)
    teacher: Any = (unit_rows(7, 5, 2), unit_rows(9, 5, 3), 15.0)
    options: Any = {"reduction": reduction, "impl": impl}
    assert_close(SigmoidContrastiveLoss(**options)(*student, -3.0), sigmoid_contrastive_loss(*student, -3.0, **options))
    ours = SigmoidDistillationLoss(temperature=2.0, **options)(*student, -3.0, *teacher, -4.0)
    assert_close(ours, sigmoid_distillation_loss(*student, -3.0, *teacher, -4.0, temperature=2.0, **options))
    nothing: Any
    for nothing in (student, (*student, None)):
        assert_close(SigmoidContrastiveLoss(**options)(*nothing), sigmoid_contrastive_loss(*student, 0.0, **options))


@given(pairs=paired_features(), bias=st.sampled_from([0.0, -10.0]), impl=st.sampled_from(IMPLS))
def test_is_the_loss_of_open_clip_and_of_siglip_kernel(pairs: Pairs, bias: float, impl: Any) -> None:
    """The latter's reference, ``siglip_kernel.reference``, cannot be imported without a CUDA device."""
    inputs = student_of(pairs, bias)
    assert_same(sigmoid_contrastive_loss(*inputs, impl=impl), SigLipLoss()(*inputs), inputs)
    image, text, scale, offset = inputs
    n = len(image)
    signs = 2 * torch.eye(n, dtype=torch.float64) - torch.ones(n, n, dtype=torch.float64)
    reference = -F.logsigmoid(signs * (image @ text.T * scale + offset)).sum() / n
    assert_same(sigmoid_contrastive_loss(*inputs, impl=impl), reference, inputs)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_near_zero_keep_their_digits(impl: Any, dtype: torch.dtype) -> None:
    """From a hundredth to a millionth, right to 2e-5 and never negative, with labels too (trap 43)."""
    x, of = unit_rows(64, 256, 0), torch.arange(64) // 2
    x = x[of]
    image, text, near = (F.normalize(x + 0.3 * unit_rows(64, 256, seed), dim=1).to(dtype) for seed in (1, 2, 3))
    exact = [features.double() for features in (image, text, near)]
    for bias in (-9.0, -13.0, -17.0, -21.0):
        found = sigmoid_contrastive_loss(image, text, -2 * bias, bias, labels=of, impl=impl)
        expected = sigmoid_contrastive_loss(*exact[:2], -2 * bias, bias, labels=of, impl="dense")
        assert found > 0
        assert_close(found.double(), expected, rtol=2e-5, atol=0)
        numbers = (-2 * bias, bias)
        found = sigmoid_distillation_loss(image, text, *numbers, image, near, *numbers, impl=impl)
        expected = sigmoid_distillation_loss(*exact[:2], *numbers, exact[0], exact[2], *numbers, impl="dense")
        assert found > 0
        assert_close(found.double(), expected, rtol=2e-5, atol=0)
    assert sigmoid_contrastive_loss(*exact[:2], 42.0, -21.0, labels=of) < 1e-5


def test_terms_have_names_and_share_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two terms of one temperature take one pass, and with a softmax's two; each term has its own gradient."""
    student, teacher = student_of(Pairs(unit_rows(7, 4, 0), unit_rows(7, 4, 1), 20.0), -10.0), unit_rows(7, 4, 2)
    passes: list[str] = []

    def counted(name: str, original: Any) -> Any:
        def count(*arguments: Any) -> Any:
            passes.append(name)
            return original(*arguments)

        return count

    for module, name in ((kernels.operators, "_forward"), (kernels.sigmoid, "_sums")):
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    sigmoids = SigmoidContrastiveLoss() + 1.5 * SigmoidDistillationLoss()
    taught = (*student, teacher, student[1].detach(), 15.0, -8.0)
    sigmoids(*taught).backward()
    assert passes == ["_sums"]
    sum(sigmoids.terms(*taught).values(), torch.zeros(())).backward()
    assert passes == ["_sums"] * 3  # the gradients of two terms take a pass of their own
    passes.clear()
    (sigmoids + 0.5 * MultimodalContrastiveLoss() + SigmoidDistillationLoss(temperature=2.0))(*taught)
    assert sorted(passes) == ["_forward", "_sums", "_sums"]
    terms = (sigmoids + SigmoidDistillationLoss()).terms(*taught)
    assert list(terms) == ["sigmoid_contrastive", "sigmoid_distillation", "sigmoid_distillation_2"]
    for name, loss, inputs in (
        ("sigmoid_contrastive", SigmoidContrastiveLoss(impl="dense"), student),
        ("sigmoid_distillation", 1.5 * SigmoidDistillationLoss(impl="dense"), taught),
        ("sigmoid_distillation_2", SigmoidDistillationLoss(impl="dense"), taught),
    ):
        assert_close(terms[name], loss(*inputs))
        gradients = torch.autograd.grad(terms[name], student, retain_graph=True)  # terms of a pass share its graph
        assert_close(gradients, torch.autograd.grad(loss(*inputs), student))


def test_a_bias_may_be_a_vector_as_data_parallel_gives_it() -> None:
    """Of equal entries, each with its share of the gradient, like a scale."""
    image, text = unit_rows(5, 3, 0), unit_rows(5, 3, 1)
    bias = torch.full((2,), -3.0, requires_grad=True)
    value = sigmoid_contrastive_loss(image, text, torch.full((2,), 2.0), bias)
    assert_close(value, sigmoid_contrastive_loss(image, text, 2.0, -3.0))
    (gradient,) = torch.autograd.grad(value, bias)
    assert_close(gradient[0], gradient[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_bias_beyond_the_dtype_is_infinite(impl: Any) -> None:
    """Of either sign: the one pair is certain to belong together, or certain not to."""
    one = torch.ones(1, 1)
    for bias in (1e39, torch.tensor(1e39)):
        assert sigmoid_contrastive_loss(one, one, 1.0, bias, impl=impl) == 0
        assert sigmoid_contrastive_loss(one, one, 1.0, -bias, impl=impl) == torch.inf


def test_fewer_texts_than_images_can_be_distilled() -> None:
    """Without labels, for a divergence knows no partners."""
    student = unit_rows(3, 2, 0), unit_rows(2, 2, 1), 1.0, 0.0
    assert sigmoid_distillation_loss(*student, *student) == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_a_nan_feature_gives_a_nan_loss(impl: Any) -> None:
    """Of the student or of the teacher."""
    x, y = unit_rows(9, 4, 0), unit_rows(9, 4, 1)
    wrong = y.clone()
    wrong[3, 2] = torch.nan
    assert sigmoid_contrastive_loss(x, wrong, 5.0, -2.0, reduction="none", impl=impl).isnan().all()
    for a, b in ((y, wrong), (wrong, y)):
        assert sigmoid_distillation_loss(x, a, 5.0, -2.0, x, b, 5.0, -2.0, impl=impl).isnan()


def taught_loss(impl: Any) -> Any:
    """Of student features and of all else that a sum of both losses takes."""
    criterion = SigmoidContrastiveLoss(impl=impl) + 1.5 * SigmoidDistillationLoss(impl=impl)
    y, teacher = unit_rows(7, 3, 1), (unit_rows(7, 3, 2), unit_rows(7, 3, 3), 4.0, -1.0)
    return lambda x: criterion(x, y[: len(x)], 5.0, -2.0, *(f[: len(x)] for f in teacher[:2]), *teacher[2:])


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # in torch's own forward mode
@pytest.mark.parametrize("impl", ["tiled", "auto"])
def test_other_derivatives_are_those_of_the_dense_form(impl: Any) -> None:
    """It has them; the others refuse and say so."""
    x, loss, dense = unit_rows(7, 3, 0), taught_loss(impl), taught_loss("dense")

    def twice(of: Any) -> Tensor:
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(of(leaf), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        return second

    step = 1e-6 * unit_rows(7, 3, 9)

    def squared(at: Tensor) -> Tensor:
        leaf = at.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0].square().sum()

    difference = (squared(x + step) - squared(x - step)) / 2
    assert_close((twice(dense) * step).sum(), difference, rtol=1e-6, atol=0)
    for derivative in (
        twice,
        lambda of: torch.func.jvp(of, (x,), (x,)),
        lambda of: torch.func.vmap(of)(x[None]),
        lambda of: torch.func.hessian(of)(x),
    ):
        with pytest.raises(RuntimeError, match=r'first derivatives in reverse mode only.*pass impl="dense"$'):
            derivative(loss)
    assert_close(torch.func.grad(loss)(x), torch.func.grad(dense)(x))


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_exports_and_is_checkpointed(impl: Any) -> None:
    """With the value and the gradient of the plain call."""
    x, loss = unit_rows(7, 3, 0).requires_grad_(), taught_loss(impl)
    expected = loss(x)
    (gradient,) = torch.autograd.grad(expected, x)
    compiled: Any = torch.compile(loss, backend="aot_eager", fullgraph=True)
    checkpointed: Any = checkpoint(loss, x, use_reentrant=False)
    with torch.autograd.graph.save_on_cpu():
        saved = loss(x)
    for value in (compiled(x), checkpointed, saved):
        assert_close(value, expected)
        assert_close(torch.autograd.grad(value, x)[0], gradient)
    with torch.no_grad():
        assert_close(compiled(x), expected)

    class Module(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Any:
            return sigmoid_distillation_loss(x, y, 5.0, -1.0, y, x, 4.0, -2.0, impl=impl)

    sizes = ({0: torch.export.Dim("n", min=2, max=64)},) * 2
    program = torch.export.export(Module(), (unit_rows(6, 3, 0), unit_rows(6, 3, 1)), dynamic_shapes=sizes).module()
    for n in (2, 6, 11):
        assert_close(program(unit_rows(n, 3, 2), unit_rows(n, 3, 3)), Module()(unit_rows(n, 3, 2), unit_rows(n, 3, 3)))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_teachers_bias_gets_no_gradient(impl: Any) -> None:
    """Nor does the value need one for it."""
    x, y, bias = unit_rows(5, 3, 0), unit_rows(5, 3, 1), torch.tensor(-1.0, requires_grad=True)
    assert not sigmoid_distillation_loss(x, y, 5.0, -1.0, y, x, 4.0, bias, impl=impl).requires_grad


def test_a_number_as_bias_may_change_in_a_compiled_loss() -> None:
    """It may become a symbol of the graph."""
    x, y, loss = unit_rows(5, 3, 0), unit_rows(5, 3, 1), SigmoidContrastiveLoss()
    compiled: Any = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for bias in (1.0, 2.0, 3.0):
        assert_close(compiled(x, y, 5.0, bias), loss(x, y, 5.0, bias))
