"""The forms that hold no pair matrix, as one pair of torch operators under an autograd function.

A form is a module with two functions, ``forward`` and ``backward``, of which `tiled` is the one to read.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from calrobust.kernels import tiled
from calrobust.kernels.dense import Factors
from calrobust.kernels.parts import Part, Strip
from calrobust.kernels.products import CAPABILITY
from calrobust.kernels.tiled import Softmaxes, Weights

_TRITON_IS_INSTALLED = find_spec("triton") is not None


def softmax_statistics(
    student: Factors,
    teacher: Factors | None,
    partner: Tensor,
    *,
    impl: str = "auto",
    memory_budget: int = 0,
    operands: torch.dtype | None = None,
) -> Strip:
    """As `dense.softmax_statistics`, by a form.

    ``"auto"`` is Triton where it runs, but for float64; else it is tiled, and keeps the logits for a backward to come
    if they fit into ``memory_budget`` bytes. ``operands`` is the dtype in which the features came: nothing is lost if
    they are multiplied in it.
    """
    x, y, _ = student
    keep = impl == "auto" and torch.is_grad_enabled() and any(factor.requires_grad for factor in student)
    if keep and not torch.compiler.is_exporting():  # an export leaves the sizes open
        keep = (1 if teacher is None else 2) * x.shape[0] * y.shape[0] * x.element_size() <= memory_budget
    function = _Compiled if torch.compiler.is_compiling() else _Eager
    frozen: Any = (None, None, None) if teacher is None else teacher
    found = function.apply(*student, *frozen, partner, impl, keep, operands or x.dtype)
    return Strip(Part(*found[0:6:2]), Part(*found[1:6:2]))


def obstacle_to_triton(device: torch.device) -> str:
    """Why the Triton kernels do not run on a device; empty if they do."""
    if not _TRITON_IS_INSTALLED:
        return "no triton to import"
    if device.type != "cuda":
        from calrobust.kernels import triton

        return "" if triton.INTERPRETED else f"features on {device}"
    if torch.version.hip is not None:
        return "a device of ROCm"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if (major, minor) >= CAPABILITY else f"compute capability {major}.{minor}"


def _takes_triton(impl: str, x: Tensor) -> bool:
    if impl != "auto":
        return impl == "triton"
    return x.device.type == "cuda" and x.dtype != torch.float64 and not obstacle_to_triton(x.device)


@torch.library.custom_op("calrobust::softmax_statistics", mutates_args=())
def _forward(
    student: list[Tensor], teacher: list[Tensor], partner: Tensor, impl: str, keep: bool, operands: torch.dtype
) -> list[Tensor]:
    """Row and column lse, the teacher's, the divergences, then the logits that are kept of both; empty if absent."""
    models = Factors(*student), Factors(*teacher) if teacher else None
    if _takes_triton(impl, student[0]):
        from calrobust.kernels import triton

        strip = triton.forward(*models, partner, operands)
        kept: list[Tensor] = []
    else:
        strip, kept = tiled.forward(*models, partner, operands, keep=keep)
    x, y, _ = student
    vectors = [vector for pair in zip(*strip, strict=True) for vector in pair]
    kept = [*kept, *(x.new_empty(0, y.shape[0]) for _ in range(2 - len(kept)))]
    return [*vectors, *kept]


@_forward.register_fake
def _(
    student: list[Tensor], teacher: list[Tensor], partner: Tensor, impl: str, keep: bool, operands: torch.dtype
) -> list[Tensor]:
    x, y, _ = student
    n, m = x.shape[0], y.shape[0]
    kept = (n if keep and not _takes_triton(impl, x) else 0, m)
    shapes = [(n,), (m,), *([(n,), (m,)] * 2 if teacher else [(0,)] * 4), kept, kept if teacher else (0, m)]
    return [x.new_empty(shape) for shape in shapes]


@torch.library.custom_op("calrobust::softmax_statistics_backward", mutates_args=())
def _backward(
    gradients: list[Tensor],
    student: list[Tensor],
    teacher: list[Tensor],
    partner: Tensor,
    found: list[Tensor],
    needs: list[bool],
    impl: str,
    operands: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the student's x, y and scale from the upstream gradients a, b, c, d of the four statistics."""
    a, b, c, d = gradients
    models = Factors(*student), Factors(*teacher) if teacher else None
    weights = Weights(a + c, b + d, c, d) if teacher else Weights(a, b, c, d)
    row_lse, column_lse, teacher_row_lse, teacher_column_lse, _, _, logits, teacher_logits = found
    softmaxes = [Softmaxes(row_lse, column_lse, logits)]
    if teacher:
        softmaxes.append(Softmaxes(teacher_row_lse, teacher_column_lse, teacher_logits))
    with torch.autocast(a.device.type, enabled=False):  # a loss may be differentiated inside of it
        if _takes_triton(impl, a):
            from calrobust.kernels import triton

            return triton.backward(weights, *models, partner, softmaxes, operands, needs)
        return tiled.backward(weights, *models, partner, softmaxes, operands, needs)


@_backward.register_fake
def _(
    gradients: list[Tensor],
    student: list[Tensor],
    teacher: list[Tensor],
    partner: Tensor,
    found: list[Tensor],
    needs: list[bool],
    impl: str,
    operands: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    x, y, scale = (
        torch.empty_like(factor) if needed else factor.new_empty(0)
        for factor, needed in zip(student, needs, strict=True)
    )
    return x, y, scale


def _refuse(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(
        "the losses that hold no pair matrix have first derivatives in reverse mode only, without vmap; "
        'for second derivatives, forward mode or vmap pass impl="dense"'
    )


class _Compiled(torch.autograd.Function):
    """The operators with their derivative, as torch.compile and torch.export trace it."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        """The outputs of the forward operator; lse and divergences of the student have a gradient."""
        *factors, partner, impl, keep, operands = inputs
        teacher = factors[3:] if factors[3] is not None else []
        return tuple(_forward(factors[:3], teacher, partner, impl, keep, operands))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Saves all that backward needs."""
        *tensors, ctx.impl, _, ctx.operands = inputs
        ctx.set_materialize_grads(False)  # logits that are kept have no gradient, which would be a matrix of zeros
        ctx.mark_non_differentiable(*output[2:4], *output[6:])
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of the student's factors."""
        saved = list(ctx.saved_tensors)  # read once: hooks of checkpointing unpack them at each reading
        found = saved[7:]
        upstream = [
            torch.zeros_like(output) if gradient is None else gradient.contiguous()
            for gradient, output in ((gradients[k], found[k]) for k in (0, 1, 4, 5))
        ]
        needs = list(ctx.needs_input_grad[:3])
        run = _differentiated if torch.compiler.is_compiling() else _Derivative.apply
        student = run(*upstream, *saved, needs, ctx.impl, ctx.operands)
        return *(gradient if needed else None for gradient, needed in zip(student, needs, strict=True)), *[None] * 7


class _Eager(_Compiled):
    """The same outside of a compiler, which would take no function that refuses derivatives."""

    jvp = vmap = staticmethod(_refuse)


def _differentiated(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The backward operator, of tensors one by one as an autograd function must take them."""
    gradients, student, teacher, (partner, *found) = inputs[:4], inputs[4:7], inputs[7:10], inputs[10:19]
    frozen = [] if teacher[0] is None else list(teacher)
    x, y, scale = _backward(list(gradients), list(student), frozen, partner, found, *inputs[19:])
    return x, y, scale


class _Derivative(torch.autograd.Function):
    """The backward operator as a function that refuses to be differentiated."""

    forward = staticmethod(_differentiated)
    backward = jvp = vmap = staticmethod(_refuse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing to save."""
