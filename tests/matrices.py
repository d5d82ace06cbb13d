"""Factors of pair matrices, and the dense definition that every form of their statistics is held to."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from strategies import unit_rows
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from calrobust.kernels import dense
from calrobust.kernels.dense import Factors, Pairing, Statistics


def factors(n: int, m: int, width: int, seed: int, *, scale: float, teacher: bool) -> list[Factors]:
    """x, y and scale and, if asked for, those of a teacher of another width and scale."""
    models = [
        Factors(unit_rows(n, width, seed), unit_rows(m, width, seed + 1), torch.tensor(scale, dtype=torch.float64))
    ]
    if teacher:
        frozen = unit_rows(n, width + 1, seed + 2), unit_rows(m, width + 1, seed + 3)
        models.append(Factors(*frozen, torch.tensor(0.9 * scale, dtype=torch.float64)))
    return models


def pairs(n: int, m: int, shift: int = 0, classes: Sequence[Tensor] = ()) -> Pairing:
    """A column for each row, one after the other, and none for rows beyond the last column."""
    columns = torch.arange(shift, n + shift)
    return Pairing(torch.where(columns < m, columns, -1), shift if n + shift <= m else -1, classes)


def classes(n: int, m: int, seed: int) -> list[Tensor]:
    """Of rows and of columns: some on one side only, some on both and several times."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1 + m // 2, (k,), generator=generator) + shift for k, shift in ((n, 0), (m, m // 4))]


def vectors(found: Statistics) -> list[Tensor]:
    """All statistics: lse and divergences of rows and of columns, a teacher's lse, and what is linear."""
    rows, columns, *others = found
    return [vector for vector in (*rows, *columns, *others) if len(vector)]


def value_and_gradients(
    statistics: Any, inputs: list[Factors], seed: int = 0, shift: int = 0, classes: Sequence[Tensor] = ()
) -> tuple[list[Tensor], list[Tensor]]:
    """Of a random combination of all statistics, so that each upstream gradient differs from pair to pair."""
    student, *teacher = inputs
    x, y, scale = (factor.clone().requires_grad_() for factor in student)
    with x.device:
        pairing = pairs(len(x), len(y), shift, classes)
    outputs = vectors(statistics(Factors(x, y, scale), teacher[0] if teacher else None, pairing))
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(v.shape, generator=generator, dtype=torch.float64, device="cpu").to(v) for v in outputs]
    # The lse over no candidate at all is a large negative number, which would swamp the others.
    total = torch.stack([(w * v)[v > -1e30].sum() for w, v in zip(weights, outputs, strict=True)]).sum()
    return outputs, list(torch.autograd.grad(total, (x, y, scale)))


def assert_like_dense(
    statistics: Any, inputs: list[Factors], tolerance: float, *, columns: bool = True, **options: Any
) -> None:
    """In all statistics and both gradients, relative to their largest entry; of rows alone without ``columns``."""
    definition, form = (partial(each, columns=columns) for each in (dense.softmax_statistics, statistics))
    expected, expected_gradients = value_and_gradients(definition, inputs, **options)
    outputs, gradients = value_and_gradients(form, inputs, **options)
    for ours, theirs in zip([*outputs, *gradients], [*expected, *expected_gradients], strict=True):
        shown = theirs > -1e30
        assert torch.equal(ours > -1e30, shown)
        scale = max(1.0, theirs[shown].abs().max().item()) if shown.any() else 1.0
        assert_close(ours[shown], theirs[shown], rtol=tolerance, atol=tolerance * scale)


class Products(TorchDispatchMode):
    """Adds up the inner sizes of the products with a 6×6 matrix."""

    width = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            (n, k), (_, m) = (operand.shape for operand in args[-2:])
            self.width += n * k * m // 36 if n > 3 else 0  # a few rows times a matrix are no unit
        return func(*args, **(kwargs or {}))


class NoFloat64(TorchDispatchMode):
    """Fails where a float64 tensor of more than a number is made."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            assert not isinstance(tensor, Tensor) or tensor.dtype != torch.float64, func
        return out
