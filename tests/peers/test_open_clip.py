"""open_clip's losses on the same features, up to the conversions that the documentation gives."""

from __future__ import annotations

import inspect
from typing import Any

import open_clip_train.main as trainer
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_clip.loss import ClipLoss, CoCaLoss, DistillClipLoss
from strategies import Pairs, paired_features, student_and_teacher
from torch import Tensor
from torch.testing import assert_close

from calrobust import MultimodalContrastiveLoss, MultimodalDistillationLoss
from calrobust.integrations.open_clip import OpenClipLoss

IMPLS = ("auto", "dense", "tiled")


def differentiable(pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """The three arguments, each asking for a gradient."""
    scale = torch.tensor(pairs.scale, dtype=torch.float64)
    return pairs.image.requires_grad_(), pairs.text.requires_grad_(), scale.requires_grad_()


@given(pairs=paired_features(), impl=st.sampled_from(IMPLS))
def test_contrastive_loss_is_clip_loss(pairs: Pairs, impl: Any) -> None:
    """In value and in the gradients of features and logit scale."""
    inputs = differentiable(pairs)
    ours, theirs = MultimodalContrastiveLoss(impl=impl)(*inputs), ClipLoss()(*inputs)
    assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for a, b in zip(oracles.gradients(ours, *inputs), oracles.gradients(theirs, *inputs), strict=True):
        assert_close(a, b, rtol=1e-10, atol=1e-10 * max(1.0, pairs.scale))


@given(models=student_and_teacher(), impl=st.sampled_from(IMPLS), weight=st.floats(0.1, 3.0))
def test_distillation_is_twice_distill_clip_loss_less_the_entropy(
    models: tuple[Pairs, Pairs], impl: Any, weight: float
) -> None:
    """Their directions are averaged and hold the teacher's entropy: weight w here is 2w there (traps 2 and 3)."""
    student, (teacher_image, teacher_text, teacher_scale) = models
    inputs = differentiable(student)
    teacher = (teacher_image, teacher_text, torch.tensor(teacher_scale, dtype=torch.float64))
    t = teacher_scale * teacher_image @ teacher_text.T
    entropy = torch.stack([-(p.exp() * p).sum(1).mean() for p in (t.log_softmax(1), t.T.log_softmax(1))]).sum()
    ours = (MultimodalContrastiveLoss(impl=impl) + weight * MultimodalDistillationLoss(impl=impl))(*inputs, *teacher)
    contrastive, distillation = DistillClipLoss()(*inputs, *teacher)
    theirs = contrastive + 2 * weight * distillation
    assert_close(ours, theirs - weight * entropy, rtol=1e-10, atol=1e-9)
    for a, b in zip(oracles.gradients(ours, *inputs), oracles.gradients(theirs, *inputs), strict=True):
        assert_close(a, b, rtol=1e-10, atol=1e-9 * max(1.0, student.scale))


@pytest.mark.parametrize("impl", IMPLS)
def test_agrees_on_the_output_of_a_real_model(impl: Any) -> None:
    """The forward pass of an open_clip CLIP is the loss's argument list."""
    import open_clip

    vision = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    model = open_clip.model.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)
    images, texts = torch.rand(6, 3, 16, 16), torch.randint(1, 64, (6, 8))
    ours = MultimodalContrastiveLoss(impl=impl)(*model(images, texts))
    assert_close(ours, ClipLoss()(*model(images, texts)))
    ours.backward()
    assert model.logit_scale.grad is not None


def test_the_terms_of_the_integration_are_theirs_under_one_other_name() -> None:
    """``distillation_loss`` where they have ``distill_loss``."""
    inputs = {"image_features": torch.eye(2), "text_features": torch.eye(2), "logit_scale": torch.tensor(1.0)}
    inputs |= {f"dist_{name}": value for name, value in inputs.items()}
    ours = OpenClipLoss(MultimodalContrastiveLoss() + MultimodalDistillationLoss())(**inputs, output_dict=True)
    theirs = DistillClipLoss()(**inputs, output_dict=True)
    assert {"distill_loss" if name == "distillation_loss" else name for name in ours} == theirs.keys()
    terms = (MultimodalContrastiveLoss() + 2 * MultimodalDistillationLoss()).terms(*inputs.values())
    assert list(terms) == ["contrastive", "distillation"]


def test_options_of_theirs_and_ours_are_others() -> None:
    """Theirs say how to gather; ours say what is contrasted, and gather with one flag."""
    theirs = ("local_loss", "gather_with_grad", "cache_labels", "rank", "world_size", "use_horovod")
    ours = ("gather", "group", "label_smoothing", "reduction", "memory_budget")
    assert tuple(inspect.signature(ClipLoss).parameters) == theirs
    losses: tuple[tuple[Any, tuple[str, ...]], ...] = (ClipLoss, ours), (MultimodalContrastiveLoss, theirs)
    for loss, others in losses:
        for name in others:
            with pytest.raises(TypeError, match=r"argument|option"):
                loss(**{name: True})
    features = torch.eye(3)
    with pytest.raises(TypeError, match="labels"):
        ClipLoss()(features, features, 1.0, labels=torch.zeros(3))
    criterion = MultimodalContrastiveLoss(
        gather=False, group=None, label_smoothing=0.1, reduction="sum", memory_budget=2**20
    )
    assert criterion(features, features, 1.0, labels=torch.zeros(3, dtype=torch.int64)).ndim == 0


def test_the_trainer_looks_its_loss_up_under_the_name_that_is_assigned() -> None:
    """``create_loss`` in ``open_clip_train.main``, in the version that is installed; later ones make it elsewhere."""
    source = inspect.getsource(trainer)
    assert "loss = create_loss(args)" in source
    assert "create_task" not in source
    assert callable(trainer.create_loss)


def test_a_coca_is_a_contrastive_loss_and_a_caption_loss() -> None:
    """By the same names, with the same values."""
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, Any] = {"image_features": torch.eye(2), "text_features": torch.eye(2), "logit_scale": 3.0}
    inputs["logits"] = torch.randn(2, 5, 7, generator=generator)
    inputs["labels"] = torch.randint(1, 7, (2, 5), generator=generator)
    ours = OpenClipLoss(MultimodalContrastiveLoss(), caption_weight=2.0)(**inputs, output_dict=True)
    theirs = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)(**inputs, output_dict=True)
    assert_close(ours, theirs)
