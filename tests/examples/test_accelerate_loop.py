from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import accelerate_loop
import pytest


def run(folder: Path) -> tuple[int, float]:
    """As a user runs it: the steps of the teacher, and the accuracy."""
    command = [sys.executable, accelerate_loop.__file__, str(folder)]
    words = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return int(words[-3]), float(words[-1])


@pytest.mark.slow
def test_learns_and_resumes_with_the_teacher(tmp_path: Path) -> None:
    """40 steps of two batches each; the second run counts on from there (trap 16)."""
    steps, accuracy = run(tmp_path / "run")
    more_steps, better = run(tmp_path / "run")
    assert (steps, more_steps) == (40, 80)
    assert 0.2 < accuracy < better
