"""The processes of ``torchrun``, or the only one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from imagenet.errors import RunError


@dataclass(frozen=True)
class Processes:
    """How many there are, which one this is, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    @contextmanager
    def started(cls, device: str) -> Iterator[Processes]:
        """Joins the process group that ``torchrun`` describes, if it does, and leaves it at the end."""
        if device == "cuda" and not torch.cuda.is_available():
            raise RunError("--device cuda needs a GPU that this PyTorch can use; pass --device cpu to do without")
        together = "RANK" in os.environ
        own = torch.device(device, int(os.environ.get("LOCAL_RANK", "0"))) if device == "cuda" else torch.device(device)
        if device == "cuda":
            torch.cuda.set_device(own)
        if not together:
            yield cls(0, 1, own)
            return
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(hours=1))
        try:
            yield cls(dist.get_rank(), dist.get_world_size(), own)
        finally:
            dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        """Whether this one prints and writes."""
        return self.rank == 0

    def gathered(self, value: Any) -> list[Any]:
        """The value of every process, in order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values
