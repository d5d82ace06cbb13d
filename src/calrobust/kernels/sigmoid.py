"""Sums over rows of ``Z = scale · x yᵀ + bias``: see ``docs/derivations.md``.

The gradient of an entry depends on no other, so one sweep gives sums and gradients if the weights of the sums are
known. Else backward sweeps again.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from calrobust._checks import can_read_values
from calrobust.kernels import tiled
from calrobust.kernels.dense import divergence_terms, not_negative, wide
from calrobust.kernels.operators import differentiable, features, kernels, like
from calrobust.kernels.tiled import FeatureGradients

BAND_BYTES = 2**17  # as in `tiled`, for more buffers


class Model(NamedTuple):
    """The `dense.Factors` of Z, and its bias."""

    x: Tensor
    y: Tensor
    scale: Tensor
    bias: Tensor


class Classes(NamedTuple):
    """A pair is positive if its classes are equal."""

    rows: Tensor  # [N], below 2²⁴, like the next
    columns: Tensor  # [M]


class Sums(NamedTuple):
    """Over each row of Z, ``[N]``."""

    negative_log_likelihood: Tensor
    divergence: Tensor  # in nats; [0] without a teacher


def sigmoid_sums(
    models: Sequence[Model],
    classes: Classes,
    weights: Sequence[float],
    *,
    impl: str = "auto",
    operands: torch.dtype | None = None,
    totalled: bool = True,
) -> tuple[Sums, Tensor]:
    """The sums and their weighted total over all rows, with gradients.

    If ``totalled``, forward makes the gradients of the total: cheaper if no others are needed.
    """
    x, *_ = models[0]
    if impl == "dense":
        sums = dense_sums(models, classes)
        return sums, torch.stack([(w * each).sum() for w, each in zip(weights, sums, strict=False)]).sum()
    needs = [totalled and torch.is_grad_enabled() and factor.requires_grad for factor in models[0]]
    of_rows = torch.stack([x.new_full(x.shape[:1], weight) for weight in weights[: len(models)]])
    options = impl, operands or x.dtype, needs
    tensors = [*features(models, options[1]), of_rows, *classes]
    total, likelihood, divergence, *_ = differentiable(_sums, _gradients, 3, options, models[0], tensors)
    return Sums(likelihood, divergence), total


def dense_sums(models: Sequence[Model], classes: Classes) -> Sums:
    """The sums by definition."""
    z, *teacher = (scale * x.to(scale.dtype) @ y.to(scale.dtype).T + bias for x, y, scale, bias in models)
    precise = wide(z.device)
    likelihood = -logsigmoid(torch.where(classes.rows[:, None] == classes.columns, z, -z)).sum(1, dtype=precise)
    divergence = likelihood.new_empty(0)
    for t in teacher:
        yes, no = (divergence_terms(logsigmoid(sign * t), logsigmoid(sign * z)) for sign in (1, -1))
        divergence = not_negative((yes + no).sum(1, dtype=precise))
    return Sums(likelihood, divergence)


def sweep(
    models: Sequence[Model], classes: Classes, weights: Tensor, __: torch.dtype, needs: list[bool]
) -> tuple[Sums, list[Tensor]]:
    """The sums, and the gradients of the student's x, y, scale and bias, empty if not needed.

    ``weights`` are ``[1, N]``, or with a teacher ``[2, N]``.
    """
    x, y, scale, _ = models[0]
    rows, columns = (each.to(scale.dtype) for each in classes)  # faster to compare than integers
    matrices = [tiled.Matrix(model, torch.full_like(classes.rows, -1)) for model in models]
    biases = torch.stack([model.bias for model in models])[:, None, None]
    tiles = tiled.tiles_of(x, y)
    buffer = scale.new_empty(len(models), tiles[0].stop, len(y))
    limit = BAND_BYTES if can_read_values(x) else tiled.TILE_BYTES
    height = min(tiles[0].stop, max(1, limit // (len(y) * scale.element_size())))
    scratch = scale.new_empty(3 + 2 * len(models), len(models), height, len(y))
    gradients = FeatureGradients(models[0], weights, needs)
    found, of_bias = [], []
    for tile in tiles:
        logits = buffer[:, : tile.stop - tile.start]
        for matrix, out in zip(matrices, logits, strict=True):
            matrix.logits(tile, out)
        for place in tiled.slices(logits.shape[1], height):
            band = logits[:, place].add_(biases)
            of_band = weights[:, tile][:, place, None] if any(needs) else None
            of = Classes(rows[tile][place], columns)
            found.append(_of_band(band, of, of_band, scratch[:, :, : place.stop - place.start]))
            of_bias.append(band[0].sum())
        if any(needs):
            gradients.add(tile, logits[0])
    bias = torch.stack(of_bias).sum() if needs[3] else scale.new_empty(0)
    return Sums(*map(torch.cat, zip(*found, strict=True))), [*gradients.results(), bias]


def _of_band(logits: Tensor, classes: Classes, weights: Tensor | None, scratch: Tensor) -> Sums:
    """The sums of some rows; with weights, Z becomes its gradient."""
    softplus, one, two, *_ = scratch
    chances = scratch[3:5]  # of yes and of no
    z, *teacher = logits
    precise = wide(z.device)
    torch.sigmoid(logits, out=chances[0])
    torch.neg(logits, out=chances[1]).sigmoid_()
    # log(1 + exp(−|z|)) is −log(1 − q) for the smaller chance q. The larger one, r, is 1 − q rounded, so
    # q + (r − 1) − log(r) has all digits. log1p takes ten times as long.
    r = torch.maximum(*chances, out=one)
    torch.log(r, out=two)
    torch.minimum(*chances, out=softplus).add_(r.sub_(1)).sub_(two)
    divergence = z.new_empty(0, dtype=precise)
    if teacher:
        ratio, excess = scratch[5:]  # of chances: log of the quotient, and difference
        torch.clamp(logits, max=0, out=one)
        torch.clamp(logits, min=0, out=two)
        torch.sub(one[0], one[1], out=ratio[0])
        torch.sub(two[1], two[0], out=ratio[1])
        ratio += softplus[1].sub_(softplus[0])
        terms = tiled.divergence_terms_in_place(ratio, chances[:, 0], chances[:, 1], excess, one)
        divergence = terms.sum((0, 2)).to(precise)
    sign = torch.eq(classes.rows[:, None], classes.columns, out=one[0]).mul_(-2).add_(1)
    v = z.mul_(sign)
    likelihood = softplus[0].add_(torch.clamp(v, min=0, out=two[0])).sum(1).to(precise)
    if weights is not None:
        v.sigmoid_().mul_(sign).mul_(weights[0])
        if teacher:
            v.addcmul_(excess[0], weights[1])
    return Sums(likelihood, divergence)


@torch.library.custom_op("calrobust::sigmoid_sums", mutates_args=())
def _sums(tensors: list[Tensor], impl: str, operands: torch.dtype, needs: list[bool]) -> list[Tensor]:
    """The total, both sums and the gradients of the total."""
    *factors, weights, rows, columns = tensors
    models = [Model(*factors[k : k + 4]) for k in range(0, len(factors), 4)]
    with torch.autocast(weights.device.type, enabled=False):  # it may be on in backward
        form = kernels("sigmoid", impl, weights, operands, teacher=len(models) == 2)
        sums, gradients = (form.sweep if form else sweep)(models, Classes(rows, columns), weights, operands, needs)
        total = torch.stack([(w * each).sum() for w, each in zip(weights, sums, strict=False)]).sum()
    return [total, *sums, *gradients]


@_sums.register_fake
def _(tensors: list[Tensor], impl: str, operands: torch.dtype, needs: list[bool]) -> list[Tensor]:
    n, weights = tensors[0].shape[0], tensors[-3]
    shapes: Any = (), (n,), (n if len(tensors) == 11 else 0,)
    return [*(weights.new_empty(shape, dtype=wide(weights.device)) for shape in shapes), *like(tensors[:4], needs)]


def _gradients(options: Any, needs: list[bool], *tensors: Any) -> list[Tensor]:
    impl, operands, made = options
    total, *of_sums = tensors[:3]
    *factors, weights, rows, columns = tensors[10:]
    are_made = all(there or not needed for there, needed in zip(made, needs, strict=True))
    if total is not None and are_made and all(upstream is None for upstream in of_sums):
        return [total.to(gradient.dtype) * gradient for gradient in tensors[6:10]]
    weights = weights * (0 if total is None else total.to(weights.dtype))
    for row, upstream in zip(weights, of_sums[: len(weights)], strict=True):
        if upstream is not None:
            row += upstream
    found: list[Tensor] = _sums([*factors, weights, rows, columns], impl, operands, needs)
    return found[3:]
