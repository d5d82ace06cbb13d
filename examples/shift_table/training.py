"""What pre-training and fine-tuning share: AdamW as CLIP models need it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

MAX_LOG_SCALE = math.log(100.0)  # CLIP's own bound; an unbounded logit scale is a hidden temperature


def optimizer_for(
    model: nn.Module,
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    warm_up: float,
) -> tuple[AdamW, LambdaLR]:
    """AdamW and its schedule: linear warm-up over a share ``warm_up`` of the steps, then a cosine down to zero.

    Only matrices decay: norms and biases should not, and the logit scale would shrink without any gradient.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=learning_rate, betas=betas, fused=True)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / (warm_up * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))

    return optimizer, LambdaLR(optimizer, factor)


def optimizer_step(model: nn.Module, optimizer: AdamW, schedule: LambdaLR) -> None:
    """One step along the gradient, clipped to norm 1; the logit scale stays within [1, 100]."""
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    logit_scale = getattr(model, "logit_scale", None)
    if isinstance(logit_scale, Tensor):
        with torch.no_grad():
            logit_scale.clamp_(0.0, MAX_LOG_SCALE)
