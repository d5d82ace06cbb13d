r"""The softmax statistics of ``S = scale · x yᵀ`` and of a teacher's ``T`` in O(N·D) memory, exact with gradient.

Only one *tile* exists at a time: some rows of S against all columns. A matrix product of a tile costs R·M·D
multiply-adds; over all tiles that is one *unit*. Forward takes 1 unit for S and 1 for T. Backward takes both again
(none where logits were kept), 1 for the gradient of x and 1 for that of y. That makes 4 units in all and 6 with a
teacher; 3 and 4 with kept logits; 1 less where a tower is frozen.

**One exponential for rows and columns.** With the row softmax ``p_ij = exp(s_ij − u_i)``, u the log-sum-exp of the row,
a column's sum of exponentials is ``exp(c) Σ_i w_i p_ij`` with ``w_i = exp(u_i − c)`` and c the largest u of the tile: a
matrix-vector product instead of a second exponential. If a column lies so far below the tile's maximum that its terms
underflow, the sum itself shows it, and the columns of that tile are then taken from the logits.

**Gradient.** Let ``a, b, c, d`` be the upstream gradients of row lse, column lse, row divergence, column divergence,
and p, q, p̃, q̃ the row and column softmaxes of S and T. Then

.. math:: \partial L / \partial s_{ij} = (a_i + c_i) p_{ij} + (b_j + d_j) q_{ij} - c_i \tilde p_{ij} - d_j \tilde q_{ij}

where ``q_ij = p_ij exp(u_i − column_lse_j)``, so that the gradient is p times an outer product.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from calrobust.kernels.dense import Factors
from calrobust.kernels.parts import EXCLUDED, Part, divergence_terms, merge, wide
from calrobust.kernels.products import FeatureGradients, are_narrow, product

TILE_BYTES = 8 * 2**20  # fits into the last cache
DEVICE_TILE_BYTES = 64 * 2**20  # off the CPU: fills the device, and its kernels outlast their launches
TILE_ROWS = 256  # at least: below, the matrix products slow down
BLOCK_BYTES = 2**18  # rows of a tile that stay in the second cache over several passes


class Softmax(NamedTuple):
    """What backward needs of one matrix."""

    row_lse: Tensor  # [N]
    column_lse: Tensor  # [M]
    logits: Tensor  # [N, M] where they are kept for backward, else [0, M]


class Forward(NamedTuple):
    """What a form gives; the teacher's part is None without one."""

    student: Softmax
    teacher: Softmax | None
    divergences: tuple[Tensor, Tensor] | None  # [N], [M]


class Weights(NamedTuple):
    """The factors of the softmaxes in the gradient in S."""

    rows: Tensor  # [N], of p
    columns: Tensor  # [M], of q
    teacher_rows: Tensor  # [N], of -p̃
    teacher_columns: Tensor  # [M], of -q̃


class _Tile(NamedTuple):
    """A tile of one matrix, and its softmaxes."""

    logits: Tensor  # [R, M]
    p: Tensor  # [R, M] row softmaxes
    row_lse: Tensor  # [R]
    column_lse: Tensor  # [M], over the rows of the tile, in the dtype of `wide`
    factors: tuple[Tensor, Tensor] | None  # [R], [M]: q is p times their outer product, where that is representable


class _Matrix:
    """One matrix ``scale · x yᵀ`` without each row's own entry, a tile at a time."""

    def __init__(self, factors: Factors, partner: Tensor, operands: torch.dtype, kept: Tensor) -> None:
        x, y, self.scale = factors
        dtype = operands if are_narrow(x, operands) else x.dtype
        self.x, self.y = x.to(dtype), y.to(dtype)
        self.partner, self.kept = partner, kept

    def logits(self, tile: slice, out: Tensor) -> Tensor:
        """Over all tiles, one unit."""
        if len(self.kept):
            out = self.kept[tile]
        if self.x.dtype == out.dtype:
            torch.mm(self.scale * self.x[tile], self.y.T, out=out)
        else:
            torch.mul(self.scale, product(self.x[tile], self.y.T, out.dtype), out=out)
        column = self.partner[tile, None].clamp(min=0)
        own = out.gather(1, column).masked_fill_(self.partner[tile, None] >= 0, EXCLUDED)
        return out.scatter_(1, column, own)

    def tile(self, tile: slice, out: Tensor, p: Tensor) -> _Tile:
        """A tile, computed in ``out`` and ``p``."""
        s = self.logits(tile, out)
        torch.softmax(s, 1, out=p)
        row_lse = s.amax(1) - p.amax(1).log()  # the largest of a row's p is exp(maximum − lse), and at least 1 / M
        top = row_lse.max()
        weights = (row_lse - top).exp()
        sums = weights @ p
        if not _representable(sums.min().log()):
            return _Tile(s, p, row_lse, s.logsumexp(0).to(wide(s.device)), None)
        return _Tile(s, p, row_lse, sums.to(wide(s.device)).log() + top, (weights, 1 / sums))

    def weighted_softmaxes(
        self, softmax: Softmax, tile: slice, rows: Tensor, columns: Tensor, p: Tensor, out: Tensor
    ) -> Tensor:
        """``rows_i p_ij + columns_j q_ij`` in ``out``; ``p`` is scratch."""
        s = softmax.logits[tile] if len(softmax.logits) else self.logits(tile, out)
        p = torch.softmax(s, 1, out=p)
        row_lse, row_factor = softmax.row_lse[tile], rows[tile, None]
        pivot = softmax.column_lse.min()
        if _representable(pivot - row_lse.max()):
            column_factor = columns * (pivot - softmax.column_lse).exp()
            return torch.addcmul(row_factor, (row_lse - pivot).exp()[:, None], column_factor, out=out).mul_(p)
        return torch.sub(s, softmax.column_lse, out=out).exp_().mul_(columns).addcmul_(p, row_factor)


def forward(
    student: Factors, teacher: Factors | None, partner: Tensor, operands: torch.dtype, *, keep: bool
) -> Forward:
    """The statistics of S, of T if there is a teacher, and the divergences between their softmaxes."""
    x, y, _ = student
    n, m = x.shape[0], y.shape[0]
    models = [student] if teacher is None else [student, teacher]
    matrices = [_Matrix(factors, partner, operands, x.new_empty(n if keep else 0, m)) for factors in models]
    row_lse = [x.new_empty(n) for _ in models]
    row_divergence = x.new_empty(n)
    merged: list[Part] = []  # over the tiles so far
    tiles = _tiles(x, y)
    buffers = x.new_empty(2 * len(models), tiles[0].stop, m)
    for rows in tiles:
        scratch = buffers[:, : rows.stop - rows.start]
        pieces = [
            matrix.tile(rows, scratch[2 * k], scratch[2 * k + 1]) for k, matrix in enumerate(matrices)
        ]
        for lse, piece in zip(row_lse, pieces, strict=True):
            lse[rows] = piece.row_lse
        part = Part(pieces[0].column_lse)
        if teacher is not None:
            row_divergence[rows], column_divergence = _divergences(*pieces)
            part = Part(part.lse, pieces[1].column_lse, column_divergence)
        merged = [merge([*merged, part])]
    columns = merged[0]
    ours, *theirs = (
        Softmax(lse, column_lse.to(x.dtype, copy=True), matrix.kept)
        for lse, column_lse, matrix in zip(row_lse, columns[: len(models)], matrices, strict=True)
        if column_lse is not None
    )
    if columns.divergence is None:
        return Forward(ours, None, None)
    return Forward(ours, theirs[0], (row_divergence, columns.divergence.to(x.dtype)))


def backward(
    weights: Weights,
    student: Factors,
    teacher: Factors | None,
    partner: Tensor,
    softmaxes: Forward,
    operands: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the student's x, y and scale; ``needs`` says which."""
    x, y, _ = student
    none = x.new_empty(0, y.shape[0])
    tiles = _tiles(x, y)
    buffers = x.new_empty(2 if teacher is None else 3, tiles[0].stop, y.shape[0])
    rounded = are_narrow(x, operands)
    products = torch.float16 if rounded else x.dtype
    gradients = FeatureGradients(student, needs, list(weights[: 2 if teacher is None else 4]), products)
    ours = _Matrix(student, partner, operands, none)
    theirs = None if teacher is None else _Matrix(teacher, partner, operands, none)
    for tile in tiles:
        p, gradient, *spare = buffers[:, : tile.stop - tile.start]
        ours.weighted_softmaxes(softmaxes.student, tile, weights.rows, weights.columns, p, out=gradient)
        if theirs is not None and softmaxes.teacher is not None:
            gradient -= theirs.weighted_softmaxes(
                softmaxes.teacher, tile, weights.teacher_rows, weights.teacher_columns, p, out=spare[0]
            )
        gradients.add(tile, (gradient * gradients.unit).to(products) if rounded else gradient)
    return gradients.results()


def _divergences(student: _Tile, teacher: _Tile) -> tuple[Tensor, Tensor]:
    """Of the rows of a tile, and of its columns over the rows of the tile."""
    s, t, p = student.logits, teacher.logits, teacher.p
    row_lse, teacher_row_lse = student.row_lse[:, None], teacher.row_lse[:, None]
    column_lse, teacher_column_lse = student.column_lse.to(s.dtype), teacher.column_lse.to(s.dtype)
    row_shift, column_shift = teacher_row_lse - row_lse, teacher_column_lse - column_lse
    of_rows, of_columns = s.new_empty(s.shape[0]), s.new_zeros(s.shape[1], dtype=student.column_lse.dtype)
    height = s.shape[0]
    if s.device.type == "cpu":
        height = max(1, min(height, BLOCK_BYTES // (s.shape[1] * s.element_size())))
    buffers = s.new_empty(2, height, s.shape[1])
    for start in range(0, s.shape[0], height):
        block = slice(start, start + height)
        scratch = buffers[:, : min(height, s.shape[0] - start)]
        terms = _weighted_terms(s[block], t[block], row_shift[block], p[block], *scratch)
        if terms is None:
            terms = divergence_terms(t[block] - teacher_row_lse[block], s[block] - row_lse[block])
        torch.sum(terms, 1, out=of_rows[block])
        terms = None if teacher.factors is None else _weighted_terms(
            s[block], t[block], column_shift, p[block], *scratch
        )
        if terms is None or teacher.factors is None:
            of_columns += divergence_terms(t[block] - teacher_column_lse, s[block] - column_lse).sum(0)
        else:
            weights, normaliser = teacher.factors
            of_columns += (weights[block] @ terms) * normaliser
    return of_rows.clamp_(min=0), of_columns.clamp_(min=0)


def _weighted_terms(s: Tensor, t: Tensor, shift: Tensor, p: Tensor, ratio: Tensor, out: Tensor) -> Tensor | None:
    """`divergence_terms` over ``exp(log_target) / p`` of a teacher's row softmax p, or None if they overflow."""
    torch.sub(s, t, out=ratio).add_(shift)  # log p − log p̃
    if not _representable(-ratio.amax()):
        return None
    return torch.expm1(ratio, out=out).sub_(ratio).mul_(p)


def _tile_rows(x: Tensor, y: Tensor) -> int:
    tile_bytes = TILE_BYTES if x.device.type == "cpu" else DEVICE_TILE_BYTES
    return min(x.shape[0], max(TILE_ROWS, tile_bytes // (y.shape[0] * y.element_size())))


def _tiles(x: Tensor, y: Tensor) -> list[slice]:
    rows = _tile_rows(x, y)
    return [slice(start, min(start + rows, x.shape[0])) for start in range(0, x.shape[0], rows)]


def _representable(exponent: Tensor) -> bool:
    """Whether terms far below ``exp(exponent)`` still do not underflow; off the CPU never, so as not to wait for it."""
    return exponent.device.type == "cpu" and bool(exponent > math.log(torch.finfo(exponent.dtype).tiny) * 2 / 3)
