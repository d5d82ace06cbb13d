"""What the Triton kernels share."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from calrobust.kernels.tiled import slices

TILE_BYTES = 160 * 2**20  # of the gradient in S
KERNELS = ("forward", "backward", "sigmoid")


class Blocks(NamedTuple):
    """A tile, and how a program works on it."""

    ROWS: int
    COLUMNS: int
    DEPTH: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None  # registers of a thread


# By kernel, bytes of an operand and models; each takes at most 99 KiB of shared memory.
BLOCKS = {
    ("forward", 2, 1): Blocks(128, 128, 64, 4, 3),
    ("forward", 2, 2): Blocks(128, 128, 64, 8, 3),
    ("backward", 2, 1): Blocks(128, 128, 64, 4, 3),
    ("backward", 2, 2): Blocks(128, 128, 64, 8, 3),
    ("sigmoid", 2, 1): Blocks(128, 128, 64, 8, 3, 128),
    ("sigmoid", 2, 2): Blocks(128, 64, 64, 8, 3),
    **{(kernel, 4, models): Blocks(128, 64, 32, 4, 3) for kernel in ("forward", "backward") for models in (1, 2)},
    **{("sigmoid", 4, models): Blocks(128, 64, 32, 8, 3) for models in (1, 2)},
    **{(kernel, 8, models): Blocks(32, 32, 16, 8, 2) for kernel in KERNELS for models in (1, 2)},
}

LOG2E = tl.constexpr(math.log2(math.e))  # for tl.exp2
LN2 = tl.constexpr(math.log(2))
NEAR = tl.constexpr(0.5)  # up to here exp(r) − 1 − r is a series
INVERSE_FACTORIALS = tl.constexpr(tuple(1 / math.factorial(k) for k in range(15)))


@triton.jit
def logits(matrix, row, column, n, m, DEPTH: tl.constexpr, EVEN: tl.constexpr):
    """A block of ``scale · x yᵀ``; beyond its end, the last row or column."""
    x, y, scale, width = matrix
    total = tl.zeros((row.shape[0], column.shape[0]), scale.dtype.element_ty)
    x_row = x + tl.minimum(row, n - 1).to(tl.int64)[:, None] * width
    y_row = y + tl.minimum(column, m - 1).to(tl.int64)[None, :] * width
    for start in range(0, width, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        if EVEN:
            a, b = tl.load(x_row + depth[None, :]), tl.load(y_row + depth[:, None])
        else:
            a = tl.load(x_row + depth[None, :], mask=(depth < width)[None, :], other=0.0)
            b = tl.load(y_row + depth[:, None], mask=(depth < width)[:, None], other=0.0)
        if a.dtype == tl.float64:  # tl.dot takes it from Triton 3.5 on
            total += tl.sum(a[:, :, None] * b[None, :, :], 1)
        elif a.dtype == tl.float32:
            total = tl.dot(a, b, total, input_precision="tf32x3")
        else:
            total = tl.dot(a, b, total)
    return total * tl.load(scale)


@triton.jit
def comparison(p, target, r, TEACHER: tl.constexpr):
    """Target p̃, excess p − p̃ and divergence p̃ (exp(r) − 1 − r), r = log p − log p̃; without a teacher only p."""
    if not TEACHER:
        return p, p, p
    TERMS: tl.constexpr = 13 if r.dtype == tl.float64 else 6
    series = tl.full(r.shape, INVERSE_FACTORIALS[TERMS + 1], r.dtype)
    for k in tl.static_range(TERMS, 1, -1):
        series = tl.fma(series, r, tl.full(r.shape, INVERSE_FACTORIALS[k], r.dtype))
    of_r = target * r
    divergence = of_r * (r * series)
    is_near = tl.abs(r) <= NEAR
    excess = tl.where(is_near, of_r + divergence, p - target)
    return target, excess, tl.where(is_near, divergence, excess - of_r)


@triton.jit
def store_parts(numbers, to, stride, inside, PARTS: tl.constexpr):
    """Each number as the sum of ``PARTS`` of lower precision."""
    for _ in tl.static_range(PARTS):
        part = numbers.to(to.dtype.element_ty)
        tl.store(to, part, mask=inside)
        numbers -= part
        to += stride


INTERPRETED = not isinstance(logits, triton.JITFunction)  # with TRITON_INTERPRET=1, on the CPU


class Launcher:
    """The matrices for kernels, and the blocks that fit."""

    def __init__(self, kernel: str, models: Sequence[Sequence[Tensor]], operands: torch.dtype) -> None:
        # Dtype and number of parts of the gradient in S.
        self.split = (torch.float16, operands.itemsize // 2) if operands.itemsize < 8 else (operands, 1)
        if INTERPRETED and operands == torch.bfloat16:
            operands = torch.float32  # the interpreter would multiply its bits
        self.matrices = [(*(t.to(operands).contiguous() for t in (x, y)), scale) for x, y, scale, *_ in models]
        widths = [x.shape[1] for x, *_ in models]
        blocks = BLOCKS[kernel, operands.itemsize, len(models)]
        self.blocks = blocks._replace(DEPTH=min(blocks.DEPTH, max(16, triton.next_power_of_2(max(widths)))))
        self.is_even = all(width % self.blocks.DEPTH == 0 for width in widths)

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], tile: slice, *arguments: Any, blocks: Blocks | None = None
    ) -> None:
        """Runs a kernel; without a teacher the student stands in."""
        matrices = [(x[tile], y, scale, x.shape[1]) for x, y, scale in self.matrices]
        options = {"TEACHER": len(matrices) == 2, "EVEN": self.is_even, "enable_fp_fusion": False}
        with torch.cuda.device_of(self.matrices[0][0]):
            kernel[grid](matrices[0], matrices[-1], *arguments, **options, **(blocks or self.blocks)._asdict())

    def tiles(self, row_bytes: int, limit: int) -> list[slice]:
        """Tiles of at least one block of rows that fit into ``limit`` bytes."""
        rows = self.blocks.ROWS * max(1, limit // (row_bytes * self.blocks.ROWS))
        return slices(len(self.matrices[0][0]), rows)

    def gradients(self) -> Iterator[tuple[slice, Tensor]]:
        """Tiles, with memory ``[parts, rows, M]`` for the gradient in S."""
        y, (dtype, parts) = self.matrices[0][1], self.split
        tiles = self.tiles(len(y) * parts * dtype.itemsize, TILE_BYTES)
        memory = y.new_empty(parts, tiles[0].stop, len(y), dtype=dtype)
        return ((tile, memory[:, : tile.stop - tile.start]) for tile in tiles)

    def grid(self, tile: Tensor) -> tuple[int, int]:
        """A program for each block of a tile ``[..., rows, columns]``."""
        return triton.cdiv(tile.shape[-2], self.blocks.ROWS), triton.cdiv(tile.shape[-1], self.blocks.COLUMNS)
