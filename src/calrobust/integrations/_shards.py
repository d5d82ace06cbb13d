"""A sharded teacher in a checkpoint: saved whole, loaded onto the shards of each rank."""

from __future__ import annotations

from typing import Any

from torch.distributed.tensor import DTensor, distribute_tensor

from calrobust import EMATeacher


def whole_state(teacher: EMATeacher) -> dict[str, Any]:
    """The state dict with whole tensors in place of FSDP2's shards; every rank has to call it."""
    state = teacher.state_dict()
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}


def load_whole_state(teacher: EMATeacher, state: dict[str, Any]) -> None:
    """Loads what :func:`whole_state` gave, onto shards where the teacher has them."""
    own = teacher.state_dict()
    shards = {name: value for name, value in own.items() if isinstance(value, DTensor) and name in state}
    for name, value in shards.items():
        state = {**state, name: distribute_tensor(state[name].to(value.device), value.device_mesh, value.placements)}
    teacher.load_state_dict(state)
