"""The teacher beside a Lightning Trainer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

from calrobust import EMATeacher, schedules
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
        self.teachers: list[EMATeacher] = []  # in a list, so that they are no part of the module

    def training_step(self, batch: Tensor) -> Tensor:
        """Mean squared error, to 1 and to what teachers say."""
        goals = [1, *(teacher(batch) for teacher in self.teachers)]
        loss: Tensor = torch.stack([(self.linear(batch) - goal).square().mean() for goal in goals]).sum()
        return loss

    def validation_step(self, batch: Tensor) -> None:
        """Remembers."""
        self.evaluated.append(self.linear.weight.detach().clone())

    def test_step(self, batch: Tensor) -> None:
        """Does the same."""
        self.validation_step(batch)

    def predict_step(self, batch: Tensor) -> Tensor:
        """Likewise."""
        self.validation_step(batch)
        return batch

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


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    """Makes three steps an epoch, of two batches each, and a checkpoint after each epoch."""
    return Trainer(
        default_root_dir=folder,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}"), *callbacks],
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


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true", "bf16-mixed"])
@pytest.mark.parametrize("held_by_module", [False, True])
@pytest.mark.parametrize("share_frozen", [False, True])
def test_resumed_training_ends_where_training_at_one_go_does(
    tmp_path: Path, held_by_module: bool, precision: str, share_frozen: bool
) -> None:
    """Teacher and counters included, saved once, by the callback or by the module that holds it (trap 16).

    In every precision the teacher is asked what the student is asked.
    """

    def made() -> tuple[Line, EMATeacher, EMATeacherCallback]:
        model = Line()
        model.linear.bias.requires_grad_(not share_frozen)
        teacher = EMATeacher(model.linear, share_frozen=share_frozen)
        model.teachers.append(teacher)
        if held_by_module:
            model.teacher = teacher
        return model, teacher, EMATeacherCallback(teacher, model.linear)

    torch.manual_seed(0)
    model, whole, callback = made()
    trainer(tmp_path, callback, max_epochs=2, precision=precision).fit(model, BATCHES, BATCHES)
    checkpoint = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert any(name.startswith("teacher.") for name in checkpoint["state_dict"]) == held_by_module
    assert any("EMATeacherCallback" in key for key in checkpoint["callbacks"]) != held_by_module

    model, resumed, callback = made()
    again = trainer(tmp_path, callback, max_epochs=2, precision=precision)
    again.fit(model, BATCHES, BATCHES, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert resumed.step == whole.step == 6
    assert (resumed.module.get_parameter("bias") is model.linear.bias) == share_frozen
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    assert {p.dtype for p in (*model.linear.parameters(), *resumed.module.parameters())} == {dtype}
    tolerance = 1e-7 if precision == "64-true" else 0  # Lightning restores a double student by way of float32
    assert_close(resumed.state_dict(), whole.state_dict(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("evaluate_teacher", [False, True])
def test_evaluates_the_averaged_weights_if_asked(tmp_path: Path, evaluate_teacher: bool) -> None:
    """Validation, test and prediction use them; between these, and in checkpoints, the student has its own weights."""
    model = Line()
    teacher = Follower(model.linear)
    callback = EMATeacherCallback(teacher, model.linear, evaluate_teacher=evaluate_teacher)
    run = trainer(tmp_path, callback, max_epochs=1, num_sanity_val_steps=0)
    run.fit(model, BATCHES, BATCHES)
    run.test(model, BATCHES, verbose=False)
    run.predict(model, BATCHES)
    average, own = teacher.module.get_parameter("weight"), teacher.seen[-1]
    assert not torch.equal(average, own)
    assert len(model.evaluated) == 18
    for weight in model.evaluated:
        assert_close(weight, average if evaluate_teacher else own, rtol=0, atol=0)
    assert_close(model.linear.weight.detach(), own, rtol=0, atol=0)
    assert_close(torch.load(tmp_path / "epoch=0.ckpt")["state_dict"]["linear.weight"], own, rtol=0, atol=0)


@pytest.mark.parametrize("save_weights_only", [False, True])
def test_a_checkpoint_without_a_teacher_is_an_error(tmp_path: Path, save_weights_only: bool) -> None:
    """Neither training nor evaluation goes on with a new teacher's weights instead (trap 16)."""
    saving, model = trainer(tmp_path, max_epochs=1), Line()
    saving.fit(model, BATCHES, BATCHES)
    saving.save_checkpoint(tmp_path / "none.ckpt", weights_only=save_weights_only)
    callback = EMATeacherCallback(EMATeacher(model.linear), model.linear, evaluate_teacher=True)
    run = trainer(tmp_path, callback, max_epochs=2)
    for evaluate in (run.validate, run.test, run.predict):
        with pytest.raises(ValueError, match=r"got .*none.ckpt, which has none under 'EMATeacherCallback'"):
            evaluate(model, BATCHES, ckpt_path=tmp_path / "none.ckpt", weights_only=False)
    if not save_weights_only:  # else Lightning says itself that training cannot go on from it
        callback.evaluate_teacher = False
        model.train()
        with pytest.raises(ValueError, match="ckpt_path must be a checkpoint with a teacher, got "):
            run.fit(model, BATCHES, BATCHES, ckpt_path=tmp_path / "none.ckpt")


def test_evaluates_the_teacher_of_the_checkpoint(tmp_path: Path) -> None:
    """This works in a new process, which has trained nothing."""
    model = Line()
    teacher = Follower(model.linear)
    trainer(tmp_path, EMATeacherCallback(teacher, model.linear), max_epochs=1).fit(model, BATCHES, BATCHES)
    model = Line()
    fresh = EMATeacherCallback(EMATeacher(model.linear), model.linear, evaluate_teacher=True)
    trainer(tmp_path, fresh).test(model, BATCHES, ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert_close(model.evaluated[0], teacher.module.get_parameter("weight"), rtol=0, atol=0)


@pytest.mark.parametrize("way", ["fit", "validate", "test", "predict"])
def test_the_student_is_the_module_that_the_trainer_runs(tmp_path: Path, way: str) -> None:
    """A copy is refused: its teacher would not move, and its evaluation would be the student's own."""
    model = Line()
    callback = EMATeacherCallback(EMATeacher(model.linear), model.linear, evaluate_teacher=way != "fit")
    run = trainer(tmp_path, callback, max_epochs=1)
    with pytest.raises(
        ValueError, match=r"student must be the Trainer's model or .*, got another Linear; make the teacher"
    ):
        getattr(run, way)(copy.deepcopy(model), *([BATCHES] * (1 + (way == "fit"))))


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_the_student_may_be_wrapped(tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]) -> None:
    """The wrapper has the module's own parameters, and is no part of it."""
    model, teacher = Line(), EMATeacher(nn.Linear(1, 1), 0.0)
    trainer(tmp_path, EMATeacherCallback(teacher, wrap(model.linear)), max_epochs=1).fit(model, BATCHES, BATCHES)
    assert_close(teacher.module.state_dict(), model.linear.state_dict())


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_moves_no_teacher(tmp_path: Path, fused: bool) -> None:
    """Lightning counts such a step, and a fused optimiser is called for it; the scale was lowered."""

    class Overflowing(Line):
        def training_step(self, batch: Tensor) -> Tensor:
            """Has no finite gradient in the first step and in the third."""
            return super().training_step(batch) * (torch.inf if self.global_step in (0, 2) else 1)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            """Fused or not."""
            return torch.optim.SGD(self.linear.parameters(), lr=0.1, fused=fused)

    model = Overflowing()
    start, teacher = model.linear.weight.detach().clone(), Follower(model.linear)
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", growth_interval=2))
    trainer(tmp_path, EMATeacherCallback(teacher, model.linear), max_epochs=2, plugins=[precision]).fit(
        model, BATCHES, BATCHES
    )
    assert len(teacher.seen) == 4
    assert all(not torch.equal(a, b) for a, b in pairwise([start, *teacher.seen]))


def test_two_teachers_follow_one_student(tmp_path: Path) -> None:
    """Each is saved under its own name and comes back from there; one of them may be evaluated."""
    model = Line()

    def made(evaluate_both: bool = False) -> list[EMATeacherCallback]:
        fast, slow = EMATeacher(model.linear, 0.0), EMATeacher(model.linear, 1.0)
        return [
            EMATeacherCallback(fast, model.linear, name="fast", evaluate_teacher=True),
            EMATeacherCallback(slow, model.linear, evaluate_teacher=evaluate_both),
        ]

    first, resumed = made(), made()
    trainer(tmp_path, *first, max_epochs=1).fit(model, BATCHES, BATCHES)
    with torch.no_grad():
        model.linear.weight.add_(1)
    again = trainer(tmp_path, *resumed, max_epochs=1)
    again.fit(model, BATCHES, BATCHES, ckpt_path=tmp_path / "epoch=0.ckpt")
    for a, b in zip(first, resumed, strict=True):
        assert_close(a.teacher.state_dict(), b.teacher.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="evaluate_teacher must be True in one callback of a student, got two"):
        trainer(tmp_path, *made(evaluate_both=True)).validate(model, BATCHES)


def test_an_exception_in_validation_gives_the_student_its_weights_back(tmp_path: Path) -> None:
    """The teacher is free to go on."""

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


@pytest.mark.parametrize("every", [1, 2])
def test_gives_the_average_of_lightnings_own_callback(tmp_path: Path, every: int) -> None:
    """It copies the student at its first update, counts steps from 0, and ends with the average in the module."""

    def fit(*callbacks: Any) -> Line:
        torch.manual_seed(0)
        model = Line()
        for callback in callbacks:
            if isinstance(callback, EMATeacherCallback):
                callback.teacher, callback.student = teacher_of(model), model.linear
        trainer(tmp_path, *callbacks, max_epochs=2).fit(model, BATCHES, BATCHES)
        return model

    def teacher_of(model: Line) -> EMATeacher:
        return EMATeacher(model.linear, schedules.every(every, lambda step: 0.9 if step else 0.0))

    theirs = fit(EMAWeightAveraging(decay=0.9, update_every_n_steps=every)).linear
    ours = EMATeacherCallback(EMATeacher(theirs), theirs)
    own = fit(ours).linear
    assert_close(ours.teacher.module.state_dict(), theirs.state_dict())
    assert not torch.equal(own.weight, theirs.weight)
