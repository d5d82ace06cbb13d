r"""The softmax statistics of ``S = scale · x yᵀ`` and of a teacher's ``T`` as Triton kernels: no tile leaves the chip.

**Forward.** A program takes a block of rows and visits blocks of columns. It merges each block into the statistics of
its rows, and writes the statistics of the block's columns. What P programs find of a row or of a column are *parts*
``[K, P, length]``: K = 1 is the lse of S; K = 3 is that, the lse of T and the divergence between the two softmaxes over
the part. `parts` has the formulas. There are no atomics, so all sums run in one order. No product is fused into the sum
after it, which would round one side of ``t − s`` alone: a teacher equal to the student gives exactly zero.

**Backward.** The gradient in S (the formula is in `tiled`) is formed from recomputed logits, a tile at a time, as
`products` takes it on to x and y.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from calrobust.kernels import parts
from calrobust.kernels.dense import Factors
from calrobust.kernels.parts import Part, Strip, merge, wide
from calrobust.kernels.products import FeatureGradients
from calrobust.kernels.tiled import Softmaxes, Weights

PARTS_BYTES = 128 * 2**20  # of columns, before they are merged
TILE_BYTES = 256 * 2**20
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

EXCLUDED = tl.constexpr(parts.EXCLUDED)  # also a logit outside the matrix


@triton.jit
def _logits(
    features: tl.tuple,
    partner: tl.tensor,
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
    """A block of ``scale · x yᵀ`` without own entries."""
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
    own = tl.load(partner + row, mask=row < n, other=-1)
    other = (row < n)[:, None] & (column < m)[None, :] & (column[None, :] != own[:, None])
    return tl.where(other, total * tl.load(scale), EXCLUDED)


@triton.jit
def _divergence_terms(log_target: tl.tensor, log_probability: tl.tensor) -> tl.tensor:
    """As `parts.divergence_terms`; exp(x) − 1 − x is its series where the difference would cancel."""
    x = log_probability - log_target
    target, probability = tl.exp(log_target), tl.exp(log_probability)
    near = tl.minimum(tl.maximum(x, -0.7), 0.7)
    series = 1.0 / 14.0 * near
    for k in tl.static_range(13, 2, -1):
        series = (1.0 + series) * near / k
    return tl.where(x == near, target * (1.0 + series) * near * near / 2, probability - target * (1.0 + x))


@triton.jit
def _merge_two(
    lse: tl.tensor,
    t_lse: tl.tensor,
    divergence: tl.tensor,
    lse_2: tl.tensor,
    t_lse_2: tl.tensor,
    divergence_2: tl.tensor,
) -> tl.tuple:
    """As `parts.merge`."""
    top, t_top = tl.maximum(lse, lse_2), tl.maximum(t_lse, t_lse_2)
    total = top + tl.log(tl.exp(lse - top) + tl.exp(lse_2 - top))
    t_total = t_top + tl.log(tl.exp(t_lse - t_top) + tl.exp(t_lse_2 - t_top))
    merged = tl.exp(t_lse - t_total) * divergence + _divergence_terms(t_lse - t_total, lse - total)
    merged += tl.exp(t_lse_2 - t_total) * divergence_2 + _divergence_terms(t_lse_2 - t_total, lse_2 - total)
    return total, t_total, merged


@triton.jit
def _log_sum_exp(logits: tl.tensor, AXIS: tl.constexpr) -> tl.tensor:
    top = tl.max(logits, AXIS)
    return top + tl.log(tl.sum(tl.exp(logits - tl.expand_dims(top, AXIS)), AXIS))


@triton.jit
def _forward_kernel(
    student: tl.tuple,
    teacher: tl.tuple,
    partner: tl.tensor,
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
    block, part = tl.program_id(0), tl.program_id(1)
    row = block * ROWS + tl.arange(0, ROWS)
    row_stride, column_stride = tl.num_programs(1).to(tl.int64) * n, tl.num_programs(0).to(tl.int64) * m
    lse = tl.full((ROWS,), EXCLUDED, TOTAL)
    t_lse = tl.full((ROWS,), EXCLUDED, TOTAL)
    divergence = tl.zeros((ROWS,), TOTAL)
    for start in range(part * span, tl.minimum((part + 1) * span, m), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        column_part = column_parts + block.to(tl.int64) * m + column
        s = _logits(student, partner, row, column, n, m, TOTAL, PRECISION, ROWS, COLUMNS, DEPTH)
        of_rows = _log_sum_exp(s, 1)
        of_columns = _log_sum_exp(s, 0)
        tl.store(column_part, of_columns, mask=column < m)
        if TEACHER:
            t = _logits(teacher, partner, row, column, n, m, TOTAL, PRECISION, ROWS, COLUMNS, DEPTH)
            t_of_rows = _log_sum_exp(t, 1)
            t_of_columns = _log_sum_exp(t, 0)
            terms = _divergence_terms(t - t_of_columns[None, :], s - of_columns[None, :])
            tl.store(column_part + column_stride, t_of_columns, mask=column < m)
            tl.store(column_part + 2 * column_stride, tl.sum(terms, 0), mask=column < m)
            terms = _divergence_terms(t - t_of_rows[:, None], s - of_rows[:, None])
            lse, t_lse, divergence = _merge_two(lse, t_lse, divergence, of_rows, t_of_rows, tl.sum(terms, 1))
        else:
            top = tl.maximum(lse, of_rows)
            lse = top + tl.log(tl.exp(lse - top) + tl.exp(of_rows - top))

    row_part = row_parts + part.to(tl.int64) * n + row
    tl.store(row_part, lse, mask=row < n)
    if TEACHER:
        tl.store(row_part + row_stride, t_lse, mask=row < n)
        tl.store(row_part + 2 * row_stride, divergence, mask=row < n)


@triton.jit
def _weighted_softmaxes(
    features: tl.tuple,
    softmaxes: tl.tuple,
    partner: tl.tensor,
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
    s = _logits(features, partner, row, column, n, m, TOTAL, PRECISION, ROWS, COLUMNS, DEPTH)
    p = tl.exp(s - tl.load(row_lse + row, mask=row < n, other=0.0)[:, None])
    q = tl.exp(s - tl.load(column_lse + column, mask=column < m, other=0.0)[None, :])
    rows = tl.load(rows + row, mask=row < n, other=0.0)
    columns = tl.load(columns + column, mask=column < m, other=0.0)
    return rows[:, None] * p + columns[None, :] * q


@triton.jit
def _backward_kernel(
    student: tl.tuple,
    teacher: tl.tuple,
    partner: tl.tensor,
    student_softmaxes: tl.tuple,
    teacher_softmaxes: tl.tuple,
    unit: tl.tensor,
    tile: tl.tensor,
    n: tl.tensor,
    m: tl.tensor,
    TEACHER: tl.constexpr,
    TOTAL: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """A block of the gradient in S, which is 0 at own entries."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    gradient = _weighted_softmaxes(
        student, student_softmaxes, partner, row, column, n, m, TOTAL, PRECISION, ROWS, COLUMNS, DEPTH
    )
    if TEACHER:
        gradient -= _weighted_softmaxes(
            teacher, teacher_softmaxes, partner, row, column, n, m, TOTAL, PRECISION, ROWS, COLUMNS, DEPTH
        )
    entries = tile + row.to(tl.int64)[:, None] * m + column[None, :]
    inside = (row < n)[:, None] & (column < m)[None, :]
    tl.store(entries, (gradient * tl.load(unit)).to(tile.dtype.element_ty), mask=inside)


INTERPRETED = not isinstance(_forward_kernel, triton.JITFunction)  # with TRITON_INTERPRET=1, on the CPU


class _Launcher:
    """The matrices as kernels read them, and kernels at the blocks that fit them."""

    def __init__(self, models: list[Factors], partner: Tensor, operands: torch.dtype) -> None:
        if INTERPRETED and operands == torch.bfloat16:
            operands = torch.float32  # the interpreter holds bfloat16 as bits, and would multiply those
        self.partner = partner
        self.total = models[0].x.dtype
        self.matrices = [(x.to(operands).contiguous(), y.to(operands).contiguous(), scale) for x, y, scale in models]
        widest = max(x.shape[1] for x, *_ in models)
        blocks = BLOCKS[operands.itemsize]
        self.blocks = blocks._replace(DEPTH=min(blocks.DEPTH, max(16, triton.next_power_of_2(widest))))

    def __call__(self, kernel: Any, grid: tuple[int, int], tile: slice, *arguments: Any) -> None:
        """On a tile of the student's matrix and of the teacher's, or twice the student's."""
        features = [(x[tile], y, scale, x.shape[1]) for x, y, scale in self.matrices]
        with torch.cuda.device_of(self.matrices[0][0]):
            kernel[grid](
                features[0],
                features[-1],
                self.partner[tile],
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


def forward(student: Factors, teacher: Factors | None, partner: Tensor, operands: torch.dtype) -> Strip:
    """The statistics, as `tiled.forward` gives them."""
    x, y, _ = student
    n, m = len(x), len(y)
    launch = _Launcher([student] if teacher is None else [student, teacher], partner, operands)
    kinds = 1 if teacher is None else 3
    rows, columns = [], []
    for tile in launch.tiles(n, kinds * m * x.element_size(), PARTS_BYTES):
        length = tile.stop - tile.start
        height, width = triton.cdiv(length, launch.blocks.ROWS), triton.cdiv(m, launch.blocks.COLUMNS)
        span = triton.cdiv(width, triton.cdiv(_programs(x.device), height))  # of a program, in blocks
        grid = height, triton.cdiv(width, span)
        by_row, by_column = x.new_empty(kinds, grid[1], length), x.new_empty(kinds, height, m)
        launch(_forward_kernel, grid, tile, by_row, by_column, length, m, span * launch.blocks.COLUMNS)
        rows.append(_merged(by_row))
        columns.append(_merged(by_column))
    joined = Part(*map(torch.cat, zip(*rows, strict=True)))
    return Strip(joined.to(x.dtype), merge(columns).to(x.dtype))


def backward(
    weights: Weights,
    student: Factors,
    teacher: Factors | None,
    partner: Tensor,
    softmaxes: list[Softmaxes],
    operands: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the student's x, y and scale, as `tiled.backward` gives them."""
    x, y, _ = student
    n, m = len(x), len(y)
    launch = _Launcher([student] if teacher is None else [student, teacher], partner, operands)
    dtype = torch.float16 if operands.itemsize == 2 else x.dtype
    tiles = launch.tiles(n, launch.blocks.ROWS * m * dtype.itemsize, TILE_BYTES)
    buffer = x.new_empty(tiles[0].stop, m, dtype=dtype)
    gradients = FeatureGradients(student, needs, list(weights[: 2 if teacher is None else 4]), dtype)
    factors = [weights[:2], weights[2:]]
    for tile in tiles:
        length = tile.stop - tile.start
        grid = triton.cdiv(length, launch.blocks.ROWS), triton.cdiv(m, launch.blocks.COLUMNS)
        arguments = [
            (own.row_lse[tile], own.column_lse, rows[tile], columns)
            for own, (rows, columns) in zip(softmaxes, factors, strict=False)
        ]
        launch(_backward_kernel, grid, tile, arguments[0], arguments[-1], gradients.unit, buffer, length, m)
        gradients.add(tile, buffer[:length])
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


def _merged(found: Tensor) -> Part:
    """The parts of ``[K, P, length]``, merged."""
    each = found.to(wide(found.device)).unbind(1)
    return merge([Part(*part) if len(part) == 3 else Part.without_teacher(part[0]) for part in each])


def _programs(device: torch.device) -> int:
    return PROGRAMS * (1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count)
