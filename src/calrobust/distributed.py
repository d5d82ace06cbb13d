"""Collectives with gradient."""

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING or dist.is_available():
    from torch.distributed import ProcessGroup as ProcessGroup
else:
    ProcessGroup = Any

Map = Callable[[Tensor], Tensor]
REFUSED = -1  # in place of a number of rows


class Ranks:
    """The ranks of a batch and their rows. All ranks call the same methods."""

    def __init__(self, sizes: list[int], rank: int = 0, group: ProcessGroup | None = None) -> None:
        self.sizes, self.rank, self.group = sizes, rank, group
        self.total, start = sum(sizes), sum(sizes[:rank])
        self.here = slice(start, start + sizes[rank])

    def gather(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """``[n, ...]`` of each rank -> ``[total, ...]`` in ``dtype``, in which gradients are summed."""
        if len(self.sizes) == 1:
            return rows.to(dtype)
        own = rows.dtype
        return _linear(rows, lambda here: self._gather(here).to(dtype), lambda there: self.scatter_sum(there).to(own))

    def scatter_sum(self, rows: Tensor) -> Tensor:
        """``[total, ...]`` of each rank -> this rank's rows ``[n, ...]`` of their sum."""
        if len(self.sizes) == 1:
            return rows
        return _linear(rows, self._scatter_sum, lambda here: self.gather(here, here.dtype))

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks, for training that averages gradients over them."""
        if len(self.sizes) == 1:
            return value
        return _linear(value, self._sum, lambda gradient: gradient * len(self.sizes))

    def _gather(self, rows: Tensor) -> Tensor:
        padded = _pad(rows, max(self.sizes))
        received = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather(received, padded, self.group)
        return torch.cat([part[:size] for part, size in zip(received, self.sizes, strict=True)])

    def _scatter_sum(self, rows: Tensor) -> Tensor:
        parts = [_pad(part, max(self.sizes)) for part in rows.split(self.sizes)]
        received = torch.empty_like(parts[0])
        dist.reduce_scatter(received, parts, group=self.group)
        return received[: self.sizes[self.rank]]

    def _sum(self, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value, group=self.group)
        return value

    @torch.no_grad()
    def maximum(self, values: Tensor) -> Tensor:
        """The largest over ranks."""
        values = values.detach().clone()
        dist.all_reduce(values, dist.ReduceOp.MAX, self.group)
        return values


def agree(
    here: Sequence[int], group: ProcessGroup | None, facts: dict[str, object], device: torch.device
) -> tuple[Ranks, ...]:
    """The ranks of each batch; ``here`` are the numbers of this rank's rows.

    All ranks raise if their ``facts`` differ or one has `REFUSED` its batch, so that none waits.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return tuple(Ranks([n]) for n in here)
    if dist.get_backend(group) != "nccl":
        device = torch.device("cpu")
    elif device.type != "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    digest = int.from_bytes(blake2b(repr(facts).encode(), digest_size=7).digest())
    mine = torch.tensor([*here, digest], device=device)
    told = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(told, mine, group)
    *sizes, digests = torch.stack(told).T.tolist()
    refused = [rank for rank, size in enumerate(sizes[0]) if size == REFUSED]
    if refused and here[0] == REFUSED:
        return ()  # the caller raises its own error
    if refused:
        raise ValueError(f"every rank must bring a valid batch, but rank {refused} did not; its own error says why")
    if len(set(digests)) > 1:
        every: list[dict[str, object]] = [{} for _ in told]
        with torch.cuda.device_of(mine):
            dist.all_gather_object(every, facts, group)
        for name in facts:
            values = [theirs[name] for theirs in every]
            if any(value != values[0] for value in values):
                raise ValueError(f"{name} must be the same on every rank, got {values}")
    return tuple(Ranks(each, dist.get_rank(group), group) for each in sizes)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(value: Tensor, apply: Map, _: Map) -> Tensor:
        return apply(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.maps = inputs[1:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.maps[1](gradient), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _linear(tangent, *ctx.maps)


def _linear(value: Tensor, apply: Map, transpose: Map) -> Tensor:
    """``apply(value)``, whose gradient goes through ``transpose``."""
    result: Tensor = _Linear.apply(value, apply, transpose)
    return result


def _pad(rows: Tensor, length: int) -> Tensor:
    more = length - len(rows)
    return torch.cat([rows, rows.new_zeros(more, *rows.shape[1:])]) if more else rows.contiguous()
