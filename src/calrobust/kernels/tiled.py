r"""The softmax statistics of ``S = scale · x yᵀ`` and of a teacher's ``T`` in O(N·D) memory, exact with gradient.

Only one *tile* exists at a time: some rows of S against all columns. A matrix product of a tile costs R·M·D
multiply-adds; over all tiles that is one *unit*. Forward takes 1 unit for S and 1 for T. Backward takes both again
(none where logits were kept), 1 for the gradient of x and 1 for that of y. That makes 4 units in all and 6 with a
teacher; 3 and 4 with kept logits; 1 less where a tower is frozen.

**One exponential for rows and columns.** With the row softmax ``p_ij = exp(s_ij − u_i)``, u the log-sum-exp of the row,
a column's sum of exponentials is ``exp(c) Σ_i w_i p_ij`` with ``w_i = exp(u_i − c)`` and c any of the u: a
matrix-vector product instead of a second exponential. If a column lies so far from c that its terms underflow, the sum
itself shows it, and the columns of that tile are then taken from the logits.

**Divergences.** `parts` says why the sum of ``p̃_ij f(r_ij)`` over j is the divergence of row i, where
``f(r) = exp(r) − 1 − r`` and ``r_ij = log p_ij − log p̃_ij``. The column softmaxes q̃ of T and q of S satisfy
``log q_ij − log q̃_ij = r_ij − d_i`` up to a constant for each column, with d the difference of the row lse of T and of
S less a constant. With ``ρ_i = exp(−d_i) − 1`` and ``b_j = Σ_i q̃_ij (exp(r_ij − d_i) − 1)``, column j diverges by

.. math:: \sum_i \tilde q_{ij} \bigl( f(-d_i) + f(r_{ij}) + \rho_i (e^{r_{ij}} - 1) \bigr) + \log(1 + b_j) - b_j

again in matrix-vector products. Where these sums would cancel, columns are taken from the logits.

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

from calrobust.kernels import dense
from calrobust.kernels.dense import Factors
from calrobust.kernels.parts import EXCLUDED, Part, Strip, merge, wide
from calrobust.kernels.products import FeatureGradients, are_narrow, product

TILE_BYTES = 8 * 2**20  # fits into the last cache
DEVICE_TILE_BYTES = 64 * 2**20  # off the CPU: fills the device, and its kernels outlast their launches
TILE_ROWS = 256  # at least: below, the matrix products slow down
FAR = 6.0  # nats by which rows or columns may shift before sums over columns cancel too much
BLOCK_BYTES = 2**18


class Softmaxes(NamedTuple):
    """What backward needs of one matrix."""

    row_lse: Tensor  # [N]
    column_lse: Tensor  # [M]
    logits: Tensor  # [N, M] where they are kept for backward, else [0, M]


class Weights(NamedTuple):
    """The factors of the softmaxes in the gradient in S."""

    rows: Tensor  # [N], of p
    columns: Tensor  # [M], of q
    teacher_rows: Tensor  # [N], of -p̃
    teacher_columns: Tensor  # [M], of -q̃


class _Matrix:
    """One matrix ``scale · x yᵀ`` without each row's own entry, a tile at a time."""

    def __init__(self, factors: Factors, partner: Tensor, operands: torch.dtype, kept: Tensor) -> None:
        x, y, self.scale = factors
        dtype = operands if are_narrow(x, operands) else x.dtype
        self.x, self.y = x.to(dtype), y.to(dtype)
        self.partner, self.kept = partner, kept

    def logits(self, tile: slice, out: Tensor) -> Tensor:
        """Over all tiles, one unit."""
        out = self.kept[tile] if len(self.kept) else out[: tile.stop - tile.start]
        if self.x.dtype == out.dtype:
            torch.mm(self.scale * self.x[tile], self.y.T, out=out)
        else:
            torch.mul(self.scale, product(self.x[tile], self.y.T, out.dtype), out=out)
        column = self.partner[tile, None].clamp(min=0)
        own = out.gather(1, column).masked_fill_(self.partner[tile, None] >= 0, EXCLUDED)
        return out.scatter_(1, column, own)

    def weighted_softmaxes(
        self, softmaxes: Softmaxes, tile: slice, rows: Tensor, columns: Tensor, p: Tensor, out: Tensor
    ) -> Tensor:
        """``rows_i p_ij + columns_j q_ij`` in ``out``; ``p`` is scratch."""
        s = softmaxes.logits[tile] if len(softmaxes.logits) else self.logits(tile, out)
        p = torch.softmax(s, 1, out=p)
        row_lse, row_factor = softmaxes.row_lse[tile], rows[tile, None]
        pivot = softmaxes.column_lse.min()
        if _is_looked_at(s) and _representable((pivot - row_lse.max()).exp()):
            column_factor = columns * (pivot - softmaxes.column_lse).exp()
            return torch.addcmul(row_factor, (row_lse - pivot).exp()[:, None], column_factor, out=out).mul_(p)
        return torch.sub(s, softmaxes.column_lse, out=out).exp_().mul_(columns).addcmul_(p, row_factor)


def forward(
    student: Factors, teacher: Factors | None, partner: Tensor, operands: torch.dtype, *, keep: bool
) -> tuple[Strip, list[Tensor]]:
    """The statistics, and the logits of S and T where they are kept for backward, else of shape ``[0, M]``."""
    x, y, _ = student
    kept = [x.new_empty(x.shape[0] if keep else 0, y.shape[0]) for model in (student, teacher) if model]
    matrices = [
        _Matrix(factors, partner, operands, logits)
        for factors, logits in zip((student, teacher), kept, strict=False)
        if factors
    ]
    rows: list[Part] = []
    columns: list[Part] = []
    tiles = _tiles(x, y)
    buffers = x.new_empty(len(matrices), 0 if keep else tiles[0].stop, y.shape[0])
    for tile in tiles:
        logits = [matrix.logits(tile, out) for matrix, out in zip(matrices, buffers, strict=True)]
        strip = _statistics(*logits)
        rows.append(strip.rows)
        columns = [merge([*columns, strip.columns])]
    joined = Part(*map(torch.cat, zip(*rows, strict=True)))
    return Strip(joined.to(x.dtype), columns[0].to(x.dtype)), kept


def backward(
    weights: Weights,
    student: Factors,
    teacher: Factors | None,
    partner: Tensor,
    softmaxes: list[Softmaxes],
    operands: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the student's x, y and scale; ``needs`` says which."""
    x, y, _ = student
    none = x.new_empty(0, y.shape[0])
    tiles = _tiles(x, y)
    buffers = x.new_empty(2 if teacher is None else 3, tiles[0].stop, y.shape[0])
    dtype = torch.float16 if are_narrow(x, operands) else x.dtype
    rounded = x.new_empty(0 if dtype == x.dtype else tiles[0].stop, y.shape[0], dtype=dtype)
    gradients = FeatureGradients(student, needs, list(weights[: 2 if teacher is None else 4]), dtype)
    matrices = [_Matrix(factors, partner, operands, none) for factors in (student, teacher) if factors]
    for tile in tiles:
        p, gradient, *spare = buffers[:, : tile.stop - tile.start]
        matrices[0].weighted_softmaxes(softmaxes[0], tile, weights.rows, weights.columns, p, out=gradient)
        for matrix, own in zip(matrices[1:], softmaxes[1:], strict=True):
            gradient -= matrix.weighted_softmaxes(
                own, tile, weights.teacher_rows, weights.teacher_columns, p, out=spare[0]
            )
        if len(rounded):
            gradient = torch.mul(gradient, gradients.unit, out=rounded[: gradient.shape[0]])
        gradients.add(tile, gradient)
    return gradients.results()


def _statistics(s: Tensor, t: Tensor | None = None) -> Strip:
    """Of the rows of a tile, and of its columns over the rows of the tile; a few rows at a time, in the cache."""
    precise = wide(s.device)
    on_cpu = _is_looked_at(s)  # elsewhere columns are taken from the logits
    height = max(1, BLOCK_BYTES // (s.shape[1] * s.element_size())) if on_cpu else s.shape[0]
    lse, teacher_lse, divergence = s.new_empty(3, s.shape[0], dtype=precise)
    # Of columns: Σ w_i p_ij and, with p̃ and its w̃, Σ w̃_i p̃_ij, the first sum of the divergence, and that of b_j.
    sums, teacher_sums, first, second = s.new_zeros(4, s.shape[1])
    pivot = teacher_pivot = lse.new_zeros(())  # mean lse of the first rows
    buffers = s.new_empty(2 if t is None else 5, min(height, s.shape[0]), s.shape[1])
    for start in range(0, s.shape[0], height):
        block = slice(start, min(start + height, s.shape[0]))
        p, scratch, *spare = buffers[:, : block.stop - block.start]
        lse[block] = _softmax(s[block], p)
        pivot = lse[block].mean() if start == 0 else pivot
        if on_cpu:
            sums += (lse[block] - pivot).exp().to(s.dtype) @ p
        if t is None:
            continue
        teacher_p, ratio, excess = spare
        teacher_lse[block] = _softmax(t[block], teacher_p)
        teacher_pivot = teacher_lse[block].mean() if start == 0 else teacher_pivot
        shift = teacher_lse[block] - lse[block]
        torch.sub(s[block], t[block], out=ratio).add_(shift.to(s.dtype)[:, None])
        terms = _divergence_terms(ratio, p, teacher_p, excess, scratch)
        torch.sum(terms, 1, dtype=precise, out=divergence[block])
        if on_cpu:
            weights = (teacher_lse[block] - teacher_pivot).exp()
            distance = (teacher_pivot - pivot) - shift
            growth = torch.expm1(distance)
            mixed = torch.stack([weights, weights * (growth - distance), weights * growth, weights + weights * growth])
            weights, curved, grown, whole = mixed.to(s.dtype)
            teacher_sums += weights @ teacher_p
            first += curved @ teacher_p
            first += weights @ terms
            first += grown @ excess
            second += grown @ teacher_p
            second += whole @ excess
    rows = Part.without_teacher(lse) if t is None else Part(lse, teacher_lse, divergence.clamp_(min=0))
    if not on_cpu:
        return Strip(rows, dense.along(0, s, t).to(precise))
    columns = Part.without_teacher(pivot + sums.to(precise).log())
    lost = ~_representable(sums)
    if t is not None:
        first, second = first.to(precise) / teacher_sums, second.to(precise) / teacher_sums
        columns = Part(
            columns.lse, teacher_pivot + teacher_sums.to(precise).log(), (first + second.log1p() - second).clamp(min=0)
        )
        lost |= ~_representable(teacher_sums) | ~(second.log1p().abs() < FAR)
        lost |= ~((lse - teacher_lse - pivot + teacher_pivot).abs().max() < FAR)
    where = lost.nonzero()[:, 0]
    if len(where):
        found = dense.along(0, s[:, where], None if t is None else t[:, where]).to(precise)
        for vector, values in zip(columns, found, strict=True):
            vector[where[: len(values)]] = values  # none of a teacher's without a teacher
    return Strip(rows, columns)


def _softmax(logits: Tensor, out: Tensor) -> Tensor:
    """Row softmaxes in ``out``; gives the log-sum-exp of the rows in the dtype of `wide`."""
    torch.softmax(logits, 1, out=out)
    top, highest = (values.amax(1).to(wide(logits.device)) for values in (logits, out))
    return top - highest.log()  # the highest probability is exp(top − lse), and at least 1 / M


def _divergence_terms(ratio: Tensor, probability: Tensor, target: Tensor, excess: Tensor, out: Tensor) -> Tensor:
    """`parts.divergence_terms` from both probabilities and ``ratio``, the logarithm of their quotient.

    Leaves ``probability − target`` in ``excess``, and uses ``ratio`` and ``probability`` as scratch.

    ``p − p̃ − p̃ log(p / p̃)`` cancels where the two are close. There its series in the ratio stands in, cut off after a
    term that leaves it below the true value wherever it is inexact. So the larger of the two is right, once what
    rounding may add to the difference is taken off. In float32 torch's expm1 takes longer than all of this.
    """
    margin = 8 * torch.finfo(ratio.dtype).eps
    torch.sub(probability, target, out=excess)
    torch.addcmul(excess, target, ratio, value=-1, out=out).sub_(target, alpha=margin)
    near = probability
    ratio.clamp_(-1, 1)
    if ratio.dtype == torch.float64:
        torch.expm1(ratio, out=near).sub_(ratio)
    else:
        *factors, last = (ratio.new_full((), 1 / math.factorial(k)) for k in range(2, 8))
        torch.add(factors[-1], ratio, alpha=float(last), out=near)
        for factor in reversed(factors[:-1]):
            torch.addcmul(factor, ratio, near, out=near)
        near.mul_(ratio).mul_(ratio)
    larger: Tensor = torch.maximum(near.mul_(target), out, out=out)
    return larger


def _tile_rows(x: Tensor, y: Tensor) -> int:
    tile_bytes = TILE_BYTES if x.device.type == "cpu" else DEVICE_TILE_BYTES
    return min(x.shape[0], max(TILE_ROWS, tile_bytes // (y.shape[0] * y.element_size())))


def _tiles(x: Tensor, y: Tensor) -> list[slice]:
    rows = _tile_rows(x, y)
    return [slice(start, min(start + rows, x.shape[0])) for start in range(0, x.shape[0], rows)]


def _is_looked_at(tensor: Tensor) -> bool:
    """Whether code may depend on values; off the CPU it would wait for the device."""
    return tensor.device.type == "cpu"


def _representable(sums: Tensor) -> Tensor:
    """Whether sums of exponentials have neither overflowed nor lost a term."""
    least = math.pow(torch.finfo(sums.dtype).tiny, 2 / 3)
    return (sums > least) & (sums < torch.inf)
