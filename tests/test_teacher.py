from __future__ import annotations

import copy
import importlib
import io
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from strategies import decay_schedules, seeds
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close

from calrobust import EMATeacher, schedules

State = dict[str, Tensor]


class Student(nn.Module):
    """Parameters, running statistics, an integer buffer, a mask with infinities and a buffer that is not saved."""

    mask: Tensor
    cache: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits, masked."""
        logits: Tensor = self.head(self.norm(self.layer(inputs)))
        return logits + self.mask


class Wrapper(nn.Module):
    """Names its parts as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def state(module: nn.Module) -> State:
    """A copy of the state dict."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def train(student: nn.Module) -> None:
    """Moves every parameter and statistic, as a training step would."""
    with torch.no_grad():
        for name, value in student.state_dict().items():
            if name.endswith("mask"):
                continue
            value.add_(torch.rand_like(value) if value.is_floating_point() else 1)  # a variance stays positive


def single(value: float, dtype: torch.dtype = torch.float64) -> nn.Linear:
    """One weight."""
    layer = nn.Linear(1, 1, bias=False, dtype=dtype)
    nn.init.constant_(layer.weight, value)
    return layer


# What the copy becomes


@given(schedule=decay_schedules(), update_every=st.integers(1, 4), steps=st.integers(0, 12), seed=seeds())
def test_the_teacher_is_the_weighted_mean_of_the_trajectory(
    schedule: Callable[[int], float], update_every: int, steps: int, seed: int
) -> None:
    """The weights have a closed form for all schedules and intervals; a step that does not act has no weight."""
    torch.manual_seed(seed)
    student = Student().double()
    teacher = EMATeacher(student, schedule, update_every=update_every)
    trajectory = [state(student)]
    for step in range(1, steps + 1):
        train(student)
        teacher.update(student)
        if step % update_every == 0:
            trajectory.append(state(student))
    decays = [schedule(n) for n in range(steps // update_every)]
    weights = [(1 - ([0.0, *decays][k])) * math.prod(decays[k:]) for k in range(len(trajectory))]
    assert (teacher.step, teacher.updates) == (steps, len(decays))
    assert sum(weights) == pytest.approx(1)
    for name, value in teacher.module.state_dict().items():
        models = [model[name] for model in trajectory]
        if not value.is_floating_point():
            assert torch.equal(value, models[-1])
        elif name == "mask":
            assert torch.equal(value, models[0])
        else:
            expected = sum((w * model for w, model in zip(weights, models, strict=True)), torch.zeros_like(value))
            assert_close(value, expected, rtol=1e-12, atol=1e-12)


def test_the_decay_honours_the_very_first_update() -> None:
    """0.75 · 1 + 0.25 · 5 = 2, where torch's AveragedModel gives 5 (trap 11)."""
    student = single(1.0)
    teacher, peer = (
        EMATeacher(student, 0.75),
        AveragedModel(student, avg_fn=lambda old, new, _: 0.75 * old + 0.25 * new),
    )
    nn.init.constant_(student.weight, 5.0)
    teacher.update(student)
    peer.update_parameters(student)
    assert teacher.module.get_parameter("weight").item() == 2.0
    assert peer.module.get_parameter("weight").item() == 5.0


def test_a_warmup_from_a_low_decay_leaves_the_anchor_its_decay() -> None:
    """After one update of the paper's schedule it keeps 0.05, after ten the product of the decays (trap 13)."""
    student = single(1.0)
    teacher = EMATeacher(student, schedules.linear_warmup(0.05, 0.9, updates=10))
    nn.init.zeros_(student.weight)  # what is left in the teacher is the weight of the pre-trained model
    left = []
    for _ in range(10):
        teacher.update(student)
        left.append(teacher.module.get_parameter("weight").item())
    assert left[0] == pytest.approx(0.05)
    assert left[-1] == pytest.approx(1.8e-5, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_student_moves_its_teacher(dtype: torch.dtype) -> None:
    """1,000 updates at decay 0.9999 reach 2 − 0.9999¹⁰⁰⁰, which without float32 masters would be 1 (trap 12)."""
    student = single(1.0, dtype)
    teacher = EMATeacher(student, 0.9999)
    nn.init.constant_(student.weight, 2.0)
    naive = torch.tensor(1.0, dtype=dtype)
    for _ in range(1000):
        teacher.update(student)
        naive.lerp_(torch.tensor(2.0, dtype=dtype), 1e-4)
    assert naive == 1.0
    expected = 2 - 0.9999**1000
    assert teacher.masters is not None
    assert teacher.masters.get_parameter("weight").item() == pytest.approx(expected, rel=1e-5)
    weight = teacher.module.get_parameter("weight")
    assert weight.dtype == dtype
    assert weight.item() == torch.tensor(expected).to(dtype).item()


def test_running_statistics_are_averaged_and_counters_copied() -> None:
    """BatchNorm's mean and variance are averaged, and its number of batches is the student's (trap 15)."""
    student = Student()
    teacher = EMATeacher(student, 0.75)
    before = state(student)
    student.train()
    student.norm(torch.randn(8, 4))
    teacher.update(student)
    for name in ("norm.running_mean", "norm.running_var"):
        assert not torch.equal(before[name], student.get_buffer(name))
        expected = 0.75 * before[name] + 0.25 * student.get_buffer(name)
        assert_close(teacher.module.get_buffer(name), expected)
    assert teacher.module.get_buffer("norm.num_batches_tracked") == 1


def test_unsaved_buffers_are_the_copys_own() -> None:
    """The teacher does not follow a buffer that is not in the state dict."""
    student = Student()
    teacher = EMATeacher(student, 0.5)
    student.cache.fill_(7.0)
    teacher.update(student)
    assert torch.equal(teacher.module.get_buffer("cache"), torch.zeros(2))


@pytest.mark.parametrize("value", [5.0, torch.inf, torch.nan])
def test_the_ends_of_the_decay_are_exact(value: float) -> None:
    """0 copies the student and 1 keeps the teacher, bit for bit, even if the student has diverged."""
    student = single(1.0)
    frozen, following = EMATeacher(student, 1.0), EMATeacher(student, 0)
    nn.init.constant_(student.weight, value)
    for teacher in (frozen, following):
        teacher.update(student)
    assert frozen.module.get_parameter("weight") == 1.0
    assert_close(following.module.get_parameter("weight"), student.weight, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("decay", [0.9, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_not_finite_on_either_side_takes_the_students_value(
    decay: float, dtype: torch.dtype, compiled: bool
) -> None:
    """This holds for each element of statistics and of parameters such as masks; inf - inf would be NaN (trap 37)."""
    inf, nan = torch.inf, torch.nan
    ours = torch.tensor([1.0, 1.0, 1.0, inf, -inf, nan, -inf, inf, nan])
    theirs = torch.tensor([5.0, inf, nan, 5.0, 5.0, 5.0, -inf, -inf, inf])
    student = nn.Sequential(nn.Linear(9, 1), nn.BatchNorm1d(9)).to(dtype)
    with torch.no_grad():
        student.get_parameter("0.weight").copy_(ours[None])
        student.get_buffer("1.running_mean").copy_(ours)
        teacher = EMATeacher(student, decay)
        student.get_parameter("0.weight").copy_(theirs[None])
        student.get_buffer("1.running_mean").copy_(theirs)
    update = torch.compile(teacher.update, fullgraph=True, backend="eager") if compiled else teacher.update
    update(student)
    expected = torch.where(ours.isfinite() & theirs.isfinite(), decay * ours + (1 - decay) * theirs, theirs).to(dtype)
    for averaged in (teacher.module.get_parameter("0.weight")[0], teacher.module.get_buffer("1.running_mean")):
        assert_close(averaged, expected, rtol=0, atol=1e-6, equal_nan=True)
    student.get_buffer("1.running_mean").fill_(3.0)
    teacher.update(student)
    assert teacher.module.get_buffer("1.running_mean").isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_that_came_with_a_checkpoint_does_not_turn_into_nan(dtype: torch.dtype) -> None:
    """The usual order is to build the model, to make the teacher, and then to load the states of both."""
    saved = nn.Sequential(nn.Linear(1, 2)).to(dtype)
    nn.init.constant_(saved.get_parameter("0.bias"), -torch.inf)
    student = nn.Sequential(nn.Linear(1, 2)).to(dtype)
    teacher = EMATeacher(student, 0.5)
    parent = nn.ModuleDict({"student": student, "teacher": teacher})
    parent.load_state_dict(nn.ModuleDict({"student": saved, "teacher": EMATeacher(saved, 0.5)}).state_dict())
    teacher.update(student)
    teacher.update(student)
    assert (teacher.module.get_parameter("0.bias") == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("way", ["load", "assign", "cast", "swap"])
def test_a_mask_that_is_written_into_the_copy_does_not_turn_into_nan(dtype: torch.dtype, late: bool, way: str) -> None:
    """Before the first update or later, and also if the teacher is cast or read before it moves."""
    student, saved = (nn.Linear(1, 2).to(dtype) for _ in range(2))
    nn.init.zeros_(student.bias)
    saved.bias.data = torch.tensor([-torch.inf, 0.0]).to(dtype)
    teacher = EMATeacher(student, 0.5)
    if late:
        teacher.update(student)
    if way == "swap":
        with teacher.swapped_into(nn.Linear(1, 2).to(dtype)):
            teacher.module.get_parameter("bias")[0] = -torch.inf
    else:
        teacher.module.load_state_dict(saved.state_dict(), assign=way == "assign")
    if way == "cast":
        teacher.to(dtype).state_dict()
    student.load_state_dict(saved.state_dict())
    for _ in range(2):
        teacher.update(student)
    assert teacher.module.get_parameter("bias").tolist() == [-torch.inf, 0.0]


class Buffers(nn.Module):
    """Has one buffer of each kind that is not a statistic of a normalisation layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Sequential(nn.BatchNorm2d(2, dtype=torch.float64))  # a wrapper between
        kinds = {"queue": torch.ones(3), "steps": torch.tensor(7.0), "running_mean": torch.ones(2)}
        for name, value in {**kinds, "mask": torch.eye(2), "observed": torch.tensor(torch.inf)}.items():
            self.register_buffer(name, value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_buffers_that_are_no_statistics_are_the_students(dtype: torch.dtype) -> None:
    """Queues, counters, masks and observers are copied, even if one has the name of a statistic."""
    student = Buffers().to(dtype)
    teacher = EMATeacher(student, 0.75)
    for buffer in student.buffers():
        buffer.copy_(torch.full_like(buffer, 5))
    teacher.update(student)
    for name, value in teacher.module.named_buffers():
        expected = {"norm.0.running_mean": 0.25 * 5, "norm.0.running_var": 0.75 + 0.25 * 5}.get(name, 5.0)
        assert (value == expected).all(), name


class Named(nn.BatchNorm1d):
    """A subclass with a buffer of its own."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.register_buffer("seen", torch.zeros(features))


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(2),
        nn.BatchNorm2d(2),
        nn.BatchNorm3d(2),
        nn.SyncBatchNorm(2),
        nn.InstanceNorm1d(2, track_running_stats=True),
        nn.InstanceNorm3d(2, track_running_stats=True),
        nn.LazyBatchNorm2d(),
        Named(2),
        checkpoint_wrapper(nn.BatchNorm1d(2)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_statistics_of_every_normalisation_layer_are_averaged(layer: nn.Module) -> None:
    """This holds for torch's layers, for their subclasses and inside wrappers."""
    if isinstance(layer, nn.LazyBatchNorm2d):
        layer(torch.randn(2, 2, 3, 3))
    teacher = EMATeacher(layer, 0.75)
    for buffer in layer.buffers():
        buffer.fill_(8)
    before = dict(EMATeacher(teacher.module).module.named_buffers())
    teacher.update(layer)
    for name, value in teacher.module.named_buffers():
        expected = 0.75 * before[name] + 0.25 * 8 if "running" in name else torch.full_like(value, 8)
        assert_close(value, expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the old form is deprecated
@pytest.mark.parametrize("spectral_norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_a_spectral_normalised_layer_of_the_teacher_has_norm_one(spectral_norm: Callable[..., nn.Module]) -> None:
    """Averaged vectors would not have norm 1; the student's estimate is good after a few steps (trap 37)."""
    torch.manual_seed(0)
    student = nn.Sequential(*(spectral_norm(nn.Linear(16, 16, bias=False)) for _ in range(6)))
    teacher = EMATeacher(student, 0.99)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    for _ in range(100):
        inputs = torch.randn(32, 16)
        optimizer.zero_grad()
        (student(inputs) - inputs.roll(1, 1)).square().mean().backward()
        optimizer.step()
        teacher.update(student)
    for layer in cast(nn.Sequential, teacher.module):
        assert torch.linalg.matrix_norm(layer(torch.eye(16)), 2).item() == pytest.approx(1, abs=1e-2)


class Overlapping(nn.Module):
    """Buffers whose elements repeat in memory."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([scale]))
        self.register_buffer("eye", (scale * torch.eye(2)).expand(3, 2, 2))
        self.register_buffer("count", torch.tensor([scale]).long().expand(4))


def test_expanded_buffers_are_followed_and_swapped() -> None:
    """Torch refuses to write to such buffers as a whole."""
    student = Overlapping(1.0)
    teacher = EMATeacher(student, 0.5)
    moved = Overlapping(3.0)
    teacher.update(moved)
    assert torch.equal(teacher.module.get_buffer("eye"), moved.get_buffer("eye"))
    assert torch.equal(teacher.module.get_buffer("count"), moved.get_buffer("count"))
    with teacher.swapped_into(student):
        assert torch.equal(student.get_buffer("eye"), moved.get_buffer("eye"))
        assert student.weight == 2.0
    assert torch.equal(student.get_buffer("eye"), Overlapping(1.0).get_buffer("eye"))
    assert student.weight == 1.0


def test_tied_weights_stay_tied_and_move_once() -> None:
    """One tensor with two names is averaged once an update, and comes back from a swap."""
    student = nn.Sequential(single(1.0), single(1.0))
    student[1].weight = student[0].weight
    teacher = EMATeacher(student, 0.75)
    nn.init.constant_(cast(Tensor, student[0].weight), 5.0)
    teacher.update(student)
    first, second = (teacher.module.get_parameter(f"{k}.weight") for k in range(2))
    assert first is second
    assert first.item() == 2.0
    with teacher.swapped_into(student):
        assert student[1].weight == 2.0
    assert student[0].weight == student[1].weight == 5.0


def test_the_schedule_is_asked_for_the_update_that_acts() -> None:
    """It is asked for 0, 1, 2, ..., once each, whatever ``update_every`` is; it may be the user's own function."""
    asked: list[int] = []

    def decay(n: int) -> float:
        asked.append(n)
        return 0.5

    student = single(1.0)
    teacher = EMATeacher(student, decay, update_every=3)
    for _ in range(10):
        teacher.update(student)
    assert asked == [0, 1, 2]
    assert (teacher.step, teacher.updates) == (10, 3)


# What the copy is


def test_the_copy_is_frozen_and_in_eval_mode_whatever_its_parent_does() -> None:
    """It has no gradient, dropout or moving statistics, also after ``train()`` or ``requires_grad_`` (trap 11)."""
    student = Student().train()
    parent = nn.ModuleDict({"student": student, "teacher": EMATeacher(student)})
    parent.train()
    parent.requires_grad_(True)
    teacher = cast(EMATeacher, parent["teacher"])
    assert teacher.train() is teacher
    assert not any(module.training for module in (teacher, *teacher.module.modules()))
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())
    before, inputs = state(teacher.module), torch.randn(5, 3, requires_grad=True)
    output = teacher(inputs)
    assert not output.requires_grad
    assert torch.equal(output, teacher(inputs=inputs))
    assert_close(state(teacher.module), before, rtol=0, atol=0)
    assert student.training
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_an_optimiser_of_the_parent_finds_the_student_alone() -> None:
    """``parent.parameters()`` holds nothing of the teacher, and a parent's initialiser does not reach it."""
    student = Student()
    parent = nn.ModuleDict({"student": student, "teacher": EMATeacher(student)})
    assert [id(p) for p in parent.parameters()] == [id(p) for p in student.parameters()]
    teacher = cast(EMATeacher, parent["teacher"])
    assert [*nn.Sequential(teacher.module, teacher, teacher.module).modules()].count(teacher.module) == 1
    before = state(teacher.module)

    def reset(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.reset_parameters()

    parent.apply(reset)
    assert_close(state(teacher.module), before, rtol=0, atol=0)


def test_the_teacher_follows_its_parent_to_another_dtype_and_device() -> None:
    """``parent.to`` reaches the copy; a copy that becomes bfloat16 gets masters, and masters stay float32."""
    student = Student()
    assert {p.device.type for p in EMATeacher(student, device="meta").module.parameters()} == {"meta"}
    parent = nn.Sequential(EMATeacher(student))
    teacher = cast(EMATeacher, parent[0])
    parent.double()
    assert teacher.module.get_parameter("layer.weight").dtype == torch.float64
    assert teacher.masters is None
    parent.bfloat16()
    assert teacher.masters is not None
    for module in (teacher.module, teacher.masters):
        module.get_parameter("layer.bias").fill_(1 + 2**-20)
    parent.half().bfloat16()
    assert torch.all(teacher.masters.get_parameter("layer.bias") == 1 + 2**-20)
    parent.to("meta", torch.float16)
    for module, dtype in ((teacher.module, torch.float16), (teacher.masters, torch.float32)):
        assert {(p.dtype, p.device.type) for p in module.parameters()} == {(dtype, "meta")}
    parent.to_empty(device="cpu")  # nothing can be copied from there, only made anew
    for module, dtype in ((teacher.module, torch.float16), (teacher.masters, torch.float32)):
        assert {(p.dtype, p.device.type) for p in module.parameters()} == {(dtype, "cpu")}


def test_data_parallel_refuses_a_model_that_holds_a_teacher() -> None:
    """Torch's replicas look up submodules, which a teacher hides; the copy itself can be replicated."""
    student = Student()
    teacher = EMATeacher(student)
    for holder in (teacher, nn.ModuleDict({"student": student, "teacher": teacher})):
        with pytest.raises(TypeError, match=r"DataParallel must .*DataParallel\(teacher\.module\)"):
            replicas_on_two_devices(holder)
    assert len(replicas_on_two_devices(teacher.module)) == 2


def replicas_on_two_devices(module: nn.Module) -> list[nn.Module]:
    """Replicas as DataParallel makes them at each forward pass, here on one device twice."""
    replication = importlib.import_module("torch.nn.parallel.replicate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replication, "_broadcast_coalesced_reshape", lambda tensors, *_, **__: [list(tensors)] * 2)
        patch.setattr(replication, "_get_device_index", lambda *_: 0)
        return cast(list[nn.Module], replication.replicate(module, [0, 0]))


def test_what_is_added_to_the_teacher_moves_with_it() -> None:
    """A user may register a head or a buffer beside the copy."""
    teacher = EMATeacher(single(1.0))
    teacher.add_module("head", single(2.0))
    teacher.register_buffer("center", torch.zeros(3))
    teacher.half()
    assert teacher.get_parameter("head.weight").dtype == teacher.get_buffer("center").dtype == torch.float16


def test_the_teacher_reads_as_it_was_made() -> None:
    """The repr shows the class of the student, the decay and the interval."""
    teacher = EMATeacher(single(1.0), schedules.constant(0.9), update_every=500)
    expected = """EMATeacher(
  decay=constant(decay=0.9), update_every=500
  (module): Linear(in_features=1, out_features=1, bias=False)
  (masters): None
)"""
    assert repr(teacher) == expected


# Names


def wrapped(student: nn.Module, how: str) -> nn.Module:
    """The student as a wrapper would hand it over."""
    wrappers: dict[str, Callable[[nn.Module], nn.Module]] = {
        "module": Wrapper,
        "compiled": lambda inner: cast(nn.Module, torch.compile(inner)),  # compiles nothing before its first call
        "DataParallel": nn.DataParallel,
        "checkpoint": checkpoint_wrapper,
    }
    for name in how.split(" of "):
        student = wrappers[name](student)
    return student


@pytest.mark.parametrize(
    "how",
    ["module", "compiled", "DataParallel", "module of compiled", "compiled of module", "checkpoint of compiled"],
)
def test_wrapped_names_are_found(how: str) -> None:
    """The words of DDP and torch.compile are ignored, also nested, before and after the teacher is made (trap 14)."""
    student = Student()
    early, late = EMATeacher(student, 0.5), EMATeacher(wrapped(student, how), 0.5)
    before = state(student)
    train(student)
    for teacher in (early, late):
        teacher.update(wrapped(student, how))
        teacher.update(student)
        for name, value in before.items():
            if value.is_floating_point() and name != "mask":
                expected = 0.25 * value + 0.75 * student.state_dict()[name]
                found = [v for key, v in teacher.module.state_dict().items() if key.endswith(name)]
                assert len(found) == 1
                assert_close(found[0], expected)


@pytest.mark.parametrize("wrap", [torch.compile, checkpoint_wrapper])
def test_a_wrapper_of_a_part_is_found(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """A compiled or checkpointed submodule adds a word in the middle of its names."""
    student = Student()
    teacher = EMATeacher(student, 0.0)
    train(student)
    own = student.layer.weight
    student.layer = cast(nn.Linear, wrap(student.layer))
    teacher.update(student)
    assert_close(teacher.module.get_parameter("layer.weight"), own)
    train(student)
    with teacher.swapped_into(student):
        assert torch.equal(own, teacher.module.get_parameter("layer.weight"))


def test_the_copy_cannot_be_replaced_but_compiled_in_place() -> None:
    """A wrapper would change the names in checkpoints; the same module may be assigned again, as FSDP2 does."""
    teacher = EMATeacher(Student().bfloat16())
    keys = [*teacher.state_dict()]
    for name in ("module", "masters"):
        with pytest.raises(AttributeError, match=rf"teacher\.{name} must stay .*call teacher\.{name}\.compile\(\)"):
            setattr(teacher, name, torch.compile(getattr(teacher, name)))
        setattr(teacher, name, getattr(teacher, name))
    teacher.module.compile(backend="eager")
    inputs = torch.randn(4, 3, dtype=torch.bfloat16)
    assert torch.equal(teacher(inputs), copy.deepcopy(teacher)(inputs))
    teacher.update(Student().bfloat16())
    assert [*teacher.state_dict()] == keys


def test_a_long_mismatch_is_told_by_its_first_names() -> None:
    """This happens when adapters are added to the student after the teacher was made."""
    teacher = EMATeacher(nn.Sequential(*(nn.Linear(1, 1) for _ in range(50))))
    with pytest.raises(ValueError, match=r"student: 0\.weight, 0\.bias, 1\.weight and 97 more; un") as told:
        teacher.update(nn.Sequential(*(Wrapper(nn.Sequential(nn.Linear(1, 1))) for _ in range(50))))
    assert len(str(told.value)) < 300


def with_layer(layer: nn.Module) -> Student:
    """A student that has another first layer."""
    student = Student()
    student.layer = cast(nn.Linear, layer)
    return student


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            nn.Linear(3, 4, bias=False),
            r"must have the same names.*missing from student: layer.bias",
        ),
        (nn.Bilinear(3, 3, 4), r"of another shape in student: layer.weight \[4, 3, 3\] for \[4, 3\]"),
        (nn.ModuleList([nn.Linear(3, 4)]), "unexpected in student: layer.0.weight"),
    ],
)
@pytest.mark.parametrize("update_every", [1, 10])
def test_a_student_of_other_names_or_shapes_raises_at_its_first_step(
    layer: nn.Module, message: str, update_every: int
) -> None:
    """It raises even if the first update that acts is far away, and nothing has changed then (trap 14)."""
    teacher = EMATeacher(Student(), 0.5, update_every=update_every)
    before = state(teacher.module)
    with pytest.raises(ValueError, match=message):
        teacher.update(with_layer(layer))
    assert (teacher.step, teacher.updates) == (0, 0)
    assert_close(state(teacher.module), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match=message), teacher.swapped_into(with_layer(layer)):
        pass


@pytest.mark.parametrize("decay", [1.5, -0.1, torch.nan])
def test_a_schedule_that_leaves_the_unit_interval_raises_and_changes_nothing(decay: float) -> None:
    """The update that asks for the decay raises."""
    student = single(1.0)
    teacher = EMATeacher(student, lambda n: decay)
    nn.init.constant_(student.weight, 5.0)
    with pytest.raises(ValueError, match="decay must be"):
        teacher.update(student)
    assert (teacher.step, teacher.updates) == (0, 0)
    assert teacher.module.get_parameter("weight") == 1.0


def test_an_option_that_is_changed_later_is_checked_as_at_first() -> None:
    """Nothing has moved then."""
    teacher = EMATeacher(single(1.0), 0.5)
    teacher.update_every = 0
    with pytest.raises(ValueError, match="update_every must be >= 1, got 0"):
        teacher.update(single(5.0))
    assert (teacher.step, teacher.module.get_parameter("weight").item()) == (0, 1.0)


# Saving


def moved_teacher(dtype: torch.dtype) -> tuple[Student, EMATeacher]:
    """A teacher after five steps; it acted at every second of them."""
    student = Student().to(dtype)
    teacher = EMATeacher(student, schedules.uniform(), update_every=2)
    for _ in range(5):
        train(student)
        teacher.update(student)
    return student, teacher


def assert_same(ours: EMATeacher, theirs: EMATeacher) -> None:
    """Weights, masters and counters, bit for bit."""
    assert (ours.step, ours.updates) == (theirs.step, theirs.updates)
    assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights_only", [True, False])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(dtype: torch.dtype, weights_only: bool) -> None:
    """Weights, masters, step and updates come back bit for bit inside the parent's state dict (trap 16)."""
    student, teacher = moved_teacher(dtype)
    file = io.BytesIO()
    torch.save(nn.ModuleDict({"student": student, "teacher": teacher}).state_dict(), file)
    file.seek(0)
    resumed = nn.ModuleDict(
        {
            "student": Student().to(dtype),
            "teacher": EMATeacher(Student().to(dtype), schedules.uniform(), update_every=2),
        }
    )
    resumed.load_state_dict(torch.load(file, weights_only=weights_only))
    other = cast(EMATeacher, resumed["teacher"])
    assert (other.step, other.updates) == (5, 2)
    assert_same(other, teacher)
    for _ in range(3):  # the sixth step acts: the phase is part of the state
        train(student)
        resumed["student"].load_state_dict(student.state_dict())
        teacher.update(student)
        other.update(resumed["student"])
    assert_same(other, teacher)


def test_the_state_of_a_low_precision_teacher_loads_into_one_of_float32() -> None:
    """Its masters have the digits."""
    _, teacher = moved_teacher(torch.bfloat16)
    other = EMATeacher(Student(), schedules.uniform(), update_every=2)
    other.load_state_dict(teacher.state_dict())
    assert teacher.masters is not None
    assert_close(other.module.state_dict(), teacher.masters.state_dict(), rtol=0, atol=0)


LOW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("wholly", [torch.float32, torch.float64])
@pytest.mark.parametrize("share_frozen", [False, True])
def test_the_state_of_a_float32_teacher_loads_into_one_of_low_precision(
    dtype: torch.dtype, wholly: torch.dtype, share_frozen: bool
) -> None:
    """Trained whole, judged low: the masters get the digits, and a parent's state too."""
    students = [nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).to(kind) for kind in (wholly, dtype)]
    for student in students:
        student[0].weight.requires_grad_(not share_frozen)
    whole, low = (EMATeacher(student, share_frozen=share_frozen) for student in students)
    nn.init.uniform_(whole.module.get_parameter("0.bias"))
    whole.step = 3
    nn.Sequential(low).load_state_dict(nn.Sequential(whole).state_dict())
    assert low.step == 3
    assert low.masters is not None
    bias = whole.module.get_parameter("0.bias")
    assert torch.equal(low.masters.get_parameter("0.bias"), bias.float())
    assert torch.equal(low.module.get_parameter("0.bias"), bias.to(dtype))


@pytest.mark.parametrize("dtype", LOW)
def test_what_is_written_into_a_copy_of_low_precision_stays(dtype: torch.dtype) -> None:
    """In the next update, in the state and through a cast; what was not written keeps its digits, infinite or not."""
    student = nn.Sequential(nn.Linear(1, 2, bias=False), nn.BatchNorm1d(1)).to(dtype)
    nn.init.constant_(student.get_parameter("0.weight"), 1.0)
    teacher = EMATeacher(student, 0.5)
    assert teacher.masters is not None
    nn.init.constant_(student.get_parameter("0.weight"), 1 + 2**-7)
    for _ in range(4):
        teacher.update(student)
    weight, master = (module.get_parameter("0.weight") for module in (teacher.module, teacher.masters))
    kept = master[1].clone()
    assert kept != kept.to(dtype)
    weight.data[0] = 9.0
    teacher.module.get_submodule("1").train()(torch.tensor([[3.0], [5.0]], dtype=dtype))  # as `update_bn`
    other = EMATeacher(nn.Sequential(nn.Linear(1, 2, bias=False), nn.BatchNorm1d(1)))
    other.load_state_dict(teacher.state_dict())
    assert torch.equal(other.module.get_parameter("0.weight").flatten(), torch.stack([torch.tensor(9.0), kept[0]]))
    assert_close(other.module.get_buffer("1.running_mean"), torch.tensor([0.4]), rtol=4e-3, atol=0)
    with torch.no_grad():
        weight[0] = 7.0
    teacher.update(student)
    assert torch.equal(master.flatten(), torch.stack([torch.tensor(4 + 2**-8), (kept[0] + 1 + 2**-7) / 2]))
    weight.data[0] = 3.0
    whole = teacher.float().module.get_parameter("0.weight")
    assert torch.equal(whole.flatten(), torch.stack([torch.tensor(3.0), master[1, 0]]))
    with torch.no_grad():
        whole[0] = 1.0
    teacher.update(student)
    assert whole[0] == 1 + 2**-8


def test_masters_are_compared_with_the_copy_only_after_a_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison costs several updates of a student of low precision; a copy of the teacher makes it once."""
    student = nn.Linear(2, 2).to(torch.bfloat16)
    teacher = EMATeacher(student, 0.5)
    compared: list[EMATeacher] = []
    original = EMATeacher._renew_masters

    def noted(one: EMATeacher) -> None:
        compared.append(one)
        original(one)

    monkeypatch.setattr(EMATeacher, "_renew_masters", noted)
    for _ in range(3):
        teacher.update(student)
    assert len(compared) == 1
    with torch.no_grad():
        teacher.module.get_parameter("weight").zero_()
    for _ in range(2):
        teacher.update(student)
    assert len(compared) == 2
    duplicate = copy.deepcopy(teacher)
    for _ in range(2):
        duplicate.update(student)
    assert len(compared) == 3


def test_a_weight_beyond_float16_comes_back() -> None:
    """The copy is infinite, and its master is not."""
    student = single(6e4, torch.float16)
    teacher = EMATeacher(student, 0.5)
    assert teacher.masters is not None
    master = teacher.masters.get_parameter("weight")
    master.fill_(1e5)
    teacher.module.get_parameter("weight").fill_(torch.inf)
    nn.init.constant_(student.weight, 0.0)
    teacher.update(student)
    assert master.item() == 5e4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_buffers_are_copied(dtype: torch.dtype) -> None:
    """They have no strides."""
    student = nn.Linear(1, 1, dtype=dtype)
    student.register_buffer("adjacency", torch.eye(2, dtype=dtype).to_sparse())
    teacher = EMATeacher(student)
    student.get_buffer("adjacency").mul_(3)
    teacher.update(student)
    assert_close(teacher.module.get_buffer("adjacency").to_dense(), 3 * torch.eye(2, dtype=dtype))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda teacher: pickle.loads(pickle.dumps(teacher))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_duplicate_goes_its_own_way(duplicate: Callable[[EMATeacher], EMATeacher], dtype: torch.dtype) -> None:
    """Both deepcopy and pickle keep schedule, masters and counters, and the original stays as it is."""
    student, teacher = moved_teacher(dtype)
    twin, before = duplicate(teacher), copy.deepcopy(teacher.state_dict())
    assert_same(twin, teacher)
    assert twin.decay == teacher.decay
    train(student)
    twin.update(student)
    assert twin.updates == 3
    assert not any(module.training for module in twin.module.modules())
    assert_close(teacher.state_dict(), before, rtol=0, atol=0)


def test_loading_is_as_strict_as_torchs() -> None:
    """Errors have the full names, ``strict=False`` returns them, and wrong shapes always raise."""
    saved = EMATeacher(Student()).state_dict()
    wrong = {"teacher." + key: value for key, value in saved.items() if key not in ("step", "module.layer.bias")}
    wrong["teacher.module.extra"] = wrong["teacher.else"] = torch.zeros(1)
    parent = nn.ModuleDict({"teacher": EMATeacher(Student())})
    with pytest.raises(RuntimeError, match=r"Missing key.*teacher\.step.*teacher\.module\.layer\.bias"):
        parent.load_state_dict(wrong)
    keys = parent.load_state_dict(wrong, strict=False)
    assert set(keys.missing_keys) == {"teacher.step", "teacher.module.layer.bias"}
    assert set(keys.unexpected_keys) == {"teacher.module.extra", "teacher.else"}
    with pytest.raises(RuntimeError, match=r"size mismatch for module\.layer\.weight"):
        EMATeacher(Student()).load_state_dict({**saved, "module.layer.weight": torch.zeros(9, 9)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_copies_unless_told_to_assign(dtype: torch.dtype) -> None:
    """As in torch, the copy keeps its tensors, and ``assign=True`` takes those of the state."""
    _, teacher = moved_teacher(dtype)
    saved = copy.deepcopy(teacher.state_dict())
    held = {"step", "updates"} | {f"module.{name}" for name in teacher.module.state_dict()}
    if teacher.masters is not None:
        held |= {f"masters.{name}" for name in teacher.masters.state_dict()}
    assert saved.keys() == held
    own = teacher.module.get_parameter("layer.weight")
    teacher.load_state_dict(saved)
    assert teacher.module.get_parameter("layer.weight") is own
    teacher.load_state_dict(saved, assign=True)
    assert teacher.module.get_parameter("layer.weight").data_ptr() == saved["module.layer.weight"].data_ptr()


# Swapping


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_student_lends_its_place_and_gets_it_back(dtype: torch.dtype) -> None:
    """Inside, the student computes what the teacher does; afterwards it has its own weights again, bit for bit."""
    student, teacher = moved_teacher(dtype)
    own, inputs, parameters = state(student), torch.randn(4, 3, dtype=dtype), [*student.parameters()]
    student.eval()
    with teacher.swapped_into(student):
        assert_close(state(student), state(teacher.module), rtol=0, atol=0)
        assert torch.equal(student(inputs), teacher(inputs))
        assert all(ours is theirs for ours, theirs in zip(parameters, student.parameters(), strict=True))
    assert_close(state(student), own, rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in parameters)


def test_autocast_keeps_no_cast_of_weights_that_were_exchanged() -> None:
    """One autocast around a step, an update and an evaluation computes what one around each of them does."""
    student, inputs = nn.Linear(3, 3), torch.randn(4, 3)
    teacher = EMATeacher(student, 0.5)

    def half(module: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return cast(Tensor, copy.deepcopy(module)(inputs)).detach()

    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            own = student(inputs)
            assert torch.equal(own, half(student))
            assert torch.equal(teacher(inputs), half(teacher.module))
            with torch.no_grad(), teacher.swapped_into(student):
                assert torch.equal(student(inputs), half(teacher.module))
            assert torch.equal(student(inputs), own)
            gradient = torch.autograd.grad(student(inputs).sum(), student.weight)[0]
            assert_close(gradient, inputs.sum(0).expand(3, 3), rtol=0.01, atol=0.01)
            torch.clear_autocast_cache()  # for the optimiser's step, which is the loop's own affair
            with torch.no_grad():
                student.weight.add_(1)
            teacher.update(student)


def test_the_student_comes_back_after_an_exception() -> None:
    """The exception passes through, and the teacher is free for the next block."""
    student, teacher = moved_teacher(torch.float32)
    own = state(student)
    for _ in range(2):
        with pytest.raises(KeyError, match="evaluation failed"), teacher.swapped_into(student):
            raise KeyError("evaluation failed")
        assert_close(state(student), own, rtol=0, atol=0)


def test_swapping_neither_nests_nor_updates() -> None:
    """Inside the block the student holds the teacher's weights, so both would lose the student's own."""
    student, teacher = moved_teacher(torch.float32)
    own, steps = state(student), teacher.step
    with teacher.swapped_into(student):
        with pytest.raises(RuntimeError, match="already active"), teacher.swapped_into(student):
            pass
        with pytest.raises(RuntimeError, match="inside swapped_into"):
            teacher.update(student)
    assert_close(state(student), own, rtol=0, atol=0)
    assert teacher.step == steps


# Cost and sharding


def test_an_update_is_one_fused_operation_that_allocates_nothing() -> None:
    """Torch's profiler sees this for parameters of one dtype on one device."""
    student = nn.Sequential(*(nn.Linear(64, 64) for _ in range(5)))
    teacher = EMATeacher(student, 0.5)
    teacher.update(student)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        teacher.update(student)
    events = seen.events()
    assert events is not None
    assert [event.name for event in events].count("aten::_foreach_lerp_") == 1
    assert sum(max(event.self_cpu_memory_usage, 0) for event in events) == 0


def test_a_search_by_name_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """While no part is replaced, later updates find every tensor by its place."""
    student = Student()
    teacher = EMATeacher(student, 0.5)
    teacher.update(student)
    before = state(teacher.module)
    monkeypatch.setattr("calrobust.teacher.paired", None)  # called, it would raise
    for _ in range(2):
        train(student)
        teacher.update(student)
    duplicate = copy.deepcopy(teacher)
    with pytest.raises(TypeError, match="not callable"):
        duplicate.update(student)
    assert not torch.equal(teacher.module.state_dict()["layer.weight"], before["layer.weight"])


def _replace_a_parameter(student: Student, _: EMATeacher) -> None:
    student.layer.weight = nn.Parameter(torch.ones(4, 3))


def _replace_one_of_the_same_place(student: Student, _: EMATeacher) -> None:
    del student.layer.bias
    student.layer.bias = nn.Parameter(torch.ones(4))


def _replace_a_buffer(student: Student, _: EMATeacher) -> None:
    student.mask = torch.tensor([1.0, 2.0])


def _replace_a_layer(student: Student, _: EMATeacher) -> None:
    student.head[1] = nn.Linear(4, 2)


def _exchange_two_parameters(student: Student, _: EMATeacher) -> None:
    norm = student.norm._parameters
    norm["weight"], norm["bias"] = norm["bias"], norm["weight"]


def _wrap_a_layer(student: Student, _: EMATeacher) -> None:
    student.layer = cast(nn.Linear, Wrapper(student.layer))


def _assign_the_student(student: Student, _: EMATeacher) -> None:
    student.load_state_dict({name: value + 1 for name, value in state(student).items()}, assign=True)


def _assign_the_teacher(_: Student, teacher: EMATeacher) -> None:
    states = teacher.state_dict()
    teacher.load_state_dict({name: value.clone() for name, value in states.items()}, assign=True)


def _move_the_teacher(_: Student, teacher: EMATeacher) -> None:
    teacher.double()


def _move_the_student(student: Student, _: EMATeacher) -> None:
    student.double()


@pytest.mark.parametrize(
    "change",
    [
        _replace_a_parameter,
        _replace_one_of_the_same_place,
        _replace_a_buffer,
        _replace_a_layer,
        _exchange_two_parameters,
        _wrap_a_layer,
        _assign_the_student,
        _assign_the_teacher,
        _move_the_teacher,
        _move_the_student,
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_replaced_between_updates_is_found(
    change: Callable[[Student, EMATeacher], None], dtype: torch.dtype
) -> None:
    """The next update is that of a teacher that searches anew."""
    student = Student().to(dtype)
    teacher = EMATeacher(student, 0.5)
    teacher.update(student)
    change(student, teacher)
    anew = copy.deepcopy(teacher)  # holds other tensors, so it searches
    train(student)
    for each in (teacher, anew):
        each.update(student)
    assert_close(teacher.state_dict(), anew.state_dict(), rtol=0, atol=0)


def test_what_is_emptied_between_updates_is_told_by_name() -> None:
    """DeepSpeed's ZeRO-3 does so to parameters that stay the same objects."""
    student = Student()
    teacher = EMATeacher(student, 0.5)
    teacher.update(student)
    student.layer.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"student's layer\.weight must have values, got an empty tensor"):
        teacher.update(student)


@pytest.mark.parametrize(
    ("decay", "update_every", "graphs", "dtype"),
    [
        (0.9, 1, 2, torch.float32),  # the first step, and all others
        (0.9, 3, 4, torch.bfloat16),  # each with and without an update
        (schedules.linear_warmup(0.1, 0.9, updates=5), 1, 3, torch.float32),  # its line and its end
        (schedules.power(), 1, 2, torch.float32),
        (schedules.uniform(), 1, 2, torch.bfloat16),
        (schedules.every(4, schedules.constant(0.5)), 1, 4, torch.float32),
    ],
)
def test_a_compiled_update_is_one_graph_that_serves_all_steps(
    decay: float | Callable[[int], float], update_every: int, graphs: int, dtype: torch.dtype
) -> None:
    """It compiles with fullgraph=True, and its values are those of the plain update."""
    student = Student().to(dtype)
    plain, teacher = (EMATeacher(student, decay, update_every=update_every) for _ in range(2))
    counter = CompileCounter()
    torch._dynamo.reset()
    update = torch.compile(teacher.update, fullgraph=True, backend=counter)
    for _ in range(20):
        train(student)
        update(student)
        plain.update(student)
    assert counter.frame_count <= graphs
    assert (teacher.step, teacher.updates) == (plain.step, plain.updates)
    assert_close(teacher.state_dict(), plain.state_dict())


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_numbers_of_numpy_are_taken_as_numbers(kind: type[Any]) -> None:
    """Decays and schedules may give them, without a warning, and the rest is computed in float64."""
    student = single(1.0)
    for decay in (kind(0.75), lambda n: kind(0.75), schedules.constant(kind(0.75)), schedules.every(2, kind(0.75))):
        teacher = EMATeacher(student, decay)
        teacher.update(single(5.0))
        assert teacher.module.get_parameter("weight") == 2.0


def test_numbers_of_numpy_compile() -> None:
    """Numbers of NumPy would break the graph."""
    student = single(1.0)
    numbers: Any = {"decay": np.float32(0.75), "update_every": np.int64(2)}
    teacher = EMATeacher(student, **numbers)
    torch._dynamo.reset()
    update = torch.compile(teacher.update, fullgraph=True, backend="eager")
    for _ in range(2):
        update(single(5.0))
    assert teacher.module.get_parameter("weight") == 2.0


def test_a_buffer_of_eight_bits_is_copied() -> None:
    """It is no statistic, and has a master only for its digits."""
    student = single(1.0)
    student.register_buffer("scale", torch.tensor([0.5, 2.0]).to(torch.float8_e4m3fn))
    teacher = EMATeacher(student, 0.75)
    student.get_buffer("scale").copy_(torch.tensor([1.0, 4.0]))
    teacher.update(student)
    assert teacher.state_dict()["module.scale"].float().tolist() == [1.0, 4.0]


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A world of one."""
    dist.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore")  # of torch's own, about a mesh on the CPU
def test_sharded_parameters_are_averaged_and_swapped() -> None:
    """FSDP2 shards them into DTensors, and its root stays gathered after a forward pass without a backward one."""
    student = Student()
    teacher = EMATeacher(student, 0.75)
    before, mesh = state(student), init_device_mesh("cpu", (1,))
    sharded = fully_shard(student, mesh=mesh)
    fully_shard(teacher.module, mesh=mesh)
    assert isinstance(student.layer.weight, DTensor)
    inputs = torch.randn(4, 3)
    for _ in range(2):
        with torch.no_grad():
            sharded.reshard()
            for parameter in student.parameters():
                parameter.add_(4.0)
            student.eval()(inputs)
        teacher(inputs)
        teacher.update(student)
    # 0.75 (0.75 θ + 0.25 (θ + 4)) + 0.25 (θ + 8) = θ + 2.75
    averaged = teacher.module.get_parameter("layer.weight")
    assert isinstance(averaged, DTensor)
    assert_close(averaged.full_tensor(), before["layer.weight"] + 2.75)
    teacher(inputs)
    with teacher.swapped_into(student):
        assert_close(student.layer.weight.full_tensor(), before["layer.weight"] + 2.75)
    assert_close(student.layer.weight.full_tensor(), before["layer.weight"] + 8)
