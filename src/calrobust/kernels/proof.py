"""The Triton kernels prove themselves: before their first use on a device they are compared with the tiled form."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from calrobust.kernels import sigmoid, tiled
from calrobust.kernels.dense import Factors
from calrobust.kernels.tiled import Softmaxes

ROWS, COLUMNS, WIDTH = 40, 72, 64  # of the problem
FAULTS: dict[tuple[torch.device, torch.dtype, str, bool], str] = {}  # of all comparisons so far
TOLERANCE = 1e-2  # relative, in the Frobenius norm; what is broken is off by more


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
            from calrobust.kernels import triton

            run = _softmax if form == "softmax" else _sigmoid
            pairs = zip(run(triton, models, operands), run(None, models, operands), strict=True)
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
