"""Averages of weights in other libraries, by the conversions that the documentation gives."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.testing import assert_close

from calrobust import EMATeacher, schedules

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the peers depend on
    from diffusers.training_utils import EMAModel
    from ema_pytorch import EMA
    from timm.utils.model_ema import ModelEmaV3

UPDATES = 12


def path() -> list[float]:
    """The weight of a student before training and after each step."""
    return [float(n * n % 7) for n in range(UPDATES + 1)]


def student_at(weight: float) -> nn.Linear:
    """A model of one number."""
    student = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.constant_(student.weight, weight)
    return student


def averaged(decay: float | Callable[[int], float]) -> list[float]:
    """The teacher's weight after each update."""
    start, *others = path()
    teacher, weights = EMATeacher(student_at(start), decay), []
    for weight in others:
        teacher.update(student_at(weight))
        weights.append(teacher(torch.ones(1, 1, dtype=torch.float64)).item())
    return weights


def of_swa_utils(**options: Any) -> list[float]:
    """Of swa_utils."""
    start, *others = path()
    model, weights = AveragedModel(student_at(start), **options), []
    for weight in others:
        model.update_parameters(student_at(weight))
        weights.append(next(model.parameters()).item())
    return weights


def of_timm(*, steps: bool, **options: Any) -> list[float]:
    """timm's, told the step or not."""
    start, *others = path()
    model, weights = ModelEmaV3(student_at(start), **options), []
    for n, weight in enumerate(others):
        model.update(student_at(weight), step=n + 1 if steps else None)
        weights.append(model.module.weight.item())
    return weights


def of_ema_pytorch(**options: Any) -> list[float]:
    """ema-pytorch's, which holds its student."""
    start, *others = path()
    student, weights = student_at(start), []
    model = EMA(student, update_every=1, **options)
    for weight in others:
        nn.init.constant_(student.weight, weight)
        model.update()
        weights.append(model.ema_model.weight.item())
    return weights


def of_diffusers(**options: Any) -> list[float]:
    """diffusers', which holds parameters alone."""
    start, *others = path()
    model, weights = EMAModel(student_at(start).parameters(), **options), []
    for weight in others:
        model.step(student_at(weight).parameters())
        weights.append(model.shadow_params[0].item())
    return weights


def after(first: int, decay: Callable[[int], float]) -> Callable[[int], float]:
    """The student up to update ``first``, then ``decay`` from its own start."""
    return lambda n: 0.0 if n <= first else decay(n - first)


@pytest.mark.parametrize(
    ("theirs", "decay"),
    [
        (lambda: of_swa_utils(multi_avg_fn=get_ema_multi_avg_fn(0.9)), lambda n: 0.9 if n else 0.0),
        (of_swa_utils, schedules.power(exponent=1.0, end=1.0)),
        (lambda: of_timm(steps=False, decay=0.9), 0.9),
        (lambda: of_timm(steps=True, decay=0.9), lambda n: 0.9 if n else 0.0),
        (lambda: of_timm(steps=True, decay=0.9, update_after_step=3), lambda n: 0.0 if n <= 3 else 0.9),
        (
            lambda: of_timm(steps=True, decay=0.7, use_warmup=True, warmup_power=0.75, warmup_gamma=2.0),
            schedules.power(exponent=0.75, scale=2.0, end=0.7),
        ),
        (
            lambda: of_timm(steps=True, decay=0.7, use_warmup=True, update_after_step=3),
            after(3, schedules.power(exponent=2 / 3, end=0.7)),
        ),
        (
            lambda: of_timm(steps=True, decay=0.7, use_warmup=True, min_decay=0.4),
            lambda n: schedules.power(exponent=2 / 3, start=0.4, end=0.7)(n) if n else 0.0,
        ),
        (lambda: of_ema_pytorch(beta=0.7, update_after_step=0), schedules.power(exponent=2 / 3, end=0.7)),
        (
            lambda: of_ema_pytorch(beta=0.7, update_after_step=3, inv_gamma=2.0, power=0.75),
            after(3, schedules.power(exponent=0.75, scale=2.0, end=0.7)),
        ),
        (lambda: of_diffusers(decay=0.4), lambda n: min(0.4, (1 + n) / (10 + n)) if n else 0.0),
        (lambda: of_diffusers(decay=0.7, use_ema_warmup=True), schedules.power(exponent=2 / 3, end=0.7)),
    ],
    ids=[
        "swa_utils",
        "swa_utils-swa",
        "timm",
        "timm-step",
        "timm-step-after",
        "timm-warmup",
        "timm-warmup-after",
        "timm-warmup-min_decay",
        "ema_pytorch",
        "ema_pytorch-after",
        "diffusers",
        "diffusers-warmup",
    ],
)
def test_the_schedule_that_migrating_names_gives_their_average(
    theirs: Callable[[], list[float]], decay: float | Callable[[int], float]
) -> None:
    """After every update, the first one included."""
    expected = theirs()
    assert len({round(b - a, 6) for a, b in pairwise(expected)}) > UPDATES // 2  # it moves, unevenly
    assert averaged(decay) == pytest.approx(expected, rel=1e-6)


def with_statistics(mean: float) -> nn.Module:
    """A BatchNorm that has seen one mean."""
    norm = nn.BatchNorm1d(1)
    norm.load_state_dict({"running_mean": torch.tensor([mean])}, strict=False)
    return nn.Sequential(nn.Linear(1, 1), norm)


def test_the_statistics_of_update_bn_go_into_the_module_of_a_teacher() -> None:
    """The teacher itself stays in eval mode, and nothing would happen."""
    teacher = EMATeacher(with_statistics(5.0), 0.9)
    loader = [torch.full((4, 1), 3.0)]
    update_bn(loader, teacher)
    assert teacher.module[1].running_mean.item() == 5.0  # type: ignore[index]
    update_bn(loader, teacher.module)
    expected = teacher.module[0](loader[0]).mean().item()  # type: ignore[index]
    assert teacher.module[1].running_mean.item() == pytest.approx(expected)  # type: ignore[index]
    assert not teacher.module[1].training  # type: ignore[index]


def test_running_statistics_are_averaged_as_with_use_buffers() -> None:
    """In value; torch copies the first student, we do not."""
    teacher = EMATeacher(with_statistics(1.0), lambda n: 0.75 if n else 0.0)
    model = AveragedModel(with_statistics(1.0), multi_avg_fn=get_ema_multi_avg_fn(0.75), use_buffers=True)
    for mean in (2.0, 6.0, 4.0):
        teacher.update(with_statistics(mean))
        model.update_parameters(with_statistics(mean))
    assert_close(teacher.module[1].running_mean, model.module[1].running_mean)  # type: ignore[index]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_of_averaged_model_makes_a_teacher(dtype: torch.dtype) -> None:
    """Loaded into a model, of which the teacher is made: its masters, if any, start there too."""

    def build() -> nn.Linear:
        return nn.Linear(2, 2).to(dtype)

    checkpoint = AveragedModel(build()).state_dict()
    model = build()
    trained: dict[str, Tensor] = {name: value.clone() for name, value in model.state_dict().items()}
    averaged = {name.removeprefix("module."): value for name, value in checkpoint.items() if name != "n_averaged"}
    model.load_state_dict(averaged)
    teacher = EMATeacher(model, 0.5)
    model.load_state_dict(trained)
    for name, value in teacher.module.state_dict().items():
        assert_close(value, averaged[name])
    teacher.update(model)
    for name, value in teacher.module.state_dict().items():
        assert_close(value, ((averaged[name].float() + trained[name].float()) / 2).to(dtype))
