"""MKD and CaRot's sum against their formulas."""

from __future__ import annotations

import math
from typing import Any

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Pairs, class_labels, fractions, seeds, student_and_teacher, unit_rows
from torch.testing import assert_close

from calrobust.functional import carot_loss, multimodal_contrastive_loss, multimodal_distillation_loss

IMPLS = ("auto", "dense", "tiled")


@given(
    models=student_and_teacher(),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    impl=st.sampled_from(IMPLS),
    seed=seeds(),
)
def test_value_and_gradients_are_those_of_the_formula(
    models: tuple[Pairs, Pairs], temperature: float, impl: Any, seed: int
) -> None:
    """Per pair and with any upstream gradient, for a teacher of another width and scale."""
    student, teacher = models
    image, text = student.image.requires_grad_(), student.text.requires_grad_()
    scale = torch.tensor(student.scale, dtype=torch.float64, requires_grad=True)
    weights = unit_rows(1, len(image), seed)[0]
    ours = multimodal_distillation_loss(
        image, text, scale, *teacher, temperature=temperature, reduction="none", impl=impl
    )
    theirs = oracles.distillation((image, text, scale), teacher, temperature)
    assert_close(ours, theirs, rtol=1e-10, atol=1e-10 * temperature**2)
    inputs = (image, text, scale)
    for a, b in zip(
        oracles.gradients(weights @ ours, *inputs), oracles.gradients(weights @ theirs, *inputs), strict=True
    ):
        assert_close(a, b, rtol=1e-10, atol=1e-10 * max(1.0, student.scale * temperature))


@given(
    models=student_and_teacher(),
    smoothing=fractions(),
    weight=st.floats(-2, 10),
    impl=st.sampled_from(IMPLS),
    seed=seeds(),
)
def test_carot_is_the_sum_of_its_parts(
    models: tuple[Pairs, Pairs], smoothing: float, weight: float, impl: Any, seed: int
) -> None:
    """MCL with smoothing and labels, plus the weight times MKD, in value and gradient."""
    student, teacher = models
    image, text = student.image.requires_grad_(), student.text.requires_grad_()
    scale = torch.tensor(student.scale, dtype=torch.float64, requires_grad=True)
    labels = class_labels(len(image), seed)
    ours = carot_loss(
        image, text, scale, *teacher, label_smoothing=smoothing, distillation_weight=weight, labels=labels, impl=impl
    )
    theirs = (
        oracles.contrastive(image, text, scale, labels=labels, smoothing=smoothing)
        + weight * oracles.distillation((image, text, scale), teacher)
    ).mean()
    assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    inputs = (image, text, scale)
    for a, b in zip(oracles.gradients(ours, *inputs), oracles.gradients(theirs, *inputs), strict=True):
        assert_close(a, b, rtol=1e-10, atol=1e-9 * max(1.0, student.scale))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_is_zero_with_zero_gradient_where_teacher_and_student_agree(dtype: torch.dtype, impl: Any) -> None:
    """A KL, not a cross-entropy: the value does not carry the teacher's entropy (trap 2)."""
    image, text = unit_rows(20, 6, 0, dtype).requires_grad_(), unit_rows(20, 6, 1, dtype).requires_grad_()
    loss = multimodal_distillation_loss(image, text, 50.0, image, text, 50.0, impl=impl)
    assert loss.item() == 0
    for gradient in oracles.gradients(loss, image, text):
        assert gradient.abs().max().item() <= {torch.float64: 1e-13}.get(dtype, 1e-4 if impl == "dense" else 0)


def test_the_two_directions_are_summed() -> None:
    """A certain teacher and a flat student: log 2 from each direction (trap 3)."""
    image = text = torch.eye(2, dtype=torch.float64)
    loss = multimodal_distillation_loss(image, text, 1e-9, image, text, 1e3)
    assert_close(loss, torch.tensor(2 * math.log(2), dtype=torch.float64), rtol=1e-8, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_teacher_never_receives_a_gradient(impl: Any) -> None:
    """Neither its features nor its logit scale, even if they ask for one."""
    student = (unit_rows(6, 4, 0).requires_grad_(), unit_rows(6, 4, 1), 10.0)
    teacher = [
        unit_rows(6, 4, 2).requires_grad_(),
        unit_rows(6, 4, 3).requires_grad_(),
        torch.tensor(5.0, dtype=torch.float64, requires_grad=True),
    ]
    multimodal_distillation_loss(*student, *teacher, impl=impl).backward()
    assert student[0].grad is not None
    assert all(t.grad is None for t in teacher)


@given(models=student_and_teacher(), seed=seeds())
def test_does_not_depend_on_the_order_of_pairs_nor_on_which_modality_comes_first(
    models: tuple[Pairs, Pairs], seed: int
) -> None:
    """The same permutation, or the same swap, of student's and teacher's pairs leaves the value."""
    student, teacher = models
    order = torch.randperm(len(student.image), generator=torch.Generator().manual_seed(seed))
    value = multimodal_distillation_loss(*student, *teacher)
    permuted = [Pairs(image[order], text[order], scale) for image, text, scale in models]
    swapped = [Pairs(text, image, scale) for image, text, scale in models]
    for a, b in (permuted, swapped):
        assert_close(multimodal_distillation_loss(*a, *b), value, rtol=1e-9, atol=1e-9)


@given(models=student_and_teacher())
def test_is_never_negative(models: tuple[Pairs, Pairs]) -> None:
    """A divergence, up to rounding."""
    student, teacher = models
    values = multimodal_distillation_loss(*student, *teacher, reduction="none")
    assert values.min().item() >= -1e-12 * max(1.0, student.scale)


@given(models=student_and_teacher(), temperature=st.sampled_from([0.5, 2.0, 10.0]))
def test_temperature_divides_both_scales_and_multiplies_by_its_square(
    models: tuple[Pairs, Pairs], temperature: float
) -> None:
    """Hinton's convention, so that gradients keep their size."""
    (image, text, scale), (teacher_image, teacher_text, teacher_scale) = models
    softened = multimodal_distillation_loss(
        image, text, scale / temperature, teacher_image, teacher_text, teacher_scale / temperature
    )
    loss = multimodal_distillation_loss(
        image, text, scale, teacher_image, teacher_text, teacher_scale, temperature=temperature
    )
    assert_close(loss, temperature**2 * softened)


def test_a_float64_teacher_raises_the_precision_of_the_student() -> None:
    """The wider dtype of the two decides, and the student's gradient keeps the student's dtype."""
    image, text = unit_rows(4, 3, 0, torch.float32).requires_grad_(), unit_rows(4, 3, 1, torch.float32)
    loss = multimodal_distillation_loss(image, text, 1.0, unit_rows(4, 3, 2), unit_rows(4, 3, 3), 1.0)
    assert loss.dtype == torch.float64
    (gradient,) = oracles.gradients(loss, image)
    assert gradient.dtype == torch.float32


def test_a_low_precision_logit_scale_is_divided_in_float32() -> None:
    """A bfloat16 parameter of 100 at a temperature of 3 is 33.3, not the 33.25 of its dtype."""
    image, text, teacher_image, teacher_text = (unit_rows(9, 4, seed, torch.float32) for seed in range(4))
    ours, expected = (
        multimodal_distillation_loss(image, text, scale, teacher_image, teacher_text, scale, temperature=3.0)
        for scale in (torch.tensor(100.0, dtype=torch.bfloat16), torch.tensor(100.0))
    )
    assert_close(ours, expected)


@pytest.mark.parametrize(("scale", "temperature"), [(1e39, 1.0), (1.0, 1e-39), (1e300, 1e-300), (1.0, 1e200)])
def test_what_float32_cannot_hold_gives_no_finite_wrong_value(scale: float, temperature: float) -> None:
    """A scale or a temperature beyond its range: NaN, infinity or a true 0, as far as the formula goes."""
    rows = unit_rows(4, 3, 0, torch.float32), unit_rows(4, 3, 1, torch.float32)
    loss = multimodal_distillation_loss(*rows, scale, *rows[::-1], 1.0, temperature=temperature)
    assert not loss.isfinite() or loss == 0


def test_contrastive_loss_is_what_remains_at_weight_zero() -> None:
    """A weight of 0 leaves MCL."""
    student, teacher = (unit_rows(5, 4, 0), unit_rows(5, 4, 1), 9.0), (unit_rows(5, 4, 2), unit_rows(5, 4, 3), 9.0)
    loss = carot_loss(*student, *teacher, label_smoothing=0.1, distillation_weight=0.0)
    assert_close(loss, multimodal_contrastive_loss(*student, label_smoothing=0.1))
