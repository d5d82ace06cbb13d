"""EMATeacher and OrthogonalityLoss on two processes, with gloo and a file store."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from leaving import leave_together
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from calrobust import EMATeacher, functional

INPUTS = torch.ones(4, 3)


def model(seed: int) -> nn.Sequential:
    """Two layers and statistics, from the seed."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def of_every_rank(tensor: Tensor) -> list[Tensor]:
    """The tensor as each rank has it."""
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    return gathered


def check_ddp(rank: int, mesh: DeviceMesh) -> None:
    """The first update with the DDP module gives every rank the first rank's copy, which then follows the student."""
    for dtype in (torch.float32, torch.bfloat16):
        student = model(seed=rank).to(dtype)
        teacher = EMATeacher(student, 0.75, update_every=2)
        wrapped = DistributedDataParallel(student)
        for _ in range(4):
            teacher.update(wrapped)
            for value in teacher.state_dict().values():
                first, second = of_every_rank(value)
                assert torch.equal(first, second)
        assert_close(teacher.module.state_dict(), model(seed=0).to(dtype).state_dict())
    student = model(seed=rank)
    student[0].requires_grad_(False)
    teacher = EMATeacher(student, 0.75, share_frozen=True)  # DDP gives all ranks the first one's shared tensors
    teacher.update(DistributedDataParallel(student))
    assert teacher.module.get_parameter("0.weight") is student[0].weight
    assert_close(teacher.module.state_dict(), model(seed=0).state_dict())
    alone = EMATeacher(student)
    alone.update(student)  # without DDP no rank waits for another
    resumed = EMATeacher(model(seed=rank))
    resumed.step = 1
    resumed.update(DistributedDataParallel(model(seed=rank)))  # nor does one that goes on
    first, second = of_every_rank(resumed.module.get_parameter("0.weight"))
    assert not torch.equal(first, second)


def check_swap(rank: int, mesh: DeviceMesh) -> None:
    """A forward pass inside swapped_into leaves none of the teacher's gathered weights in an FSDP2 student."""
    student = model(seed=0)
    teacher = EMATeacher(student, 0.5)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(5)
    own, lent = student.eval()(INPUTS), teacher(INPUTS)
    apply_activation_checkpointing(student, check_fn=lambda part: isinstance(part, nn.Linear))
    sharded: nn.Module = model(seed=0)
    fully_shard(sharded, mesh=mesh)
    with pytest.raises(ValueError, match=r"sharded alike, got 0\.weight whole in the teacher and sharded in the stud"):
        EMATeacher(model(seed=0)).update(sharded)
    for module in (student, teacher.module):
        fully_shard(module, mesh=mesh)
    with teacher.swapped_into(student):
        assert_close(student(INPUTS), lent)
    assert_close(student(INPUTS), own)
    teacher.update(student)
    averaged = teacher.module.get_parameter("0.weight")
    assert isinstance(averaged, DTensor)
    assert_close(averaged.full_tensor(), 3 * model(seed=0).get_parameter("0.weight").detach())


def check_orthogonality(rank: int, mesh: DeviceMesh) -> None:
    """Value and gradient of a sharded projection are those of the whole one."""
    for shape in ((4, 3), (3, 5)):
        torch.manual_seed(0)
        whole, layer, holder = nn.Parameter(torch.randn(shape)), nn.Linear(*shape, bias=False), nn.Module()
        layer.weight = nn.Parameter(whole.detach().T.contiguous())
        holder.projection = nn.Parameter(whole.detach().clone())
        fully_shard([layer, holder], mesh=mesh)
        for squared in (True, False):
            expected = functional.orthogonality_loss(whole, squared=squared)
            (gradient,) = torch.autograd.grad(expected, whole)
            for weight, parameter, grad in (
                (layer, layer.weight, gradient.T),
                (holder.projection, holder.projection, gradient),
            ):
                value = functional.orthogonality_loss(weight, squared=squared)
                assert_close(value, expected)
                (sharded,) = torch.autograd.grad(value, parameter)
                assert isinstance(sharded, DTensor)
                assert_close(sharded.full_tensor(), grad)


def on_a_rank(rank: int, store: str) -> None:
    """Runs every check in one process group."""
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for check in (check_ddp, check_swap, check_orthogonality):
        check(rank, mesh)
    leave_together()


def test_two_ranks_hold_one_teacher(tmp_path: Path) -> None:
    """It is made before DDP from models that differ, or sharded by FSDP2 (trap 40)."""
    spawn(on_a_rank, ((tmp_path / "store").as_uri(),), nprocs=2)
