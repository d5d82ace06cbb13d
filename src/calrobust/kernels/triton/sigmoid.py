"""The sweep of `kernels.sigmoid` as a Triton kernel."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from calrobust.kernels.dense import wide
from calrobust.kernels.sigmoid import Classes, Model, Sums
from calrobust.kernels.tiled import FeatureGradients
from calrobust.kernels.triton import LOG2E, Launcher, comparison, logits, store_parts

# log(1 + e) / e for e in [0, 1], within 4e-8. Divisions would take as long as all else.
_CUBIC = 0.999999965, -0.499994357, 0.333179343, -0.248339455
POLYNOMIAL = tl.constexpr((*_CUBIC, 0.190713096, -0.135906002, 0.0773807384, -0.0289919564, 0.0051058258))


@triton.jit
def _sigmoids(z):
    """``log(1 + exp(−|z|))``, ``σ(z)`` and ``σ(−z)``."""
    e = tl.exp2(-tl.abs(z) * LOG2E)
    if z.dtype == tl.float64:
        y = e / (2.0 + e)  # log(1 + e) = 2 artanh(y), y <= 1/3
        series = tl.full(z.shape, 1.0 / 33, z.dtype)
        for k in tl.static_range(16, 0, -1):
            series = tl.fma(series, y * y, tl.full(z.shape, 1.0 / (2 * k - 1), z.dtype))
        rest = 2.0 * y * series
    else:
        series = tl.full(z.shape, POLYNOMIAL[8], z.dtype)
        for k in tl.static_range(7, -1, -1):
            series = tl.fma(series, e, tl.full(z.shape, POLYNOMIAL[k], z.dtype))
        rest = e * series
    likely = tl.exp2(-rest * LOG2E)
    return rest, tl.where(z > 0, likely, e * likely), tl.where(z > 0, e * likely, likely)


@triton.jit
def _sums_kernel(
    student,
    teacher,
    bias,
    t_bias,
    row_classes,
    column_classes,
    weights,
    t_weights,
    gain,
    sums,  # [likelihood, divergence, gradient; programs of a row; n]
    tiles,
    stride,  # from part to part
    n,
    m,
    PARTS: tl.constexpr,  # 0 if no gradient is wanted
    TEACHER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
):
    """A block of the gradient in Z, in parts, and the sums over its rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    z = logits(student, row, column, n, m, DEPTH, EVEN) + tl.load(bias)
    of_rows = tl.load(row_classes + row, mask=row < n, other=0).to(tl.int32)
    of_columns = tl.load(column_classes + column, mask=column < m, other=0).to(tl.int32)
    positive = of_rows[:, None] == of_columns[None, :]
    rest, yes, no = _sigmoids(z)
    inside = (row < n)[:, None] & (column < m)[None, :]
    to, step = sums + tl.program_id(1) * n + row, tl.num_programs(1) * n
    likelihood = tl.maximum(tl.where(positive, -z, z), 0.0) + rest
    tl.store(to, tl.sum(tl.where(inside, likelihood, 0.0), 1), mask=row < n)
    if PARTS > 0:
        gradient = tl.load(weights + row, mask=row < n, other=0.0)[:, None] * tl.where(positive, -no, yes)
    if TEACHER:
        t = logits(teacher, row, column, n, m, DEPTH, EVEN) + tl.load(t_bias)
        t_rest, t_yes, t_no = _sigmoids(t)
        of_yes = comparison(yes, t_yes, (tl.minimum(z, 0.0) - tl.minimum(t, 0.0)) - (rest - t_rest), TEACHER)
        of_no = comparison(no, t_no, (tl.maximum(t, 0.0) - tl.maximum(z, 0.0)) - (rest - t_rest), TEACHER)
        to += step
        tl.store(to, tl.sum(tl.where(inside, of_yes[2] + of_no[2], 0.0), 1), mask=row < n)
        if PARTS > 0:
            gradient += tl.load(t_weights + row, mask=row < n, other=0.0)[:, None] * of_yes[1]
    if PARTS > 0:
        tl.store(to + step, tl.sum(tl.where(inside, gradient, 0.0), 1), mask=row < n)
        entries = tiles + row.to(tl.int64)[:, None] * m + column[None, :]
        store_parts(gradient * tl.load(gain), entries, stride, inside, PARTS)


def sweep(
    models: Sequence[Model], classes: Classes, weights: Tensor, operands: torch.dtype, needs: list[bool]
) -> tuple[Sums, list[Tensor]]:
    """Does what `kernels.sigmoid.sweep` does."""
    scale = models[0].scale
    launch = Launcher("sigmoid", models, operands)
    gradients = FeatureGradients(models[0], weights, needs, *launch.split)
    found = []
    for tile, gradient in launch.gradients():
        grid = launch.grid(gradient)
        parts = len(gradient) if any(needs) else 0
        sums = scale.new_empty(len(models) + (parts > 0), grid[1], tile.stop - tile.start)
        launch(
            _sums_kernel,
            grid,
            tile,
            models[0].bias,
            models[-1].bias,
            classes.rows[tile],
            classes.columns,
            weights[0][tile],
            weights[-1][tile],
            gradients.gain,
            sums,
            gradient,
            gradient.stride(0),
            *gradient.shape[1:],
            parts,
        )
        if parts:
            gradients.add(tile, *gradient)
        found.append(sums.sum(1, dtype=wide(scale.device)))
    likelihood, *others = (torch.cat(vectors) for vectors in zip(*found, strict=True))
    bias = others.pop().sum().to(scale.dtype) if any(needs) else scale.new_empty(0)
    divergence = others[0] if others else likelihood.new_empty(0)
    return Sums(likelihood, divergence), [*gradients.results(), bias if needs[3] else scale.new_empty(0)]
