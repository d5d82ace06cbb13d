"""What each of two ranks checks of the callbacks with a teacher that FSDP2 shards; run by tests/integrations."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from leaving import leave_together
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close
from transformers import TrainerControl, TrainerState, TrainingArguments

from calrobust import EMATeacher
from calrobust.integrations import lightning, transformers

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
arguments = TrainingArguments(sys.argv[1], use_cpu=True, report_to="none")
state, control = TrainerState(global_step=1), TrainerControl()
checkpoint = Path(sys.argv[1]) / "checkpoint-1"
if dist.get_rank() == 0:
    checkpoint.mkdir(parents=True)


def sharded(student: nn.Module) -> tuple[nn.Module, EMATeacher]:
    """A student and its teacher, each rank with its part of both."""
    student = copy.deepcopy(student)
    teacher = EMATeacher(student, decay=0.5)
    for module in (student, teacher.module, teacher.masters):
        if module is not None:
            fully_shard(module, mesh=mesh)
    return student, teacher


def whole(teacher: EMATeacher) -> dict[str, Tensor]:
    """The whole state, with full tensors in place of shards."""
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in teacher.state_dict().items()}


for dtype in (torch.float32, torch.bfloat16):  # without masters and with them
    torch.manual_seed(0)
    first = nn.Linear(5, 3).to(dtype)
    alone = EMATeacher(first, decay=0.5)
    student, teacher = sharded(first)
    callback, hook = transformers.EMATeacherCallback(teacher, student), lightning.EMATeacherCallback(teacher, student)
    with torch.no_grad():
        for parameter in (*first.parameters(), *student.parameters()):
            parameter.mul_(3)
    alone.update(first)
    callback.on_step_end(arguments, state, control)
    dist.barrier()
    callback.on_save(arguments, state, control)
    dist.barrier()
    kept = torch.load(checkpoint / "teacher.pt", weights_only=True)
    assert_close(kept, dict(alone.state_dict()))
    hooked = hook.state_dict()
    assert_close(hooked["teacher"], dict(alone.state_dict()))

    student, resumed = sharded(first)
    transformers.EMATeacherCallback(resumed, student).on_train_begin(arguments, state, control)
    assert_close(whole(resumed), dict(alone.state_dict()))
    student, resumed = sharded(first)
    lightning.EMATeacherCallback(resumed, student).load_state_dict(hooked)
    assert_close(whole(resumed), dict(alone.state_dict()))
    resumed.update(student)
    dist.barrier()

    torch.manual_seed(dist.get_rank())  # the ranks initialise their models on their own
    teacher = EMATeacher(nn.Linear(5, 3).to(dtype))
    transformers.EMATeacherCallback(teacher, student).on_train_begin(arguments, TrainerState(), control)
    for value in teacher.state_dict().values():
        values = [torch.empty_like(value) for _ in range(2)]
        dist.all_gather(values, value)
        assert torch.equal(*values)
leave_together()
