"""A teacher that holds the student's own tensors for parameters that need no gradient."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize
from torch.testing import assert_close

from calrobust import EMATeacher, schedules

INPUTS = torch.randn(5, 4)


class Adapter(nn.Module):
    """A trainable change of low rank to a frozen weight, as a parametrisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(1, width))
        self.up = nn.Parameter(torch.zeros(width, 1))

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight."""
        return weight + self.up @ self.down


def adapted() -> nn.Sequential:
    """Two tied frozen layers, one of which has an adapter, frozen normalisation with statistics, and a head."""
    layer, tied = nn.Linear(4, 4), nn.Linear(4, 4)
    tied.bias = layer.bias
    model = nn.Sequential(layer, nn.BatchNorm1d(4), tied, nn.Linear(4, 2)).requires_grad_(False)
    parametrize.register_parametrization(layer, "weight", Adapter(4))
    model[3].requires_grad_(True)
    return model


FROZEN = {"0.bias", "0.parametrizations.weight.original", "1.weight", "1.bias", "2.weight", "2.bias"}


def train(student: nn.Module) -> None:
    """Moves what needs a gradient, and the statistics."""
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.rand_like(parameter))
        student.train()(INPUTS.to(next(student.parameters()).dtype))


def shares(teacher: EMATeacher, student: nn.Module) -> set[str]:
    """The names of the parameters that both models hold."""
    theirs = dict(student.named_parameters(remove_duplicate=False))
    ours = teacher.module.named_parameters(remove_duplicate=False)
    return {name for name, parameter in ours if parameter is theirs[name]}


def storages(module: nn.Module) -> dict[int, int]:
    """The bytes of each storage of a module, by its address."""
    held = [*module.parameters(), *module.buffers()]
    return {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in held}


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_sharing_teacher_is_the_teacher_that_copies_everything(dtype: torch.dtype, given: bool) -> None:
    """Values, masters, outputs and counters are equal after any number of steps, also with a second model."""
    student = adapted().to(dtype)
    other = adapted().to(dtype) if given else None
    whole = EMATeacher(student, schedules.uniform(), update_every=2)
    teacher = EMATeacher(student, schedules.uniform(), update_every=2, share_frozen=True, copy=other)
    before = {name: value.clone() for name, value in student.state_dict().items() if name in FROZEN}
    for _ in range(5):
        train(student)
        whole.update(student)
        teacher.update(student)
        assert_close(teacher(INPUTS.to(dtype)), whole(INPUTS.to(dtype)), rtol=0, atol=0)
    assert shares(teacher, student) == FROZEN
    assert (teacher.step, teacher.updates) == (5, 2)
    for ours, theirs in ((teacher.module, whole.module), (teacher.masters, whole.masters)):
        if theirs is not None:
            expected = {name: value for name, value in theirs.state_dict().items() if name not in FROZEN}
            found = {name: value for name, value in cast(nn.Module, ours).state_dict().items() if name not in FROZEN}
            assert_close(found, expected, rtol=0, atol=0)
    assert_close({name: student.state_dict()[name] for name in before}, before, rtol=0, atol=0)


@pytest.mark.parametrize("given", [False, True])
def test_a_sharing_teacher_takes_the_memory_of_what_trains(given: bool) -> None:
    """Its own storages are those of trainable parameters and of buffers, and their masters."""
    student = adapted()
    own = sum(4 * p.numel() for p in student.parameters() if p.requires_grad)
    own += sum(one.untyped_storage().nbytes() for one in student.buffers())
    teacher = EMATeacher(student, share_frozen=True, copy=adapted() if given else None)
    ours, theirs = storages(teacher.module), storages(student)
    assert sum(size for address, size in ours.items() if address not in theirs) == own
    low = EMATeacher(student.bfloat16(), share_frozen=True)
    masters, copies = storages(cast(nn.Module, low.masters)), storages(low.module) | storages(student)
    assert sum(size for address, size in masters.items() if address not in copies) == own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_holds_what_the_teacher_has_of_its_own(dtype: torch.dtype) -> None:
    """A resumed run is the run that was not interrupted, inside a parent and alone; loading keeps the sharing."""

    def parent() -> nn.ModuleDict:
        student = adapted().to(dtype)
        return nn.ModuleDict({"student": student, "teacher": EMATeacher(student, 0.9, share_frozen=True)})

    whole, file = parent(), io.BytesIO()
    student, teacher = whole["student"], cast(EMATeacher, whole["teacher"])
    for _ in range(3):
        train(student)
        teacher.update(student)
    assert not FROZEN & {name.partition(".")[2] for name in teacher.state_dict()}
    assert {"step", "updates", "module.3.weight", "module.1.running_mean"} <= teacher.state_dict().keys()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    saved = torch.load(file)
    for assign in (False, True):
        resumed = parent()
        resumed["student"].load_state_dict({k.removeprefix("student."): v for k, v in saved.items() if "student." in k})
        other = cast(EMATeacher, resumed["teacher"])
        other.load_state_dict(
            {k.removeprefix("teacher."): v.clone() for k, v in saved.items() if "teacher." in k}, assign=assign
        )
        assert shares(other, resumed["student"]) == FROZEN
        assert_close(other.state_dict(), teacher.state_dict(), rtol=0, atol=0)
        other.update(resumed["student"])
    resumed = parent()
    resumed.load_state_dict(saved)
    train(student)
    resumed["student"].load_state_dict(student.state_dict())
    for each in (whole, resumed):
        cast(EMATeacher, each["teacher"]).update(each["student"])
    assert_close(resumed["teacher"].state_dict(), teacher.state_dict(), rtol=0, atol=0)


def test_loading_says_which_state_it_expects() -> None:
    """A state with the shared tensors is refused, one without them is missed by name; the student does not change."""
    student = adapted()
    sharing, whole = EMATeacher(student, share_frozen=True), EMATeacher(adapted())
    before = copy.deepcopy(student.state_dict())
    expected = r"must not have what share_frozen=True shares with the student, got .*\.bias and 5 more; load one that"
    with pytest.raises(RuntimeError, match=expected):
        sharing.load_state_dict(whole.state_dict())
    assert_close(student.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"Missing key.*module\.2\.weight"):
        whole.load_state_dict(sharing.state_dict())
    assert "module.3.weight" in sharing.load_state_dict({}, strict=False).missing_keys


@pytest.mark.parametrize("fails", [False, True])
def test_a_swap_lends_what_trains_alone(fails: bool) -> None:
    """Inside, the student computes what the teacher does; the frozen tensors are never written to."""
    student = adapted()
    teacher = EMATeacher(student, 0.5, share_frozen=True)
    train(student)
    teacher.update(student)
    own = copy.deepcopy(student.state_dict())
    versions = {name: p._version for name, p in student.named_parameters() if not p.requires_grad}
    try:
        with teacher.swapped_into(student):
            assert torch.equal(student.eval()(INPUTS), teacher(INPUTS))
            assert not torch.equal(student.state_dict()["3.weight"], own["3.weight"])
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert_close(student.state_dict(), own, rtol=0, atol=0)
    assert {name: p._version for name, p in student.named_parameters() if not p.requires_grad} == versions


@pytest.mark.parametrize("update_every", [1, 10])
def test_a_parameter_that_is_unfrozen_later_raises_by_name(update_every: int) -> None:
    """The next update raises, even if it would not act, and nothing has changed; frozen again, it goes on."""
    student = adapted()
    parent = nn.ModuleList([student, EMATeacher(student, 0.5, update_every=update_every, share_frozen=True)])
    teacher = cast(EMATeacher, parent[1])
    teacher.update(student)
    student[2].requires_grad_(True)
    before = copy.deepcopy(teacher.state_dict())
    with pytest.raises(
        ValueError, match=r"student's 0\.bias must stay the frozen tensor.*, got requires_grad=True; make"
    ):
        teacher.update(student)
    assert_close(teacher.state_dict(), before, rtol=0, atol=0)
    student[2].requires_grad_(False)
    teacher.update(student)
    parent.requires_grad_(True)
    with pytest.raises(ValueError, match="must stay the frozen tensor"):
        teacher.update(student)


@pytest.mark.parametrize("change", ["another student", "another tensor", "a duplicate"])
def test_a_frozen_tensor_that_is_not_the_shared_one_raises_by_name(change: str) -> None:
    """The teacher would average into the tensors of the student that it came from."""
    student = other = adapted()
    teacher = EMATeacher(student, 0.5, share_frozen=True)
    if change == "another student":
        other = adapted()
    elif change == "another tensor":
        student[1].weight = nn.Parameter(torch.ones(4), requires_grad=False)
    else:
        teacher = copy.deepcopy(teacher)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(
        ValueError, match=r"must stay the frozen tensor that share_frozen=True shares, got another; make"
    ):
        teacher.update(other)
    assert teacher.step == 0
    assert_close(student.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda parent: pickle.loads(pickle.dumps(parent))])
def test_a_duplicate_of_the_parent_shares_within_itself(duplicate: Callable[[nn.ModuleList], nn.ModuleList]) -> None:
    """Its teacher follows its student, and the original stays as it is."""
    student = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    twin, held = duplicate(nn.ModuleList([student, EMATeacher(student, 0.5, share_frozen=True)]))
    teacher = cast(EMATeacher, held)
    assert shares(teacher, twin) == {"0.weight", "0.bias"}
    assert not set(storages(twin)) & set(storages(student))
    teacher.update(twin)


def test_what_is_shared_moves_with_the_student() -> None:
    """A parent moves both, the teacher alone moves what it has of its own, and the masters stay float32."""
    student = adapted()
    parent = nn.ModuleList([student, EMATeacher(student, 0.5, share_frozen=True)])
    teacher = cast(EMATeacher, parent[1])
    teacher.double()
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert teacher.module.get_parameter("3.weight").dtype == torch.float64
    parent.bfloat16()
    assert {p.dtype for p in teacher.module.parameters()} == {torch.bfloat16}
    assert teacher.masters is not None
    assert teacher.masters.get_parameter("3.weight").dtype == torch.float32
    assert teacher.masters.get_parameter("2.weight") is student[2].weight
    train(student)
    teacher.update(student)
    assert shares(teacher, student) == FROZEN


def test_a_device_elsewhere_than_the_students_is_an_error() -> None:
    """Its own device is none, and nothing is elsewhere if nothing is shared."""
    student = adapted()
    with pytest.raises(
        ValueError, match=r"device must be the student's, .* got meta; leave out device or share_frozen"
    ):
        EMATeacher(student, device="meta", share_frozen=True)
    assert shares(EMATeacher(student, device="cpu", share_frozen=True), student) == FROZEN
    EMATeacher(nn.Linear(1, 1), device="meta", share_frozen=True)


@pytest.mark.filterwarnings("ignore")  # of torch's own, about a mesh on the CPU
def test_fsdp2_needs_a_teacher_that_copies_everything(tmp_path: Path) -> None:
    """It gives each model shards of its own, so the update names the first tensor that is no longer shared."""
    dist.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    try:
        student = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
        teacher, mesh = EMATeacher(student, share_frozen=True), init_device_mesh("cpu", (1,))
        fully_shard(student, mesh=mesh)
        with pytest.raises(ValueError, match=r"sharded alike, got 0\.weight whole"):
            teacher.update(student)
        fully_shard(teacher.module, mesh=mesh)
        with pytest.raises(ValueError, match=r"student's 0\.weight must stay the frozen tensor.*, got another"):
            teacher.update(student)
    finally:
        dist.destroy_process_group()


def test_wrapped_students_share_as_bare_ones_do() -> None:
    """The words of wrappers are left out of names, in the student and in a second model."""
    student = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    compiled = cast(nn.Module, torch.compile(student))
    for teacher in (
        EMATeacher(compiled, 0.5, share_frozen=True),
        EMATeacher(compiled, 0.5, share_frozen=True, copy=copy.deepcopy(student)),
    ):
        assert shares(teacher, student) == {"0.weight", "0.bias"}
        teacher.update(compiled)
        teacher.update(student)
        assert "module.0.weight" not in teacher.state_dict()
    assert "share_frozen=True" in repr(teacher)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_update_gives_the_values_of_the_plain_one(dtype: torch.dtype) -> None:
    """It compiles with fullgraph=True."""
    student = adapted().to(dtype)
    plain, compiled = (EMATeacher(student, 0.5, share_frozen=True) for _ in range(2))
    update = torch.compile(compiled.update, fullgraph=True, backend="eager")
    for _ in range(4):
        train(student)
        plain.update(student)
        update(student)
    assert_close(compiled.state_dict(), plain.state_dict(), rtol=0, atol=0)
