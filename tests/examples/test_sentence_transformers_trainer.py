from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentence_transformers_trainer as example
import torch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch.testing import assert_close

import calrobust as cr


@pytest.mark.slow
def test_learns_and_keeps_the_teacher(tmp_path: Path) -> None:
    """As a user runs it: the averaged weights name every square, terms are logged, a checkpoint holds the teacher."""
    command = [sys.executable, example.__file__, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "after 80 steps the averaged weights name 6 of 6 squares" in result.stdout
    assert "'contrastive': " in result.stdout
    assert "'distillation': " in result.stdout
    (path,) = tmp_path.glob("checkpoint-*/teacher.pt")
    assert torch.load(path, weights_only=True)["step"] == 80


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_is_their_symmetric_loss_without_a_teacher(tmp_path: Path) -> None:
    """Value and gradients of every weight are equal; with the model as its own teacher the distillation is 0."""
    torch.manual_seed(0)
    model = example.make_model(tmp_path)
    data = example.make_data(len(example.COLORS))
    columns = [model.preprocess(data[name]) for name in ("image", "caption")]
    both: Any = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    theirs = MultipleNegativesRankingLoss(model, **both)
    criterion = cr.MultimodalContrastiveLoss()
    ours = example.PairLoss(model, criterion)
    values, gradients = [], []
    for loss in (ours, theirs):
        output = loss([dict(column) for column in columns], None)
        value = output["contrastive"] if isinstance(output, dict) else output
        values.append(value)
        parameters = [parameter for name, parameter in model.named_parameters() if "logit_scale" not in name]
        gradients.append(torch.autograd.grad(value, parameters))
    assert_close(values[0], values[1])
    assert_close(gradients[0], gradients[1])
    teacher = cr.EMATeacher(model)
    taught = example.PairLoss(model.eval(), criterion + 2 * cr.MultimodalDistillationLoss(), teacher)
    assert_close(taught(columns)["distillation"], torch.tensor(0.0))
    assert {id(p) for p in taught.parameters()} == {id(p) for p in model.parameters()}  # the optimiser's
