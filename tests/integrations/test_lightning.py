"""The teacher beside a Lightning Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

from calrobust import EMATeacher
from calrobust.integrations.lightning import EMATeacherCallback

# Lightning's advice on the number of workers, and that a second run writes where the first did.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Found 1 module.* in eval mode"),  # the teacher, where it ought to be
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning's own use of what torch has renamed
]


class Line(LightningModule):
    """Fits a line, and remembers the weights it was evaluated with."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.evaluated: list[Tensor] = []

    def training_step(self, batch: Tensor) -> Tensor:
        """Mean squared error."""
        loss: Tensor = (self.linear(batch) - 1).square().mean()
        return loss

    def validation_step(self, batch: Tensor) -> None:
        """Remembers."""
        self.evaluated.append(self.linear.weight.detach().clone())

    def test_step(self, batch: Tensor) -> None:
        """Likewise."""
        self.validation_step(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD on the line."""
        return torch.optim.SGD(self.linear.parameters(), lr=0.1)


class Follower(EMATeacher):
    """Remembers what it was shown."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student, decay=0.5)
        self.seen: list[Tensor] = []

    def update(self, student: nn.Module) -> None:
        """Remembers the weight."""
        self.seen.append(student.get_parameter("weight").detach().clone())
        super().update(student)


BATCHES = DataLoader[Tensor](torch.arange(12.0).view(6, 2, 1) / 10)  # type: ignore[arg-type]  # a tensor will do


def trainer(folder: Path, callback: EMATeacherCallback, **options: Any) -> Trainer:
    """Three steps an epoch, of two batches each, and a checkpoint after each epoch."""
    return Trainer(
        default_root_dir=folder,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}"), callback],
        **options,
    )


def test_the_teacher_sees_each_step_and_no_batch_that_accumulates(tmp_path: Path) -> None:
    """Three steps of two batches are three updates, each with weights that have moved."""
    model = Line()
    start = model.linear.weight.detach().clone()
    teacher = Follower(model.linear)
    trainer(tmp_path, EMATeacherCallback(teacher, model.linear), max_epochs=1).fit(model, BATCHES, BATCHES)
    assert len(teacher.seen) == teacher.step == 3
    expected = start
    for before, after in zip([start, *teacher.seen], teacher.seen, strict=False):
        assert not torch.equal(before, after)
        expected = (expected + after) / 2
    assert_close(teacher.seen[-1], model.linear.weight.detach())
    assert_close(teacher.module.get_parameter("weight"), expected)


@pytest.mark.parametrize("held_by_module", [False, True])
def test_resumed_training_ends_where_training_at_one_go_does(tmp_path: Path, held_by_module: bool) -> None:
    """Teacher and counters included, saved once, by the callback or by the module that holds it (trap 16)."""

    def made() -> tuple[Line, EMATeacher, EMATeacherCallback]:
        model = Line()
        teacher = EMATeacher(model.linear)
        if held_by_module:
            model.teacher = teacher
        return model, teacher, EMATeacherCallback(teacher, model.linear)

    torch.manual_seed(0)
    model, whole, callback = made()
    trainer(tmp_path, callback, max_epochs=2).fit(model, BATCHES, BATCHES)
    checkpoint = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert any(name.startswith("teacher.") for name in checkpoint["state_dict"]) == held_by_module
    assert any("EMATeacherCallback" in key for key in checkpoint["callbacks"]) != held_by_module

    model, resumed, callback = made()
    trainer(tmp_path, callback, max_epochs=2).fit(model, BATCHES, BATCHES, ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    assert resumed.step == whole.step == 6
    assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("evaluate_teacher", [False, True])
def test_evaluates_the_averaged_weights_if_asked(tmp_path: Path, evaluate_teacher: bool) -> None:
    """In validation and test; in between, and in the checkpoints, the student is itself."""
    model = Line()
    teacher = Follower(model.linear)
    callback = EMATeacherCallback(teacher, model.linear, evaluate_teacher=evaluate_teacher)
    run = trainer(tmp_path, callback, max_epochs=1, num_sanity_val_steps=0)
    run.fit(model, BATCHES, BATCHES)
    run.test(model, BATCHES, verbose=False)
    average, own = teacher.module.get_parameter("weight"), teacher.seen[-1]
    assert not torch.equal(average, own)
    assert len(model.evaluated) == 12
    for weight in model.evaluated:
        assert_close(weight, average if evaluate_teacher else own, rtol=0, atol=0)
    assert_close(model.linear.weight.detach(), own, rtol=0, atol=0)
    assert_close(torch.load(tmp_path / "epoch=0.ckpt")["state_dict"]["linear.weight"], own, rtol=0, atol=0)


def test_an_exception_in_validation_gives_the_student_its_weights_back(tmp_path: Path) -> None:
    """And leaves the teacher free to go on."""

    class Broken(Line):
        def validation_step(self, batch: Tensor) -> None:
            raise ArithmeticError

    model = Broken()
    teacher = Follower(model.linear)
    callback = EMATeacherCallback(teacher, model.linear, evaluate_teacher=True)
    with pytest.raises(ArithmeticError):
        trainer(tmp_path, callback, max_epochs=1, num_sanity_val_steps=0).fit(model, BATCHES, BATCHES)
    assert_close(model.linear.weight.detach(), teacher.seen[-1], rtol=0, atol=0)
    teacher.update(model.linear)


def test_wrong_arguments_are_named() -> None:
    """Where they are passed."""
    student = Line()
    with pytest.raises(TypeError, match=r"teacher must be of type EMATeacher, got Line; make it with EMATeacher\(stud"):
        EMATeacherCallback(student, student)  # type: ignore[arg-type]  # the wrong type is the test
    with pytest.raises(TypeError, match=r"student must be a torch.nn.Module, got str"):
        EMATeacherCallback(EMATeacher(student), "student")  # type: ignore[arg-type]  # likewise
