"""Losses of images and texts that are no pairs: banks of candidates, labels of both sides, one direction."""

from __future__ import annotations

from typing import Any, cast

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Candidates, candidates, fractions, unit_rows
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from calrobust import MultimodalContrastiveLoss, MultimodalDistillationLoss, functional, kernels
from calrobust.functional import multimodal_contrastive_loss, multimodal_distillation_loss

IMPLS = ("auto", "dense", "tiled")
DIRECTIONS = ("both", "image_to_text", "text_to_image")
ONE_DIRECTION = DIRECTIONS[1:]


def mean_of_directions(direction: str, image: Tensor, text: Tensor, scale: Tensor, **options: Any) -> list[Tensor]:
    """The mean over the anchors of each direction that is asked for."""
    wanted = ONE_DIRECTION if direction == "both" else (direction,)
    return [oracles.directed(image, text, scale, way, **options).mean() for way in wanted]


def hold(ours: Tensor, theirs: Tensor, inputs: Any, scale: float = 1.0) -> None:
    """Value and all gradients within 1e-12, relative to the largest."""
    assert_close(ours, theirs, rtol=1e-12, atol=1e-12 * max(1.0, scale))
    for a, b in zip(oracles.gradients(ours, *inputs), oracles.gradients(theirs, *inputs), strict=True):
        assert_close(a, b, rtol=1e-12, atol=1e-12 * max(1.0, scale, b.abs().max().item()))


def trained(given: Candidates) -> tuple[Tensor, Tensor, Tensor]:
    """The student's features and scale, which ask for a gradient."""
    scale = torch.tensor(given.scale, dtype=torch.float64)
    return given.image.requires_grad_(), given.text.requires_grad_(), scale.requires_grad_()


@given(
    given=candidates(),
    smoothing=fractions(),
    impl=st.sampled_from(IMPLS),
    direction=st.sampled_from(DIRECTIONS),
    labelled=st.booleans(),
    lonely=st.booleans(),
)
def test_contrastive_losses_of_any_candidates_are_their_formula(
    given: Candidates, smoothing: float, impl: Any, direction: Any, labelled: bool, lonely: bool
) -> None:
    """With labels of both sides, or without and M ≥ N; only from text to image may an image be without a positive."""
    image, text, scale = trained(given)
    labels: Any = given.labels if labelled or len(image) > len(text) else None
    if labels and lonely and direction == "text_to_image" and len(image) > 1:
        labels = torch.cat([labels[0][:1], torch.full_like(labels[0][1:], 1)]), labels[1]
    ours = multimodal_contrastive_loss(
        image, text, scale, labels=labels, label_smoothing=smoothing, direction=direction, impl=impl
    )
    parts = mean_of_directions(direction, image, text, scale, labels=labels, smoothing=smoothing)
    hold(ours, torch.stack(parts).mean(), (image, text, scale), given.scale)


@given(
    given=candidates(),
    temperature=st.sampled_from([1.0, 3.0]),
    impl=st.sampled_from(IMPLS),
    direction=st.sampled_from(DIRECTIONS),
)
def test_distillation_of_any_candidates_is_its_formula(
    given: Candidates, temperature: float, impl: Any, direction: Any
) -> None:
    """No image or text needs a partner, whichever are more."""
    image, text, scale = trained(given)
    ours = multimodal_distillation_loss(
        image, text, scale, *given.teacher, temperature=temperature, direction=direction, impl=impl
    )
    parts = mean_of_directions(direction, image, text, scale, teacher=given.teacher, temperature=temperature)
    hold(ours, torch.stack(parts).sum(), (image, text, scale), max(given.scale, given.teacher[2]))


@given(
    given=candidates(max_rows=60),
    ours=st.sampled_from(DIRECTIONS),
    theirs=st.sampled_from(DIRECTIONS),
    temperature=st.sampled_from([1.0, 2.0]),
    reduction=st.sampled_from(["mean", "sum"]),
    impl=st.sampled_from(IMPLS),
)
def test_terms_of_different_directions_add(
    given: Candidates, ours: Any, theirs: Any, temperature: float, reduction: Any, impl: Any
) -> None:
    """In one pass if they are of one temperature, and in two if not."""
    image, text, scale = trained(given)
    options: Any = {"reduction": reduction, "impl": impl}
    contrastive = MultimodalContrastiveLoss(direction=ours, **options)
    distillation = MultimodalDistillationLoss(direction=theirs, temperature=temperature, **options)
    found = (contrastive + 1.5 * distillation)(image, text, scale, *given.teacher, labels=given.labels)

    def reduced(direction: str, **named: Any) -> list[Tensor]:
        wanted = ONE_DIRECTION if direction == "both" else (direction,)
        each = [oracles.directed(image, text, scale, way, **named) for way in wanted]
        return [values.mean() if reduction == "mean" else values.sum() for values in each]

    expected = torch.stack(reduced(ours, labels=given.labels)).mean()
    expected = expected + 1.5 * sum(reduced(theirs, teacher=given.teacher, temperature=temperature))
    hold(found, expected, (image, text, scale), max(1.0, expected.item(), given.scale))


@given(given=candidates(), smoothing=fractions(), impl=st.sampled_from(IMPLS))
def test_a_class_bank_gives_torchs_cross_entropy(given: Candidates, smoothing: float, impl: Any) -> None:
    """``labels=(target, torch.arange(C))`` from image to text, without the ``[N, C]`` matrix."""
    image, bank, scale = trained(given)
    target = given.labels[0].abs() % len(bank)
    labels = target, torch.arange(len(bank))
    ours = multimodal_contrastive_loss(
        image, bank, scale, labels=labels, label_smoothing=smoothing, direction="image_to_text", impl=impl
    )
    theirs = F.cross_entropy(scale * image @ bank.T, target, label_smoothing=smoothing)
    hold(ours, theirs, (image, bank, scale), given.scale)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("k", [1, 2, 5])
def test_several_captions_of_an_image_are_labels_repeated(k: int, direction: Any, impl: Any) -> None:
    """An image shares its target among its captions; each caption has the one image."""
    image, text = unit_rows(7, 4, 0).requires_grad_(), unit_rows(7 * k, 4, 1).requires_grad_()
    own = torch.arange(7)
    labels = own, own.repeat_interleave(k)
    ours = multimodal_contrastive_loss(image, text, 9.0, labels=labels, direction=direction, impl=impl)
    logits = 9.0 * image @ text.T
    of_images = logits.logsumexp(1).mean() - logits.view(7, 7, k)[own, own].mean()
    of_texts = F.cross_entropy(logits.T, labels[1])
    theirs = {"image_to_text": of_images, "text_to_image": of_texts, "both": (of_images + of_texts) / 2}[direction]
    hold(ours, theirs, (image, text), 9.0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("direction", ONE_DIRECTION)
def test_values_of_one_direction_are_those_of_its_anchors(direction: Any, impl: Any) -> None:
    """``[N]`` of images, ``[M]`` of texts: 0 for a text without a positive in MCL, all of them in MKD."""
    image, text, teacher = unit_rows(5, 3, 0), unit_rows(8, 3, 1), (unit_rows(5, 3, 2), unit_rows(8, 3, 3), 4.0)
    options: Any = {"reduction": "none", "direction": direction, "impl": impl}
    values = multimodal_contrastive_loss(image, text, 5.0, **options)
    expected = oracles.directed(image, text, 5.0, direction)
    assert_close(values[:5], expected)
    assert values.tolist()[5:] == ([0.0] * 3 if direction == "text_to_image" else [])
    assert_close(
        multimodal_distillation_loss(image, text, 5.0, *teacher, **options),
        oracles.directed(image, text, 5.0, direction, teacher=teacher),
    )


def test_a_sum_of_one_direction_each_is_of_pairs_where_there_are_pairs() -> None:
    """As many images as texts: a value of each pair, though the directions differ."""
    image, text, teacher = unit_rows(5, 3, 0), unit_rows(5, 3, 1), (unit_rows(5, 3, 2), unit_rows(5, 3, 3), 4.0)
    contrastive = MultimodalContrastiveLoss(direction="text_to_image", reduction="none")
    distillation = MultimodalDistillationLoss(direction="image_to_text", reduction="none")
    values = (contrastive + distillation)(image, text, 5.0, *teacher)
    first = oracles.directed(image, text, 5.0, "text_to_image")
    assert_close(values, first + oracles.directed(image, text, 5.0, "image_to_text", teacher=teacher))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("noise", [1.0, 1.5])
@pytest.mark.parametrize("labelled", [False, True])
def test_float32_losses_keep_their_digits_near_zero(noise: float, direction: Any, impl: Any, labelled: bool) -> None:
    """Within 2e-5 of float64 on the same features and never negative, of banks and of one direction too (trap 43)."""
    images, noises, more = unit_rows(200, 64, 0), unit_rows(200, 64, 1), unit_rows(40, 64, 2)
    order = torch.randperm(240, generator=torch.Generator().manual_seed(0)) if labelled else torch.arange(240)
    texts = torch.cat([F.normalize(images + noise * noises, dim=1), more])[order]
    moved = [F.normalize(f + 0.1 * unit_rows(len(f), 64, 7), dim=1) for f in (images, texts)]
    exact = [f.float().double() for f in (images, texts, *moved)]
    labels = (torch.arange(200), order) if labelled else None
    for scale in (30.0, 60.0):
        found: list[list[Tensor]] = []
        for dtype, form in ((torch.float32, impl), (torch.float64, "dense")):
            x, y, tx, ty = (f.to(dtype) for f in exact)
            options: Any = {"impl": form, "direction": direction}
            contrastive = multimodal_contrastive_loss(x, y, scale, labels=labels, **options)
            found.append([contrastive, multimodal_distillation_loss(x, y, scale, tx, ty, scale, **options)])
        for value, expected in zip(*found, strict=True):
            assert value >= 0
            assert expected < 1e-6 or (value.double() / expected - 1).abs() <= 2e-5


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_second_derivatives_of_the_dense_form_are_right(direction: Any) -> None:
    """Against finite differences, with partners that rows share."""
    labels = torch.tensor([3, 1, 3, 0]), torch.tensor([0, 3, 1, 3, 7])
    teacher = unit_rows(4, 3, 2), unit_rows(5, 3, 3), 2.0

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return functional.carot_loss(
            *(image, text, scale, *teacher),
            labels=labels,
            label_smoothing=0.1,
            distillation_weight=1.5,
            direction=direction,
            impl="dense",
        )

    inputs = unit_rows(4, 3, 0), unit_rows(5, 3, 1), torch.tensor(3.0, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(loss, tuple(each.requires_grad_() for each in inputs))


def divergences(x: Tensor, y: Tensor, scale: float, tx: Tensor, ty: Tensor, teacher_scale: float) -> dict[str, Tensor]:
    """By torch, of softmaxes in both directions and of sigmoids with a bias of -1."""
    s, t = scale * x @ y.T, teacher_scale * tx @ ty.T
    of_softmaxes = sum(
        F.kl_div(a.log_softmax(1), b.log_softmax(1), reduction="batchmean", log_target=True)
        for a, b in ((s, t), (s.T, t.T))
    )
    return {
        "softmax": torch.as_tensor(of_softmaxes),
        "sigmoid": F.binary_cross_entropy_with_logits(s - 1, (t - 1).sigmoid(), reduction="sum") / len(x),
    }


def distilled(kind: str, impl: Any, *given: Any) -> Tensor:
    """Ours of the same."""
    if kind == "softmax":
        return multimodal_distillation_loss(*given, impl=impl)
    loss: Any = functional.sigmoid_distillation_loss
    return cast(Tensor, loss(*given[:3], -1.0, *given[3:], -1.0, impl=impl))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_gradients_are_right_where_logs_of_probabilities_differ_by_one(
    kind: str, impl: Any, dtype: torch.dtype, scale: float
) -> None:
    """As those of features made by hand do; some functions of torch have no gradient at their bounds."""
    y = torch.eye(2, dtype=dtype)
    x, same = (y.clone().requires_grad_() for _ in range(2))
    distilled(kind, impl, x, y, scale, y.flip(0), y, scale).backward()
    divergences(same, y, scale, y.flip(0), y, scale)[kind].backward()
    assert_close(x.grad, same.grad)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # in torch's own forward mode
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_second_derivatives_of_the_dense_form_are_right_where_student_and_teacher_agree(kind: str) -> None:
    """There the divergence is 0, and its Hessian is Fisher's matrix."""
    x, y = unit_rows(4, 3, 0), unit_rows(4, 3, 1)
    hessian = torch.func.hessian(lambda of: distilled(kind, "dense", of, y, 3.0, x, y, 3.0))(x)
    expected = torch.func.hessian(lambda of: divergences(of, y, 3.0, x, y, 3.0)[kind])(x)
    assert_close(hessian, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", ["auto", "dense"])
@pytest.mark.parametrize(
    ("direction", "labelled"), [("both", True), ("image_to_text", True), ("text_to_image", True), ("both", False)]
)
def test_compiles_into_one_graph_and_exports_with_any_sizes(direction: Any, impl: Any, labelled: bool) -> None:
    """Images and texts of sizes of their own, with a gradient and without (an evaluation)."""

    class Loss(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor, *labels: Any) -> Tensor:
            options: Any = {"labels": labels if labelled else None, "direction": direction, "impl": impl}
            return multimodal_contrastive_loss(x, y, 5.0, **options)

    def inputs(n: int, m: int) -> tuple[Tensor, ...]:
        return unit_rows(n, 3, 0), unit_rows(m, 3, 1), *((torch.arange(n) % m, torch.arange(m)) if labelled else ())

    n, m = torch.export.Dim("n", min=2, max=64), torch.export.Dim("m", min=65, max=4096)
    shapes = ({0: n}, {0: m}, *([({0: n}, {0: m})] if labelled else []))
    program = torch.export.export(Loss(), inputs(6, 70), dynamic_shapes=shapes).module()
    torch.compiler.reset()
    compiled: Any = torch.compile(Loss(), fullgraph=True, backend="aot_eager")
    for sizes in ((2, 65), (6, 70), (11, 80)):
        assert_close(program(*inputs(*sizes)), Loss()(*inputs(*sizes)))
    assert_close(compiled(*inputs(6, 70)), Loss()(*inputs(6, 70)))
    each = [rows.requires_grad_() if rows.is_floating_point() else rows for rows in inputs(6, 70)]
    assert_close(*(oracles.gradients(loss(*each), *each[:2]) for loss in (compiled, Loss())))


def test_a_bank_of_classes_exports_with_batches_of_any_size() -> None:
    """Fewer images than classes or more."""

    class Loss(torch.nn.Module):
        def forward(self, images: Tensor, target: Tensor) -> Tensor:
            labels = target, torch.arange(6)
            return multimodal_contrastive_loss(images, torch.eye(6), 5.0, labels=labels, direction="image_to_text")

    def inputs(n: int) -> tuple[Tensor, Tensor]:
        return unit_rows(n, 6, 0, torch.float32), torch.arange(n) % 6

    size = {0: torch.export.Dim("n", min=2, max=4096)}
    program = torch.export.export(Loss(), inputs(8), dynamic_shapes=(size, size)).module()
    for n in (3, 8, 20):
        assert_close(program(*inputs(n)), Loss()(*inputs(n)))


def test_an_image_without_a_positive_is_no_number_where_values_are_not_looked_at() -> None:
    """NaN in a graph, and an error where values are seen (trap 48)."""
    image, text = unit_rows(3, 4, 0), unit_rows(5, 4, 1)
    labels = torch.tensor([0, 9, 1]), torch.arange(5)

    def loss(direction: Any) -> Tensor:
        return multimodal_contrastive_loss(image, text, 5.0, labels=labels, direction=direction)

    torch.compiler.reset()
    compiled: Any = torch.compile(loss, fullgraph=True, backend="eager")
    for direction in ("both", "image_to_text"):
        assert compiled(direction).isnan()
        with pytest.raises(ValueError, match=r"^labels must give each image .* got none for 1 of 3 images; add texts"):
            loss(direction)
    assert_close(compiled("text_to_image"), loss("text_to_image"))


def test_one_direction_asks_for_its_statistics_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text to image is image to text with the two exchanged; directions that meet in a sum share a pass."""
    sweeps: list[tuple[int, bool]] = []
    original = kernels.operators.softmax_statistics

    def noted(student: Any, *others: Any, columns: bool, **options: Any) -> Any:
        sweeps.append((len(student.x), columns))
        return original(student, *others, columns=columns, **options)

    monkeypatch.setattr(kernels.operators, "softmax_statistics", noted)
    image, text, teacher = unit_rows(5, 3, 0), unit_rows(8, 3, 1), (unit_rows(5, 3, 2), unit_rows(8, 3, 3), 4.0)
    of_images, of_texts, both = (5, False), (8, False), (5, True)

    def asked(first: Any, second: Any, temperature: float = 1.0) -> list[tuple[int, bool]]:
        sweeps.clear()
        distillation = MultimodalDistillationLoss(direction=second, temperature=temperature)
        (MultimodalContrastiveLoss(direction=first) + distillation)(image, text, 5.0, *teacher)
        return list(sweeps)

    assert asked("image_to_text", "image_to_text") == [of_images]
    assert asked("text_to_image", "text_to_image") == [of_texts]
    assert asked("text_to_image", "image_to_text") == asked("both", "text_to_image") == [both]
    assert asked("text_to_image", "image_to_text", temperature=2.0) == [of_texts, of_images]
