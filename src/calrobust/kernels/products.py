"""The products with the gradient in S that lead to the gradients of the features, in low precision where they came so.

The gradient in S is rounded to float16, a tile at a time, after its *gain*: a power of two that takes it to the upper
end of float16's range; bfloat16 would be too coarse. For float32 features, the Triton form splits each number into two
of float16: three products of these halves are as exact as one of float32, and several times as fast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from calrobust.kernels.dense import Factors

CAPABILITY = (8, 0)  # the least compute capability of a CUDA device that multiplies bfloat16 and TF32


def are_narrow(x: Tensor, operands: torch.dtype) -> bool:
    """Whether torch multiplies features ``x``, which came as ``operands``, in low precision."""
    if operands.itemsize != 2 or x.device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(x.device) >= CAPABILITY


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` of low precision, summed and returned in ``dtype``."""
    # The CPU, which interprets the Triton kernels, has no product of low precision with a float32 result.
    return torch.mm(a, b, out_dtype=dtype) if a.device.type == "cuda" else torch.mm(a.to(dtype), b.to(dtype))


class FeatureGradients:
    """Sums up the gradients of x, y and scale from tiles of the gradient in S: one matrix product each for x and y."""

    def __init__(
        self, factors: Factors, weights: list[Tensor], needs: list[bool], dtype: torch.dtype, parts: int = 1
    ) -> None:
        """``needs`` says which gradients are wanted, and ``dtype`` in which tiles are multiplied, in ``parts`` of it.

        Each entry of the gradient in S is a sum of softmaxes times ``weights``, which bound it.
        """
        self.x, self.y, self.scale = factors
        self.needs = needs
        self.takes_rows = needs[0] or (needs[2] and not needs[1])  # scale needs either of the two products
        self.is_rounded = dtype != self.x.dtype
        self.gain, self.operands = torch.ones_like(self.scale), [[self.x], [self.y]]
        if self.is_rounded:
            bound = torch.stack([weight.abs().amax() for weight in weights]).sum()
            self.gain, *self.gains = (_gain(top) for top in (bound, self.x.abs().amax(), self.y.abs().amax()))
            self.operands = [
                _split(gain * t, dtype, parts) for gain, t in zip(self.gains, (self.x, self.y), strict=True)
            ]
        wanted = self.takes_rows, needs[1]
        self.totals = [torch.zeros_like(t) if w else t.new_empty(0) for t, w in zip(factors, wanted, strict=False)]
        self.of_scale = torch.zeros_like(self.scale)

    def add(self, tile: slice, *gradient: Tensor) -> None:
        """Adds the rows ``tile`` of the gradient in S, times ``gain`` and in parts of the dtype of the products."""
        (x, y), (of_x, of_y) = self.operands, self.totals
        if self.needs[1]:
            _multiply([part.T for part in gradient], [part[tile] for part in x], of_y, add=True)
        if self.takes_rows:
            _multiply(gradient, y, of_x[tile], add=False)
            if self.needs[2]:
                self.of_scale += torch.linalg.vecdot(of_x[tile], self.x[tile]).sum()

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients after the last tile; one that is not needed is empty."""
        of_x, of_y = self.totals
        if self.is_rounded:
            of_x.div_(self.gain).div_(self.gains[1])
            of_y.div_(self.gain).div_(self.gains[0])
            self.of_scale.div_(self.gain).div_(self.gains[1])
        if self.needs[2] and not self.takes_rows:
            self.of_scale = torch.linalg.vecdot(of_y, self.y).sum()
        of_x = of_x.mul_(self.scale) if self.needs[0] else of_x.new_empty(0)
        return of_x, of_y.mul_(self.scale), self.of_scale if self.needs[2] else self.of_scale.new_empty(0)


def _multiply(left: Sequence[Tensor], right: Sequence[Tensor], out: Tensor, *, add: bool) -> None:
    """Writes the product of two sums of parts into ``out``, or adds it; without what is beneath the last part."""
    for a, b in ((a, b) for i, a in enumerate(left) for b in right[: len(right) - i]):
        if a.dtype == out.dtype:
            torch.addmm(out, a, b, beta=int(add), out=out)
        elif a.device.type == "cuda":
            torch.addmm(out, a, b, beta=int(add), out_dtype=out.dtype, out=out)
        else:
            torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=int(add), out=out)
        add = True


def _split(numbers: Tensor, dtype: torch.dtype, parts: int) -> list[Tensor]:
    """Each number as a sum of numbers of lower precision."""
    split = []
    for _ in range(parts):
        split.append(numbers.to(dtype))
        numbers = numbers - split[-1]
    return split


def _gain(bound: Tensor) -> Tensor:
    """The power of two that scales what is at most ``bound`` to the upper end of float16's range."""
    return torch.ldexp(torch.ones_like(bound), 15 - torch.frexp(bound.clamp_min(1e-30)).exponent)
