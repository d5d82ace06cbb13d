"""The modules: they forward to their functions, and add and scale like numbers."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Pairs, class_labels, fractions, seeds, student_and_teacher, unit_rows
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

from calrobust import (
    CaRotLoss,
    FeatureDistillationLoss,
    MultimodalContrastiveLoss,
    MultimodalDistillationLoss,
    OrthogonalityLoss,
    SigmoidContrastiveLoss,
    SigmoidDistillationLoss,
    functional,
    kernels,
)
from calrobust.integrations.open_clip import OpenClipLoss

STUDENT = (unit_rows(7, 4, 0), unit_rows(7, 4, 1), 20.0)
TEACHER = (unit_rows(7, 5, 2), unit_rows(7, 5, 3), 15.0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("impl", ["auto", "dense", "tiled"])
@pytest.mark.parametrize("direction", ["both", "image_to_text", "text_to_image"])
def test_modules_are_their_functions(reduction: Any, impl: Any, direction: Any) -> None:
    """Every keyword argument reaches the function."""
    labels = class_labels(7, 0)
    options: Any = {"direction": direction, "reduction": reduction, "impl": impl, "memory_budget": 0}
    assert_close(
        MultimodalContrastiveLoss(label_smoothing=0.2, **options)(*STUDENT, labels=labels),
        functional.multimodal_contrastive_loss(*STUDENT, labels=labels, label_smoothing=0.2, **options),
    )
    assert_close(
        MultimodalDistillationLoss(temperature=2.0, **options)(*STUDENT, *TEACHER),
        functional.multimodal_distillation_loss(*STUDENT, *TEACHER, temperature=2.0, **options),
    )
    options |= {"label_smoothing": 0.2, "distillation_weight": 1.5}
    assert_close(
        CaRotLoss(**options)(*STUDENT, *TEACHER, labels=labels),
        functional.carot_loss(*STUDENT, *TEACHER, labels=labels, **options),
    )
    assert_close(OrthogonalityLoss(squared=False)(STUDENT[0]), functional.orthogonality_loss(STUDENT[0], squared=False))


@given(
    models=student_and_teacher(),
    smoothing=fractions(),
    weight=st.floats(-3, 3),
    temperature=st.sampled_from([1.0, 3.0]),
    impl=st.sampled_from(["auto", "dense", "tiled"]),
    reduction=st.sampled_from(["mean", "sum"]),
    seed=seeds(),
)
def test_a_sum_is_the_sum_of_its_values(
    models: tuple[Pairs, Pairs],
    smoothing: float,
    weight: float,
    temperature: float,
    impl: Any,
    reduction: Any,
    seed: int,
) -> None:
    """In value and in gradient, at equal and at different temperatures, with labels."""
    student, teacher = models
    image, text = student.image.requires_grad_(), student.text.requires_grad_()
    scale = torch.tensor(student.scale, dtype=torch.float64, requires_grad=True)
    labels = class_labels(len(image), seed)
    contrastive = MultimodalContrastiveLoss(label_smoothing=smoothing, impl=impl, reduction=reduction)
    distillation = MultimodalDistillationLoss(temperature=temperature, impl=impl, reduction=reduction)
    criterion = 2 * (contrastive + weight * distillation)
    ours = criterion(image, text, scale, *teacher, labels=labels)
    per_pair = 2 * oracles.contrastive(image, text, scale, labels=labels, smoothing=smoothing)
    per_pair = per_pair + 2 * weight * oracles.distillation((image, text, scale), teacher, temperature)
    theirs = per_pair.mean() if reduction == "mean" else per_pair.sum()
    assert_close(ours, theirs, rtol=1e-10, atol=1e-9)
    inputs = (image, text, scale)
    for a, b in zip(oracles.gradients(ours, *inputs), oracles.gradients(theirs, *inputs), strict=True):
        assert_close(a, b, rtol=1e-10, atol=1e-8 * max(1.0, student.scale))


def test_a_sum_of_one_temperature_sweeps_the_pair_matrix_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two temperatures need two sweeps, and the one without a teacher's term does without the teacher."""
    sweeps = []
    original = kernels.operators.softmax_statistics

    def counted(student: Any, teacher: Any, *others: Any, **options: Any) -> Any:
        sweeps.append("plain" if teacher is None else "with teacher")
        return original(student, teacher, *others, **options)

    monkeypatch.setattr(kernels.operators, "softmax_statistics", counted)
    contrastive, distillation = MultimodalContrastiveLoss(), MultimodalDistillationLoss()
    (contrastive + 1.5 * distillation + 0.1 * contrastive)(*STUDENT, *TEACHER)
    assert sweeps == ["with teacher"]
    sweeps.clear()
    (contrastive + MultimodalDistillationLoss(temperature=2.0))(*STUDENT, *TEACHER)
    assert sweeps == ["plain", "with teacher"]


def test_terms_sum_to_the_loss_and_are_weighted() -> None:
    """For logging; a second term of a kind gets a name of its own."""
    criterion = MultimodalContrastiveLoss() + 1.5 * MultimodalDistillationLoss()
    terms = criterion.terms(*STUDENT, *TEACHER)
    assert list(terms) == ["contrastive", "distillation"]
    assert_close(terms["contrastive"], functional.multimodal_contrastive_loss(*STUDENT))
    assert_close(terms["distillation"], 1.5 * functional.multimodal_distillation_loss(*STUDENT, *TEACHER))
    assert_close(terms["contrastive"] + terms["distillation"], criterion(*STUDENT, *TEACHER))
    softer = criterion + MultimodalDistillationLoss(temperature=4.0)
    assert list(softer.terms(*STUDENT, *TEACHER)) == ["contrastive", "distillation", "distillation_2"]
    assert list(MultimodalContrastiveLoss().terms(*STUDENT)) == ["contrastive"]


def test_composition_obeys_the_laws_of_numbers() -> None:
    """Order, grouping, both sides of the product, and the built-in sum."""
    a, b = MultimodalContrastiveLoss(label_smoothing=0.1), MultimodalDistillationLoss()
    value = (a + 1.5 * b)(*STUDENT, *TEACHER)
    built_in: Any = sum([a, 1.5 * b])
    for same in (1.5 * b + a, a + b * 1.5, 0.5 * (2 * a + b * 3), built_in, a + b + 0.5 * b):
        assert_close(same(*STUDENT, *TEACHER), value)


def test_repr_reads_as_the_formula() -> None:
    """Arguments that differ from their defaults, weights other than one."""
    a, b = MultimodalContrastiveLoss(label_smoothing=0.1), MultimodalDistillationLoss(temperature=2.0, impl="dense")
    assert repr(a) == "MultimodalContrastiveLoss(label_smoothing=0.1)"
    assert repr(b) == "MultimodalDistillationLoss(temperature=2.0, impl='dense')"
    c = MultimodalContrastiveLoss(impl="dense")
    assert repr(c + 1.5 * b) == (
        "MultimodalContrastiveLoss(impl='dense') + 1.5 * MultimodalDistillationLoss(temperature=2.0, impl='dense')"
    )
    assert repr(CaRotLoss(label_smoothing=0.1, distillation_weight=1.5)) == (
        "MultimodalContrastiveLoss(label_smoothing=0.1) + 1.5 * MultimodalDistillationLoss()"
    )
    assert repr(OrthogonalityLoss(squared=False)) == "OrthogonalityLoss(squared=False)"


def test_carot_is_a_sum_that_goes_on_composing() -> None:
    """CaRotLoss adds and scales as the sum it stands for."""
    carot = CaRotLoss(label_smoothing=0.1, distillation_weight=1.5)
    by_hand = MultimodalContrastiveLoss(label_smoothing=0.1) + 1.5 * MultimodalDistillationLoss()
    assert_close(carot(*STUDENT, *TEACHER), by_hand(*STUDENT, *TEACHER))
    assert_close((2 * carot)(*STUDENT, *TEACHER), 2 * by_hand(*STUDENT, *TEACHER))
    assert repr(2 * carot) == "2 * MultimodalContrastiveLoss(label_smoothing=0.1) + 3 * MultimodalDistillationLoss()"


def test_losses_survive_copy_and_pickle() -> None:
    """As any module does."""
    criterion = MultimodalContrastiveLoss() + 1.5 * MultimodalDistillationLoss()
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert repr(twin) == repr(criterion)
        assert_close(twin(*STUDENT, *TEACHER), criterion(*STUDENT, *TEACHER))


def test_a_sum_takes_open_clips_output_by_name() -> None:
    """Arguments are named as open_clip names its outputs."""
    names = ("image_features", "text_features", "logit_scale")
    output = dict(zip(names, STUDENT, strict=True))
    teacher = {f"teacher_{name}": value for name, value in zip(names, TEACHER, strict=True)}
    criterion = MultimodalContrastiveLoss() + MultimodalDistillationLoss()
    assert_close(criterion(**output, **teacher), criterion(*STUDENT, *TEACHER))
    assert_close(MultimodalContrastiveLoss()(**output), MultimodalContrastiveLoss()(*STUDENT))


@pytest.mark.parametrize("student_bias", [False, True])
@pytest.mark.parametrize("teacher_bias", [False, True])
def test_models_with_a_logit_bias_go_in_as_they_are(student_bias: bool, teacher_bias: bool) -> None:
    """By place and by name: no softmax changes, and the bias gets a zero gradient."""
    bias = torch.tensor(-10.0, requires_grad=True)
    criterion = MultimodalContrastiveLoss() + 1.5 * MultimodalDistillationLoss()
    expected = criterion(*STUDENT, *TEACHER)
    student = (*STUDENT, bias) if student_bias else STUDENT
    teacher = (*TEACHER, torch.tensor([-9.0])) if teacher_bias else TEACHER
    names = ("image_features", "text_features", "logit_scale", "logit_bias")
    named = dict(zip(names, student, strict=False)), dict(zip(names, teacher, strict=False))
    teachers_named = {f"teacher_{name}": value for name, value in named[1].items()}
    for value in (
        criterion(*student, *teacher),
        criterion(*student, **teachers_named),
        criterion(**named[0], **teachers_named),
    ):
        assert_close(value, expected)
        if student_bias:
            assert torch.autograd.grad(value, bias)[0] == 0
    if student_bias:
        assert_close(MultimodalContrastiveLoss()(*student), MultimodalContrastiveLoss()(*STUDENT))


def test_a_scale_repeated_for_each_replica_counts_once() -> None:
    """As DataParallel gathers it: equal entries, whose gradients sum to that of the scalar."""
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    one = MultimodalContrastiveLoss()(*STUDENT[:2], scale)
    three = MultimodalContrastiveLoss()(*STUDENT[:2], scale.expand(3))
    assert_close(three, one)
    assert_close(oracles.gradients(three, scale), oracles.gradients(one, scale))


def test_losses_listen_to_their_attributes() -> None:
    """Whoever anneals an argument, a weight or an option is heard, checked, and sees it in the repr (trap 46)."""
    carot = CaRotLoss(label_smoothing=0.1, distillation_weight=1.5)
    carot.label_smoothing, carot.distillation_weight = 0.3, 0.5
    by_hand: Any = MultimodalContrastiveLoss(label_smoothing=0.3) + 0.5 * MultimodalDistillationLoss()
    assert repr(carot) == repr(by_hand)
    assert_close(carot(*STUDENT, *TEACHER), by_hand(*STUDENT, *TEACHER))
    by_hand.weights[1], by_hand.losses[0].label_smoothing = 1.5, 0.1
    assert_close(
        by_hand(*STUDENT, *TEACHER), CaRotLoss(label_smoothing=0.1, distillation_weight=1.5)(*STUDENT, *TEACHER)
    )
    contrastive: Any = MultimodalContrastiveLoss()
    contrastive.reduction = "none"
    assert contrastive(*STUDENT).shape == (len(STUDENT[0]),)
    contrastive.label_smoothing = 1.5
    with pytest.raises(ValueError, match=r"^label_smoothing must be in \[0, 1\), got 1.5"):
        contrastive(*STUDENT)
    with pytest.raises(AttributeError, match=r"^label_smoothing belongs to a term of the sum; set criterion.losses"):
        by_hand.label_smoothing = 0.5
    by_hand.weights[1] = float("nan")
    with pytest.raises(ValueError, match=r"^weight must be finite, got nan"):
        by_hand(*STUDENT, *TEACHER)
    by_hand.weights[1], by_hand.losses[0].reduction = 1.5, "sum"
    with pytest.raises(ValueError, match=r"^losses that add must agree"):
        by_hand(*STUDENT, *TEACHER)
    by_hand.weights, by_hand.losses[0].reduction = [1.0], "mean"
    with pytest.raises(ValueError, match=r"^weights must be one for each loss of the sum, got \[1.0\]"):
        by_hand(*STUDENT, *TEACHER)


def test_a_forward_of_ones_own_runs_or_is_refused() -> None:
    """It runs alone, also as a sum's only summand; sums, multiples, terms and OpenClipLoss would drop it."""

    class Normalised(MultimodalContrastiveLoss):
        def forward(self, image_features: Tensor, text_features: Tensor, *others: Any, **named: Any) -> Tensor:
            features = (torch.nn.functional.normalize(rows, dim=1) for rows in (image_features, text_features))
            return super().forward(*features, *others, **named)

    class Twice(CaRotLoss):
        def forward(self, *outputs: Any, **named: Any) -> Tensor:
            return 2 * super().forward(*outputs, **named)

    alone, plain = Normalised(), MultimodalContrastiveLoss()
    twice, carot = (kind(label_smoothing=0.1, distillation_weight=1.5) for kind in (Twice, CaRotLoss))
    summed: Any = sum([alone])
    assert_close(summed(3 * STUDENT[0], 3 * STUDENT[1], STUDENT[2]), plain(*STUDENT))
    assert_close(twice(*STUDENT, *TEACHER), 2 * carot(*STUDENT, *TEACHER))
    changed: Any = plain + plain
    changed.losses[1] = alone
    calls: dict[Any, list[Any]] = {
        alone: [lambda: 2 * alone, lambda: plain + alone, lambda: carot + alone, lambda: alone.terms(*STUDENT)],
        twice: [lambda: 2 * twice, lambda: twice + plain, lambda: twice.terms(*STUDENT, *TEACHER)],
    }
    for loss, refused in calls.items():
        for call in (*refused, partial(OpenClipLoss, loss)):
            with pytest.raises(
                TypeError, match=rf"must not override forward, got {type(loss).__name__}; call it alone"
            ):
                call()
    with pytest.raises(TypeError, match="must not override forward"):
        changed(*STUDENT)


def test_a_subclass_that_only_sets_defaults_adds() -> None:
    """It has no forward of its own."""

    class Smooth(MultimodalContrastiveLoss):
        def __init__(self) -> None:
            super().__init__(label_smoothing=0.2)

    assert_close((2 * Smooth())(*STUDENT), 2 * MultimodalContrastiveLoss(label_smoothing=0.2)(*STUDENT))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int64])
def test_numbers_of_numpy_are_numbers(kind: Any) -> None:
    """As weight, smoothing, temperature and logit scale, without a warning."""
    criterion = kind(2) * MultimodalContrastiveLoss(label_smoothing=kind(0)) + MultimodalDistillationLoss(
        temperature=kind(2)
    ) * kind(3)
    plain = 2.0 * MultimodalContrastiveLoss() + 3.0 * MultimodalDistillationLoss(temperature=2.0)
    given = criterion(*STUDENT[:2], kind(4), *TEACHER[:2], kind(5))
    assert_close(given, plain(*STUDENT[:2], 4.0, *TEACHER[:2], 5.0))


@pytest.mark.parametrize("impl", ["dense", "tiled", "auto"])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("noise", [0.0, 1.0, 1.3, 1.5, 2.0, 4.0])
def test_float32_losses_keep_their_digits_down_to_a_millionth(noise: float, seed: int, impl: Any) -> None:
    """Within 2e-5 of float64 on the same features, and never negative, also for small losses (trap 43)."""
    images, noises = (unit_rows(200, 64, s + 10 * seed) for s in (0, 1))
    exact = [f.float().double() for f in (images, torch.nn.functional.normalize(images + noise * noises, dim=1))]

    def hold(loss: Any, scale: float, *features: Tensor, **options: Any) -> None:
        single, double = (
            with_scales([f.to(dtype) for f in features], scale) for dtype in (torch.float32, torch.float64)
        )
        value = loss(*single, impl=impl, reduction="none", **options)
        expected = loss(*double, impl="dense", reduction="none", **options)
        assert (value >= 0).all()
        assert expected.mean() < 1e-6 or (value.double().mean() / expected.mean() - 1).abs() <= 2e-5

    for scale in (30.0, 100.0):
        for smoothing in (0.0, 1e-6):
            hold(functional.multimodal_contrastive_loss, scale, *exact, label_smoothing=smoothing)
    for step in (1e-2, 1e-1, 1.0):
        moved = [
            torch.nn.functional.normalize(f + step * unit_rows(200, 64, 7 + k), dim=1) for k, f in enumerate(exact)
        ]
        hold(functional.multimodal_distillation_loss, 40.0, *exact, *(f.float().double() for f in moved))


@pytest.mark.parametrize("impl", ["dense", "tiled"])
def test_float32_divergences_of_columns_keep_their_digits(impl: Any) -> None:
    """Sums over columns whose rows differ much in the two models are formed again: few pairs, unlike teachers."""
    for seed in range(200, 300):
        generator = torch.Generator().manual_seed(seed)
        sizes = [int(torch.randint(low, high, (1,), generator=generator)) for low, high in ((2, 12), (1, 6), (1, 5))]
        n, m, width = sizes
        drawn = [torch.randn(rows, width, generator=generator) for rows in (n, m, n, m)]
        x, y, tx, ty = (torch.nn.functional.normalize(features, dim=1) for features in drawn)
        scales = (torch.rand(2, generator=generator) * 10 + 1).tolist()
        ours = MultimodalDistillationLoss(impl=impl)(x, y, scales[0], tx, ty, scales[1])
        x, y, tx, ty = (features.double() for features in (x, y, tx, ty))
        exact = MultimodalDistillationLoss(impl="dense")(x, y, scales[0], tx, ty, scales[1])
        assert_close(ours.double(), exact, rtol=2e-5, atol=2e-7)


@pytest.mark.parametrize("impl", ["dense", "tiled", "auto"])
@pytest.mark.parametrize(("step", "scale"), [(1e-3, 20.0), (3e-3, 20.0), (3e-3, 5.0), (1e-2, 5.0)])
def test_float32_divergences_of_flat_softmaxes_keep_their_digits(step: float, scale: float, impl: Any) -> None:
    """Where every probability differs a little, rounding must not add up: 2e-5 of float64 from 7e-6 up."""
    exact = [unit_rows(200, 64, k).float().double() for k in (0, 1)]
    moved = [torch.nn.functional.normalize(f + step * unit_rows(200, 64, 7 + k), dim=1) for k, f in enumerate(exact)]
    features = [*exact, *(f.float().double() for f in moved)]
    double, single = (with_scales([f.to(d) for f in features], scale) for d in (torch.float64, torch.float32))
    expected = functional.multimodal_distillation_loss(*double, impl="dense")
    value = functional.multimodal_distillation_loss(*single, impl=impl)
    assert (value.double() / expected - 1).abs() <= 2e-5


def with_scales(features: list[Tensor], scale: float) -> list[Any]:
    """Images and texts of each model, with a logit scale after them."""
    return [argument for k in range(0, len(features), 2) for argument in (*features[k : k + 2], scale)]


@pytest.mark.parametrize("impl", ["auto", "dense", "tiled"])
def test_a_scaled_loss_is_unscaled_to_the_same_step(impl: Any) -> None:
    """GradScaler's factor passes through backward to the bit; a gradient clipped before unscale_ is lost (trap 10)."""
    start = unit_rows(9, 4, 5, torch.float32)
    images, text = torch.eye(9)[:7], unit_rows(7, 4, 1, torch.float32)
    teacher = (unit_rows(7, 5, 2, torch.float32), unit_rows(7, 5, 3, torch.float32), 15.0)
    criterion = MultimodalContrastiveLoss(impl=impl) + 1.5 * MultimodalDistillationLoss(impl=impl)

    def step(order: str) -> Any:
        weight = torch.nn.Parameter(start.clone())
        optimizer, scaler = torch.optim.SGD([weight], lr=0.1), torch.amp.GradScaler("cpu", enabled=order != "unscaled")
        scaler.scale(criterion(images @ weight, text, 20.0, *teacher)).backward()
        if order == "unscale, clip":
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_([weight], 1e-2)
        scaler.step(optimizer)
        return weight.detach() - start, norm

    (plain, norm), (unscaled, same), (lost, _) = (step(s) for s in ("unscaled", "unscale, clip", "clip, unscale"))
    assert norm > 1e-2
    assert norm == same
    assert torch.equal(unscaled, plain)
    assert lost.norm() < plain.norm() / 1000


def test_a_sum_compiles_without_a_graph_break() -> None:
    """torch.compile(fullgraph=True), value and gradient."""
    criterion = MultimodalContrastiveLoss(label_smoothing=0.1) + 1.5 * MultimodalDistillationLoss()
    image = STUDENT[0].clone().requires_grad_()
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")(image, *STUDENT[1:], *TEACHER)
    expected = criterion(image, *STUDENT[1:], *TEACHER)
    assert_close(compiled, expected)
    assert_close(oracles.gradients(compiled, image), oracles.gradients(expected, image))


def test_a_term_that_was_compiled_alone_compiles_in_a_sum() -> None:
    """torch.compile leaves an attribute in what it compiled, and sets it in the sum."""
    term = MultimodalContrastiveLoss()
    compiled: Any = [torch.compile(loss, backend="eager") for loss in (term, 2 * term)]
    assert_close(compiled[1](*STUDENT), 2 * compiled[0](*STUDENT))


EVERY_LOSS = {
    "contrastive": MultimodalContrastiveLoss(),
    "distillation": MultimodalDistillationLoss(),
    "carot": CaRotLoss(label_smoothing=0.1, distillation_weight=1.5),
    "sigmoid_contrastive": SigmoidContrastiveLoss(),
    "sigmoid_distillation": SigmoidDistillationLoss(),
    "feature": FeatureDistillationLoss(),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    ("name", "texts"),
    [*((name, "pairs") for name in EVERY_LOSS), ("all", "labelled pairs"), ("all", "more"), ("all", "bank")],
)
def test_a_new_batch_size_compiles_no_new_graph(name: str, texts: str, dynamic: bool | None) -> None:
    """One graph for the first size and one for all others, as for any plain function."""
    torch.compiler.reset()
    counter = CompileCounter()
    criterion: Any = sum(EVERY_LOSS.values()) if name == "all" else EVERY_LOSS[name]
    compiled: Any = torch.compile(criterion, fullgraph=True, backend=counter, dynamic=dynamic)
    for n in (8, 5, 7, 3):
        m = {"more": n + 3, "bank": 6}.get(texts, n)
        outputs: Any = unit_rows(n, 4, 0).requires_grad_(), unit_rows(m, 4, 1), torch.tensor(20.0), torch.tensor(-1.0)
        if name not in ("contrastive", "sigmoid_contrastive"):
            outputs += tuple(output.detach().flip(0) if output.ndim else output for output in outputs)
        labels: Any = class_labels(n, 0) if "labelled" in texts else None
        labels = (torch.arange(n) % m, torch.arange(m)) if texts == "bank" else labels
        assert_close(compiled(*outputs, labels=labels), criterion(*outputs, labels=labels))
    assert counter.frame_count <= 2


def test_values_of_two_directions_are_no_sum_where_images_and_texts_are_no_pairs() -> None:
    """Each alone is one value of each image, or of each text; together they would be added by place."""
    images, texts, labels = torch.eye(4), torch.eye(4), (torch.arange(4), torch.arange(4))
    one, other = (
        MultimodalContrastiveLoss(direction=way, reduction="none") for way in ("image_to_text", "text_to_image")
    )
    assert one(images, texts, 1.0, labels=labels).shape == other(images, texts, 1.0, labels=labels).shape == (4,)
    with pytest.raises(ValueError, match="reduction='none' must be of pairs or of one direction, got image and text"):
        (one + other)(images, texts, 1.0, labels=labels)
    assert (one + other)(images, texts, 1.0, labels=labels[0]).shape == (4,)
