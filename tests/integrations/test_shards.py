"""A teacher of several ranks in the trainers' checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
from leaving import torchrun


@pytest.mark.slow
def test_a_sharded_teacher_is_saved_whole_and_comes_back_onto_its_shards(tmp_path: Path) -> None:
    """With both callbacks on two ranks, the file of rank 0 holds what both ranks averaged."""
    torchrun(Path(__file__).parents[1] / "sharded_teacher_on_a_rank.py", str(tmp_path / "run"))


@pytest.mark.slow
def test_a_trainer_of_two_ranks_has_one_teacher_and_resumes_with_it(tmp_path: Path) -> None:
    """Transformers' ``Trainer`` under DDP, with accumulated gradients and pairs that are gathered."""
    torchrun(Path(__file__).parents[1] / "trainer_on_a_rank.py", str(tmp_path))
