"""A teacher that FSDP2 shards, in the trainers' checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
from leaving import torchrun


@pytest.mark.slow
def test_a_sharded_teacher_is_saved_whole_and_comes_back_onto_its_shards(tmp_path: Path) -> None:
    """With both callbacks on two ranks, the file of rank 0 holds what both ranks averaged."""
    torchrun(Path(__file__).parents[1] / "sharded_teacher_on_a_rank.py", str(tmp_path / "run"))
