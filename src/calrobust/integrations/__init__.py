"""Other people's training loops."""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from calrobust import EMATeacher


def whole_state(teacher: EMATeacher) -> dict[str, Any]:
    """The state dict of whole tensors; every rank has to call it."""
    state = teacher.state_dict()
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}


def load_whole_state(teacher: EMATeacher, state: dict[str, Any]) -> None:
    """Loads what ``whole_state`` gave."""
    state = dict(state)
    for name, own in teacher.state_dict().items():
        if hasattr(own, "full_tensor") and name in state:
            from torch.distributed.tensor import distribute_tensor

            state[name] = distribute_tensor(state[name].to(own.device), own.device_mesh, own.placements)
    teacher.load_state_dict(state)


def share_first_rank(teacher: EMATeacher) -> None:
    """Gives every rank the new teacher of the first."""
    if teacher.step == 0 and dist.is_available() and dist.is_initialized():
        whole = whole_state(teacher).items()
        states = [{name: value.cpu() if isinstance(value, Tensor) else value for name, value in whole}]
        dist.broadcast_object_list(states)
        load_whole_state(teacher, states[0])
