"""Distillation of features: values, gradients, digits, and what it does not compute."""

from __future__ import annotations

import itertools
from typing import Any, NoReturn

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds, unit_rows
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from calrobust import FeatureDistillationLoss, MultimodalContrastiveLoss, MultimodalDistillationLoss, functional
from calrobust.functional import pairs

MODALITIES: tuple[Any, ...] = ("both", "image", "text")
feature_distillation_loss: Any = functional.feature_distillation_loss  # of arguments that are unpacked


def models(n: int, m: int, width: int, seed: int, norm: float = 1.0) -> tuple[Any, Any]:
    """A student whose features and scale ask for a gradient, and a teacher; texts need not be as many as images."""
    images, texts = (unit_rows(k, width, seed + i).mul(norm).requires_grad_() for i, k in enumerate((n, m)))
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    return (images, texts, scale), (unit_rows(n, width, seed + 2), unit_rows(m, width, seed + 3), 15.0)


def plain(student: Any, teacher: Any, modality: str, reduction: str = "mean") -> Any:
    """The formula, modality by modality."""
    rows = [((x - t) ** 2).sum(1) / 2 for x, t in zip(student[:2], teacher[:2], strict=True)]
    images, texts = (r if reduction == "none" else r.mean() if reduction == "mean" else r.sum() for r in rows)
    return images + texts if modality == "both" else images if modality == "image" else texts


@given(
    n=st.integers(1, 40),
    m=st.integers(1, 40),
    width=st.integers(1, 20),
    norm=st.sampled_from([1.0, 0.3, 7.0]),
    modality=st.sampled_from(MODALITIES),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    weight=st.floats(-3, 3),
    impl=st.sampled_from(["auto", "dense", "tiled"]),
    seed=seeds(),
)
def test_is_the_plain_formula(
    n: int, m: int, width: int, norm: float, modality: Any, reduction: Any, weight: float, impl: Any, seed: int
) -> None:
    """In float64 to 1e-12, of any norm and any numbers of images and texts; a sum with others too."""
    m = n if reduction == "none" and modality == "both" else m
    student, teacher = models(n, m, width, seed, norm)
    options: Any = {"reduction": reduction, "impl": impl}
    ours = feature_distillation_loss(*student, *teacher, modality=modality, **options)
    theirs = plain(student, teacher, modality, reduction)
    assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    criterion = weight * FeatureDistillationLoss(modality=modality, **options)
    assert_close(criterion(*student, *teacher), weight * theirs, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    inputs = student[0] if modality == "image" else student[1] if modality == "text" else student[:2]
    for a, b in zip(*(torch.autograd.grad((upstream * v).sum(), inputs) for v in (ours, theirs)), strict=True):
        assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("modality", MODALITIES)
def test_of_unit_norm_it_is_one_minus_the_cosine(modality: Any) -> None:
    """In value, and behind a normalisation in the gradient, where the difference of the two points along x."""
    student, teacher = models(9, 7, 5, 0)
    leaves = [(3 * features).detach().requires_grad_() for features in student[:2]]
    places = (0, 1) if modality == "both" else (MODALITIES.index(modality) - 1,)

    def gradients(loss: Any) -> list[Tensor]:
        value = loss([F.normalize(leaf, dim=1) for leaf in leaves])
        return [value, *oracles.gradients(value, *(leaves[k] for k in places))]

    ours = gradients(lambda features: feature_distillation_loss(*features, 1.0, *teacher, modality=modality))
    theirs = gradients(lambda x: sum((1 - torch.linalg.vecdot(x[k], teacher[k])).mean() for k in places))
    assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("step", [1e-1, 1e-2, 1e-3])
def test_small_values_keep_their_digits(dtype: torch.dtype, step: float) -> None:
    """Down to a millionth and less, where 1 minus a dot product has none in float32; and 0 only where all are equal."""
    x = unit_rows(64, 256, 0)
    student, teacher = x.to(dtype), (x + step * unit_rows(64, 256, 1)).to(dtype)
    found = feature_distillation_loss(student, student, 1.0, teacher, student, 1.0)
    expected = feature_distillation_loss(
        *[f.double() for f in (student, student)], 1.0, *[f.double() for f in (teacher, student)], 1.0
    )
    assert found.dtype == torch.float32
    assert found > 0
    assert_close(found.double(), expected, rtol=1e-6, atol=0)
    assert feature_distillation_loss(student, student, 1.0, student, student, 1.0) == 0


def test_takes_no_pass_over_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone it gathers nothing and asks for no statistics; in a sum it adds none to those of the others."""
    passes: list[bool] = []
    original = vars(pairs)["pair_statistics"]

    def counted(*arguments: Any, **options: Any) -> Any:
        passes.append(options["columns"])
        return original(*arguments, **options)

    def refuse(*arguments: Any, **options: Any) -> NoReturn:
        raise AssertionError

    student, teacher = models(6, 6, 4, 0)
    monkeypatch.setattr(pairs, "pair_statistics", counted)
    criterion = MultimodalContrastiveLoss() + MultimodalDistillationLoss() + 2 * FeatureDistillationLoss()
    criterion(*student, *teacher)
    assert passes == [True]
    monkeypatch.setattr(pairs, "PairBatch", refuse)
    FeatureDistillationLoss()(*student, *teacher)


class Shapes(TorchDispatchMode):
    """Notes the shapes of all results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen |= {tuple(result.shape)} if isinstance(result, Tensor) else set()
        return result


@pytest.mark.parametrize("modality", MODALITIES)
def test_computes_what_the_modality_names_alone(modality: Any) -> None:
    """Forward and backward, no tensor has a place for each pair, or a row for each of what is left out."""
    student, teacher = models(6, 9, 4, 0)
    with Shapes() as shapes:
        feature_distillation_loss(*student, *teacher, modality=modality).backward()
    rows = {"both": {6, 9}, "image": {6}, "text": {9}}[modality]
    assert {shape[0] for shape in shapes.seen if shape} - {1, 2} == rows
    assert {shape[1] for shape in shapes.seen if len(shape) > 1} <= {1, 4}


def test_a_large_bank_takes_no_matrix() -> None:
    """Of 60,000 texts and images the pair matrix would need 14 GB."""
    x, y = unit_rows(60_000, 2, 0, torch.float32), unit_rows(60_000, 2, 1, torch.float32)
    value = feature_distillation_loss(x, y, 1.0, y, x, 1.0, impl="dense")
    assert_close(value, plain((x, y), (y, x), "both"))


def test_terms_are_named_and_add_to_all_others() -> None:
    """``feature``, weighted; several of them, with labels that are not for it, and a bias that it does not see."""
    student, teacher = models(6, 6, 4, 0)
    anchor = FeatureDistillationLoss()
    criterion = MultimodalContrastiveLoss() + 3 * anchor + 0.5 * FeatureDistillationLoss(modality="text")
    assert repr(criterion) == (
        "MultimodalContrastiveLoss() + 3 * FeatureDistillationLoss() + 0.5 * FeatureDistillationLoss(modality='text')"
    )
    labels = torch.tensor([0, 0, 1, 2, 3, 4])
    terms = criterion.terms(*student, -2.0, *teacher, labels=labels)
    assert list(terms) == ["contrastive", "feature", "feature_2"]
    assert_close(terms["feature"], 3 * plain(student, teacher, "both"))
    assert_close(terms["feature_2"], 0.5 * plain(student, teacher, "text"))
    assert_close(criterion(*student, *teacher, labels=labels), sum(terms.values(), torch.zeros(())))
    anchor.modality = "image"
    assert_close(anchor(*student, *teacher), plain(student, teacher, "image"))


def test_gradients_reach_what_the_modality_names() -> None:
    """Not the teacher, not the other modality; the scale and the bias get zeros, for which DDP would wait."""
    for modality, given_bias in itertools.product(MODALITIES, (False, True)):
        student, teacher = models(5, 8, 3, 0)
        teacher = (*(f.clone().requires_grad_() for f in teacher[:2]), 15.0)
        bias = [torch.tensor(-3.0, requires_grad=True)] * given_bias
        FeatureDistillationLoss(modality=modality)(*student, *bias, *teacher).backward()
        assert [f.grad is not None for f in student[:2]] == [modality != "text", modality != "image"]
        assert [number.grad for number in (student[2], *bias)] == [0.0] * (1 + given_bias)
        assert all(f.grad is None for f in teacher[:2])


def test_a_scale_of_another_dtype_or_shape_changes_nothing() -> None:
    """As DataParallel gives one, or float64 beside float32 features."""
    x, y = unit_rows(5, 3, 0, torch.float32), unit_rows(5, 3, 1, torch.float32)
    for scale in (torch.full((2,), 9.0), torch.tensor(9.0, dtype=torch.float64)):
        value = feature_distillation_loss(x, x, scale, y, y, 1.0)
        assert value.dtype == torch.float32
        assert_close(value, feature_distillation_loss(x, x, 9.0, y, y, 1.0))
    assert feature_distillation_loss(x, x, 1.0, y.double(), y.double(), 1.0).dtype == torch.float64


def test_a_nan_feature_gives_a_nan_loss() -> None:
    """Of the student or of the teacher, unless the modality leaves it out."""
    x, wrong = unit_rows(4, 3, 0), unit_rows(4, 3, 1)
    wrong[2, 1] = torch.nan
    for a, b in ((x, wrong), (wrong, x)):
        assert feature_distillation_loss(a, x, 1.0, b, x, 1.0).isnan()
        assert feature_distillation_loss(a, x, 1.0, b, x, 1.0, modality="text") == 0


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # in torch's own forward mode
def test_has_all_derivatives_compiles_and_ignores_autocast() -> None:
    """Whatever ``impl`` says, as it is plain arithmetic."""
    student, teacher = models(5, 4, 3, 0)

    def loss(x: Tensor) -> Any:
        return feature_distillation_loss(x, student[1], 2.0, *teacher, impl="tiled")

    x = student[0].detach()
    assert_close(torch.func.hessian(loss)(x).reshape(15, 15), torch.eye(15, dtype=torch.float64) / 5)
    compiled: Any = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), loss(x))
    low = [f.detach().float() for f in (*student[:2], *teacher[:2])]
    expected = feature_distillation_loss(*low[:2], 2.0, *low[2:], 2.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(feature_distillation_loss(*low[:2], 2.0, *low[2:], 2.0), expected, rtol=0, atol=0)
