"""The examples for several processes, as their docstrings run them: on two CPUs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from leaving import torchrun

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
def test_ddp_prints_the_gradient_of_one_process() -> None:
    """Rounding with gather=True, something else without (trap 7)."""
    errors = [float(error) for error in re.findall(r"one process: (\S+)", torchrun(EXAMPLES / "ddp.py"))]
    assert errors[0] < 1e-12
    assert errors[1] > 1e-2


@pytest.mark.slow
def test_fsdp_learns_with_half_of_the_weights_on_each_process() -> None:
    """The loss falls, and weights are sharded."""
    found = re.findall(r"loss (\S+)  share of the weights on this process (\S+)", torchrun(EXAMPLES / "fsdp.py"))
    (first, share), (last, _) = [(float(loss), float(part)) for loss, part in found]
    assert last < first / 2
    assert share == 0.5
