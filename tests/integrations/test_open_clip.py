"""The loss under open_clip's calling conventions."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import open_clip
import oracles
import pytest
import torch
from open_clip.loss import ClipLoss, CoCaLoss, DistillClipLoss
from strategies import unit_rows
from torch import Tensor, nn
from torch.testing import assert_close

from calrobust import EMATeacher, MultimodalContrastiveLoss, MultimodalDistillationLoss
from calrobust.integrations.open_clip import OpenClipLoss
from calrobust.losses import PairLoss

CONTRASTIVE, CAROT = MultimodalContrastiveLoss(), MultimodalContrastiveLoss() + 1.5 * MultimodalDistillationLoss()


def features(seed: int, width: int = 6, scale: float = 20.0) -> dict[str, Tensor]:
    """What an open_clip model returns with ``output_dict=True``, in float64."""
    return {
        "image_features": unit_rows(5, width, seed).requires_grad_(),
        "text_features": unit_rows(5, width, seed + 1).requires_grad_(),
        "logit_scale": torch.tensor(scale, dtype=torch.float64, requires_grad=True),
    }


def as_teacher(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs under the names that the trainer gives those of its distillation model."""
    return {f"dist_{name}": value.detach() for name, value in outputs.items()}


def test_stands_in_for_clip_loss() -> None:
    """It has the same call, dict key, value and gradients."""
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
    """The same holds for ClipLoss, where it costs an addition to every logit."""
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


@pytest.mark.parametrize("student_has_bias", [False, True])
@pytest.mark.parametrize("teacher_has_bias", [None, False, True])
def test_what_a_siglip_model_returns_goes_in_by_place_and_by_name(
    student_has_bias: bool, teacher_has_bias: bool | None
) -> None:
    """A model gives three values or four, and so does its teacher; the bias is not taken for features."""
    bias = {"logit_bias": torch.tensor(-10.0, dtype=torch.float64, requires_grad=True)}
    plain, plain_teacher = features(0), features(2)
    student = {**plain, **(bias if student_has_bias else {})}
    teacher = {} if teacher_has_bias is None else {**plain_teacher, **(bias if teacher_has_bias else {})}
    loss = OpenClipLoss(CAROT if teacher else CONTRASTIVE)
    by_place = loss(*student.values(), *(value.detach() for value in teacher.values()))
    assert_close(by_place, loss(**student, **as_teacher(teacher)))
    assert_close(by_place, loss(*plain.values(), *(plain_teacher.values() if teacher else ())))
    if student_has_bias:
        (gradient,) = torch.autograd.grad(by_place, bias["logit_bias"])
        assert gradient == 0


@pytest.mark.parametrize("has_teacher", [False, True])
def test_stands_in_for_coca_loss(has_teacher: bool) -> None:
    """It takes all that a CoCa returns: the contrastive loss uses its features, and captions have a loss too."""
    torch.manual_seed(0)
    tower = {"layers": 1, "width": 16, "heads": 1}
    text = {"context_length": 6, "vocab_size": 20, "embed_cls": True, "output_tokens": True, **tower}
    vision = {"image_size": 8, "patch_size": 4, "attentional_pool": True, "attn_pooler_heads": 1, "output_tokens": True}
    model = open_clip.coca_model.CoCa(
        16,
        {"context_length": 6, "vocab_size": 20, **tower},
        text,
        {"layers": 1, "width": 16, "head_width": 16, **vision},
    )
    for parameter in model.parameters():  # some of which open_clip leaves as memory was
        nn.init.normal_(parameter, std=0.1)
    texts = torch.randint(1, 20, (4, 6))
    outputs = model(torch.randn(4, 3, 8, 8), texts)
    if "labels" not in outputs:  # the task of open_clip 4 makes them
        outputs |= {"logits": outputs["logits"][:, :-1], "labels": texts[:, 1:]}
    expected = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)(**outputs, output_dict=True)
    teacher = as_teacher(outputs) if has_teacher else {}
    criterion = CAROT if has_teacher else CONTRASTIVE
    ours = OpenClipLoss(criterion, caption_weight=2.0)(**outputs, **teacher, output_dict=True)
    if has_teacher:
        assert_close(ours.pop("distillation_loss"), torch.tensor(0.0), rtol=0, atol=1e-5)
    assert_close(ours, expected)
    with pytest.raises(TypeError, match=r"caption_weight must be given .*caption_weight=2.0\), or 0.0"):
        OpenClipLoss(criterion)(**outputs, **teacher)
    del outputs["labels"]  # as open_clip 4's task that distils does
    with pytest.raises(
        TypeError, match=r"labels must be given with logits of captions; .*caption_weight=0.0\) for a t"
    ):
        OpenClipLoss(criterion, caption_weight=2.0)(**outputs, **teacher)
    untrained = OpenClipLoss(criterion, caption_weight=0.0)(**outputs, **teacher, output_dict=True)
    assert_close(untrained["contrastive_loss"], expected["contrastive_loss"])


def test_a_teacher_that_does_not_come_is_an_error_that_names_the_trainers_options() -> None:
    """With --accum-freq the trainer leaves its distillation model out."""
    with pytest.raises(TypeError, match=r"needs teacher_image_features.*; open_clip's .* never with --accum-freq"):
        OpenClipLoss(CAROT)(**features(0))
    teacher = as_teacher(features(2))
    del teacher["dist_logit_scale"]
    with pytest.raises(TypeError, match="needs teacher_image_features"):
        OpenClipLoss(CAROT)(**features(0), **teacher)


@pytest.mark.parametrize("criterion", [CONTRASTIVE, 2 * CONTRASTIVE])
def test_a_teacher_that_nobody_asked_for_is_an_error(criterion: PairLoss) -> None:
    """A second model would run for nothing."""
    student, teacher = features(0), as_teacher(features(2))
    for arguments, named in (((*student.values(), *teacher.values()), {}), ((), {**student, **teacher})):
        with pytest.raises(TypeError, match=r"; open_clip's .* with --distill-model"):
            OpenClipLoss(criterion)(*arguments, **named)


@pytest.mark.parametrize(
    ("home", "warned"), [("open_clip.factory", True), ("open_clip_trainer", False), (None, False), ("", False)]
)
def test_the_trainer_of_open_clip_4_that_would_never_call_it_is_named(
    home: str | None, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Assigning ``create_loss`` does nothing there; version 3, a trainer with another task and own loops are quiet."""
    main = SimpleNamespace() if home is None else SimpleNamespace(create_task=SimpleNamespace(__module__=home))
    monkeypatch.setitem(sys.modules, "open_clip_train.main", main if home != "" else None)
    with pytest.warns(UserWarning, match="never calls create_loss; .*task.loss") if warned else nullcontext():
        OpenClipLoss(CONTRASTIVE)


@pytest.mark.skipif(not hasattr(open_clip, "CLIPTask"), reason="open_clip 4, which has tasks, is not on PyPI")
def test_tasks_of_open_clip_4_train_as_with_their_own_losses() -> None:
    """A task gives the loss what its own loss gets, and a teacher that follows is its teacher."""
    vision = {"image_size": 8, "patch_size": 8, "layers": 1, "width": 16, "head_width": 16}
    text = {"context_length": 6, "vocab_size": 20, "layers": 1, "width": 16, "heads": 1}
    model = open_clip.CLIP(8, vision, text, output_dict=True)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    teacher = EMATeacher(model, decay=0.5)
    batch = {"image": torch.randn(4, 3, 8, 8), "text": torch.randint(1, 20, (4, 6))}
    tasks: Any = open_clip
    both = (OpenClipLoss(CONTRASTIVE), ClipLoss())
    ours, theirs = (tasks.CLIPTask(model, loss=loss).training_forward(batch)[0] for loss in both)
    assert_close(ours, theirs)
    task = tasks.DistillCLIPTask(model, teacher, loss=OpenClipLoss(CAROT))
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.1), []
    for _ in range(3):
        terms = task.training_forward(batch)[0]
        terms["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        teacher.update(model)
        losses.append(terms)
    assert losses[0]["distillation_loss"] < 1e-6 < losses[2]["distillation_loss"]
    assert losses[2]["contrastive_loss"] < losses[0]["contrastive_loss"]
    assert (teacher.step, task.training) == (3, True)
