"""Factors of pair matrices, and the dense definition that every form of their statistics is held to."""

from __future__ import annotations

from typing import Any

import torch
from strategies import unit_rows
from torch import Tensor
from torch.testing import assert_close

from calrobust.kernels import dense
from calrobust.kernels.dense import Factors, SoftmaxStatistics


def factors(n: int, m: int, width: int, seed: int, *, scale: float, teacher: bool) -> list[Factors]:
    """x, y and scale and, if asked for, those of a teacher of another width and scale."""
    models = [(unit_rows(n, width, seed), unit_rows(m, width, seed + 1), torch.tensor(scale, dtype=torch.float64))]
    if teacher:
        frozen = unit_rows(n, width + 1, seed + 2), unit_rows(m, width + 1, seed + 3)
        models.append((*frozen, torch.tensor(0.9 * scale, dtype=torch.float64)))
    return models


def value_and_gradients(
    statistics: Any, inputs: list[Factors], seed: int = 0
) -> tuple[SoftmaxStatistics, list[Tensor]]:
    """Of a random combination of all statistics, so that each upstream gradient differs from pair to pair."""
    student, *teacher = inputs
    x, y, scale = (factor.clone().requires_grad_() for factor in student)
    outputs = statistics((x, y, scale), *teacher)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(v.shape, generator=generator, dtype=torch.float64, device="cpu").to(v) for v in outputs]
    total = torch.stack([(w * v).sum() for w, v in zip(weights, outputs, strict=True)]).sum()
    return outputs, list(torch.autograd.grad(total, (x, y, scale)))


def assert_like_dense(statistics: Any, inputs: list[Factors], tolerance: float) -> None:
    """In all statistics and both gradients, relative to their largest entry."""
    expected, expected_gradients = value_and_gradients(dense.softmax_statistics, inputs)
    outputs, gradients = value_and_gradients(statistics, inputs)
    for ours, theirs in zip([*outputs, *gradients], [*expected, *expected_gradients], strict=True):
        if theirs.numel():
            scale = max(1.0, theirs.abs().max().item())
            assert_close(ours, theirs, rtol=tolerance, atol=tolerance * scale)
