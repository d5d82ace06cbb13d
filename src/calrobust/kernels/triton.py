r"""The softmax statistics of ``S = scale · x yᵀ`` and of a teacher's ``T`` as Triton kernels: no tile leaves the chip.

**Forward.** A program takes a block of rows and visits blocks of columns. It merges each block into the statistics of
its rows, and writes the statistics of the block's columns. What P programs find of a row or of a column are *parts*
``[K, P, length]``: with K = 1 the lse of S; with K = 3 also the lse of T and the divergence over the part. `parts` has
the formulas. There are no atomics, so all sums run in one order. No product is fused into the sum after it, which would
round one side of ``t − s`` alone: a teacher equal to the student gives exactly zero.

**Backward.** The gradient in S (the formula is in `tiled`) is formed from recomputed logits, a tile at a time, as
`products` takes it on to x and y.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from calrobust.kernels import parts
from calrobust.kernels.dense import Factors
from calrobust.kernels.parts import Part, Strip, merge, wide
from calrobust.kernels.products import FeatureGradients
from calrobust.kernels.tiled import Softmaxes

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

EXCLUDED = tl.constexpr(parts.EXCLUDED)  # also a logit outside the matrix


@triton.jit
def _logits(
    matrix: tl.tuple, row: tl.tensor, column: tl.tensor, n: tl.tensor, m: tl.tensor, DEPTH: tl.constexpr
) -> tl.tensor:
    """A block of ``scale · x yᵀ`` without own entries."""
    x, y, scale, width, partner = matrix
    total = tl.zeros((row.shape[0], column.shape[0]), scale.dtype.element_ty)
    x_row = x + row.to(tl.int64)[:, None] * width
    y_row = y + column.to(tl.int64)[None, :] * width
    for start in range(0, width, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        a = tl.load(x_row + depth[None, :], mask=(row < n)[:, None] & (depth < width)[None, :], other=0.0)
        b = tl.load(y_row + depth[:, None], mask=(column < m)[None, :] & (depth < width)[:, None], other=0.0)
        if a.dtype == tl.float64:  # tl.dot takes it from Triton 3.5 on
            total += tl.sum(a[:, :, None] * b[None, :, :], 1)
        elif a.dtype == tl.float32:
            total = tl.dot(a, b, total, input_precision="tf32x3")
        else:
            total = tl.dot(a, b, total)
    partners = tl.load(partner + row, mask=row < n, other=-1)
    other = (row < n)[:, None] & (column < m)[None, :] & (column[None, :] != partners[:, None])
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
def _log_add_exp(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    top = tl.maximum(a, b)
    return top + tl.log(tl.exp(a - top) + tl.exp(b - top))


@triton.jit
def _log_sum_exp(logits: tl.tensor, AXIS: tl.constexpr) -> tl.tensor:
    top = tl.max(logits, AXIS)
    return top + tl.log(tl.sum(tl.exp(logits - tl.expand_dims(top, AXIS)), AXIS))


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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """The parts of a block of rows in a span of columns."""
    block, part = tl.program_id(0), tl.program_id(1)
    row = block * ROWS + tl.arange(0, ROWS)
    row_part = row_parts + part.to(tl.int64) * n + row
    row_stride, column_stride = tl.num_programs(1).to(tl.int64) * n, tl.num_programs(0).to(tl.int64) * m
    lse = tl.full((ROWS,), EXCLUDED, row_parts.dtype.element_ty)
    t_lse = lse
    divergence = tl.zeros_like(lse)
    for start in range(part * span, tl.minimum((part + 1) * span, m), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        column_part = column_parts + block.to(tl.int64) * m + column
        s = _logits(student, row, column, n, m, DEPTH)
        of_rows, of_columns = _log_sum_exp(s, 1), _log_sum_exp(s, 0)
        tl.store(column_part, of_columns, mask=column < m)
        total = _log_add_exp(lse, of_rows)
        if TEACHER:
            t = _logits(teacher, row, column, n, m, DEPTH)
            t_of_rows, t_of_columns = _log_sum_exp(t, 1), _log_sum_exp(t, 0)
            terms = _divergence_terms(t - t_of_columns[None, :], s - of_columns[None, :])
            tl.store(column_part + column_stride, t_of_columns, mask=column < m)
            tl.store(column_part + 2 * column_stride, tl.sum(terms, 0), mask=column < m)
            here = tl.sum(_divergence_terms(t - t_of_rows[:, None], s - of_rows[:, None]), 1)
            t_total = _log_add_exp(t_lse, t_of_rows)
            # `parts.merge` of what came before and of this block
            before, now = t_lse - t_total, t_of_rows - t_total
            divergence = tl.exp(before) * divergence + _divergence_terms(before, lse - total)
            divergence += tl.exp(now) * here + _divergence_terms(now, of_rows - total)
            t_lse = t_total
        lse = total

    tl.store(row_part, lse, mask=row < n)
    if TEACHER:
        tl.store(row_part + row_stride, t_lse, mask=row < n)
        tl.store(row_part + 2 * row_stride, divergence, mask=row < n)


@triton.jit
def _weighted_softmaxes(
    softmaxes: tl.tuple, s: tl.tensor, row: tl.tensor, column: tl.tensor, n: tl.tensor, m: tl.tensor
) -> tl.tensor:
    """A block of the row and column softmaxes of S, times their weights and added up."""
    row_lse, column_lse, row_weights, column_weights = softmaxes
    p = tl.exp(s - tl.load(row_lse + row, mask=row < n, other=0.0)[:, None])
    q = tl.exp(s - tl.load(column_lse + column, mask=column < m, other=0.0)[None, :])
    of_rows = tl.load(row_weights + row, mask=row < n, other=0.0)
    of_columns = tl.load(column_weights + column, mask=column < m, other=0.0)
    return of_rows[:, None] * p + of_columns[None, :] * q


@triton.jit
def _backward_kernel(
    student: tl.tuple,
    teacher: tl.tuple,
    softmaxes: tl.tuple,
    teacher_softmaxes: tl.tuple,
    gain: tl.tensor,
    tile: tl.tensor,
    n: tl.tensor,
    m: tl.tensor,
    TEACHER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """A block of the gradient in S, which is 0 at own entries."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    gradient = _weighted_softmaxes(softmaxes, _logits(student, row, column, n, m, DEPTH), row, column, n, m)
    if TEACHER:
        t = _logits(teacher, row, column, n, m, DEPTH)
        gradient += _weighted_softmaxes(teacher_softmaxes, t, row, column, n, m)
    entries = tile + row.to(tl.int64)[:, None] * m + column[None, :]
    inside = (row < n)[:, None] & (column < m)[None, :]
    tl.store(entries, (gradient * tl.load(gain)).to(tile.dtype.element_ty), mask=inside)


INTERPRETED = not isinstance(_forward_kernel, triton.JITFunction)  # with TRITON_INTERPRET=1, on the CPU


class _Launcher:
    """The matrices as kernels read them, and kernels at the blocks that fit them."""

    def __init__(self, models: list[Factors], partner: Tensor, operands: torch.dtype) -> None:
        if INTERPRETED and operands == torch.bfloat16:
            operands = torch.float32  # the interpreter holds bfloat16 as bits, and would multiply those
        self.partner = partner
        self.matrices = [(x.to(operands).contiguous(), y.to(operands).contiguous(), scale) for x, y, scale in models]
        widest = max(x.shape[1] for x, *_ in models)
        blocks = BLOCKS[operands.itemsize]
        self.blocks = blocks._replace(DEPTH=min(blocks.DEPTH, max(16, triton.next_power_of_2(widest))))

    def __call__(self, kernel: Any, grid: tuple[int, int], tile: slice, *arguments: Any) -> None:
        """On a tile of the student's matrix and of the teacher's, or twice the student's."""
        matrices = [(x[tile], y, scale, x.shape[1], self.partner[tile]) for x, y, scale in self.matrices]
        options = {"TEACHER": len(matrices) == 2, "enable_fp_fusion": False, **self.blocks._asdict()}
        with torch.cuda.device_of(self.partner):
            kernel[grid](matrices[0], matrices[-1], *arguments, **options)

    def tiles(self, n: int, block_bytes: int, limit: int) -> list[slice]:
        """Slices of n rows, of as many blocks as fit into ``limit`` bytes, and of one at least."""
        rows = self.blocks.ROWS * max(1, limit // block_bytes)
        return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]


def forward(models: list[Factors], partner: Tensor, operands: torch.dtype) -> Strip:
    """The statistics, as `tiled.forward` gives them."""
    x, y, _ = models[0]
    n, m = len(x), len(y)
    launch = _Launcher(models, partner, operands)
    kinds = 1 if len(models) == 1 else 3
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
    models: list[Factors], softmaxes: list[Softmaxes], partner: Tensor, operands: torch.dtype, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the student's x, y and scale, as `tiled.backward` gives them."""
    x, y, _ = models[0]
    n, m = len(x), len(y)
    launch = _Launcher(models, partner, operands)
    dtype = torch.float16 if operands.itemsize == 2 else x.dtype
    tiles = launch.tiles(n, launch.blocks.ROWS * m * dtype.itemsize, TILE_BYTES)
    buffer = x.new_empty(tiles[0].stop, m, dtype=dtype)
    gradients = FeatureGradients(models[0], [w for each in softmaxes for w in each[2:4]], needs, dtype)
    for tile in tiles:
        length = tile.stop - tile.start
        grid = triton.cdiv(length, launch.blocks.ROWS), triton.cdiv(m, launch.blocks.COLUMNS)
        arguments = [
            (each.row_lse[tile], each.column_lse, each.row_weights[tile], each.column_weights) for each in softmaxes
        ]
        launch(_backward_kernel, grid, tile, arguments[0], arguments[-1], gradients.gain, buffer, length, m)
        gradients.add(tile, buffer[:length])
    return gradients.results()


def _merged(found: Tensor) -> Part:
    """The parts of ``[K, P, length]``, merged."""
    each = found.to(wide(found.device)).unbind(1)
    return merge([Part(*part) if len(part) == 3 else Part.without_teacher(part[0]) for part in each])


def _programs(device: torch.device) -> int:
    return PROGRAMS * (1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count)
