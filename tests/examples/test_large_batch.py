from __future__ import annotations

import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import large_batch
import pytest
import torch
from large_batch import TwoTowers, backward_in_chunks, encode
from leaving import torchrun
from torch import Tensor, nn
from torch.testing import assert_close

from calrobust import CaRotLoss, EMATeacher


class HeldForBackward(torch.autograd.graph.saved_tensors_hooks):
    """Measures the most bytes that autograd held for backward at any one time, the data aside, each storage once."""

    def __init__(self, *data: Tensor) -> None:
        self.peak = self.now = 0
        self.holders = {tensor.data_ptr(): 1 for tensor in data}
        super().__init__(self._pack, lambda packed: packed[0])

    def _pack(self, tensor: Tensor) -> tuple[Tensor, _Token]:
        key, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        self.now += 0 if self.holders.get(key) else size
        self.holders[key] = self.holders.get(key, 0) + 1
        self.peak = max(self.peak, self.now)
        token = _Token()
        weakref.finalize(token, self._release, key, size)
        return tensor, token

    def _release(self, key: int, size: int) -> None:
        self.holders[key] -= 1
        self.now -= 0 if self.holders[key] else size


class _Token:
    """Dies with the graph."""


def batch(pairs: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Made-up pictures and texts."""
    return torch.randn(pairs, 64, dtype=dtype), torch.randn(pairs, 64, dtype=dtype)


def gradients(model: nn.Module) -> list[Tensor]:
    """Of each parameter, taken away from it."""
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(found) == len(list(model.parameters()))
    model.zero_grad()
    return found


CRITERION = CaRotLoss(label_smoothing=0.1, distillation_weight=1.5, memory_budget=2**20)


@pytest.mark.parametrize("chunk", [1, 4, 5, 13])
def test_chunks_give_the_gradients_of_one_batch(chunk: int) -> None:
    """Of weights and logit scale, uneven last chunk included."""
    model, pairs = TwoTowers().double(), batch(13, torch.float64)
    teacher = EMATeacher(TwoTowers().double())
    loss = backward_in_chunks(CRITERION, model, teacher, *pairs, chunk)
    in_chunks = gradients(model)
    whole = CRITERION(*model(*pairs), *teacher(*pairs))
    whole.backward()
    assert_close(loss, whole.detach())
    for a, b in zip(in_chunks, gradients(model), strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("frozen", ["visual", "textual", "log_scale", "visual textual", "visual log_scale"])
def test_parts_may_be_frozen(frozen: str) -> None:
    """What trains gets the gradient of one batch, and what is frozen gets none."""
    model, pairs = TwoTowers().double(), batch(13, torch.float64)
    for part in frozen.split():
        for parameter in (model.log_scale,) if part == "log_scale" else model.get_submodule(part).parameters():
            parameter.requires_grad_(False)
    check_against_one_batch(model, pairs)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("is_parameter", [False, True])
def test_a_scale_may_be_a_number_or_the_parameter_itself(is_parameter: bool, with_bias: bool) -> None:
    """The gradient of a parameter that the model returns as it is counts once."""

    class Scaled(TwoTowers):
        def forward(self, images: Tensor, texts: Tensor) -> tuple[Any, ...]:
            """Features of the towers, and a scale, maybe with a bias."""
            scale = self.log_scale if is_parameter else 20.0
            return *super().forward(images, texts)[:2], scale, *((scale,) if with_bias else ())

    check_against_one_batch(Scaled().double(), batch(13, torch.float64))


def check_against_one_batch(model: nn.Module, pairs: tuple[Tensor, Tensor]) -> None:
    """In chunks of 5, 5 and 3."""
    teacher = EMATeacher(TwoTowers().double())
    backward_in_chunks(CRITERION, model, teacher, *pairs, 5)
    in_chunks = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    CRITERION(*model(*pairs), *teacher(*pairs)).backward()
    for ours, parameter in zip(in_chunks, model.parameters(), strict=True):
        assert_close(ours, parameter.grad, rtol=1e-9, atol=1e-12)


def test_dropout_falls_alike_in_both_passes() -> None:
    """The step lowers the loss that was evaluated: its gradient is the derivative of that very draw."""
    model, pairs = TwoTowers(dropout=0.5).double(), batch(8, torch.float64)
    teacher = EMATeacher(model)
    bias = model.visual[-1].get_parameter("bias")

    def loss() -> float:
        torch.manual_seed(3)
        return backward_in_chunks(CRITERION, model, teacher, *pairs, 4).item()

    loss()
    assert bias.grad is not None
    slope, around = bias.grad[5].item(), []
    for step in (1e-5, -2e-5):
        bias.data[5] += step
        around.append(loss())
    assert slope == pytest.approx((around[0] - around[1]) / 2e-5, rel=1e-5)


def test_dropout_falls_by_the_seed_alone() -> None:
    """Alike for one seed, otherwise for the next chunk's, and without touching the generator of the training loop."""
    model, pairs = TwoTowers(dropout=0.5), batch(4)
    state = torch.get_rng_state()
    first, again, other = (encode(model, pairs, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_memory_is_that_of_one_chunk() -> None:
    """4,096 pairs hold little more for backward than 256, and a tenth of what they hold at once."""
    model = TwoTowers()
    teacher = EMATeacher(model)
    held = {}
    for pairs, chunk in ((256, 256), (4096, 256), (4096, 4096)):
        data = batch(pairs)
        meter = HeldForBackward(*data)
        with meter:
            backward_in_chunks(CRITERION, model, teacher, *data, chunk)
        held[pairs, chunk] = meter.peak
    assert held[4096, 256] < 1.1 * held[256, 256]
    assert held[4096, 256] < held[4096, 4096] / 10


@pytest.mark.slow
def test_chunks_on_two_ranks_give_the_gradients_of_one_process() -> None:
    """Of unequal shares, in one chunk a rank and in several; DistributedDataParallel averages each gradient once."""
    torchrun(Path(__file__).parents[1] / "large_batch_on_a_rank.py")


def test_runs_as_documented() -> None:
    """And finds no difference but rounding."""
    result = subprocess.run([sys.executable, large_batch.__file__], capture_output=True, text=True, check=True)
    words = result.stdout.split()
    assert float(words[words.index("to") + 1]) < 1e-4
