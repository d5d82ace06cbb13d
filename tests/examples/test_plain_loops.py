"""What every loop in examples/ keeps to, whichever trainer it shows."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("script", ["fsdp.py", "accelerate_loop.py", "transformers_trainer.py"])
@pytest.mark.filterwarnings("ignore")  # of the trainers
def test_no_loop_decays_its_logit_scale(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decay alone would take it from 100 to 94 in a long run, with no gradient at all (trap 8)."""
    decays: list[float] = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            decays.extend(group["weight_decay"] for parameter in group["params"] if parameter.numel() == 1)

    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0", "LOCAL_RANK": "0"}
    for name, value in alone.items() if script == "fsdp.py" else ():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", [script, str(tmp_path / "out")])
    hook = register_optimizer_step_pre_hook(look)
    try:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    finally:
        hook.remove()
    assert set(decays) == {0}
