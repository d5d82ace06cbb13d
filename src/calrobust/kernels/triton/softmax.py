"""The statistics of `tiled` as Triton kernels: logits stay on the chip.

Rows and columns are sums of `comparison` at *references*, the largest logits of the row so far: see
``docs/derivations.md``. A second kernel merges columns, and forms sums that lost terms or digits again, at the columns'
own references. No product is fused into ``s − t``, so equal models diverge by exactly 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from calrobust.kernels import dense
from calrobust.kernels.dense import Factors, Part, merge, merge_rows, wide
from calrobust.kernels.tiled import FeatureGradients, Softmaxes
from calrobust.kernels.triton import INTERPRETED, LN2, LOG2E, Launcher, comparison, logits, store_parts

SUMS_BYTES = 192 * 2**20  # of columns, before they are merged
PROGRAMS = 4  # for each multiprocessor, at least
SPANS = 16  # of columns, at least; they share rows in the cache
COLUMN_SPAN = 32  # blocks of rows whose columns a program merges

EXCLUDED = tl.constexpr(dense.EXCLUDED)
FLOOR = tl.constexpr(-(2.0**123))  # the least reference, far above excluded logits
LOST = tl.constexpr(2.0**-80)  # a sum below may have lost terms
FAR = tl.constexpr(12)  # change of log2(p / p̃) at which sums over columns cancel
HEAVY = tl.constexpr(20)  # log2 of a weight that brings lost terms back
LOSS = tl.constexpr(0.99)  # the share of F that may cancel in a column


@triton.jit
def _partners(partner, row, n, m):
    """The partners of a block of rows, their first and last, and where the rows end."""
    own = tl.load(partner + row, mask=row < n, other=-1)
    return own, tl.min(tl.where(own < 0, m, own), 0), tl.max(own, 0), tl.max(row, 0) + 1


@triton.jit
def _others(matrix, partners, row, start, n, m, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr):
    """A block of logits without own entries and what is outside."""
    column = start + tl.arange(0, COLUMNS)
    block = logits(matrix, row, column, n, m, DEPTH, EVEN)
    own, first, last, end = partners
    if ((first < start + COLUMNS) & (last >= start)) | (start + COLUMNS > m) | (end > n):
        inside = (row < n)[:, None] & (column < m)[None, :]
        block = tl.where(inside & (column[None, :] != own[:, None]), block, EXCLUDED)
    return block


@triton.jit
def _entries(s, t, reference, t_reference, TEACHER: tl.constexpr):
    """The comparisons of logits at references, and the student's exponentials."""
    r = (s - t) - (reference - t_reference) * LN2
    log2e = tl.full(s.shape, LOG2E, s.dtype)
    p = tl.exp2(tl.fma(s, log2e, -reference))
    target = p
    if TEACHER:
        target = tl.exp2(tl.fma(t, log2e, -t_reference))
    return comparison(p, target, r, TEACHER), p


@triton.jit
def _times(u, v, TEACHER: tl.constexpr):
    """The comparison of a product, from those of its factors."""
    target = u[0] * v[0]
    if not TEACHER:
        return target, target, target
    excess = tl.fma(u[0] + u[1], v[1], u[1] * v[0])
    return target, excess, tl.fma(u[0], v[2], tl.fma(u[2], v[0], u[1] * v[1]))


@triton.jit
def _factors(shift, t_shift, TEACHER: tl.constexpr):
    """The comparison of factors of shifted references."""
    return comparison(tl.exp2(shift), tl.exp2(t_shift), (shift - t_shift) * LN2, TEACHER)


@triton.jit
def _store_sums(to, sums, part, index, length, TEACHER: tl.constexpr):
    """Into ``to [parts, 2 or 6, length]``."""
    COUNT: tl.constexpr = 6 if TEACHER else 2
    to += part.to(tl.int64) * COUNT * length + index
    for k in tl.static_range(COUNT):
        tl.store(to + k * length, sums[k], mask=index < length)


@triton.jit
def _forward_kernel(
    student,
    teacher,
    partner,
    row_sums,
    column_sums,
    pivots,
    n,
    m,
    span,  # columns of a program
    WITH_COLUMNS: tl.constexpr,
    TEACHER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
):
    """The sums of a block of rows over a span of columns, and of these columns over the block."""
    part, block = tl.program_id(0), tl.program_id(1)
    height, width = tl.num_programs(1), tl.cdiv(m, COLUMNS)
    row = block * ROWS + tl.arange(0, ROWS)
    partners = _partners(partner, row, n, m)
    reference = tl.full((ROWS,), FLOOR, row_sums.dtype.element_ty)
    t_reference = reference
    target = tl.zeros_like(reference)
    excess, divergence, total = target, target, target
    pivot, t_pivot = tl.max(reference, 0), tl.max(reference, 0)
    lost = tl.full((ROWS,), float("nan"), reference.dtype)
    for start in range(part * span, tl.minimum((part + 1) * span, m), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        s = _others(student, partners, row, start, n, m, COLUMNS, DEPTH, EVEN)
        t = s
        top = tl.maximum(reference, tl.max(s, 1) * LOG2E)
        t_top = top
        if TEACHER:
            t = _others(teacher, partners, row, start, n, m, COLUMNS, DEPTH, EVEN)
            t_top = tl.maximum(t_reference, tl.max(t, 1) * LOG2E)
        sums = target, excess, divergence
        before = _times(sums, _factors(reference - top, t_reference - t_top, TEACHER), TEACHER)
        here, p = _entries(s, t, top[:, None], t_top[:, None], TEACHER)
        target = before[0] + tl.sum(here[0], 1)
        if TEACHER:
            excess = before[1] + tl.sum(here[1], 1)
            divergence = before[2] + tl.sum(here[2], 1)
            total = tl.fma(total, tl.exp2(reference - top), tl.sum(p, 1))
        reference, t_reference = top, t_top
        if WITH_COLUMNS:
            if start == part * span:
                pivot = tl.max(top, 0)
                t_pivot = pivot + tl.sum(tl.where(row < n, t_top - top, 0.0), 0) / tl.minimum(n - block * ROWS, ROWS)
            shift, t_shift = top - pivot, t_top - t_pivot
            is_safe = (tl.abs(shift - t_shift) < FAR) & (tl.maximum(shift, t_shift) < HEAVY)
            weights = _factors(tl.where(is_safe, shift, lost), tl.where(is_safe, t_shift, lost), TEACHER)
            by_column = _times((weights[0][:, None], weights[1][:, None], weights[2][:, None]), here, TEACHER)
            to = column_sums + block * m + column
            tl.store(to, tl.sum(by_column[0], 0), mask=column < m)
            at = pivots + block * width + start // COLUMNS
            if TEACHER:
                tl.store(to + height * m, tl.sum(by_column[1], 0), mask=column < m)
                tl.store(to + 2 * height * m, tl.sum(by_column[2], 0), mask=column < m)
                tl.store(at + height * width, t_pivot)
            tl.store(at, pivot)

    _store_sums(row_sums, (reference, target, t_reference, excess, divergence, total), part, row, n, TEACHER)


@triton.jit
def _columns_kernel(
    student,
    teacher,
    partner,
    merged,
    column_sums,
    pivots,
    n,
    m,
    WIDTH: tl.constexpr,  # columns of a pivot
    SPAN: tl.constexpr,  # blocks of rows of a program
    TEACHER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
):
    """The sums of a block of columns over a span of blocks of rows."""
    block, part = tl.program_id(0), tl.program_id(1)
    width, height = tl.cdiv(m, WIDTH), tl.cdiv(n, ROWS)
    start = block * COLUMNS
    column = start + tl.arange(0, COLUMNS)
    reference = tl.full((COLUMNS,), FLOOR, merged.dtype.element_ty)
    t_reference = reference
    target = tl.zeros_like(reference)
    excess, divergence, total = target, target, target
    at = column_sums + part * SPAN * m + column
    for k in range(part * SPAN, tl.minimum((part + 1) * SPAN, height)):
        at_pivot = pivots + k * width + start // WIDTH
        pivot = tl.load(at_pivot) + tl.zeros_like(reference)
        t_pivot = pivot
        z = tl.load(at, mask=column < m, other=1.0)
        e, f, student_z = z, z, z
        found = (z > LOST) & (z < float("inf"))
        if TEACHER:
            t_pivot = tl.load(at_pivot + height * width) + tl.zeros_like(reference)
            e = tl.load(at + height * m, mask=column < m, other=0.0)
            f = tl.load(at + 2 * height * m, mask=column < m, other=0.0)
            b = e / tl.maximum(z, LOST)
            cancels = b - tl.log(tl.maximum(1.0 + b, LOST))
            cancels = tl.where(tl.abs(b) < 0.125, b * b * 0.55, cancels)  # a bound where it is inexact
            found &= (b > -0.9) & (cancels * z <= f * LOSS)  # digits of Z + E, of F
            student_z = z + e
        if tl.min(found.to(tl.int32), 0) == 0:
            row = k * ROWS + tl.arange(0, ROWS)
            partners = _partners(partner, row, n, m)
            s = _others(student, partners, row, start, n, m, COLUMNS, DEPTH, EVEN)
            t = s
            pivot = tl.maximum(tl.max(s, 0) * LOG2E, FLOOR)
            t_pivot = pivot
            if TEACHER:
                t = _others(teacher, partners, row, start, n, m, COLUMNS, DEPTH, EVEN)
                t_pivot = tl.maximum(tl.max(t, 0) * LOG2E, FLOOR)
            here, p = _entries(s, t, pivot[None, :], t_pivot[None, :], TEACHER)
            z = tl.sum(here[0], 0)
            if TEACHER:
                e, f, student_z = tl.sum(here[1], 0), tl.sum(here[2], 0), tl.sum(p, 0)
        top, t_top = tl.maximum(reference, pivot), tl.maximum(t_reference, t_pivot)
        sums = target, excess, divergence
        before = _times(sums, _factors(reference - top, t_reference - t_top, TEACHER), TEACHER)
        here = _times((z, e, f), _factors(pivot - top, t_pivot - t_top, TEACHER), TEACHER)
        target, excess, divergence = before[0] + here[0], before[1] + here[1], before[2] + here[2]
        total = total * tl.exp2(reference - top) + student_z * tl.exp2(pivot - top)
        reference, t_reference = top, t_top
        at += m

    _store_sums(merged, (reference, target, t_reference, excess, divergence, total), part, column, m, TEACHER)


@triton.jit
def _weighted_softmaxes(softmaxes, s, row, column, n, m, WITH_COLUMNS: tl.constexpr):
    """A block of `tiled.Matrix.weighted_softmaxes`."""
    row_lse, column_lse, row_weights, column_weights = softmaxes
    p = tl.exp2((s - tl.load(row_lse + row, mask=row < n, other=0.0)[:, None]) * LOG2E)
    total = tl.load(row_weights + row, mask=row < n, other=0.0)[:, None] * p
    if WITH_COLUMNS:
        q = tl.exp2((s - tl.load(column_lse + column, mask=column < m, other=0.0)[None, :]) * LOG2E)
        total += tl.load(column_weights + column, mask=column < m, other=0.0)[None, :] * q
    return total


@triton.jit
def _backward_kernel(
    student,
    teacher,
    partner,
    softmaxes,
    teacher_softmaxes,
    gain,
    tiles,
    stride,  # from part to part
    n,
    m,
    PARTS: tl.constexpr,
    WITH_COLUMNS: tl.constexpr,
    TEACHER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
):
    """A block of the gradient in S, which is 0 at own entries, in parts."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * COLUMNS
    column = start + tl.arange(0, COLUMNS)
    partners = _partners(partner, row, n, m)
    s = _others(student, partners, row, start, n, m, COLUMNS, DEPTH, EVEN)
    gradient = _weighted_softmaxes(softmaxes, s, row, column, n, m, WITH_COLUMNS)
    if TEACHER:
        t = _others(teacher, partners, row, start, n, m, COLUMNS, DEPTH, EVEN)
        gradient += _weighted_softmaxes(teacher_softmaxes, t, row, column, n, m, WITH_COLUMNS)
    entries = tiles + row.to(tl.int64)[:, None] * m + column[None, :]
    inside = (row < n)[:, None] & (column < m)[None, :]
    store_parts(gradient * tl.load(gain), entries, stride, inside, PARTS)


def forward(
    models: list[Factors], partner: Tensor, operands: torch.dtype, *, columns: bool, kept: object = ()
) -> tuple[Part, Part]:
    """Does what `tiled.forward` does."""
    x, y, scale = models[0]
    m = len(y)
    launch = Launcher("forward", models, operands)
    # Forming sums again needs many registers.
    narrow = launch.blocks._replace(COLUMNS=min(64, launch.blocks.COLUMNS), num_warps=4)
    sums = 2 * len(models) - 1
    width = triton.cdiv(m, launch.blocks.COLUMNS)
    of_rows, of_columns = [], []
    of_a_row = triton.cdiv(sums * m * scale.element_size(), launch.blocks.ROWS) if columns else 1  # bytes
    for tile in launch.tiles(of_a_row, SUMS_BYTES):
        length = tile.stop - tile.start
        height = triton.cdiv(length, launch.blocks.ROWS)
        span = triton.cdiv(width, max(SPANS, triton.cdiv(_programs(x.device), height)))  # of a program, in blocks
        by_row = scale.new_empty(triton.cdiv(width, span), 2 * sums, length)
        by_column = scale.new_empty(sums, height, m if columns else 0)
        pivots = scale.new_empty(len(models), height, width)
        arguments = by_row, by_column, pivots, length, m, span * launch.blocks.COLUMNS, columns
        launch(_forward_kernel, (len(by_row), height), tile, partner[tile], *arguments)
        of_rows.append(merge_rows(_statistics(by_row)))
        merged = scale.new_empty(triton.cdiv(height, COLUMN_SPAN), 2 * sums, m if columns else 0)
        if columns:
            rest = merged, by_column, pivots, length, m, launch.blocks.COLUMNS, COLUMN_SPAN
            grid = triton.cdiv(m, narrow.COLUMNS), len(merged)
            launch(_columns_kernel, grid, tile, partner[tile], *rest, blocks=narrow)
        of_columns.append(merge_rows(_statistics(merged)))
    rows = Part(*map(torch.cat, zip(*of_rows, strict=True)))
    return rows.to(scale.dtype), merge(of_columns).to(scale.dtype)


def _statistics(sums: Tensor) -> Part:
    """From `_store_sums`: references and Z; of a teacher also its references, E, F and Z + E."""
    reference, target, *teacher = sums.to(wide(sums.device)).unbind(1)
    if not teacher:
        return Part.without_teacher(_log_sum_exp(reference, target))
    t_reference, excess, divergence, total = teacher
    b = excess / target
    growth = torch.where(b < -0.5, (total / target).log(), b.log1p())
    kl = torch.where(target == 0, 0, divergence / target + (growth - b)).clamp(min=0)
    return Part(_log_sum_exp(reference, total), kl, _log_sum_exp(t_reference, target))


def _log_sum_exp(reference: Tensor, total: Tensor) -> Tensor:
    return (reference + total.log2()).mul(LN2.value).clamp(min=dense.EXCLUDED)


def backward(
    models: list[Factors], softmaxes: list[Softmaxes], partner: Tensor, operands: torch.dtype, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Does what `tiled.backward` does."""
    launch = Launcher("backward", models, operands)
    columns = len(softmaxes[0].column_weights) > 0
    gradients = FeatureGradients(models[0], [w for each in softmaxes for w in each[2:4]], needs, *launch.split)
    for tile, gradient in launch.gradients():
        arguments = [
            (each.row_lse[tile], each.column_lse, each.row_weights[tile], each.column_weights) for each in softmaxes
        ]
        launch(
            _backward_kernel,
            launch.grid(gradient),
            tile,
            partner[tile],
            arguments[0],
            arguments[-1],
            gradients.gain,
            gradient,
            gradient.stride(0),
            *gradient.shape[1:],
            len(gradient),
            columns,
        )
        gradients.add(tile, *gradient)
    return gradients.results()


def _programs(device: torch.device) -> int:
    return PROGRAMS * (1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count)
