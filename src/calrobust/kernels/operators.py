"""Torch operators around the forms that hold no pair matrix, and their autograd function; read `tiled` first."""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from calrobust.kernels import tiled
from calrobust.kernels.dense import Factors, Part, Strip
from calrobust.kernels.tiled import CAPABILITY, Softmaxes

_TRITON_IS_INSTALLED = find_spec("triton") is not None
FAULTS: dict[tuple[torch.device, torch.dtype, str, bool], str] = {}  # of the kernels compared so far
ROWS, COLUMNS, WIDTH = 40, 72, 64  # of the problem that they are compared on
TOLERANCE = 1e-2  # relative, in the Frobenius norm


def softmax_statistics(
    student: Factors,
    teacher: Factors | None,
    partner: Tensor,
    *,
    columns: bool = True,
    impl: str = "auto",
    memory_budget: int = 0,
    operands: torch.dtype | None = None,
) -> Strip:
    """What `dense.softmax_statistics` gives. Features may be multiplied as ``operands``.

    ``"auto"`` is Triton where `kernels` has it, except for float64, and else tiled, which keeps logits that fit into
    ``memory_budget`` bytes.
    """
    x, y, _ = student
    factors = [*student, *(teacher or ())]
    keep = impl == "auto" and is_differentiated(factors)
    if keep and not torch.compiler.is_exporting():  # an export leaves the sizes open
        keep = len(factors) // 3 * x.shape[0] * y.shape[0] * x.element_size() <= memory_budget
    options = impl, operands or x.dtype, columns, keep
    found = differentiable(_forward, _gradients, 4, options, *factors, partner)
    return Strip(Part(*found[0:6:2]), Part(*found[1:6:2]))


def obstacle_to_triton(device: torch.device) -> str:
    """Why Triton does not run on a device; empty if it does."""
    if not _TRITON_IS_INSTALLED:
        return "no triton to import"
    if device.type != "cuda":
        from calrobust.kernels import triton

        return "" if triton.INTERPRETED else f"features on {device}"
    if torch.version.hip is not None:
        return "a device of ROCm"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if (major, minor) >= CAPABILITY else f"compute capability {major}.{minor}"


def may_take_triton(impl: str, x: Tensor) -> bool:
    """Whether the form is Triton's, if its kernels prove themselves."""
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
    if key not in FAULTS and not (x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        FAULTS[key] = fault(*key)
    reason = FAULTS.get(key)
    if not reason:
        return import_module(f"calrobust.kernels.triton.{form}")
    if impl == "triton":
        raise RuntimeError(f"impl='triton' cannot be used for {operands} on {x.device}: {reason}; pass impl='auto'")
    _warn(f"the Triton kernels are not used for {operands} on {x.device}, which takes more time: {reason}")
    return None


@cache
def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def fault(device: torch.device, operands: torch.dtype, form: str, teacher: bool) -> str:
    """How the kernels of a form differ from the tiled form; empty if they agree."""
    FAULTS[device, operands, form, teacher] = ""  # so that they are taken here
    dtype = torch.promote_types(operands, torch.float32)
    generator = torch.Generator("cpu").manual_seed(0)

    def drawn(rows: int) -> Tensor:
        features = normalize(torch.randn(rows, WIDTH, generator=generator, device="cpu"), dim=1)
        return features.to(operands).to(device, dtype)

    scale_and_bias = torch.tensor([20.0, -5.0], dtype=dtype, device=device)
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
    found = _forward(tensors, impl, operands, True, False)
    upstream = [torch.full_like(vector, 1 / ROWS) for vector in found[:4]]
    return [*found, *_backward([*upstream, *found, *tensors], [True] * 3, impl, operands)]


def _sigmoid(factors: list[Tensor], impl: str, operands: torch.dtype) -> list[Tensor]:
    from calrobust.kernels.sigmoid import _sums

    x, y, *_ = factors
    classes = [torch.arange(len(features), device=x.device) for features in (x, y)]
    found: list[Tensor] = _sums([*factors, x.new_ones(len(factors) // 4, ROWS), *classes], impl, operands, [True] * 4)
    return found


@torch.library.custom_op("calrobust::softmax_statistics", mutates_args=())
def _forward(tensors: list[Tensor], impl: str, operands: torch.dtype, columns: bool, keep: bool) -> list[Tensor]:
    """Lse, divergence and teacher's lse, each of rows and of columns, then the kept logits of both; empty if absent.

    ``tensors`` are factors and partners.
    """
    *factors, partner = tensors
    form = kernels("softmax", impl, factors[0], operands, teacher=len(factors) == 6)
    kept = _results(tensors, impl, operands, columns, keep)[6:]
    if form:
        strip = form.forward(_models(factors), partner, operands, columns=columns)
    else:
        strip = tiled.forward(_models(factors), partner, operands, columns=columns, kept=kept)
    return [*(vector for pair in zip(*strip, strict=True) for vector in pair), *kept]


@_forward.register_fake
def _results(tensors: list[Tensor], impl: str, operands: torch.dtype, columns: bool, keep: bool) -> list[Tensor]:
    x, y, *_ = tensors
    n, m = x.shape[0], y.shape[0]
    kept = (n if keep and not may_take_triton(impl, x) else 0, m)
    each = [(n,), (m if columns else 0,)]
    has_teacher = len(tensors) == 7
    shapes = [*each, *(each * 2 if has_teacher else [(0,)] * 4), kept, kept if has_teacher else (0, m)]
    return [x.new_empty(shape) for shape in shapes]


@torch.library.custom_op("calrobust::softmax_statistics_backward", mutates_args=())
def _backward(tensors: list[Tensor], needs: list[bool], impl: str, operands: torch.dtype) -> list[Tensor]:
    """The gradients of the student's factors from a, b, c, d of the derivations, results and tensors of `_forward`."""
    a, b, c, d, row_lse, column_lse, _, _, *teacher_lses, logits, teacher_logits = tensors[:12]
    *factors, partner = tensors[12:]
    has_teacher = len(factors) == 6
    softmaxes = [Softmaxes(row_lse, column_lse, a, b, logits)]
    if has_teacher:
        softmaxes = [
            Softmaxes(row_lse, column_lse, a + c, b + d, logits),
            Softmaxes(teacher_lses[0], teacher_lses[1], -c, -d, teacher_logits),
        ]
    with torch.autocast(a.device.type, enabled=False):  # it may be on in backward
        form = kernels("softmax", impl, a, operands, teacher=has_teacher) or tiled
        return list(form.backward(_models(factors), softmaxes, partner, operands, needs))


@_backward.register_fake
def _(tensors: list[Tensor], needs: list[bool], impl: str, operands: torch.dtype) -> list[Tensor]:
    return like(tensors[12:15], needs)


def like(factors: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    """Memory for the gradients of factors that are needed."""
    return [factor.new_empty(factor.shape if needed else 0) for factor, needed in zip(factors, needs, strict=True)]


def _models(factors: list[Tensor]) -> list[Factors]:
    return [Factors(*factors[k : k + 3]) for k in range(0, len(factors), 3)]


def _gradients(options: Any, needs: list[bool], *tensors: Tensor | None) -> list[Tensor]:
    impl, operands, *_ = options
    saved: Any = tensors[4:]
    upstream = [
        torch.zeros_like(result) if gradient is None else gradient.contiguous()
        for gradient, result in zip(tensors[:4], saved[:4], strict=True)
    ]
    found: list[Tensor] = _backward([*upstream, *saved], needs[:3], impl, operands)
    return found


def differentiable(
    forward: Callable[..., Any], backward: Callable[..., Any], number: int, options: Any, *tensors: Tensor
) -> Any:
    """The results of an operator, the first ``number`` of them with a gradient.

    ``backward`` takes options, needs, upstream gradients, results and tensors.
    """
    if not torch.compiler.is_compiling():
        return _Eager.apply(forward, backward, number, options, *tensors)
    # The compiler fails on an autograd function none of whose inputs has a gradient.
    run = _Compiled.apply if is_differentiated(tensors) else _Compiled.forward
    return run(forward, backward, number, options, *tensors)


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
    def forward(forward: Callable[..., Any], _: Any, __: int, options: Any, *tensors: Tensor) -> Any:
        return tuple(forward(list(tensors), *options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, ctx.derivative, ctx.number, ctx.options, *tensors = inputs
        ctx.set_materialize_grads(False)  # the gradient of kept logits would be a matrix of zeros
        ctx.mark_non_differentiable(*output[ctx.number :])
        ctx.save_for_backward(*output, *tensors)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: each reading runs the hooks of checkpointing
        needs = list(ctx.needs_input_grad[4:])
        inputs = ctx.derivative, ctx.options, needs, *upstream[: ctx.number], *saved
        found = _call(*inputs) if torch.compiler.is_compiling() else _Once.apply(*inputs)
        wanted = [gradient if needed else None for gradient, needed in zip(found, needs[: len(found)], strict=True)]
        return *[None] * 4, *wanted, *[None] * (len(needs) - len(found))


class _Eager(_Compiled):
    """It refuses other derivatives, which the compiler does not accept."""

    jvp = vmap = staticmethod(refuse)


def _call(function: Callable[..., Any], *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(function(*inputs))


class _Once(torch.autograd.Function):
    forward = staticmethod(_call)
    backward = jvp = vmap = staticmethod(refuse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing to save."""
