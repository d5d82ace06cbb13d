"""The softmax statistics of ``S = scale · x yᵀ`` and of a teacher's ``T`` in O(N·D) memory.

Backward forms S and T again unless they were kept. See ``docs/derivations.md``.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from calrobust._checks import can_read_values
from calrobust.kernels import dense
from calrobust.kernels.dense import EXCLUDED, Factors, Pairing, Part, merge, totals, wide

CAPABILITY = (8, 0)  # the least that multiplies bfloat16 and TF32
TILE_BYTES = 8 * 2**20  # fits into the last cache
DEVICE_TILE_BYTES = 64 * 2**20  # kernels outlast their launches
TILE_ROWS = 512  # at least, for fast products
BAND_BYTES = 2**18  # of rows, fits into the second cache
SCALE_ROWS = 8192  # at once, for the gradient of the scale
FAR = 4.0  # nats of shift at which sums over columns cancel


class Softmaxes(NamedTuple):
    """The softmaxes of one matrix, with their weights in the gradient in S."""

    row_lse: Tensor  # [N]
    column_lse: Tensor  # [M], or [0] without columns
    row_weights: Tensor
    column_weights: Tensor
    logits: Tensor  # [N, M] if kept, else [0, M]


class Matrix:
    """``scale · x yᵀ`` without own entries, a tile at a time."""

    def __init__(self, factors: Sequence[Tensor], partner: Tensor) -> None:
        self.x, self.y, self.scale, *_ = factors
        self.partner = partner

    def logits(self, tile: slice, out: Tensor) -> Tensor:
        """The logits of some rows, in ``out``."""
        x = self.x[tile]
        if x.dtype == out.dtype:
            torch.mm(self.scale * x, self.y.T, out=out)
        else:
            _multiply([x], [self.y.T], out, add=False)
            out *= self.scale
        column = self.partner[tile, None].clamp(min=0)
        own = out.gather(1, column).masked_fill_(self.partner[tile, None] >= 0, EXCLUDED)
        return out.scatter_(1, column, own)

    def weighted_softmaxes(self, softmaxes: Softmaxes, tile: slice, scratch: Tensor, out: Tensor) -> Tensor:
        """The weighted sum of row and column softmaxes."""
        row_lse, column_lse, row_weights, column_weights, kept = softmaxes
        row_lse, row_weights = row_lse[tile], row_weights[tile, None]
        s = kept[tile] if len(kept) else self.logits(tile, out)
        p = torch.softmax(s, 1, out=scratch)
        if not len(column_lse):
            return torch.mul(p, row_weights, out=out)
        pivot = column_lse.min()
        if can_read_values(s) and _representable((pivot - row_lse.max()).exp()):
            column_factor = column_weights * (pivot - column_lse).exp()
            return torch.addcmul(row_weights, (row_lse - pivot).exp()[:, None], column_factor, out=out).mul_(p)
        return torch.sub(s, column_lse, out=out).exp_().mul_(column_weights).addcmul_(p, row_weights)


def forward(
    models: list[Factors], partner: Tensor, _: torch.dtype, *, columns: bool, kept: Sequence[Tensor]
) -> tuple[Part, Part]:
    """The statistics of rows and columns; logits stay in ``kept`` if it has rows."""
    x, y, scale = models[0]
    matrices = [Matrix(factors, partner) for factors in models]
    tiles = tiles_of(x, y)
    keep = len(kept[0]) > 0
    buffers = kept if keep else [scale.new_empty(tiles[0].stop, len(y)) for _ in models]
    of_rows: list[Part] = []
    of_columns: list[Part] = []
    for tile in tiles:
        place = tile if keep else slice(tile.stop - tile.start)
        logits = [m.logits(tile, buffer[place]) for m, buffer in zip(matrices, buffers, strict=False)]
        rows, over_rows = _statistics(columns, *logits)
        of_rows.append(rows)
        of_columns = [merge([*of_columns, over_rows])]
    rows = Part(*map(torch.cat, zip(*of_rows, strict=True)))
    return rows.to(scale.dtype), of_columns[0].to(scale.dtype)


def backward(
    models: list[Factors], softmaxes: list[Softmaxes], partner: Tensor, _: torch.dtype, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the student's x, y and scale, empty if not needed."""
    x, y, scale = models[0]
    matrices = [Matrix(factors, partner) for factors in models]
    tiles = tiles_of(x, y)
    buffers = scale.new_empty(1 + len(models), tiles[0].stop, len(y))
    gradients = FeatureGradients(models[0], [w for each in softmaxes for w in each[2:4]], needs)
    for tile in tiles:
        scratch, *outs = buffers[:, : tile.stop - tile.start]
        gradient, *others = (
            matrix.weighted_softmaxes(each, tile, scratch, out)
            for matrix, each, out in zip(matrices, softmaxes, outs, strict=True)
        )
        for other in others:
            gradient += other
        gradients.add(tile, gradient)
    return gradients.results()


def _statistics(columns: bool, s: Tensor, t: Tensor | None = None) -> tuple[Part, Part]:
    """The statistics of the rows of a tile and, if asked for, of its columns."""
    precise = wide(s.device)
    on_cpu = can_read_values(s)
    by_band = columns and on_cpu
    height = max(1, BAND_BYTES // s[0].nbytes) if on_cpu else len(s)
    lse, teacher_lse, divergence = vectors = s.new_empty(3, len(s), dtype=precise)
    lses = vectors[: 1 if t is None else 2]
    is_far = s.new_empty(len(s), dtype=torch.bool)  # rows that the sums leave out
    # Of columns: Σ w_i p_ij; then Σ w̃_i p̃_ij and, times that, the first sum of the divergence, and b_j.
    all_sums = s.new_zeros(4, s.shape[1] if by_band else 0)
    pivots = lses[:, :0]  # then the mean lse of the first band
    buffers = s.new_empty(2 if t is None else 5, min(height, len(s)), s.shape[1])
    for band in slices(len(s), height):
        p, scratch, *spare = buffers[:, : band.stop - band.start]
        lse[band] = _softmax(s[band], p)
        if t is not None:
            teacher_p, ratio, excess = spare
            teacher_lse[band] = _softmax(t[band], teacher_p)
        if by_band:
            pivots = pivots if band.start else lses[:, band].mean(1, keepdim=True)
            shifts = lses[:, band] - pivots
            distance = shifts[0] - shifts[-1]
            is_far[band] = ~(distance.abs() < FAR)
            weights = shifts.exp().masked_fill_(is_far[band], 0)
            all_sums[0].addmv_(p.T, weights[0].to(s.dtype))
        if t is None:
            continue
        torch.sub(s[band], t[band], out=ratio).add_((teacher_lse[band] - lse[band])[:, None].to(s.dtype))
        terms = divergence_terms_in_place(ratio, p, teacher_p, excess, scratch)
        torch.sum(terms, 1, dtype=precise, out=divergence[band])
        if by_band:
            growth = torch.expm1(distance.masked_fill_(is_far[band], 0))
            grown = weights[1] * growth
            of_p = torch.stack([weights[1], weights[1] * (growth - distance), grown]).to(s.dtype)
            all_sums[1:].addmm_(of_p, teacher_p)
            all_sums[2:].addmm_(torch.stack([grown, weights[1] + grown]).to(s.dtype), excess)
            all_sums[2].addmv_(terms.T, of_p[0])
    rows = Part.without_teacher(lse) if t is None else Part(lse, divergence.clamp_(min=0), teacher_lse)
    if not by_band:
        return rows, dense.along(0, s, t).to(precise) if columns else Part.without_teacher(lse[:0])
    sums = all_sums[: len(lses)]
    column_lse, *of_teacher = pivots + sums.to(precise).log()
    found = Part.without_teacher(column_lse)
    heaviest = (lses - pivots).masked_fill_(is_far, 0).amax(1, keepdim=True).exp()
    lost = ~_representable(sums, heaviest).all(0)
    if t is not None:
        first, second = all_sums[2:].to(precise) / sums[1]
        found = Part(column_lse, (first + second.log1p() - second).clamp(min=0), *of_teacher)
        lost |= ~(second.log1p().abs() < FAR) | ~first.isfinite()
        if is_far.any():
            found = merge([found, dense.along(0, s[is_far], t[is_far]).to(precise)])
    where = lost.nonzero()[:, 0]
    if len(where):
        exact = dense.along(0, s[:, where], None if t is None else t[:, where]).to(precise)
        for vector, values in zip(found, exact, strict=True):
            vector[where[: len(values)]] = values  # none without a teacher
    return rows, found


def _softmax(logits: Tensor, out: Tensor) -> Tensor:
    """Row softmaxes in ``out``, and the log-sum-exp of rows."""
    torch.softmax(logits, 1, out=out)
    top, highest = (values.amax(1).to(wide(logits.device)) for values in (logits, out))
    return top - highest.log()  # the highest probability is exp(top − lse)


def divergence_terms_in_place(
    ratio: Tensor, probability: Tensor, target: Tensor, excess: Tensor, out: Tensor
) -> Tensor:
    """`dense.divergence_terms` from both probabilities and ``ratio``, the logarithm of their quotient.

    Leaves ``probability − target`` in ``excess``, and overwrites ``ratio`` and ``probability``. Of the difference and
    its series the larger is right: see ``docs/derivations.md``.
    """
    margin = 8 * torch.finfo(ratio.dtype).eps
    torch.sub(probability, target, out=excess)
    torch.addcmul(excess, target, ratio, value=-1, out=out).sub_(target, alpha=margin)
    near = probability
    ratio.clamp_(-1, 1)
    if ratio.dtype == torch.float64:
        torch.expm1(ratio, out=near).sub_(ratio)
    else:
        torch.add(ratio.new_full((), 1 / math.factorial(6)), ratio, alpha=1 / math.factorial(7), out=near)
        for k in range(5, 1, -1):
            torch.addcmul(ratio.new_full((), 1 / math.factorial(k)), ratio, near, out=near)
        near.mul_(ratio).mul_(ratio)
    larger: Tensor = torch.maximum(near.mul_(target), out, out=out)
    return larger


def slices(length: int, height: int) -> list[slice]:
    """``height`` rows at a time."""
    return [slice(start, min(start + height, length)) for start in range(0, length, height)]


def tiles_of(x: Tensor, y: Tensor) -> list[slice]:
    """The rows of each tile."""
    limit = TILE_BYTES if can_read_values(x) else DEVICE_TILE_BYTES
    return slices(len(x), max(TILE_ROWS, limit // (len(y) * y.element_size())))


def _representable(sums: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    """Whether sums have neither overflowed nor lost a term of at most these ``weights``."""
    least = math.pow(torch.finfo(sums.dtype).tiny, 2 / 3)
    return (sums > least * weights) & (sums < torch.inf)


def are_narrow(x: Tensor, operands: torch.dtype) -> bool:
    """Whether torch multiplies features that came as ``operands`` in low precision."""
    if operands.itemsize != 2 or x.device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(x.device) >= CAPABILITY


class FeatureGradients:
    """The gradients of x, y and scale from tiles of the gradient in S."""

    def __init__(
        self,
        factors: Sequence[Tensor],
        weights: Iterable[Tensor],
        needs: list[bool],
        dtype: torch.dtype | None = None,
        parts: int = 1,
    ) -> None:
        """Tiles are multiplied in ``parts`` of ``dtype``. The ``weights`` bound the gradient in S."""
        self.x, self.y, self.scale, *_ = factors
        self.needs = needs
        self.takes_rows = needs[0] or (needs[2] and not needs[1])  # scale needs either of the two products
        precise, features = self.scale.dtype, factors[:2]
        dtype = dtype or (precise if self.x.dtype == precise else torch.float16)
        self.is_rounded = dtype != precise
        self.gain = torch.ones_like(self.scale)
        self.operands = [[t] for t in features]
        if self.is_rounded:
            bounds = [_largest(tensors, precise) for tensors in (weights, [self.x], [self.y])]
            self.gain, *self.gains = _gain(torch.stack(bounds)).unbind()
            self.operands = [
                _split(gain * t.to(precise), dtype, parts) for gain, t in zip(self.gains, features, strict=True)
            ]
        wanted = zip(features, (self.takes_rows, needs[1]), strict=True)
        self.totals = [self.scale.new_zeros(t.shape if needed else 0) for t, needed in wanted]

    def add(self, tile: slice, *gradient: Tensor) -> None:
        """Adds rows of the gradient in S, plain or times ``gain`` in parts."""
        (x, y), (of_x, of_y) = self.operands, self.totals
        if gradient[0].dtype != x[0].dtype:
            gradient = (torch.mul(gradient[0], self.gain, out=torch.empty_like(gradient[0], dtype=x[0].dtype)),)
        if self.needs[1]:
            _multiply([part.T for part in gradient], [part[tile] for part in x], of_y, add=True)
        if self.takes_rows:
            _multiply(gradient, y, of_x[tile], add=False)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients, after the last tile."""
        of_x, of_y = self.totals
        if self.is_rounded:
            of_x.div_(self.gain).div_(self.gains[1])
            of_y.div_(self.gain).div_(self.gains[0])
        of_scale = self.scale.new_empty(0)
        if self.needs[2]:
            each = (of_x, self.x) if self.takes_rows else (of_y, self.y)
            rows = zip(*(t.split(SCALE_ROWS) for t in each), strict=True)
            of_scale = torch.stack([torch.linalg.vecdot(g, f.to(g.dtype)).sum() for g, f in rows]).sum()
        of_x = of_x.mul_(self.scale) if self.needs[0] else of_x.new_empty(0)
        return of_x, of_y.mul_(self.scale), of_scale


def add_gradients(
    of_x: Tensor, of_y: Tensor, x: Tensor, y: Tensor, pairing: Pairing, own: Tensor, of_rows: Tensor, of_columns: Tensor
) -> None:
    """Adds the gradients of `linear_parts`, from upstream ones."""
    _, start, classes = pairing
    m = y.shape[0]
    if len(of_x):
        if len(own):
            of_x.addcmul_(own[:, None], pairing.of_rows(y))
        _add_sums(of_x, y, classes, m, of_rows, of_columns)
    if len(of_y):
        if len(own) and start < 0:
            of_y.index_add_(0, pairing.partner.clamp(min=0), own[:, None] * x)
        elif len(own):
            pairing.of_rows(of_y).addcmul_(own[:, None], x)
        _add_sums(of_y, x, classes[::-1], m, of_columns, of_rows)


def _add_sums(to: Tensor, features: Tensor, classes: Sequence[Tensor], m: int, here: Tensor, there: Tensor) -> None:
    if len(here) or len(there):
        features = features.to(to.dtype)
    if len(here):
        for weights, total in zip(here, totals(features, classes, m), strict=True):
            to.addcmul_(weights[:, None], total)
    if len(there):
        for total in totals(features, classes, m, there):
            to += total


def _multiply(left: Sequence[Tensor], right: Sequence[Tensor], out: Tensor, *, add: bool) -> None:
    """Writes or adds the product of two sums of parts, but for negligible terms."""
    for i, a in enumerate(left):
        for b in right[: len(right) - i]:
            if a.dtype == out.dtype or a.device.type != "cuda":
                torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=int(add), out=out)
            else:
                torch.addmm(out, a, b, beta=int(add), out_dtype=out.dtype, out=out)
            add = True


def _split(numbers: Tensor, dtype: torch.dtype, parts: int) -> list[Tensor]:
    split = [numbers.to(dtype)]
    for _ in range(1, parts):
        numbers = numbers - split[-1]
        split.append(numbers.to(dtype))
    return split


def _largest(tensors: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(t, math.inf).to(dtype) for t in tensors if len(t)]).sum()


def _gain(bound: Tensor) -> Tensor:
    """The power of two that brings ``bound`` to the end of float16's range."""
    return torch.ldexp(torch.ones_like(bound), 15 - torch.frexp(bound.clamp_min(1e-30)).exponent)
