from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "open_clip_trainer.py"


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """As a user runs it."""
    command = [sys.executable, str(SCRIPT), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which it ran once."""
    folder = tmp_path_factory.mktemp("open_clip")
    result = run(folder)
    assert result.returncode == 0, result.stderr
    return folder / "open_clip_run" / "carot"


def test_their_trainer_logs_our_terms(trained: Path) -> None:
    """The teacher is the model at the first step and no longer at the last."""
    log = (trained / "out.log").read_text()
    steps = [line.split() for line in log.splitlines() if "Train Epoch" in line]
    values = [[float(words[words.index(f"{name}:") + 1]) for words in steps] for name in
              ("Contrastive_loss", "Distillation_loss", "Loss")]  # fmt: skip
    contrastive, distillation, total = values
    assert distillation[0] == pytest.approx(0, abs=1e-5)
    assert distillation[-1] > 0.01
    assert total == pytest.approx([a + b for a, b in zip(contrastive, distillation, strict=True)], rel=1e-3)


def test_resuming_goes_on_with_the_teacher(trained: Path) -> None:
    """Their --resume latest finds the model, we find its teacher, which counts on (trap 16)."""
    result = run(trained.parents[1], "--epochs", "3", "--resume", "latest")
    assert result.returncode == 0, result.stderr
    steps = [int(torch.load(trained / "checkpoints" / f"teacher_{epoch}.pth")["step"]) for epoch in (1, 2, 3)]
    assert steps == [4, 8, 12]


def test_the_teacher_stays_behind_the_model(trained: Path) -> None:
    """Of the same names, other values, as the average of a trajectory has."""
    student = torch.load(trained / "checkpoints" / "epoch_2.pt")["state_dict"]
    teacher = torch.load(trained / "checkpoints" / "teacher_2.pth")
    for name, value in student.items():
        assert teacher[f"module.{name}"].shape == value.shape
    assert not torch.equal(teacher["module.visual.proj"], student["visual.proj"])


def test_accumulation_without_a_teacher_is_refused(tmp_path: Path) -> None:
    """open_clip leaves the teacher out when it accumulates; that is said, not trained."""
    result = run(tmp_path, "--accum-freq", "2")
    assert result.returncode != 0
    assert "needs teacher_image_features" in result.stderr
