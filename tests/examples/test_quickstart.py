"""The quickstart: what it prints, and what its page says that it prints."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_carot_keeps_what_flyp_loses_and_the_page_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    """In distribution as accurate; under shift more accurate and far better calibrated. No scale decays (trap 8)."""
    decays: set[float] = set()

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        decays.update(group["weight_decay"] for group in optimizer.param_groups)

    hook = register_optimizer_step_pre_hook(look)
    try:
        with torch.random.fork_rng():
            runpy.run_path(str(ROOT / "examples" / "quickstart.py"), run_name="__main__")
    finally:
        hook.remove()
    assert decays == {0}
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if "|" in line]
    columns = rows[0][1:]
    _, flyp, carot = (dict(zip(columns, map(float, row[1:]), strict=True)) for row in rows[2:])
    assert carot["ID accuracy"] > flyp["ID accuracy"] - 3
    assert carot["OOD accuracy"] > flyp["OOD accuracy"] + 5
    assert carot["OOD ECE"] < flyp["OOD ECE"] / 2
    # Figures differ a little between machines and versions; all else is the page's.
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"<!-- output -->\n```text\n(.*?)```", page, re.DOTALL)
    shape = [re.sub(r"[ -]+", " ", re.sub(r"\d+\.\d+", "0", text)).strip() for text in (shown, printed)]
    assert shape[0] == shape[1]
