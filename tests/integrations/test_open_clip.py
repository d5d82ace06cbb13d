"""The loss under open_clip's calling conventions."""

from __future__ import annotations

import oracles
import pytest
import torch
from open_clip.loss import ClipLoss, DistillClipLoss
from strategies import unit_rows
from torch import Tensor, nn
from torch.testing import assert_close

from calrobust import MultimodalContrastiveLoss, MultimodalDistillationLoss, OrthogonalityLoss
from calrobust.integrations.open_clip import OpenClipLoss

CONTRASTIVE, CAROT = MultimodalContrastiveLoss(), MultimodalContrastiveLoss() + 1.5 * MultimodalDistillationLoss()


def features(seed: int, width: int = 6, scale: float = 20.0) -> dict[str, Tensor]:
    """What an open_clip model returns with ``output_dict=True``, in float64."""
    return {
        "image_features": unit_rows(5, width, seed).requires_grad_(),
        "text_features": unit_rows(5, width, seed + 1).requires_grad_(),
        "logit_scale": torch.tensor(scale, dtype=torch.float64, requires_grad=True),
    }


def as_teacher(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names that the trainer gives the outputs of its distillation model."""
    return {f"dist_{name}": value.detach() for name, value in outputs.items()}


def test_stands_in_for_clip_loss() -> None:
    """Same call, same dict key, same value and gradients."""
    student = features(0)
    for arguments, keywords in (((), student), (tuple(student.values()), {})):
        ours, theirs = OpenClipLoss(CONTRASTIVE)(*arguments, **keywords), ClipLoss()(*arguments, **keywords)
        assert_close(ours, theirs)
    named, peer = (loss(**student, output_dict=True) for loss in (OpenClipLoss(CONTRASTIVE), ClipLoss()))
    assert named.keys() == peer.keys()
    inputs = tuple(student.values())
    gradients = (oracles.gradients(loss["contrastive_loss"], *inputs) for loss in (named, peer))
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b)


def test_stands_in_for_distill_clip_loss() -> None:
    """Takes its arguments by name and by place; its gradient is theirs with twice the weight (trap 3)."""
    student, teacher = features(0), as_teacher(features(2, width=4, scale=9.0))
    inputs = tuple(student.values())
    named = OpenClipLoss(CAROT)(**student, **teacher, output_dict=True)
    assert list(named) == ["contrastive_loss", "distillation_loss"]
    assert_close(
        OpenClipLoss(CAROT)(*inputs, *teacher.values()), named["contrastive_loss"] + named["distillation_loss"]
    )
    contrastive, distillation = DistillClipLoss()(**student, **teacher)
    ours = oracles.gradients(OpenClipLoss(CAROT)(**student, **teacher), *inputs)
    for a, b in zip(ours, oracles.gradients(contrastive + 3 * distillation, *inputs), strict=True):
        assert_close(a, b)


def test_the_terms_that_are_logged_add_up_to_what_is_trained() -> None:
    """The trainer sums the values of the dict."""
    student, teacher = features(0), as_teacher(features(2))
    losses = OpenClipLoss(2 * CAROT)(**student, **teacher, output_dict=True)
    assert_close(sum(losses.values()), (2 * CAROT)(*student.values(), *teacher.values()))


def test_a_logit_bias_changes_nothing_and_has_a_gradient_of_zero() -> None:
    """As in ClipLoss, where it costs an addition to every logit."""
    student, bias = features(0), torch.tensor([-10.0], dtype=torch.float64, requires_grad=True)
    for output_dict in (False, True):
        ours, theirs = (
            loss(**student, logit_bias=bias, output_dict=output_dict)
            for loss in (OpenClipLoss(CONTRASTIVE), ClipLoss())
        )
        assert_close(ours, theirs)
    (gradient,) = torch.autograd.grad(OpenClipLoss(CONTRASTIVE)(**student, logit_bias=bias), bias)
    assert_close(gradient, torch.zeros_like(bias), rtol=0, atol=0)
    teacher = as_teacher({**features(2), "logit_bias": bias})
    OpenClipLoss(CAROT)(**student, logit_bias=bias, **teacher)


@pytest.mark.parametrize("given", [{}, {"dist_image_features", "dist_text_features"}])
def test_a_teacher_that_does_not_come_is_an_error(given: set[str]) -> None:
    """As with --accum-freq, where the trainer leaves its distillation model out."""
    teacher = {name: value for name, value in as_teacher(features(2)).items() if name in given}
    with pytest.raises(TypeError, match="needs teacher_image_features"):
        OpenClipLoss(CAROT)(**features(0), **teacher)


def test_a_teacher_that_nobody_asked_for_is_an_error() -> None:
    """A second model that runs for nothing is worth knowing of."""
    with pytest.raises(TypeError, match="no distillation term"):
        OpenClipLoss(2 * CONTRASTIVE)(**features(0), **as_teacher(features(2)))


@pytest.mark.parametrize("criterion", [OrthogonalityLoss(), nn.CrossEntropyLoss(), 1.0])
def test_what_is_no_loss_on_pairs_is_refused(criterion: object) -> None:
    """Where it is passed, not in the first step."""
    with pytest.raises(TypeError, match=r"criterion must be of type PairLoss, got .*MultimodalContrastiveLoss"):
        OpenClipLoss(criterion)  # type: ignore[arg-type]  # the wrong type is the test
