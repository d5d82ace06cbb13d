from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
import transformers_trainer
from transformers import CLIPModel, TrainingArguments

import calrobust as cr


@pytest.fixture
def printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What a run prints."""
    transformers_trainer.main(tmp_path)
    return capsys.readouterr().out.splitlines()


def test_learns_and_keeps_the_teacher(printed: list[str], tmp_path: Path) -> None:
    """The loss of the averaged weights falls, and each checkpoint has its teacher."""
    logs = [ast.literal_eval(line) for line in printed if line.startswith("{")]
    losses = [float(log["eval_loss"]) for log in logs if "eval_loss" in log]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 3
    assert printed[-1] == "the teacher followed 12 steps of the optimiser"
    kept = [int(torch.load(path)["step"]) for path in tmp_path.glob("checkpoint-*/teacher.pt")]
    assert sorted(kept) == [4, 8, 12]


@pytest.mark.slow
def test_evaluates_the_averaged_weights(tmp_path: Path) -> None:
    """A student that is lost does not show, and is the student again afterwards."""
    model = CLIPModel(transformers_trainer.CONFIG)
    trainer = transformers_trainer.CaRotTrainer(
        model,
        TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, dataloader_pin_memory=False),
        eval_dataset=transformers_trainer.make_data(8, seed=0),
        criterion=cr.MultimodalContrastiveLoss() + cr.MultimodalDistillationLoss(),
        teacher=cr.EMATeacher(model),
    )
    before = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        model.visual_projection.weight.fill_(torch.nan)
    assert trainer.evaluate()["eval_loss"] == before
    assert model.visual_projection.weight.isnan().all()
