"""``examples/open_clip_trainer.py`` on one of several CPUs; run by tests/examples/test_open_clip_trainer.py."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "examples"))

import open_clip_trainer
import torch
from leaving import leave_together
from torch.nn.parallel import DistributedDataParallel

from calrobust import MultimodalContrastiveLoss
from calrobust.integrations.open_clip import OpenClipLoss


class OnCPUs(DistributedDataParallel):
    """open_clip names a device, which torch takes for GPUs alone."""

    def __init__(self, module: torch.nn.Module, device_ids: Any = None, **options: Any) -> None:
        super().__init__(module, **options)


torch.nn.parallel.DistributedDataParallel = OnCPUs  # type: ignore[assignment,misc]
assert not open_clip_trainer.main(sys.argv[1:])

alone, features = OpenClipLoss(MultimodalContrastiveLoss()), (torch.eye(2), torch.eye(2), 1.0)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    alone(*features)
assert "pass gather=True" in str(caught[0].message)
with warnings.catch_warnings():
    warnings.simplefilter("error")
    OpenClipLoss(MultimodalContrastiveLoss(gather=True))(*features)
leave_together()
