from __future__ import annotations

import math
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import open_clip_trainer
import pytest
import torch
from leaving import torchrun

from calrobust import MultimodalContrastiveLoss

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


@pytest.mark.slow
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


@pytest.mark.slow
def test_two_ranks_contrast_each_others_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 pairs, of which each rank has 8: an untrained model's loss is near log(16), and not near log(8)."""
    monkeypatch.chdir(tmp_path)
    torchrun(Path(__file__).parents[1] / "open_clip_on_a_rank.py", "--epochs", "1")
    log = (tmp_path / "open_clip_run" / "carot" / "out.log").read_text()
    first = float(log.split("Contrastive_loss: ")[1].split()[0])
    assert abs(first - math.log(16)) < abs(first - math.log(8))


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--precision", "amp_bf16"), ("--torchcompile",), ("--grad-clip-norm", "1.0")])
def test_options_of_their_trainer_train_the_teacher_as_well(options: tuple[str, ...], tmp_path: Path) -> None:
    """Under autocast and compiled, it follows every step, and the distillation starts at 0."""
    result = run(tmp_path, "--epochs", "1", *options)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "open_clip_run" / "carot"
    assert int(torch.load(folder / "checkpoints" / "teacher_1.pth", weights_only=True)["step"]) == 4
    first, *_ = re.findall(r"Distillation_loss: (\S+)", (folder / "out.log").read_text())
    assert float(first) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"horovod": True}, r"--horovod has no process group.*torchrun"),
        ({"distill": True}, r"--distill-model names a fixed teacher"),
        ({"accum_freq": 2}, r"--accum-freq must be 1: open_clip asks no teacher when it accumulates gradients"),
    ],
)
def test_options_that_would_be_without_effect_are_refused(option: dict[str, int], message: str) -> None:
    """Each rank of Horovod would contrast its own pairs alone, and the fixed teacher would never be asked."""
    epochs = open_clip_trainer.CaRotEpochs(MultimodalContrastiveLoss())
    arguments = Namespace(**{"horovod": False, "distill": False, "accum_freq": 1, "checkpoint_path": "", **option})
    with pytest.raises(ValueError, match=message):
        epochs(None, None, None, 0, None, None, None, None, arguments)
