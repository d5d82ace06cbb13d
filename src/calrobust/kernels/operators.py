"""The forms that hold no pair matrix, as one pair of torch operators: choice, fake tensors, saved tensors, autograd.

A form is a module with two functions. ``forward`` gives, for the student's matrix and for a teacher's, the row lse
``[N]``, the column lse ``[M]`` and the row softmaxes, ``[N, M]`` if it keeps them for backward and else ``[0, M]``;
and, with a teacher, the divergences of rows and of columns. ``backward`` gives the gradients of the student's x, y and
scale from the factors of ``p, q, p̃, q̃`` in the gradient in S.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NoReturn

import torch
from torch import Tensor

from calrobust.kernels import tiled
from calrobust.kernels.dense import Factors, SoftmaxStatistics
from calrobust.kernels.products import CAPABILITY

_TRITON_IS_INSTALLED = find_spec("triton") is not None


def softmax_statistics(
    student: Factors,
    teacher: Factors | None = None,
    *,
    impl: str = "auto",
    memory_budget: int = 0,
    operands: torch.dtype | None = None,
    first_partner: int = 0,
) -> SoftmaxStatistics:
    """As `dense.softmax_statistics`, by a form.

    ``"auto"`` is tiled for float64, and if the exponentials fit into ``memory_budget`` bytes, kept then for a backward
    to come; else it is Triton where that runs. Gradients add up in the dtype of the factors, which came as
    ``operands``: nothing is lost if they are multiplied in that. ``first_partner`` is the column of the first row's
    pair.
    """
    x, y, _ = student
    fits = (1 if teacher is None else 2) * len(x) * len(y) * x.element_size() <= memory_budget
    differentiated = torch.is_grad_enabled() and any(factor.requires_grad for factor in student)
    if impl == "auto":
        impl = ("kept" if differentiated else "tiled") if fits else "fastest"
    outputs = _forward([*student, *(teacher or ())], impl, operands or x.dtype, first_partner)
    row_lse, column_lse, row_divergence, column_divergence = outputs[:4]
    teacher_column_lse = x.new_empty(0) if teacher is None else outputs[-2].detach()
    return SoftmaxStatistics(row_lse, column_lse, row_divergence, column_divergence, teacher_column_lse)


def obstacle_to_triton(device: torch.device) -> str:
    """Why the Triton kernels do not run on a device; nothing if they do."""
    if not _TRITON_IS_INSTALLED:
        return "no triton to import"
    if device.type != "cuda":
        from calrobust.kernels import triton

        return "" if triton.INTERPRETED else f"features on {device}"
    if torch.version.hip is not None:
        return "a device of ROCm"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if (major, minor) >= CAPABILITY else f"compute capability {major}.{minor}"


def _uses_triton(impl: str, device: torch.device, dtype: torch.dtype) -> bool:
    if impl != "fastest":
        return impl == "triton"
    return device.type == "cuda" and dtype != torch.float64 and not obstacle_to_triton(device)


@torch.library.custom_op("calrobust::softmax_statistics", mutates_args=())
def _forward(factors: list[Tensor], impl: str, operands: torch.dtype, first_partner: int) -> list[Tensor]:
    """Both lse and both divergences, then what backward needs of the student and of the teacher, if there is one."""
    x = factors[0]
    if _uses_triton(impl, x.device, x.dtype):
        from calrobust.kernels import triton

        matrices, divergences = triton.forward(factors, operands)
    else:
        matrices, divergences = tiled.forward(factors, operands, keep=impl == "kept")
    row_lse, column_lse, _ = matrices[0]
    none = [x.new_empty(0), x.new_empty(0)]
    return [row_lse.clone(), column_lse.clone(), *(divergences or none), *(t for own in matrices for t in own)]


@torch.library.custom_op("calrobust::softmax_statistics_backward", mutates_args=())
def _backward(
    gradients: list[Tensor],
    factors: list[Tensor],
    statistics: list[Tensor],
    impl: str,
    operands: torch.dtype,
    first_partner: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, y and scale from a, b, c, d, the upstream gradients of the four statistics."""
    a, b, c, d = gradients
    weights = [a, b, c, d] if len(factors) == 3 else [a + c, b + d, c, d]
    with torch.autocast(a.device.type, enabled=False):  # a loss may be differentiated inside of it
        if _uses_triton(impl, a.device, a.dtype):
            from calrobust.kernels import triton

            return triton.backward(weights, factors, statistics, operands, first_partner)
        return tiled.backward(weights, factors, statistics, operands, first_partner)


@_forward.register_fake
def _(factors: list[Tensor], impl: str, operands: torch.dtype, first_partner: int) -> list[Tensor]:
    x, y, _ = factors[:3]
    rows, columns, none = x.new_empty(len(x)), x.new_empty(len(y)), x.new_empty(0)
    divergences = [none, none] if len(factors) == 3 else [rows, columns]
    statistics = [rows, columns, x.new_empty(len(x) if impl == "kept" else 0, len(y))] * (len(factors) // 3)
    return [torch.empty_like(t) for t in (rows, columns, *divergences, *statistics)]


@_backward.register_fake
def _(
    gradients: list[Tensor],
    factors: list[Tensor],
    statistics: list[Tensor],
    impl: str,
    operands: torch.dtype,
    first_partner: int,
) -> tuple[Tensor, Tensor, Tensor]:
    x, y, scale = factors[:3]
    return torch.empty_like(x), torch.empty_like(y), torch.empty_like(scale)


def _save(ctx: Any, inputs: tuple[list[Tensor], str, torch.dtype, int], output: list[Tensor]) -> None:
    factors, *ctx.options = inputs
    ctx.count = len(factors)
    ctx.set_materialize_grads(False)  # the kept exponentials are an output too, and have no gradient
    ctx.save_for_backward(*factors, *output)


def _differentiate(ctx: Any, gradients: list[Tensor | None]) -> tuple[list[Tensor | None], None, None, None]:
    factors, outputs = list(ctx.saved_tensors[: ctx.count]), list(ctx.saved_tensors[ctx.count :])
    upstream = [
        torch.zeros_like(output) if gradient is None else gradient.contiguous()
        for gradient, output in zip(gradients[:4], outputs[:4], strict=True)
    ]
    student = _backward(upstream, factors, outputs[4:], *ctx.options)
    return [*student, *[None] * (ctx.count - 3)], None, None, None


def _refuse(ctx: Any, *gradients: Tensor) -> NoReturn:
    raise RuntimeError('only the dense losses have a second derivative; pass impl="dense"')


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)
