"""A batch that the ranks of a process group share out: collectives with gradient over its rows."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING or dist.is_available():
    from torch.distributed import ProcessGroup
else:  # a torch built without it has no such name, and no group to pass
    ProcessGroup = Any

__all__ = ["REDUCTIONS", "REFUSED", "ProcessGroup", "Ranks", "Reduction", "agree"]

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
REFUSED = -1  # in the place of a number of rows: this rank has found its batch wrong


class Ranks:
    """The ranks that share out a batch, and how many rows each holds; of one rank, nothing here communicates.

    Every method is collective: all ranks of the group call it, in the same order.
    """

    def __init__(self, sizes: list[int], rank: int = 0, group: ProcessGroup | None = None) -> None:
        self.sizes = sizes
        self.rank = rank
        self.group = group
        self.total = sum(sizes)
        start = sum(sizes[:rank])
        self.own = slice(start, start + sizes[rank])  # this rank's rows among all

    def gather(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """``[n, ...]`` here -> ``[total, ...]`` in ``dtype``, in which the gradient is summed over ranks."""
        if len(self.sizes) == 1:
            return rows.to(dtype)
        gathered: Tensor = _Gather.apply(rows, self, dtype)
        return gathered

    def scatter_sum(self, rows: Tensor) -> Tensor:
        """``[total, ...]`` here -> this rank's ``[n, ...]`` of the sum over ranks."""
        if len(self.sizes) == 1:
            return rows
        own: Tensor = _ScatterSum.apply(rows, self)
        return own

    def sum(self, value: Tensor) -> Tensor:
        """Over ranks, on each of them; its gradient here is such that averaging gradients over ranks is exact."""
        if len(self.sizes) == 1:
            return value
        total: Tensor = _Sum.apply(value, self)
        return total

    def reduce(self, values: Tensor, reduction: Reduction) -> Tensor:
        """The mean or the sum over the rows of all ranks, or the values of this one's."""
        if reduction == "none":
            return values
        total = self.sum(values.sum())
        return total / self.total if reduction == "mean" else total

    @torch.no_grad()
    def maximum(self, values: Tensor) -> Tensor:
        """Elementwise over ranks, without gradient."""
        values = values.detach().clone()
        if len(self.sizes) > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX, self.group)
        return values


def agree(n: int, group: ProcessGroup | None, facts: dict[str, object], device: torch.device) -> Ranks:
    """Tells all ranks of the group the number of rows here, and facts that must be the same on all of them.

    Args:
        n: number of rows here, or `REFUSED`.
        group: the process group; None is the world.
        facts: what must be the same, by a name that an error can show.
        device: of the rows; the message travels on it where the backend wants a CUDA device.

    Raises:
        ValueError: a rank has refused its batch, or the facts differ. All ranks raise, so that none waits for another.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return Ranks([n])
    if dist.get_backend(group) != "nccl":
        device = torch.device("cpu")
    elif device.type != "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    digest = int.from_bytes(blake2b(repr(facts).encode(), digest_size=7).digest())
    mine = torch.tensor([n, digest], device=device)
    told = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(told, mine, group)
    sizes, digests = torch.stack(told).T.tolist()
    if REFUSED in sizes:
        if n == REFUSED:
            return Ranks(sizes)  # the caller raises its own error
        refused = [rank for rank, size in enumerate(sizes) if size == REFUSED]
        raise ValueError(f"every rank must bring a valid batch, but rank {refused} did not; its own error says why")
    if len(set(digests)) > 1:
        every: list[dict[str, object]] = [{} for _ in sizes]
        with torch.cuda.device_of(mine):
            dist.all_gather_object(every, facts, group)
        for name in facts:
            values = [theirs[name] for theirs in every]
            if any(value != values[0] for value in values):
                raise ValueError(f"{name} must be the same on every rank, got {values}")
    return Ranks(sizes, dist.get_rank(group), group)


class _Gather(torch.autograd.Function):
    """Its adjoint is `_ScatterSum`, so that each can be differentiated by the other, any number of times."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks, dtype: torch.dtype) -> Tensor:
        ctx.ranks, ctx.dtype = ranks, rows.dtype
        return _gather(rows, ranks).to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        own: Tensor = _ScatterSum.apply(gradient, ctx.ranks)
        return own.to(ctx.dtype), None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return _scatter_sum(rows, ranks)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(gradient, ctx.ranks, gradient.dtype), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, ranks: Ranks) -> Tensor:
        ctx.world_size = len(ranks.sizes)
        value = value.clone()
        dist.all_reduce(value, group=ranks.group)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.world_size, None  # by which DDP and FSDP divide when they average


def _gather(rows: Tensor, ranks: Ranks) -> Tensor:
    longest = max(ranks.sizes)
    padded = _pad(rows, longest)
    received = [torch.empty_like(padded) for _ in ranks.sizes]
    dist.all_gather(received, padded, ranks.group)
    return torch.cat([part[:size] for part, size in zip(received, ranks.sizes, strict=True)])


def _scatter_sum(rows: Tensor, ranks: Ranks) -> Tensor:
    longest = max(ranks.sizes)
    parts = [_pad(part, longest) for part in rows.split(ranks.sizes)]
    received = torch.empty_like(parts[0])
    dist.reduce_scatter(received, parts, group=ranks.group)
    return received[: ranks.sizes[ranks.rank]]


def _pad(rows: Tensor, length: int) -> Tensor:
    """Collectives want the same number of rows from every rank."""
    if rows.shape[0] == length:
        return rows.contiguous()
    return torch.cat([rows, rows.new_zeros(length - rows.shape[0], *rows.shape[1:])])
