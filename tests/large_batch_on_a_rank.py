"""What each of two ranks checks of ``examples/large_batch.py``; run by tests/examples/test_large_batch.py."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "examples"))

import pytest
import torch
import torch.distributed as dist
from large_batch import TwoTowers, backward_in_chunks
from leaving import leave_together
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from calrobust import CaRotLoss, EMATeacher

dist.init_process_group("gloo")
torch.manual_seed(0)  # the same weights and the same whole batch on both ranks
alone = TwoTowers().double()
images, texts = torch.randn(13, 64).double(), torch.randn(13, 64).double()
teacher = EMATeacher(TwoTowers().double())
expected = CaRotLoss(label_smoothing=0.1, distillation_weight=1.5)(*alone(images, texts), *teacher(images, texts))
expected.backward()

own = slice(0, 8) if dist.get_rank() == 0 else slice(8, 13)
model = DistributedDataParallel(copy.deepcopy(alone))
criterion = CaRotLoss(label_smoothing=0.1, distillation_weight=1.5, gather=True)
for chunk in (3, 8, 5, 1):  # chunks a rank: 3 and 2, 1 and 1, 2 and 1, 8 and 5
    compiled: Any = torch.compile(model, backend="eager")
    for student in (model, compiled):
        model.zero_grad()
        loss = backward_in_chunks(criterion, student, teacher, images[own], texts[own], chunk)
        assert_close(loss, expected.detach())
        for ours, whole in zip(model.parameters(), alone.parameters(), strict=True):
            assert_close(ours.grad, whole.grad, rtol=1e-9, atol=1e-12)
static = DistributedDataParallel(copy.deepcopy(alone), static_graph=True)
with pytest.raises(ValueError, match="static_graph=False"):
    backward_in_chunks(criterion, static, teacher, images[own], texts[own], 3)
leave_together()
