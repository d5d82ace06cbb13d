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

import torch
from torch import Tensor

from calrobust.kernels.products import FeatureGradients, are_narrow, product

TILE_BYTES = 8 * 2**20  # fits into the last cache
DEVICE_TILE_BYTES = 64 * 2**20  # off the CPU: fills the device, and its kernels outlast their launches
TILE_ROWS = 256  # at least: below, the matrix products slow down


class _Matrix:
    """One matrix ``scale · x yᵀ``, a tile of rows at a time, and what its row and column softmaxes need."""

    def __init__(self, factors: list[Tensor], statistics: list[Tensor], operands: torch.dtype) -> None:
        x, y, self.scale = factors
        dtype = operands if are_narrow(x, operands) else x.dtype
        self.x, self.y = x.to(dtype), y.to(dtype)
        # u [N]; column lse [M]; the row softmaxes [N, M] where they are kept, else [0, M]
        self.row_lse, self.column_lse, self.kept = statistics

    def logits(self, tile: slice, out: Tensor) -> Tensor:
        """Over all tiles, one GEMM unit."""
        if self.x.dtype == out.dtype:
            return torch.mm(self.scale * self.x[tile], self.y.T, out=out)
        return torch.mul(self.scale, product(self.x[tile], self.y.T, out.dtype), out=out)

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


def forward(factors: list[Tensor], operands: torch.dtype, *, keep: bool) -> tuple[list[list[Tensor]], list[Tensor]]:
    """As `operators` asks for it."""
    x, y, _ = factors[:3]
    n, m = len(x), len(y)
    tiles = _tiles(x, y)
    student, *teachers = matrices = [
        _Matrix(factors[k : k + 3], _no_statistics(x, m, keep), operands) for k in range(0, len(factors), 3)
    ]
    row_gap = x.new_zeros(n if teachers else 0)
    column_gap = student.column_lse.new_zeros(m if teachers else 0)  # Σ p̃ (t − s), Σ q̃ (t − s)
    buffers = x.new_empty(3 if teachers else 2, tiles[0].stop, m)
    for tile in tiles:
        s, scratch, *spare = buffers[:, : tile.stop - tile.start]
        student.logits(tile, out=s)
        p = student.row_softmaxes(s, tile, out=scratch)
        weights, top = student.row_weights(tile)
        sums = weights @ p
        part = sums.double().log() + top if _representable(sums.min().log()) else s.logsumexp(0).double()
        student.merge_columns(part)
        for teacher in teachers:
            t = teacher.logits(tile, out=spare[0])
            p = teacher.row_softmaxes(t, tile, out=scratch)
            weights, top = teacher.row_weights(tile)
            sums = weights @ p
            gap = torch.sub(t, s, out=s)
            weighted = torch.mul(p, gap, out=scratch)
            row_gap[tile] = weighted.sum(1)
            if _representable(sums.min().log()):
                part, mean = sums.double().log() + top, (weights @ weighted) / sums
            else:
                part, mean = t.logsumexp(0).double(), t.softmax(0).mul_(gap).sum(0)
            old, new = teacher.merge_columns(part)
            column_gap = old * column_gap + new * mean
    divergences = []
    for teacher in teachers:
        row_gap += student.row_lse - teacher.row_lse
        column_gap += student.column_lse - teacher.column_lse
        divergences = [row_gap, column_gap.to(x.dtype)]
    return [[matrix.row_lse, matrix.column_lse.to(x.dtype, copy=True), matrix.kept] for matrix in matrices], divergences


def backward(
    weights: list[Tensor], factors: list[Tensor], statistics: list[Tensor], operands: torch.dtype, first_partner: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `operators` asks for it."""
    rows, columns, teacher_rows, teacher_columns = weights
    x, y, _ = factors[:3]
    student, *teachers = (
        _Matrix(factors[k : k + 3], statistics[k : k + 3], operands) for k in range(0, len(factors), 3)
    )
    tiles = _tiles(x, y)
    buffers = x.new_empty(3 if teachers else 2, tiles[0].stop, len(y))
    rounded = are_narrow(x, operands)
    slab = x.new_empty(tiles[0].stop if rounded else 0, len(y), dtype=torch.float16 if rounded else x.dtype)
    gradients = FeatureGradients(factors, weights, slab, first_partner)
    for tile in tiles:
        scratch, s, *spare = buffers[:, : tile.stop - tile.start]
        student.weighted_softmaxes(tile, rows, columns, scratch, out=s)
        for teacher in teachers:
            s -= teacher.weighted_softmaxes(tile, teacher_rows, teacher_columns, scratch, out=spare[0])
        gradients.add_tile(tile, s)
    return gradients.results()


def _tile_rows(x: Tensor, y: Tensor) -> int:
    tile_bytes = TILE_BYTES if x.device.type == "cpu" else DEVICE_TILE_BYTES
    return min(len(x), max(TILE_ROWS, tile_bytes // (len(y) * y.element_size())))


def _tiles(x: Tensor, y: Tensor) -> list[slice]:
    rows = _tile_rows(x, y)
    return [slice(start, min(start + rows, len(x))) for start in range(0, len(x), rows)]


def _no_statistics(x: Tensor, m: int, keep: bool) -> list[Tensor]:
    """Room for row lse, column lse and row softmaxes; column lse adds up from log 0 in float64."""
    n = len(x)
    columns = x.new_full((m,), -torch.inf, dtype=torch.float64)
    return [x.new_empty(n), columns, x.new_empty(n if keep else 0, m)]


def _representable(exponent: Tensor) -> bool:
    """Whether terms far below ``exp(exponent)`` still do not underflow; off the CPU, not to wait for it, never."""
    return exponent.device.type == "cpu" and bool(exponent > math.log(torch.finfo(exponent.dtype).tiny) * 2 / 3)
