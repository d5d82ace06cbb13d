"""Teachers of examples/ run in the precision of their students."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _accelerate_starts_anew() -> Iterator[None]:
    """It keeps its precision for the process, and other tests have theirs."""

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield
    reset()


@pytest.mark.parametrize(
    ("script", "besides"), [("accelerate_loop.py", {torch.float32}), ("transformers_trainer.py", set())]
)
@pytest.mark.filterwarnings("ignore")  # of the trainers
def test_student_and_teacher_run_in_bf16_where_accelerate_is_told_so(
    script: str, besides: set[torch.dtype], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``prepare`` gives autocast to the student alone, and the examples give it to the teacher.

    After the training, the loop evaluates its teacher in float32.
    """
    dtypes: dict[bool, set[torch.dtype]] = {True: set(), False: set()}

    def look(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(module, nn.Linear):
            dtypes[module.training].add(output.dtype)

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr(sys, "argv", [script, str(tmp_path / "out")])
    hook = register_module_forward_hook(look)
    try:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    finally:
        hook.remove()
    assert dtypes == {True: {torch.bfloat16}, False: {torch.bfloat16} | besides}
