"""The teacher beside a Trainer, and features out of Transformers' models."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel, Trainer, TrainingArguments

from calrobust import EMATeacher, MultimodalContrastiveLoss, MultimodalDistillationLoss
from calrobust.integrations.transformers import EMATeacherCallback, clip_features

TOWER = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
TEXT, VISION = {**TOWER, "vocab_size": 9, "eos_token_id": 8}, {**TOWER, "image_size": 4, "patch_size": 2}
INPUTS = {"input_ids": torch.tensor([[1, 8]] * 3), "pixel_values": torch.rand(3, 3, 4, 4)}


class Line(nn.Module):
    """A model that a Trainer can train."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Mean squared error."""
        return {"loss": (self.linear(x) - 1).square().mean()}


class Follower(EMATeacher):
    """Remembers what it was shown."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student, decay=0.5)
        self.seen: list[Tensor] = []

    def update(self, student: nn.Module) -> None:
        """Remembers the weight."""
        self.seen.append(student.get_parameter("linear.weight").detach().clone())
        super().update(student)


def trainer(
    folder: Path, teacher: EMATeacher, student: nn.Module, kind: type[Trainer] = Trainer, **options: Any
) -> Trainer:
    """Makes three steps an epoch, of two batches each."""
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        save_strategy="epoch",
        use_cpu=True,
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    data = [{"x": torch.tensor([float(i)])} for i in range(12)]
    callback = EMATeacherCallback(teacher, student)
    return kind(student, arguments, train_dataset=data, eval_dataset=data, callbacks=[callback])


def test_the_teacher_sees_each_step_and_no_batch_that_accumulates(tmp_path: Path) -> None:
    """Three steps of two batches are three updates, each with weights that have moved."""
    student = Line()
    teacher = Follower(student)
    start = student.linear.weight.detach().clone()
    trainer(tmp_path, teacher, student, num_train_epochs=1).train()
    assert len(teacher.seen) == teacher.step == 3
    for before, after in zip([start, *teacher.seen], teacher.seen, strict=False):
        assert not torch.equal(before, after)
    assert_close(teacher.seen[-1], student.linear.weight.detach())
    expected = start
    for weight in teacher.seen:
        expected = (expected + weight) / 2
    assert_close(teacher.module.get_parameter("linear.weight"), expected)


def test_the_student_is_the_model_that_the_trainer_trains(tmp_path: Path) -> None:
    """``model_init`` makes another one, which the teacher would not follow."""
    student = Line()
    run = trainer(tmp_path, EMATeacher(student), student, num_train_epochs=1)
    run.model_init = Line  # type: ignore[assignment]  # any model will do
    with pytest.raises(ValueError, match=r"student must be the Trainer's model or .*, got another Line; .* model_init"):
        run.train()


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch", "adamw_torch_fused"])
def test_a_step_that_the_scaler_skips_moves_no_teacher(tmp_path: Path, optim: str) -> None:
    """A fused optimiser is called for such a step, and Accelerate takes it for a step that was made."""

    class Overflowing(Line):
        calls = 0

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            """Has no finite gradient in the first step and in the third, of two batches each."""
            self.calls += 1
            return {"loss": super().forward(x)["loss"] * (torch.inf if self.calls in (1, 5) else 1)}

    class Scaling(Trainer):
        def create_accelerator_and_postprocess(self) -> None:
            """Adds the scaler, which Accelerate has on a GPU."""
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = torch.amp.GradScaler("cpu", growth_interval=2)

    student = Overflowing()
    start, teacher = student.linear.weight.detach().clone(), Follower(student)
    trainer(tmp_path, teacher, student, num_train_epochs=2, max_grad_norm=0, optim=optim, kind=Scaling).train()
    assert len(teacher.seen) == 4
    assert all(not torch.equal(a, b) for a, b in pairwise([start, *teacher.seen]))


def test_resumed_training_ends_where_training_at_one_go_does(tmp_path: Path) -> None:
    """The teacher and its counters are equal (trap 16)."""
    torch.manual_seed(0)
    student = Line()
    whole = EMATeacher(student)
    trainer(tmp_path / "whole", whole, student, num_train_epochs=2).train()

    torch.manual_seed(0)
    student = Line()
    first = EMATeacher(student)
    trainer(tmp_path / "parts", first, student, num_train_epochs=2, max_steps=3).train()
    student = Line()
    resumed = EMATeacher(student)
    trainer(tmp_path / "parts", resumed, student, num_train_epochs=2).train(resume_from_checkpoint=True)
    assert resumed.step == whole.step == 6
    assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_resuming_without_the_teacher_is_an_error(tmp_path: Path) -> None:
    """A new teacher never follows an old student silently (trap 16)."""
    student = Line()
    trainer(tmp_path, EMATeacher(student), student, num_train_epochs=1).train()
    (tmp_path / "checkpoint-3" / "teacher.pt").unlink()
    again = trainer(tmp_path, EMATeacher(student), student, num_train_epochs=2)
    with pytest.raises(
        FileNotFoundError,
        match=r"checkpoint-3 must hold the teacher as teacher.pt.*; copy all files of the resumed checkpo",
    ):
        again.train(resume_from_checkpoint=True)


def test_a_checkpoint_is_data_and_no_program(tmp_path: Path) -> None:
    """A file from elsewhere must not run code when it is loaded."""
    student = Line()
    trainer(tmp_path, EMATeacher(student), student, num_train_epochs=1).train()
    torch.save({"step": Path("not a tensor")}, tmp_path / "checkpoint-3" / "teacher.pt")
    with pytest.raises(UnpicklingError, match="Weights only load failed"):
        trainer(tmp_path, EMATeacher(student), student, num_train_epochs=2).train(resume_from_checkpoint=True)


def test_the_best_checkpoint_is_one_of_student_and_teacher(tmp_path: Path) -> None:
    """``load_best_model_at_end`` loads both of the same step, here the first of three (trap 42)."""
    student = Line()
    teacher = Follower(student)
    best = trainer(
        tmp_path,
        teacher,
        student,
        num_train_epochs=3,
        eval_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # so that training makes it worse
        save_total_limit=1,
    )
    best.can_return_loss = True
    best.train()
    assert len(teacher.seen) == 9
    assert_close(student.linear.weight.detach(), teacher.seen[2], rtol=0, atol=0)
    kept = torch.load(tmp_path / "checkpoint-3" / "teacher.pt", weights_only=True)
    assert_close(teacher.state_dict(), kept, rtol=0, atol=0)
    assert teacher.step == 3

    (tmp_path / "checkpoint-3" / "teacher.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-3 must hold the teacher as teacher.pt"):
        EMATeacherCallback(teacher, student).on_train_end(best.args, best.state, best.control)


def test_a_part_of_the_model_may_be_the_student(tmp_path: Path) -> None:
    """What the teacher copied is what it follows."""
    model = Line()
    teacher = EMATeacher(model.linear, decay=0.0)
    run = trainer(tmp_path, teacher, model, num_train_epochs=1)
    run.remove_callback(EMATeacherCallback)
    run.add_callback(EMATeacherCallback(teacher, model.linear))
    run.train()
    assert_close(teacher.module.state_dict(), model.linear.state_dict())


BERT = {"pad_token_id": 1, "bos_token_id": 0, "max_position_embeddings": 8}
PATCHES = {"pixel_values": torch.rand(3, 4, 12), "pixel_attention_mask": torch.ones(3, 4, dtype=torch.int64)}
SHARED: dict[str, Any] = {"text_config": TEXT, "vision_config": VISION, "projection_dim": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "Aimv2": SHARED,
    "Align": {
        "text_config": {**TEXT, **BERT},
        "vision_config": {"image_size": 32, "width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 16},
        "projection_dim": 32,
    },
    "AltCLIP": {**SHARED, "text_config": {**TEXT, **BERT, "project_dim": 4, "type_vocab_size": 1}},
    "Blip": {**SHARED, "text_config": {**TEXT, **BERT, "sep_token_id": 2}},
    "ChineseCLIP": {**SHARED, "text_config": {**TEXT, **BERT}},
    "CLIP": SHARED,
    "CLIPSeg": SHARED,
    "MetaClip2": SHARED,
    "OwlViT": SHARED,
    "PeVideo": {
        "text_config": {"model_type": "modernbert", **TEXT, **BERT},
        "video_config": {
            **TOWER,
            "head_dim": 8,
            "num_key_value_heads": 1,
            "vision_config": {
                "model_type": "timm_wrapper",
                "architecture": "vit_pe_core_tiny_patch16_384",
                "model_args": {"img_size": (16, 16), "depth": 1},
            },
        },
    },
    "Siglip": {"text_config": TEXT, "vision_config": VISION},
    "Siglip2": {"text_config": TEXT, "vision_config": {**TOWER, "patch_size": 2, "num_patches": 4}},
    "Tipsv2": {"text_config": TEXT, "vision_config": VISION},
    "VisionTextDualEncoder": {
        "text_config": {"model_type": "bert", **TEXT, **BERT},
        "vision_config": {"model_type": "vit", **VISION},
        "projection_dim": 4,
    },
}
FAMILIES = [family for family in CONFIGS if hasattr(transformers, f"{family}Model")]  # the oldest release lacks some
TAKES = {
    "Align": {**INPUTS, "pixel_values": torch.rand(3, 3, 32, 32)},
    "PeVideo": {"input_ids": INPUTS["input_ids"], "pixel_values_videos": torch.rand(3, 2, 3, 16, 16)},
    "Siglip2": {"input_ids": INPUTS["input_ids"], **PATCHES, "spatial_shapes": torch.tensor([[2, 2]] * 3)},
}


def made(family: str) -> Any:
    """A tiny random model in eval mode."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**CONFIGS[family])
    model = getattr(transformers, f"{family}Model")(config).eval()
    for parameter in model.parameters():  # some of which stay as memory was
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_that_the_models_own_logits_are_made_of(family: str) -> None:
    """Whether a family keeps the logarithm of its scale, the scale, a divisor or a bound, and whether it has a bias."""
    model = made(family)
    scalars = {name: one for name, one in model.named_parameters() if "." not in name and one.numel() == 1}
    for name, scalar in scalars.items():
        nn.init.constant_(scalar, 0.3 if name == "temperature" else 1.7)
    output = model(**TAKES.get(family, INPUTS))
    image_features, text_features, logit_scale, *biases = clip_features(output, model)
    if family != "PeVideo":  # which does not normalise
        for features in (image_features, text_features):
            assert_close(features.norm(dim=1), torch.ones(3))
    expected = output["logits_video_text" if family == "PeVideo" else "logits_per_image"]
    assert_close(logit_scale * image_features @ text_features.T + sum(biases), expected)
    assert len(biases) == len(scalars) - 1 == (family in ("PeVideo", "Siglip", "Siglip2"))
    for one in (logit_scale, *biases):
        assert one.shape == ()
    (logit_scale + sum(biases)).backward()
    assert all(scalar.grad is not None and scalar.grad != 0 for scalar in scalars.values())


@pytest.mark.parametrize("log_scale", [-1.0, 9.0])
def test_the_bound_of_a_scale_is_the_models_own(log_scale: float) -> None:
    """AIMv2 clamps the scale in its forward pass, from which a scale outside the bounds gets no gradient."""
    model = made("Aimv2")
    nn.init.constant_(model.logit_scale, log_scale)
    output = model(**INPUTS)
    image_features, text_features, logit_scale = clip_features(output, model)
    assert_close(logit_scale * image_features @ text_features.T, output.logits_per_image)
    assert_close(logit_scale.item(), 1.0 if log_scale < 0 else 100.0)


def test_features_of_a_wrapped_model() -> None:
    """A teacher's scale is its own and has no gradient; DataParallel hides the model likewise."""
    model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=4))
    teacher = EMATeacher(model)
    with torch.no_grad():
        model.logit_scale.add_(1)
    *_, student_scale = clip_features(model(**INPUTS), nn.DataParallel(model))
    *_, teacher_scale = clip_features(teacher(**INPUTS), teacher)
    assert_close(student_scale / teacher_scale, torch.tensor(1.0).exp())
    assert not teacher_scale.requires_grad


def test_siglip_trains_under_distributed_data_parallel(tmp_path: Path) -> None:
    """It waits for a gradient of every parameter, so the bias, which changes no softmax, needs one of zero."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        student = SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION))
        teacher, model = EMATeacher(student), nn.parallel.DistributedDataParallel(student)
        criterion = MultimodalContrastiveLoss() + MultimodalDistillationLoss()
        for _ in range(3):
            taught = clip_features(teacher(**INPUTS), teacher)
            criterion(*clip_features(model(**INPUTS), model), *taught).backward()
            teacher.update(model)
        assert student.logit_bias.grad == 0
    finally:
        torch.distributed.destroy_process_group()
