from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import lora
import pytest

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "lora.md"


@pytest.mark.slow
def test_learns_and_its_teacher_costs_what_trains() -> None:
    """As a user runs it: the loss falls, and memory and file are the share of the weights that train."""
    result = subprocess.run([sys.executable, lora.__file__], capture_output=True, text=True, check=True)
    assert not result.stderr
    first, last = (float(loss) for loss in re.findall(r"loss (\S+)", result.stdout))
    assert last < 0.9 * first
    (share,) = re.findall(r"(\S+)% of the weights", result.stdout)
    (memory, file), (own, own_file) = (
        map(float, numbers) for numbers in re.findall(r"(\S+) MiB of memory, .* (\S+) MiB in a file", result.stdout)
    )
    assert own / memory == pytest.approx(float(share) / 100, abs=0.01)
    assert own_file / file == pytest.approx(float(share) / 100, abs=0.01)
    for line in result.stdout.splitlines()[2:]:  # the page shows them, but for the times
        shown = re.escape(re.sub(r"\S+ ms", "# ms", line)).replace(r"\#", r"\S+")
        assert re.search(shown.replace(r"\ \S", r"\ +\S"), PAGE.read_text(encoding="utf-8"))
