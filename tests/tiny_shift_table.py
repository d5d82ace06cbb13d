"""``examples/shift_table.py`` in some seconds: two steps of everything, on few pictures."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from shift_table import data
from shift_table.data import Split
from shift_table.model import Pretraining

TINY = Pretraining(steps=2, per_style=2)


def few(split: Split, n: int = 128) -> Split:
    """The first ``n`` pictures."""
    return Split(split.images[:n], split.target[:n])


def tiny_script() -> ModuleType:
    """The script itself, whose name is also its package's, with fewer steps and pictures for ``--fast``."""
    path = Path(__file__).parents[1] / "examples" / "shift_table.py"
    spec = importlib.util.spec_from_file_location("shift_table_script", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    train, validation = few(data.train_split()), few(data.validation_split(), 200)
    test = {name: few(split, 90) for name, split in data.test_splits().items()}
    vars(script).update(
        FAST=(TINY, 1), train_split=lambda: train, validation_split=lambda: validation, test_splits=lambda: test
    )
    return script
