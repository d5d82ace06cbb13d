"""Sigmoid models of open_clip and Transformers, trained with our losses in the loops of these libraries."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.loss import SigLipLoss
from open_clip_train.train import train_one_epoch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import Siglip2Config, Siglip2Model, SiglipConfig, SiglipModel, Trainer, TrainingArguments

from calrobust import EMATeacher, SigmoidContrastiveLoss, SigmoidDistillationLoss
from calrobust.integrations.open_clip import OpenClipLoss
from calrobust.integrations.transformers import EMATeacherCallback, clip_features


class Batches:
    """What open_clip's loop reads from: three batches of four pairs."""

    num_batches, num_samples = 3, 12

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            yield torch.rand(4, 3, 16, 16, generator=generator), torch.randint(1, 64, (4, 8), generator=generator)


def open_clip_model() -> nn.Module:
    """A tiny one that returns a logit bias."""
    torch.manual_seed(0)
    tower = {"width": 32, "layers": 1}
    vision = open_clip.CLIPVisionCfg(image_size=16, patch_size=8, head_width=16, **tower)
    text = open_clip.CLIPTextCfg(context_length=8, vocab_size=64, heads=2, **tower)
    biased = {"init_logit_scale": 2.3, "init_logit_bias": -5, "output_dict": True}
    model: nn.Module = open_clip.model.CustomTextCLIP(16, vision, text, **biased)
    return model


def train_with_open_clip(model: nn.Module, loss: nn.Module, teacher: nn.Module | None = None) -> nn.Module:
    """One epoch of its own loop."""
    options = Namespace(
        **{
            "device": "cpu",
            "precision": "fp32",
            "accum_freq": 1,
            "distill": teacher is not None,
            "grad_clip_norm": None,
        },
        **{"skip_scheduler": True, "log_every_n_steps": 1, "batch_size": 4, "world_size": 1, "rank": 0, "wandb": False},
        **{"distributed": False, "horovod": False},
    )
    data = {"train": Namespace(dataloader=Batches(), set_epoch=lambda epoch: None)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_one_epoch(model, data, loss, 0, optimizer, None, None, teacher, options)
    return model


def test_open_clip_trains_a_sigmoid_model_as_with_its_own_loss() -> None:
    """To the same weights, bias and scale; with a teacher too it learns."""
    start = open_clip_model()
    ours = train_with_open_clip(copy.deepcopy(start), OpenClipLoss(SigmoidContrastiveLoss()))
    theirs = train_with_open_clip(copy.deepcopy(start), SigLipLoss())
    assert_close(ours.state_dict(), theirs.state_dict())
    assert ours.get_parameter("logit_bias") != start.get_parameter("logit_bias")
    criterion = SigmoidContrastiveLoss() + 2.0 * SigmoidDistillationLoss()
    taught = train_with_open_clip(copy.deepcopy(start), OpenClipLoss(criterion), EMATeacher(start))
    for name, parameter in taught.named_parameters():
        assert parameter.isfinite().all(), name
        assert not torch.equal(parameter, start.get_parameter(name)) or parameter.grad == 0, name


TOWER = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
TEXT = {**TOWER, "vocab_size": 9, "bos_token_id": 7, "eos_token_id": 8, "pad_token_id": 0, "projection_size": 8}


def siglip() -> tuple[nn.Module, dict[str, Tensor]]:
    """Whole pictures go in."""
    vision = {**TOWER, "image_size": 4, "patch_size": 2}
    return SiglipModel(SiglipConfig(text_config=TEXT, vision_config=vision)), {"pixel_values": torch.rand(12, 3, 4, 4)}


def siglip2() -> tuple[nn.Module, dict[str, Tensor]]:
    """Patches of pictures of any shape go in."""
    model = Siglip2Model(Siglip2Config(text_config=TEXT, vision_config={**TOWER, "num_patches": 4, "patch_size": 2}))
    pictures = {
        "pixel_values": torch.rand(12, 4, 12),
        "pixel_attention_mask": torch.ones(12, 4, dtype=torch.int64),
        "spatial_shapes": torch.tensor([[2, 2]] * 12),
    }
    return model, pictures


class SigmoidTrainer(Trainer):
    """A Trainer with our loss, and with the model's own where there is no criterion."""

    criterion: Any = None
    teacher: EMATeacher | None = None

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Called by every training step."""
        if self.criterion is None:
            return model(**inputs, return_loss=True).loss
        taught: tuple[Tensor, ...] = ()
        if self.teacher is not None:
            taught = clip_features(self.teacher(**inputs), self.teacher)
        return self.criterion(*clip_features(model(**inputs), model), *taught)


@pytest.mark.parametrize("build", [siglip, siglip2])
def test_transformers_trains_a_sigmoid_model_as_with_its_own_loss(build: Any, tmp_path: Path) -> None:
    """To the same weights, bias and scale; with a teacher too it learns."""
    torch.manual_seed(0)
    start, pictures = build()
    words = torch.randint(1, 9, (12, 3))
    data = [{"input_ids": words[k], **{name: v[k] for name, v in pictures.items()}} for k in range(12)]

    def train(criterion: Any, *, teach: bool = False) -> nn.Module:
        model: nn.Module = copy.deepcopy(start)
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=3,
            optim="sgd",
            learning_rate=0.1,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        teacher = EMATeacher(start) if teach else None
        callbacks: Any = [EMATeacherCallback(teacher, model)] if teacher is not None else []
        trainer = SigmoidTrainer(model, arguments, train_dataset=data, callbacks=callbacks)
        trainer.criterion, trainer.teacher = criterion, teacher
        trainer.train()
        return model

    ours, theirs = train(SigmoidContrastiveLoss()), train(None)
    assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-6)
    assert ours.get_parameter("logit_bias") != start.get_parameter("logit_bias")
    taught = train(SigmoidContrastiveLoss() + 2.0 * SigmoidDistillationLoss(), teach=True)
    assert all(parameter.isfinite().all() for parameter in taught.parameters())
    assert not torch.equal(taught.get_parameter("logit_bias"), ours.get_parameter("logit_bias"))
