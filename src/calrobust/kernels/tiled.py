r"""The softmax statistics of ``S = scale · x yᵀ`` and of a teacher's ``T`` in O(N·D) memory, exact with gradient.

Only one tile of rows exists at a time. A matrix product of a tile costs R·M·D multiply-adds; over all tiles that is one
*GEMM unit*. Forward: 1 unit for S, 1 for T. Backward: both again (none when the exponentials were kept), 1 for the
gradient of x and 1 for that of y. Hence 4 units in all, 6 with a teacher; 3 and 4 with kept exponentials.

**One exponential for rows and columns.** With the row softmax ``p_ij = exp(s_ij − u_i)``, u the lse of the row, a
column's sum of exponentials is ``exp(c) Σ_i w_i p_ij`` with ``w_i = exp(u_i − c)``, c the largest u of the tile: a
matrix-vector product instead of a second exponential. A column that lies so far below the tile's maximum that its terms
underflow shows in the sum itself, and that tile's columns are then taken from the logits. Columns of successive tiles
merge in float64.

**Divergence.** ``KL(p̃ ‖ p) = Σ_j p̃_j (t_j − s_j) + lse(s) − lse(t)``: only differences of logits are weighted, so a
teacher equal to the student gives exactly zero.

**Gradient.** With ``a, b, c, d`` the upstream gradients of row lse, column lse, row divergence, column divergence,
and p, q, p̃, q̃ the row and column softmaxes of S and T,

.. math:: \partial L / \partial s_{ij} = (a_i + c_i) p_{ij} + (b_j + d_j) q_{ij} - c_i \tilde p_{ij} - d_j \tilde q_{ij}

where, from one exponential again, ``q_ij = p_ij exp(u_i − column_lse_j)``: the gradient is p times an outer product.
"""

import math
from typing import Any, NoReturn

import torch
from torch import Tensor

from calrobust.kernels.dense import Factors, SoftmaxStatistics

TILE_BYTES = 8 * 2**20  # fits into the last cache
TILE_ROWS = 256  # at least: below, the matrix products slow down


def softmax_statistics(
    student: Factors, teacher: Factors | None = None, *, memory_budget: int = 0
) -> SoftmaxStatistics:
    """As `dense.softmax_statistics`; keeps the exponentials for backward if they fit into ``memory_budget`` bytes."""
    x, y, _ = student
    differentiated = torch.is_grad_enabled() and any(factor.requires_grad for factor in student)
    kept_bytes = (1 if teacher is None else 2) * len(x) * len(y) * x.element_size()
    factors = [*student, *(teacher or ())]
    outputs = _forward(factors, _tile_rows(x, y), differentiated and kept_bytes <= memory_budget)
    row_lse, column_lse, row_divergence, column_divergence = outputs[:4]
    teacher_column_lse = x.new_empty(0) if teacher is None else outputs[-2].detach()
    return SoftmaxStatistics(row_lse, column_lse, row_divergence, column_divergence, teacher_column_lse)


class _Matrix:
    """One matrix ``scale · x yᵀ``, a tile of rows at a time, and what its row and column softmaxes need."""

    def __init__(self, factors: list[Tensor], statistics: list[Tensor]) -> None:
        self.x, self.y, self.scale = factors
        # u [N]; column lse [M]; the row softmaxes [N, M] where they are kept, else [0, M]
        self.row_lse, self.column_lse, self.kept = statistics

    def logits(self, tile: slice, out: Tensor | None = None) -> Tensor:
        """Over all tiles, one GEMM unit."""
        return torch.mm(self.scale * self.x[tile], self.y.T, out=out)

    def row_softmaxes(self, logits: Tensor, tile: slice, out: Tensor) -> Tensor:
        """``p``; sets the row lse of the tile."""
        p = torch.softmax(logits, 1, out=self.kept[tile] if len(self.kept) else out)
        # The largest of a row's p is exp(maximum − lse), and at least 1 / M.
        torch.sub(logits.amax(1), p.amax(1).log(), out=self.row_lse[tile])
        return p

    def row_weights(self, tile: slice) -> tuple[Tensor, Tensor]:
        """``w_i = exp(u_i − c)``, which turns p into exponentials that all rows of the tile share, and c."""
        top = self.row_lse[tile].max()
        return (self.row_lse[tile] - top).exp(), top

    def merge_columns(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """Adds a tile to the column lse; the shares of the earlier tiles and of this one in each column's softmax."""
        before, self.column_lse = self.column_lse, torch.logaddexp(self.column_lse, part)
        return (before - self.column_lse).exp(), (part - self.column_lse).exp()

    def weighted_softmaxes(self, tile: slice, rows: Tensor, columns: Tensor, p: Tensor, out: Tensor) -> Tensor:
        """``rows_i p_ij + columns_j q_ij`` in ``out``; ``p`` is scratch."""
        p = self.kept[tile] if len(self.kept) else torch.softmax(self.logits(tile, out), 1, out=p)
        row_lse, row_factor = self.row_lse[tile], rows[tile, None]
        pivot = self.column_lse.min()
        if _representable(pivot - row_lse.max()):
            column_factor = columns * (pivot - self.column_lse).exp()
            return torch.addcmul(row_factor, (row_lse - pivot).exp()[:, None], column_factor, out=out).mul_(p)
        q = self.logits(tile, out).sub_(self.column_lse).exp_()
        return q.mul_(columns).addcmul_(p, row_factor)


@torch.library.custom_op("calrobust::softmax_statistics", mutates_args=())
def _forward(factors: list[Tensor], tile_rows: int, keep: bool) -> list[Tensor]:
    """Both lse and both divergences, then what backward needs of the student and of the teacher, if there is one."""
    x, y, _ = factors[:3]
    (n, m), tiles = (len(x), len(y)), _tiles(x, tile_rows)
    student, *teachers = (_Matrix(factors[k : k + 3], _no_statistics(x, m, keep)) for k in range(0, len(factors), 3))
    row_gap = x.new_zeros(n if teachers else 0)
    column_gap = student.column_lse.new_zeros(m if teachers else 0)  # Σ p̃ (t − s), Σ q̃ (t − s)
    buffers = x.new_empty(3 if teachers else 2, tiles[0].stop, m)
    for tile in tiles:
        s, scratch, *spare = buffers[:, : tile.stop - tile.start]
        student.logits(tile, out=s)
        p = student.row_softmaxes(s, tile, out=scratch)
        weights, top = student.row_weights(tile)
        sums = weights @ p
        if _representable(sums.min().log()):
            student.merge_columns(sums.double().log() + top)
        else:
            student.merge_columns(student.logits(tile).logsumexp(0).double())
        for teacher in teachers:
            t = teacher.logits(tile, out=spare[0])
            p = teacher.row_softmaxes(t, tile, out=scratch)
            gap = torch.sub(t, s, out=s).mul_(p)
            row_gap[tile] = gap.sum(1)
            weights, top = teacher.row_weights(tile)
            sums = weights @ p
            if _representable(sums.min().log()):
                mean, (old, new) = (weights @ gap) / sums, teacher.merge_columns(sums.double().log() + top)
            else:
                t = teacher.logits(tile)
                part = t.logsumexp(0)
                mean = ((t - part).exp() * (t - student.logits(tile))).sum(0)
                old, new = teacher.merge_columns(part.double())
            column_gap = old * column_gap + new * mean
    for teacher in teachers:
        row_gap += student.row_lse - teacher.row_lse
        column_gap += student.column_lse - teacher.column_lse
    return [student.row_lse, student.column_lse.to(x.dtype), row_gap, column_gap.to(x.dtype)] + [
        tensor
        for matrix in (student, *teachers)
        for tensor in (matrix.row_lse.clone(), matrix.column_lse.to(x.dtype, copy=True), matrix.kept)
    ]


@torch.library.custom_op("calrobust::softmax_statistics_backward", mutates_args=())
def _backward(
    gradients: list[Tensor], factors: list[Tensor], statistics: list[Tensor], tile_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, y and scale from a, b, c, d, the upstream gradients of the four statistics."""
    a, b, c, d = gradients
    x, y, scale = factors[:3]
    student, *teachers = (
        _Matrix(factors[3 * k : 3 * k + 3], statistics[3 * k : 3 * k + 3]) for k in range(len(factors) // 3)
    )
    rows, columns = (a + c, b + d) if teachers else (a, b)
    tiles = _tiles(x, tile_rows)
    buffers = x.new_empty(3 if teachers else 2, tiles[0].stop, len(y))
    x_gradient, y_gradient, scale_gradient = torch.empty_like(x), torch.zeros_like(y), torch.zeros_like(scale)
    for tile in tiles:
        scratch, s, *spare = buffers[:, : tile.stop - tile.start]
        student.weighted_softmaxes(tile, rows, columns, scratch, out=s)
        for teacher in teachers:
            s -= teacher.weighted_softmaxes(tile, c, d, scratch, out=spare[0])
        product = torch.mm(s, y, out=x_gradient[tile])  # one GEMM unit over all tiles
        scale_gradient += torch.linalg.vecdot(product, x[tile]).sum()
        product *= scale
        y_gradient.addmm_(s.T, scale * x[tile])  # and one more
    return x_gradient, y_gradient, scale_gradient


@_forward.register_fake
def _(factors: list[Tensor], tile_rows: int, keep: bool) -> list[Tensor]:
    x, y, _ = factors[:3]
    rows, columns, none = x.new_empty(len(x)), x.new_empty(len(y)), x.new_empty(0)
    divergences = [none, none] if len(factors) == 3 else [rows, columns]
    statistics = [rows, columns, x.new_empty(len(x) if keep else 0, len(y))] * (len(factors) // 3)
    return [torch.empty_like(t) for t in (rows, columns, *divergences, *statistics)]


@_backward.register_fake
def _(
    gradients: list[Tensor], factors: list[Tensor], statistics: list[Tensor], tile_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    x, y, scale = factors[:3]
    return torch.empty_like(x), torch.empty_like(y), torch.empty_like(scale)


def _save(ctx: Any, inputs: tuple[list[Tensor], int, bool], output: list[Tensor]) -> None:
    factors, ctx.tile_rows, _ = inputs
    ctx.count = len(factors)
    ctx.set_materialize_grads(False)  # the kept exponentials are an output too, and have no gradient
    ctx.save_for_backward(*factors, *output)


def _differentiate(ctx: Any, gradients: list[Tensor | None]) -> tuple[list[Tensor | None], None, None]:
    factors, outputs = list(ctx.saved_tensors[: ctx.count]), list(ctx.saved_tensors[ctx.count :])
    upstream = [
        torch.zeros_like(output) if gradient is None else gradient.contiguous()
        for gradient, output in zip(gradients[:4], outputs[:4], strict=True)
    ]
    student = _backward(upstream, factors, outputs[4:], ctx.tile_rows)
    return [*student, *[None] * (ctx.count - 3)], None, None


def _refuse(ctx: Any, *gradients: Tensor) -> NoReturn:
    raise RuntimeError('the tiled losses have no second derivative; pass impl="dense"')


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)


def _tile_rows(x: Tensor, y: Tensor) -> int:
    return min(len(x), max(TILE_ROWS, TILE_BYTES // (len(y) * y.element_size())))


def _tiles(x: Tensor, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, len(x))) for start in range(0, len(x), rows)]


def _no_statistics(x: Tensor, m: int, keep: bool) -> list[Tensor]:
    """Room for row lse, column lse and row softmaxes; column lse adds up from log 0 in float64."""
    n = len(x)
    columns = x.new_full((m,), -torch.inf, dtype=torch.float64)
    return [x.new_empty(n), columns, x.new_empty(n if keep else 0, m)]


def _representable(exponent: Tensor) -> bool:
    """Whether terms far below ``exp(exponent)`` still do not underflow; off the CPU, not to wait for it, never."""
    return exponent.device.type == "cpu" and bool(exponent > math.log(torch.finfo(exponent.dtype).tiny) * 2 / 3)
