r"""The softmax statistics of ``S = scale · x yᵀ`` and of a teacher's ``T`` as Triton kernels: no tile leaves the chip.

**Forward.** A program takes a block of rows and visits tiles of columns. It folds each tile into a running maximum of
its rows, the sum of exponentials below it and, with a teacher, of ``p̃ (t − s)``, and writes the same of the tile's
columns. What P programs find of a row or of a column are *parts* ``[K, P, length]``: K = 1 is the lse of S, K = 3 that,
the lse of T and the mean of ``t − s`` under T's softmax. No atomics: all sums run in one order. No product is fused
into the sum after it, which would round one side of ``t − s`` alone: a teacher equal to the student gives exactly zero.

**Backward.** The gradient in S (the formula is in `tiled`) is formed from recomputed logits, a slab of rows at a time,
as `products` takes it on to x and y.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from calrobust.kernels.products import FeatureGradients

PARTS_BYTES = 128 * 2**20  # of columns, before they are merged
SLAB_BYTES = 256 * 2**20
PROGRAMS = 4  # for each multiprocessor, at least, if there are tiles enough


class Blocks(NamedTuple):
    """The size of a tile, and how a program works on it."""

    ROWS: int
    COLUMNS: int
    DEPTH: int
    num_warps: int
    num_stages: int


# By bytes of an operand; within the 99 KiB of shared memory that every card has.
BLOCKS = {2: Blocks(128, 128, 64, 8, 3), 4: Blocks(128, 64, 32, 8, 3), 8: Blocks(32, 32, 16, 8, 2)}

# What `tune` tries.
CANDIDATES = [
    Blocks(rows, columns, depth, num_warps, 3)
    for rows, columns in ((128, 128), (128, 256), (256, 128), (128, 64), (64, 128), (64, 256))
    for depth in (32, 64)
    for num_warps in (4, 8)
]

MASKED = tl.constexpr(-3e38)  # a logit outside the matrix: finite, so that the difference of two is 0


@triton.jit
def _logits(
    features: tl.tuple,
    row: tl.tensor,
    column: tl.tensor,
    n: tl.tensor,
    m: tl.tensor,
    TOTAL: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> tl.tensor:
    """A tile of ``scale · x yᵀ``."""
    x, y, scale, width = features
    total = tl.zeros((ROWS, COLUMNS), TOTAL)
    x_row = x + row.to(tl.int64)[:, None] * width
    y_row = y + column.to(tl.int64)[None, :] * width
    for start in range(0, width, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        a = tl.load(x_row + depth[None, :], mask=(row < n)[:, None] & (depth < width)[None, :], other=0.0)
        b = tl.load(y_row + depth[:, None], mask=(column < m)[None, :] & (depth < width)[:, None], other=0.0)
        if a.dtype == tl.float64:  # tl.dot takes it from Triton 3.5 on
            total += tl.sum(a[:, :, None] * b[None, :, :], 1)
        else:
            total = tl.dot(a, b, total, input_precision=PRECISION)
    return total * tl.load(scale)


@triton.jit
def _forward_kernel(
    student: tl.tuple,
    teacher: tl.tuple,
    row_parts: tl.tensor,
    column_parts: tl.tensor,
    n: tl.tensor,
    m: tl.tensor,
    span: tl.tensor,  # columns of a program
    TEACHER: tl.constexpr,
    TOTAL: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """The parts of a block of rows in a span of columns."""
    block, split = tl.program_id(0), tl.program_id(1)
    row = block * ROWS + tl.arange(0, ROWS)
    row_stride, column_stride = tl.num_programs(1).to(tl.int64) * n, tl.num_programs(0).to(tl.int64) * m
    s_top = tl.full((ROWS,), MASKED, TOTAL)
    t_top = tl.full((ROWS,), MASKED, TOTAL)
    s_sum = tl.zeros((ROWS,), TOTAL)
    t_sum = tl.zeros((ROWS,), TOTAL)
    gap_sum = tl.zeros((ROWS,), TOTAL)
    for start in range(split * span, tl.minimum((split + 1) * span, m), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row < n)[:, None] & (column < m)[None, :]
        column_part = column_parts + block.to(tl.int64) * m + column

        s = _logits(student, row, column, n, m, TOTAL, PRECISION, ROWS, COLUMNS, DEPTH)
        s = tl.where(inside, s, MASKED)
        top = tl.maximum(s_top, tl.max(s, 1))
        s_sum = s_sum * tl.exp(s_top - top) + tl.sum(tl.exp(s - top[:, None]), 1)
        s_top = top
        top = tl.max(s, 0)
        total = tl.sum(tl.exp(s - top[None, :]), 0)
        tl.store(column_part, top + tl.log(total), mask=column < m)

        if TEACHER:
            t = _logits(teacher, row, column, n, m, TOTAL, PRECISION, ROWS, COLUMNS, DEPTH)
            t = tl.where(inside, t, MASKED)
            gap = t - s
            top = tl.maximum(t_top, tl.max(t, 1))
            kept = tl.exp(t_top - top)
            weight = tl.exp(t - top[:, None])
            t_sum = t_sum * kept + tl.sum(weight, 1)
            gap_sum = gap_sum * kept + tl.sum(weight * gap, 1)
            t_top = top
            top = tl.max(t, 0)
            weight = tl.exp(t - top[None, :])
            total = tl.sum(weight, 0)
            tl.store(column_part + column_stride, top + tl.log(total), mask=column < m)
            tl.store(column_part + 2 * column_stride, tl.sum(weight * gap, 0) / total, mask=column < m)

    row_part = row_parts + split.to(tl.int64) * n + row
    tl.store(row_part, s_top + tl.log(s_sum), mask=row < n)
    if TEACHER:
        tl.store(row_part + row_stride, t_top + tl.log(t_sum), mask=row < n)
        tl.store(row_part + 2 * row_stride, gap_sum / t_sum, mask=row < n)


@triton.jit
def _weighted_softmaxes(
    features: tl.tuple,
    softmaxes: tl.tuple,
    row: tl.tensor,
    column: tl.tensor,
    n: tl.tensor,
    m: tl.tensor,
    TOTAL: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> tl.tensor:
    """``rows_i p_ij + columns_j q_ij``."""
    row_lse, column_lse, rows, columns = softmaxes
    s = _logits(features, row, column, n, m, TOTAL, PRECISION, ROWS, COLUMNS, DEPTH)
    p = tl.exp(s - tl.load(row_lse + row, mask=row < n, other=0.0)[:, None])
    q = tl.exp(s - tl.load(column_lse + column, mask=column < m, other=0.0)[None, :])
    rows = tl.load(rows + row, mask=row < n, other=0.0)
    columns = tl.load(columns + column, mask=column < m, other=0.0)
    return rows[:, None] * p + columns[None, :] * q


@triton.jit
def _backward_kernel(
    student: tl.tuple,
    teacher: tl.tuple,
    student_softmaxes: tl.tuple,
    teacher_softmaxes: tl.tuple,
    unit: tl.tensor,
    slab: tl.tensor,
    partners: tl.tensor,
    n: tl.tensor,
    m: tl.tensor,
    first_partner: tl.tensor,
    TEACHER: tl.constexpr,
    TOTAL: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """A tile of the gradient in S."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_columns = row < n, column < m

    gradient = _weighted_softmaxes(
        student, student_softmaxes, row, column, n, m, TOTAL, PRECISION, ROWS, COLUMNS, DEPTH
    )
    if TEACHER:
        gradient -= _weighted_softmaxes(
            teacher, teacher_softmaxes, row, column, n, m, TOTAL, PRECISION, ROWS, COLUMNS, DEPTH
        )

    # Of the tile's first row the partner is in this column of the tile, if it is in the tile.
    shift = first_partner + tl.program_id(0) * ROWS - tl.program_id(1) * COLUMNS
    if (shift > -ROWS) & (shift < COLUMNS):
        is_partner = column[None, :] - row[:, None] == first_partner
        found = tl.sum(is_partner.to(tl.int32), 1) > 0
        tl.store(partners + row, tl.sum(tl.where(is_partner, gradient, 0.0), 1), mask=in_rows & found)
        gradient = tl.where(is_partner, 0.0, gradient)
    entries = slab + row.to(tl.int64)[:, None] * m + column[None, :]
    tl.store(entries, (gradient * tl.load(unit)).to(slab.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


INTERPRETED = not isinstance(_forward_kernel, triton.JITFunction)  # with TRITON_INTERPRET=1, on the CPU


class _Launcher:
    """The matrices as kernels read them, and kernels at the blocks that fit them."""

    def __init__(self, factors: Sequence[Tensor], operands: torch.dtype) -> None:
        if INTERPRETED and operands == torch.bfloat16:
            operands = torch.float32  # the interpreter holds bfloat16 as bits, and would multiply those
        self.total = factors[0].dtype
        self.matrices = [
            (x.to(operands).contiguous(), y.to(operands).contiguous(), scale)
            for x, y, scale in zip(factors[::3], factors[1::3], factors[2::3], strict=True)
        ]
        widest = max(x.shape[1] for x in factors[::3])
        blocks = BLOCKS[operands.itemsize]
        self.blocks = blocks._replace(DEPTH=min(blocks.DEPTH, max(16, triton.next_power_of_2(widest))))

    def __call__(self, kernel: Any, grid: tuple[int, int], tile: slice, *arguments: Any) -> None:
        """On a tile of rows of the student and of the teacher, or twice the student."""
        features = [(x[tile], y, scale, x.shape[1]) for x, y, scale in self.matrices]
        with torch.cuda.device_of(self.matrices[0][0]):
            kernel[grid](
                features[0],
                features[-1],
                *arguments,
                TEACHER=len(features) == 2,
                TOTAL=tl.float64 if self.total == torch.float64 else tl.float32,
                PRECISION="tf32x3" if self.matrices[0][0].dtype == torch.float32 else "ieee",
                enable_fp_fusion=False,
                **self.blocks._asdict(),
            )

    def tiles(self, n: int, block_bytes: int, limit: int) -> list[slice]:
        """Slices of n rows, of as many blocks as fit into ``limit`` bytes, and of one at least."""
        rows = self.blocks.ROWS * max(1, limit // block_bytes)
        return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]


def forward(factors: list[Tensor], operands: torch.dtype) -> tuple[list[list[Tensor]], list[Tensor]]:
    """As `operators` asks for it."""
    x, y, _ = factors[:3]
    n, m = len(x), len(y)
    launch = _Launcher(factors, operands)
    count = len(launch.matrices)
    kinds = 2 * count - 1
    parts_by_row, parts_by_column = [], []
    for tile in launch.tiles(n, kinds * m * x.element_size(), PARTS_BYTES):
        length = tile.stop - tile.start
        height, width = triton.cdiv(length, launch.blocks.ROWS), triton.cdiv(m, launch.blocks.COLUMNS)
        span = triton.cdiv(width, triton.cdiv(_programs(x.device), height))  # in tiles, of a program
        grid = height, triton.cdiv(width, span)
        by_row, by_column = x.new_empty(kinds, grid[1], length), x.new_empty(kinds, height, m)
        launch(_forward_kernel, grid, tile, by_row, by_column, length, m, span * launch.blocks.COLUMNS)
        parts_by_row.append(_merge(by_row))
        parts_by_column.append(_merge(by_column))
    by_row, by_column = torch.cat(parts_by_row, 1), _merge(torch.stack(parts_by_column, 1))
    statistics = [[by_row[k].clone(), by_column[k].clone(), x.new_empty(0, m)] for k in range(count)]
    return statistics, [s - t + gap for s, t, gap in (by_row, by_column)] if count == 2 else []


def backward(
    weights: list[Tensor], factors: list[Tensor], statistics: list[Tensor], operands: torch.dtype, first_partner: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `operators` asks for it."""
    rows, columns, t_rows, t_columns = weights
    x, y, _ = factors[:3]
    n, m = len(x), len(y)
    (row_lse, column_lse, _), (t_row_lse, t_column_lse, _) = statistics[:3], statistics[-3:]
    launch = _Launcher(factors, operands)

    dtype = torch.float16 if operands.itemsize == 2 else x.dtype
    tiles = launch.tiles(n, launch.blocks.ROWS * m * dtype.itemsize, SLAB_BYTES)
    gradients = FeatureGradients(factors, weights, x.new_empty(tiles[0].stop, m, dtype=dtype), first_partner)
    for tile in tiles:
        length = tile.stop - tile.start
        grid = triton.cdiv(length, launch.blocks.ROWS), triton.cdiv(m, launch.blocks.COLUMNS)
        softmaxes = row_lse[tile], column_lse, rows[tile], columns
        t_softmaxes = t_row_lse[tile], t_column_lse, t_rows[tile], t_columns
        outputs = gradients.slab[:length], gradients.partners[tile]
        sizes = length, m, first_partner + tile.start
        launch(_backward_kernel, grid, tile, softmaxes, t_softmaxes, gradients.unit, *outputs, *sizes)
        gradients.add_slab(tile, outputs[0])
    return gradients.results()


def tune(step: Callable[[], object], operands: torch.dtype, candidates: Sequence[Blocks] = CANDIDATES) -> Blocks:
    """Times a step at several sizes of blocks, and keeps the fastest for the rest of the process.

    Args:
        step: takes a loss with ``impl="triton"`` forward and backward, on features as large as those to come.
        operands: their dtype; where student and teacher differ, that to which both are promoted.
        candidates: blocks to try, besides those in use.

    Returns:
        The blocks that are in use from now on.
    """
    seconds: dict[Blocks, float] = {}
    before = BLOCKS[operands.itemsize]
    try:
        for blocks in dict.fromkeys((before, *candidates)):
            BLOCKS[operands.itemsize] = blocks
            with suppress(triton.OutOfResources):  # of a block too large for the device
                seconds[blocks] = triton.testing.do_bench(step, return_mode="median")
    finally:
        BLOCKS[operands.itemsize] = min(seconds, key=seconds.__getitem__, default=before)
    return BLOCKS[operands.itemsize]


def _merge(parts: Tensor) -> Tensor:
    """``[K, P, length]`` -> ``[K, length]``."""
    lse = parts[:2].logsumexp(1)
    if len(parts) == 1:
        return lse
    return torch.cat([lse, (parts[1].softmax(0) * parts[2]).sum(0, keepdim=True)])


def _programs(device: torch.device) -> int:
    return PROGRAMS * (1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count)
