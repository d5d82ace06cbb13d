"""The forms that hold no pair matrix, as a pair of torch operators under an autograd function.

A form is a module with two functions, ``forward`` and ``backward``: `tiled`, which is the one to read, or `triton`.
"""

import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from calrobust.kernels import tiled
from calrobust.kernels.dense import Factors, Part, Strip
from calrobust.kernels.tiled import CAPABILITY, Softmaxes

_TRITON_IS_INSTALLED = find_spec("triton") is not None
FAULTS: dict[tuple[torch.device, torch.dtype, str, bool], str] = {}  # of the kernels, from all comparisons so far
ROWS, COLUMNS, WIDTH = 40, 72, 64  # of the problem that they are compared on
TOLERANCE = 1e-2  # relative, in the Frobenius norm; what is broken is off by more


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
    """What `dense.softmax_statistics` gives, from a form that holds no pair matrix.

    ``"auto"`` is Triton where it runs and proves itself, except for float64. Elsewhere it is tiled, and keeps the
    logits for backward if they fit into ``memory_budget`` bytes. ``operands`` is the dtype in which the features came:
    nothing is lost if they are multiplied in it.
    """
    x, y, _ = student
    factors = [*student, *(teacher or ())]
    differentiated = torch.is_grad_enabled() and any(factor.requires_grad for factor in student)
    keep = impl == "auto" and differentiated
    if keep and not torch.compiler.is_exporting():  # an export leaves the sizes open
        keep = len(factors) // 3 * x.shape[0] * y.shape[0] * x.element_size() <= memory_budget
    run = _Eager.apply
    if torch.compiler.is_compiling():  # the compiler fails on an autograd function none of whose inputs has a gradient
        run = _Compiled.apply if differentiated else _Compiled.forward
    found = run(impl, columns, keep, operands or x.dtype, partner, *factors)
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


def may_take_triton(impl: str, x: Tensor) -> bool:
    """Whether the form is Triton's, if its kernels prove themselves."""
    if impl != "auto":
        return impl == "triton"
    return x.device.type == "cuda" and x.dtype != torch.float64 and not obstacle_to_triton(x.device)


def takes_triton(impl: str, x: Tensor, operands: torch.dtype, *, form: str, teacher: bool) -> bool:
    """Whether the form is Triton's: its kernels are compared with the tiled form on first use."""
    return may_take_triton(impl, x) and is_proven(impl, x.device, operands, form=form, teacher=teacher)


def is_proven(impl: str, device: torch.device, operands: torch.dtype, *, form: str, teacher: bool) -> bool:
    """Whether the kernels of a form, ``"softmax"`` or ``"sigmoid"``, can be used; warns once if they cannot.

    Raises:
        RuntimeError: they cannot, and ``impl`` insists on them.
    """
    key = device, operands, form, teacher
    # While a CUDA graph is captured nothing can be compared; a step before it has done so.
    if key not in FAULTS and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        FAULTS[key] = fault(*key)
    reason = FAULTS.get(key, "")
    if reason and impl == "triton":
        raise RuntimeError(f"impl='triton' cannot be used for {operands} on {device}: {reason}; pass impl='auto'")
    if reason:
        _warn(f"the Triton kernels are not used for {operands} on {device}, which takes more time: {reason}")
    return not reason


def fault(device: torch.device, operands: torch.dtype, form: str, teacher: bool) -> str:
    """What is wrong with the kernels of a form on a device, and empty if they agree with the tiled form."""
    dtype = torch.promote_types(operands, torch.float32)
    generator = torch.Generator("cpu").manual_seed(0)
    shapes = [(ROWS, WIDTH), (COLUMNS, WIDTH)] * (1 + teacher)
    features = [
        torch.nn.functional.normalize(torch.randn(shape, generator=generator, device="cpu"), dim=1) for shape in shapes
    ]
    x, y, *others = (each.to(operands).to(device, dtype) for each in features)
    scale = torch.tensor(20.0, dtype=dtype, device=device)
    models = [Factors(x, y, scale), *([Factors(others[0], others[1], scale)] if teacher else [])]
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            from calrobust.kernels.triton import sigmoid, softmax

            run, kernels = (_softmax, softmax) if form == "softmax" else (_sigmoid, sigmoid)
            pairs = zip(run(kernels, models, operands), run(None, models, operands), strict=True)
            worst = float(torch.stack([(a - b).norm() / b.norm() for a, b in pairs if b.numel()]).max())
        except Exception as error:  # of a compiler, a driver, a launch: whatever it is, the tiled form still works
            return f"{type(error).__name__}: {error}"
    return "" if worst <= TOLERANCE else f"they differ from the tiled form by {worst:.1g} of its results"


def _softmax(kernels: Any, models: list[Factors], operands: torch.dtype) -> list[Tensor]:
    partner = torch.arange(ROWS, device=models[0].x.device)
    exact, _ = tiled.forward(models, partner, operands, columns=True, keep=False)
    strip = kernels.forward(models, partner, operands, columns=True) if kernels else exact
    weights = models[0].x.new_full((COLUMNS,), 1 / ROWS)
    softmaxes = [
        Softmaxes(exact.rows[k], exact.columns[k], sign * weights[:ROWS], sign * weights, weights[:0])
        for k, sign in enumerate((1, -0.5)[: len(models)])
    ]
    backward = (kernels or tiled).backward
    gradients = backward(models, softmaxes, partner, operands, [True, True, True])
    return [*strip.rows, *(vector[:ROWS] for vector in strip.columns), *gradients]


def _sigmoid(kernels: Any, models: list[Factors], operands: torch.dtype) -> list[Tensor]:
    from calrobust.kernels import sigmoid

    device = models[0].x.device
    biased = [sigmoid.Model(*model, model.scale.new_full((), -5.0)) for model in models]
    classes = sigmoid.Classes(torch.arange(ROWS, device=device), torch.arange(COLUMNS, device=device))
    weights = models[0].x.new_ones(len(models), ROWS)
    sums = kernels.sigmoid_sums if kernels else sigmoid.tiled_sums
    found, gradients = sums(biased, classes, weights, operands, [True] * 4)
    return [*found, *gradients]


@cache
def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


@torch.library.custom_op("calrobust::softmax_statistics", mutates_args=())
def _forward(
    factors: list[Tensor], partner: Tensor, impl: str, columns: bool, keep: bool, operands: torch.dtype
) -> list[Tensor]:
    """Row and column lse, the teacher's, the divergences, then the logits that are kept of both; empty if absent.

    ``factors`` are x, y and scale of the student, then of the teacher if there is one.
    """
    x, y, *_ = factors
    kept: list[Tensor] = []
    if takes_triton(impl, x, operands, form="softmax", teacher=len(factors) == 6):
        from calrobust.kernels.triton import softmax

        strip = softmax.forward(_models(factors), partner, operands, columns=columns)
    else:
        keep &= not may_take_triton(impl, x)
        strip, kept = tiled.forward(_models(factors), partner, operands, columns=columns, keep=keep)
    vectors = [vector for pair in zip(*strip, strict=True) for vector in pair]
    return [*vectors, *kept, *(x.new_empty(0, len(y)) for _ in range(2 - len(kept)))]


@_forward.register_fake
def _(
    factors: list[Tensor], partner: Tensor, impl: str, columns: bool, keep: bool, operands: torch.dtype
) -> list[Tensor]:
    x, y, *_ = factors
    n, m = x.shape[0], y.shape[0]
    teacher = len(factors) == 6
    kept = (n if keep and not may_take_triton(impl, x) else 0, m)
    each = [(n,), (m if columns else 0,)]
    shapes = [*each, *(each * 2 if teacher else [(0,)] * 4), kept, kept if teacher else (0, m)]
    return [x.new_empty(shape) for shape in shapes]


@torch.library.custom_op("calrobust::softmax_statistics_backward", mutates_args=())
def _backward(
    factors: list[Tensor],
    needs: list[bool],
    gradients: list[Tensor],
    found: list[Tensor],
    partner: Tensor,
    impl: str,
    operands: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the student's x, y and scale from the upstream gradients a, b, c, d, named as in `tiled`."""
    a, b, c, d = gradients
    row_lse, column_lse, teacher_row_lse, teacher_column_lse, _, _, logits, teacher_logits = found
    softmaxes = [Softmaxes(row_lse, column_lse, a, b, logits)]
    if len(factors) == 6:
        softmaxes = [
            Softmaxes(row_lse, column_lse, a + c, b + d, logits),
            Softmaxes(teacher_row_lse, teacher_column_lse, -c, -d, teacher_logits),
        ]
    with torch.autocast(a.device.type, enabled=False):  # a loss may be differentiated inside of it
        if takes_triton(impl, a, operands, form="softmax", teacher=len(factors) == 6):
            from calrobust.kernels.triton import softmax

            return softmax.backward(_models(factors), softmaxes, partner, operands, needs)
        return tiled.backward(_models(factors), softmaxes, partner, operands, needs)


@_backward.register_fake
def _(factors: list[Tensor], needs: list[bool], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, y, scale = (f.new_empty(f.shape if needed else 0) for f, needed in zip(factors, needs, strict=False))
    return x, y, scale


def _models(factors: list[Tensor]) -> list[Factors]:
    return [Factors(*factors[k : k + 3]) for k in range(0, len(factors), 3)]


def refuse(ctx: Any, *_: Any) -> Any:
    """Raises in place of a derivative that there is not."""
    raise RuntimeError(
        "the losses that hold no pair matrix have first derivatives in reverse mode only, without vmap; "
        'for second derivatives, forward mode or vmap pass impl="dense"'
    )


class _Compiled(torch.autograd.Function):
    """The operators with their derivative, as torch.compile and torch.export trace it.

    Autograd sees tensors that are arguments, but not those inside of a list. So lists are passed entry by entry.
    """

    @staticmethod
    def forward(impl: str, columns: bool, keep: bool, operands: torch.dtype, partner: Tensor, *factors: Tensor) -> Any:
        return tuple(_forward(list(factors), partner, impl, columns, keep, operands))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.impl, _, _, ctx.operands, *tensors = inputs
        ctx.set_materialize_grads(False)  # logits that are kept have no gradient, which would be a matrix of zeros
        ctx.mark_non_differentiable(*output[2:4], *output[6:])
        ctx.save_for_backward(*output, *tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)  # read once: hooks of checkpointing unpack them at each reading
        upstream = [
            torch.zeros_like(output) if gradient is None else gradient.contiguous()
            for gradient, output in ((gradients[k], saved[k]) for k in (0, 1, 4, 5))
        ]
        needs = list(ctx.needs_input_grad[5:8])
        inputs = ctx.impl, ctx.operands, needs, *upstream, *saved
        compiling = torch.compiler.is_compiling()
        student = _differentiated(*inputs) if compiling else Once.apply(_differentiated, *inputs)
        wanted = (gradient if needed else None for gradient, needed in zip(student, needs, strict=True))
        return *[None] * 5, *wanted, *[None] * (len(ctx.needs_input_grad) - 8)


class _Eager(_Compiled):
    """The same with a refusal of other derivatives, which the compiler does not accept in a function."""

    jvp = vmap = staticmethod(refuse)


def _differentiated(
    impl: str, operands: torch.dtype, needs: list[bool], *tensors: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward operator; the tensors are the upstream gradients and what `_Compiled` has saved."""
    gradients, found, (partner, *factors) = list(tensors[:4]), list(tensors[4:12]), tensors[12:]
    x, y, scale = _backward(factors, needs, gradients, found, partner, impl, operands)
    return x, y, scale


class Once(torch.autograd.Function):
    """A function of tensors that refuses to be differentiated."""

    backward = jvp = vmap = staticmethod(refuse)

    @staticmethod
    def forward(function: Callable[..., Any], *inputs: Any) -> Any:
        """Its value."""
        return function(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing to save."""
