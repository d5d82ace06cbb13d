from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import lightning_module
import pytest
import torch


@pytest.mark.slow
def test_learns_and_keeps_the_teacher(tmp_path: Path) -> None:
    """As a user runs it: far above the chance of 1 in 200, and the checkpoint holds the teacher once."""
    command = [sys.executable, lightning_module.__file__, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    words = result.stdout.split()
    assert float(words[-1]) > 0.3
    assert "after 80 steps" in result.stdout
    (path,) = tmp_path.rglob("*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["state_dict"]["teacher.step"] == 80
    assert not any("EMATeacher" in key for key in checkpoint["callbacks"])
