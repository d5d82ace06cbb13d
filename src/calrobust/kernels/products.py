"""Matrix products of features that came in low precision: as fast as a CUDA device has them, as exact as their dtype.

**Logits** of such features are their products as they are, summed in float32, which loses nothing.

**Gradients.** The gradient in S is rounded to float16, a slab of rows at a time, scaled by a power of two to its upper
end: eight times as exact as bfloat16, which would be too coarse. A row's partner is left out: once a model is trained
that entry all but cancels against the linear part. These entries, a vector, stay in float32.
"""

import torch
from torch import Tensor

CAPABILITY = (8, 0)  # from which on a CUDA device multiplies bfloat16 and TF32


def are_narrow(x: Tensor, operands: torch.dtype) -> bool:
    """Whether features x, which came as ``operands``, are multiplied in low precision by torch."""
    if operands.itemsize != 2 or x.device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(x.device) >= CAPABILITY


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` of low precision, summed and returned in ``dtype``."""
    # The CPU interprets the Triton kernels, and has no such product.
    return torch.mm(a, b, out_dtype=dtype) if a.device.type == "cuda" else torch.mm(a.to(dtype), b.to(dtype))


class FeatureGradients:
    """Takes slabs of the gradient in S to the gradients of x, y and scale: two GEMM units."""

    def __init__(self, factors: list[Tensor], weights: list[Tensor], slab: Tensor, first_partner: int) -> None:
        """``slab`` has room for its rows, in float16 if they are to be rounded.

        Each entry of the gradient in S is a sum of softmaxes times ``weights``, and so bounded by these.
        """
        self.x, self.y, self.scale = factors[:3]
        self.slab, self.first_partner = slab, first_partner
        self.partners = self.x.new_zeros(len(self.x))  # the entries that slabs leave out
        self.is_rounded = slab.dtype != self.x.dtype
        self.unit, self.factors = torch.ones_like(self.scale), [self.x, self.y]
        if self.is_rounded:
            bound = torch.stack([weight.abs().amax() for weight in weights if len(weight)]).sum()
            self.unit, *self.units = (_unit(top) for top in (bound, *(t.abs().amax() for t in self.factors)))
            self.factors = [(unit * t).to(slab.dtype) for unit, t in zip(self.units, self.factors, strict=True)]
        self.x_gradient, self.y_gradient = torch.zeros_like(self.x), torch.zeros_like(self.y)
        self.scale_gradient = torch.zeros_like(self.scale)

    def add_tile(self, tile: slice, gradient: Tensor) -> None:
        """The rows ``tile`` of the gradient in S, which is scratch."""
        own = gradient.diagonal(self.first_partner + tile.start)
        self.partners[tile][: len(own)] = own
        own.zero_()
        if self.is_rounded:
            gradient = torch.mul(gradient, self.unit, out=self.slab[: len(gradient)])
        self.add_slab(tile, gradient)

    def add_slab(self, tile: slice, slab: Tensor) -> None:
        """As `add_tile`, for rows that are in units of the slab already and whose partners stand in ``partners``."""
        x, y = self.factors
        result = self.x_gradient[tile]
        _add_product(result, slab, y)
        _add_product(self.y_gradient, slab.T, x[tile])
        if self.is_rounded:
            result.div_(self.unit).div_(self.units[1])
        own = self.y[self.first_partner + tile.start :][: len(result)]
        result[: len(own)].addcmul_(self.partners[tile][: len(own), None], own)
        self.scale_gradient += torch.linalg.vecdot(result, self.x[tile]).sum()
        result *= self.scale

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """After the last slab."""
        if self.is_rounded:
            self.y_gradient.div_(self.unit).div_(self.units[0])
        own = self.y_gradient[self.first_partner :][: len(self.x)]
        own.addcmul_(self.partners[: len(own), None], self.x[: len(own)])
        self.y_gradient *= self.scale
        return self.x_gradient, self.y_gradient, self.scale_gradient


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += product(a, b, total.dtype)


def _unit(bound: Tensor) -> Tensor:
    """The power of two by which what is at most ``bound`` fills the range of float16."""
    return torch.ldexp(torch.ones_like(bound), 15 - torch.frexp(bound.clamp_min(1e-30)).exponent)
