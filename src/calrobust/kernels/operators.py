"""Torch operators around the forms that hold no pair matrix, and their autograd function."""

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from threading import RLock
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from calrobust._checks import warn
from calrobust.kernels import tiled
from calrobust.kernels.dense import Factors, Pairing, Part, Statistics, linear_parts
from calrobust.kernels.tiled import CAPABILITY, Softmaxes, add_gradients

_TRITON_IS_INSTALLED = find_spec("triton") is not None
FAULTS: dict[tuple[torch.device, torch.dtype, str, bool], str] = {}  # of the kernels compared so far
ROWS, COLUMNS, WIDTH = 40, 72, 64  # of the comparison
TOLERANCE = 1e-2  # relative
_COMPARING = RLock()  # the comparison itself takes the kernels
_warn_once = cache(warn)


def softmax_statistics(
    student: Factors,
    teacher: Factors | None,
    pairing: Pairing,
    *,
    columns: bool = True,
    impl: str = "auto",
    memory_budget: int = 0,
    operands: torch.dtype | None = None,
) -> Statistics:
    """Does what `dense.softmax_statistics` does. Features may be multiplied as ``operands``.

    For ``"auto"`` the tiled form keeps logits up to ``memory_budget`` bytes.
    """
    x, y, scale = student
    models = [model for model in (student, teacher) if model]
    keep = impl == "auto" and is_differentiated(student)
    if keep and not torch.compiler.is_exporting():  # an export leaves the sizes open
        keep = len(models) * x.shape[0] * y.shape[0] * scale.element_size() <= memory_budget
    options = impl, operands or x.dtype, columns, keep, pairing.start
    tensors = [*features(models, options[1]), pairing.partner, *pairing.classes]
    found = differentiable(_forward, _gradients, 7, options, student, tensors)
    row_lse, row_kl, column_lse, column_kl, *linear, row_teacher_lse, column_teacher_lse, teacher_own = found[:10]
    own, row_sums, column_sums = linear
    rows, over_rows = Part(row_lse, row_kl, row_teacher_lse), Part(column_lse, column_kl, column_teacher_lse)
    return Statistics(rows, over_rows, own, row_sums, column_sums, teacher_own)


def obstacle_to_triton(device: torch.device) -> str:
    """Why Triton does not run on a device; empty if it does."""
    if not _TRITON_IS_INSTALLED:
        return "no triton to import"
    if device.type != "cuda":
        from calrobust.kernels import triton

        return "" if triton.INTERPRETED else f"features on {device}"
    if torch.version.hip is not None:
        return "a device of ROCm"
    capability = torch.cuda.get_device_capability(device)
    return "" if capability >= CAPABILITY else "compute capability {}.{}".format(*capability)


def may_take_triton(impl: str, x: Tensor) -> bool:
    """Whether the form is Triton's, if its kernels are right."""
    if impl != "auto":
        return impl == "triton"
    return x.device.type == "cuda" and x.dtype != torch.float64 and not obstacle_to_triton(x.device)


def kernels(form: str, impl: str, x: Tensor, operands: torch.dtype, *, teacher: bool) -> Any:
    """Triton's module of a form, ``"softmax"`` or ``"sigmoid"``, or None for the tiled form.

    On first use the two are compared. If they differ, it warns once, or raises for ``impl="triton"``.
    """
    if not may_take_triton(impl, x):
        return None
    key = x.device, operands, form, teacher
    # Nothing can be compared while a CUDA graph is captured.
    with _COMPARING:
        if key not in FAULTS and not (x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            FAULTS[key] = fault(*key)
    reason = FAULTS.get(key)
    if not reason:
        return import_module(f"calrobust.kernels.triton.{form}")
    if impl == "triton":
        raise RuntimeError(f"impl='triton' cannot be used for {operands} on {x.device}: {reason}; pass impl='auto'")
    _warn_once(f"the Triton kernels are not used for {operands} on {x.device}, which takes more time: {reason}")
    return None


def fault(device: torch.device, operands: torch.dtype, form: str, teacher: bool) -> str:
    """How kernels differ from the tiled form; empty if they agree."""
    FAULTS[device, operands, form, teacher] = ""  # so that they are taken here
    generator = torch.Generator("cpu").manual_seed(0)

    def drawn(rows: int) -> Tensor:
        return normalize(torch.randn(rows, WIDTH, generator=generator, device="cpu")).to(device, operands)

    scale_and_bias = torch.tensor([20.0, -5.0], dtype=torch.promote_types(operands, torch.float32), device=device)
    factors = [t for _ in range(1 + teacher) for t in (drawn(ROWS), drawn(COLUMNS), *scale_and_bias)]
    results = _softmax if form == "softmax" else _sigmoid
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            pairs = zip(results(factors, "triton", operands), results(factors, "tiled", operands), strict=True)
            worst = float(torch.stack([(a - b).norm() / b.norm() for a, b in pairs if b.numel()]).max())
        except Exception as error:  # the tiled form works
            return f"{type(error).__name__}: {error}"
    return "" if worst <= TOLERANCE else f"they differ from the tiled form by {worst:.1g} of its results"


def _softmax(factors: list[Tensor], impl: str, operands: torch.dtype) -> list[Tensor]:
    tensors = [*factors[:3], *factors[4:7], torch.arange(ROWS, device=factors[0].device)]
    found = _forward(tensors, impl, operands, True, False, 0)
    upstream = [torch.full_like(result, 1 / ROWS) for result in found[:7]]
    return [*found, *_backward([*upstream, *found, *tensors], [True] * 3, impl, operands, 0)]


def _sigmoid(factors: list[Tensor], impl: str, operands: torch.dtype) -> list[Tensor]:
    from calrobust.kernels.sigmoid import _sums

    x, y, *_ = factors
    classes = [torch.arange(len(features), device=x.device) for features in (x, y)]
    found: list[Tensor] = _sums([*factors, x.new_ones(len(factors) // 4, ROWS), *classes], impl, operands, [True] * 4)
    return found


@torch.library.custom_op("calrobust::softmax_statistics", mutates_args=())
def _forward(
    tensors: list[Tensor], impl: str, operands: torch.dtype, columns: bool, keep: bool, start: int
) -> list[Tensor]:
    """Lse and divergence of rows and of columns; linear parts; both lse and own entries of a teacher; kept logits.

    Absent results are empty. ``tensors`` are factors and those of a `Pairing`.
    """
    models, pairing = _inputs(tensors, start)
    form = kernels("softmax", impl, tensors[0], operands, teacher=len(models) == 2) or tiled
    kept = _results(tensors, impl, operands, columns, keep, start)[10:]
    found = form.forward(models, pairing.partner, operands, columns=columns, kept=kept)
    (*rows, row_teacher_lse), (*over_rows, column_teacher_lse) = found
    x, y, scale = models[0]
    linear = linear_parts(x.to(scale.dtype), y.to(scale.dtype), pairing, columns=columns)
    own = scale.new_empty(0)
    for x, y, _ in models[1:]:
        own = pairing.own(x.to(scale.dtype), y.to(scale.dtype))
    return [*rows, *over_rows, *linear, row_teacher_lse, column_teacher_lse, own, *kept]


@_forward.register_fake
def _results(
    tensors: list[Tensor], impl: str, operands: torch.dtype, columns: bool, keep: bool, start: int
) -> list[Tensor]:
    x, y, scale, *_ = tensors
    models, pairing = _inputs(tensors, start)
    n, m, taught, sums = x.shape[0], y.shape[0], len(models) - 1, 2 if pairing.classes else 1
    length = m if columns else 0
    kept = n if keep and not may_take_triton(impl, x) else 0
    shapes: Any = [n, n * taught, length, length * taught, n, (sums, n), (sums if columns else 0, m)]
    shapes += [n * taught, length * taught, n * taught, (kept, m), (kept * taught, m)]
    return [scale.new_empty(shape) for shape in shapes]


@torch.library.custom_op("calrobust::softmax_statistics_backward", mutates_args=())
def _backward(tensors: list[Tensor], needs: list[bool], impl: str, operands: torch.dtype, start: int) -> list[Tensor]:
    """The gradients of the student's factors from upstream ones, results and tensors of `_forward`.

    Upstream are a, c, b, d of the derivations, and those of linear parts, which may be empty.
    """
    a, c, b, d, *linear = tensors[:7]
    row_lse, _, column_lse, *_, row_teacher_lse, column_teacher_lse, _, logits, teacher_logits = tensors[7:19]
    models, pairing = _inputs(tensors[19:], start)
    x, y, _ = models[0]
    softmaxes = [Softmaxes(row_lse, column_lse, a, b, logits)]
    if len(models) == 2:
        softmaxes = [
            Softmaxes(row_lse, column_lse, a + c, b + d, logits),
            Softmaxes(row_teacher_lse, column_teacher_lse, -c, -d, teacher_logits),
        ]
    with torch.autocast(a.device.type, enabled=False):  # it may be on in backward
        form = kernels("softmax", impl, a, operands, teacher=len(models) == 2) or tiled
        of_x, of_y, of_scale = form.backward(models, softmaxes, pairing.partner, operands, needs)
        add_gradients(of_x, of_y, x, y, pairing, *linear)
    return [of_x, of_y, of_scale]


@_backward.register_fake
def _(tensors: list[Tensor], needs: list[bool], impl: str, operands: torch.dtype, start: int) -> list[Tensor]:
    return like(tensors[19:22], needs)


def features(models: Sequence[Sequence[Tensor]], operands: torch.dtype) -> list[Tensor]:
    """Detached factors, with features in the dtype of their products."""
    x, _, scale, *_ = models[0]
    dtype = operands if tiled.are_narrow(x, operands) else scale.dtype
    return [f.detach().to(dtype if f.ndim else f.dtype) for factors in models for f in factors]


def like(factors: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    """Memory for the gradients that are needed."""
    scale = factors[2]
    return [scale.new_empty(factor.shape if needed else 0) for factor, needed in zip(factors, needs, strict=True)]


def _inputs(tensors: list[Tensor], start: int) -> tuple[list[Factors], Pairing]:
    factors = [tensor for tensor in tensors if tensor.is_floating_point()]
    partner, *classes = tensors[len(factors) :]
    return [Factors(*factors[k : k + 3]) for k in range(0, len(factors), 3)], Pairing(partner, start, classes)


def _gradients(options: Any, needs: list[bool], *tensors: Any) -> list[Tensor]:
    impl, operands, *_, start = options
    upstream = [
        gradient.contiguous() if gradient is not None else torch.zeros_like(result if k < 4 else result[:0])
        for k, (gradient, result) in enumerate(zip(tensors[:7], tensors[7:14], strict=True))
    ]
    found: list[Tensor] = _backward([*upstream, *tensors[7:]], needs, impl, operands, start)
    return found


def differentiable(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    number: int,
    options: Any,
    factors: Sequence[Tensor],
    tensors: Sequence[Tensor],
) -> Any:
    """The results of an operator on ``tensors``, the first ``number`` of them with a gradient in ``factors``.

    ``backward`` takes options, needs, upstream gradients, results and tensors.
    """
    inputs = forward, backward, number, options, len(factors), *factors, *tensors
    if not torch.compiler.is_compiling():
        return _Eager.apply(*inputs)
    # The compiler fails on an autograd function if no input has a gradient.
    return _Compiled.apply(*inputs) if is_differentiated(factors) else _Compiled.forward(*inputs)


def is_differentiated(tensors: Sequence[Tensor]) -> bool:
    """Whether autograd records them."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def refuse(ctx: Any, *_: Any) -> Any:
    """Raises in place of a missing derivative."""
    raise RuntimeError(
        "the losses that hold no pair matrix have first derivatives in reverse mode only, without vmap; "
        'for second derivatives, forward mode or vmap pass impl="dense"'
    )


class _Compiled(torch.autograd.Function):
    """Autograd does not see tensors in lists."""

    @staticmethod
    def forward(forward: Callable[..., Any], _: Any, __: int, options: Any, count: int, *tensors: Tensor) -> Any:
        return tuple(forward(list(tensors[count:]), *options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, ctx.derivative, ctx.number, ctx.options, ctx.count, *tensors = inputs
        ctx.set_materialize_grads(False)  # kept logits would get a matrix of zeros
        ctx.mark_non_differentiable(*output[ctx.number :])
        ctx.save_for_backward(*output, *tensors[ctx.count :])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: reading runs the hooks of checkpointing
        needs = list(ctx.needs_input_grad[5 : 5 + ctx.count])
        inputs = ctx.derivative, ctx.options, needs, *upstream[: ctx.number], *saved
        found = _call(*inputs) if torch.compiler.is_compiling() else _Once.apply(*inputs)
        wanted = [gradient if needed else None for gradient, needed in zip(found, needs, strict=True)]
        return *[None] * 5, *wanted, *[None] * (len(ctx.needs_input_grad) - 5 - ctx.count)


class _Eager(_Compiled):
    """It refuses other derivatives. The compiler does not accept functions that do."""

    jvp = vmap = staticmethod(refuse)


def _call(function: Callable[..., Any], *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(function(*inputs))


class _Once(torch.autograd.Function):
    forward = staticmethod(_call)
    backward = jvp = vmap = staticmethod(refuse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass
