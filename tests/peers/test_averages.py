"""Averages of weights in other libraries, by the conversions that the documentation gives."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
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


def test_other_buffers_are_copied_as_without_use_buffers() -> None:
    """Torch copies all of them, ours those that are no statistics; timm averages all that are floating, or none."""
    start, after = with_statistics(1.0), with_statistics(3.0)
    for model, value in ((start, 0.0), (after, 8.0)):
        model.register_buffer("other", torch.tensor(value))
    teacher, model = EMATeacher(start, 0.5), AveragedModel(start, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    peers = [ModelEmaV3(start, decay=0.5, exclude_buffers=exclude) for exclude in (False, True)]
    for _ in range(2):  # the first one copies
        model.update_parameters(after)
    averages: list[Any] = [teacher, *peers]
    for average in averages:
        average.update(after)
    modules: list[Any] = [average.module for average in (teacher, model, *peers)]
    means = [module[1].running_mean.item() for module in modules]
    others = [module.other.item() for module in modules]
    assert means == [2, 3, 2, 3]
    assert others == [8, 8, 4, 8]


def test_stochastic_weight_averages_count_the_pre_trained_model() -> None:
    """``schedules.uniform()`` is the mean with it, torch's without; ``updates`` is its ``n_averaged``."""
    start, *others = path()
    assert averaged(schedules.uniform())[-1] == pytest.approx(sum(path()) / len(path()))
    assert of_swa_utils()[-1] == pytest.approx(sum(others) / len(others))
    model, teacher = (
        AveragedModel(student_at(start)),
        EMATeacher(student_at(start), schedules.uniform(), update_every=2),
    )
    for weight in others:
        model.update_parameters(student_at(weight))
        teacher.update(student_at(weight))
    assert (int(model.n_averaged), int(teacher.step), int(teacher.updates)) == (UPDATES, UPDATES, UPDATES // 2)


def test_low_precision_is_averaged_in_float32_as_with_their_dtype() -> None:
    """Steps that bfloat16 would lose."""
    student = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.constant_(student.weight, 1.0)
    teacher, model = EMATeacher(student, 0.999), ModelEmaV3(student, decay=0.999, dtype=torch.float32)
    nn.init.constant_(student.weight, 2.0)
    for _ in range(100):
        teacher.update(student)
        model.update(student)
    expected = 2 - 0.999**100
    assert model.module.weight.item() == pytest.approx(expected, rel=1e-5)
    weight: Any = teacher.module.weight
    assert weight.item() == pytest.approx(expected, rel=4e-3)  # in bfloat16
    assert weight.dtype == torch.bfloat16


def test_averages_answer_without_gradient_and_name_their_decay() -> None:
    """Timm's ``ema(x)`` and ``get_decay``; ours in eval mode as well."""
    student = student_at(2.0)
    teacher, model = EMATeacher(student, 0.9), ModelEmaV3(student, decay=0.9)
    assert not teacher(torch.ones(1, 1).double()).requires_grad
    assert teacher.module.weight == model.module.weight == 2
    assert model.get_decay(5) == teacher.decay == 0.9


def test_the_warm_up_of_ema_pytorch_counts_the_calls_in_between() -> None:
    """Its decay at the second update that acts is that of call 10; ours is that of update 1."""
    defaults = {name: p.default for name, p in inspect.signature(EMA.__init__).parameters.items()}
    assert (defaults["update_after_step"], defaults["update_every"], defaults["beta"]) == (100, 10, 0.9999)
    student = student_at(0.0)
    model = EMA(student, update_after_step=0, update_every=10)
    teacher, schedule = (
        EMATeacher(student, schedules.power(exponent=2 / 3), update_every=10),
        schedules.power(exponent=2 / 3),
    )
    nn.init.constant_(student.weight, 1.0)
    for _ in range(11):
        model.update()
    assert model.get_current_decay() == pytest.approx(schedule(10), rel=1e-6)
    for _ in range(20):
        teacher.update(student)
    assert int(teacher.updates) == 2
    assert teacher(torch.ones(1, 1).double()) == 1  # decay 0 at the first update


def test_diffusers_store_and_restore_is_swapped_into() -> None:
    """It holds parameters alone; ours brings the weights back after an error too."""
    student = nn.BatchNorm1d(1)
    model, teacher = EMAModel(student.parameters(), decay=0.5), EMATeacher(student, 0.5)
    assert len(model.shadow_params) == len(list(student.parameters()))
    nn.init.constant_(student.weight, 3.0)
    model.store(student.parameters())
    model.copy_to(student.parameters())
    assert student.weight == 1
    model.restore(student.parameters())
    assert student.weight == 3
    with suppress(KeyError), teacher.swapped_into(student):
        assert student.weight == 1
        raise KeyError
    assert student.weight == 3


@pytest.mark.parametrize("foreach", [False, True])
def test_foreach_of_timm_changes_no_weight(foreach: bool) -> None:
    """So there is nothing to choose."""
    start, *others = path()
    average, weights = ModelEmaV3(student_at(start), decay=0.9, foreach=foreach), []
    for weight in others:
        average.update(student_at(weight))
        weights.append(next(average.module.parameters()).item())
    assert averaged(0.9) == pytest.approx(weights, rel=1e-12)


def test_wrapped_models_update_a_teacher_as_they_update_averaged_model(tmp_path: Path) -> None:
    """A model in DistributedDataParallel and one in torch.compile."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wraps: list[Any] = [DistributedDataParallel, partial(torch.compile, backend="eager")]
        for wrap in wraps:
            start, after = student_at(1.0), student_at(3.0)
            average, teacher = AveragedModel(start, multi_avg_fn=get_ema_multi_avg_fn(0.9)), EMATeacher(start, 0.9)
            for model in (start, after):  # torch copies the first
                average.update_parameters(wrap(model))
                teacher.update(wrap(model))
            assert_close(next(teacher.module.parameters()), next(average.module.parameters()))
    finally:
        dist.destroy_process_group()
