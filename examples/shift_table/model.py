"""The model, a CLIP small enough to train on a CPU in two minutes, and its pre-training."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import calrobust
from shift_table.cache import load_or_build
from shift_table.data import CONTEXT, END, NAMES, TEMPLATES, WebData, tokenize
from shift_table.pictures import PICTURE


@dataclass(frozen=True)
class Pretraining:
    """How the zero-shot model is made."""

    steps: int = 1000
    per_style: int = 14  # pictures a step in each of the six styles
    learning_rate: float = 2e-3
    nudged: bool = False  # one weight is moved by its last digit: what difference does rounding make?


def new_clip(seed: int) -> open_clip.CLIP:
    """An untrained CLIP, a ResNet and a two-layer text tower, with weights that are alike on every CPU.

    It is of float64. Training multiplies rounding errors by a million, so float32 gives every CPU another model.
    """
    clip = open_clip.CLIP(
        embed_dim=64,
        vision_cfg={"layers": (1, 1, 1, 1), "width": 16, "head_width": 16, "image_size": PICTURE},
        text_cfg={"context_length": CONTEXT, "vocab_size": END + 1, "width": 64, "heads": 2, "layers": 2},
    )
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in clip.parameters():
            if parameter.ndim >= 2:  # norms and the logit scale start as constants
                bound = parameter[0].numel() ** -0.5
                drawn = rng.random(parameter.shape, np.float32)
                parameter.copy_(torch.from_numpy(np.float32(2 * bound) * (drawn - np.float32(0.5))))
            elif parameter.ndim == 1 and not torch.equal(parameter, torch.ones_like(parameter)):
                parameter.zero_()
    return clip.double().to(memory_format=torch.channels_last)  # a CPU's convolutions are a quarter faster so


class Classifier(nn.Module):
    """An image tower and a linear head on its unit-norm features: the form in which every row is tested."""

    def __init__(self, visual: nn.Module, weight: Tensor) -> None:
        super().__init__()
        self.visual = copy.deepcopy(visual)
        self.weight = nn.Parameter(weight)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, 10]`` of pictures ``[N, 3, 32, 32]``."""
        return self.features(images) @ self.weight.T

    def features(self, images: Tensor) -> Tensor:
        """Unit-norm features ``[N, 64]``."""
        return F.normalize(self.visual(images), dim=-1)


@torch.no_grad()
def zero_shot(clip: open_clip.CLIP) -> Classifier:
    """The classifier that CLIP's text tower makes of the captions of the ten digits."""
    weight = calrobust.zero_shot_classifier(clip, tokenize, NAMES[:10], TEMPLATES)
    return Classifier(clip.visual, clip.logit_scale.exp() * weight).eval()


class Optimizer:
    """AdamW with warm-up, then a cosine down to zero, and what a CLIP needs: a clipped gradient, a bounded scale."""

    def __init__(self, model: nn.Module, steps: int, learning_rate: float, weight_decay: float, warm_up: float) -> None:
        self.model = model
        parameters = [*model.parameters()]
        groups = [  # only matrices decay: the logit scale would shrink without any gradient
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, lr=learning_rate, fused=True)

        def factor(step: int) -> float:
            return min(1.0, (step + 1) / (warm_up * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adam, factor)

    def step(self, loss: Tensor) -> None:
        """Goes down ``loss``."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.adam.step()
        self.adam.zero_grad()
        self.schedule.step()
        if isinstance(scale := getattr(self.model, "logit_scale", None), Tensor):
            scale.data.clamp_(0, math.log(100))  # CLIP's own bound; an unbounded scale is a hidden temperature


def pretrained(recipe: Pretraining, seed: int, cache: Path, bar: tqdm) -> open_clip.CLIP:
    """A pre-trained model in eval mode: from ``cache`` if it holds this very one, else made now."""
    clip = new_clip(seed)
    if recipe.nudged:
        gain = clip.visual.bn1.weight.data
        gain[0] = torch.nextafter(gain[0], gain.new_tensor(2.0))

    def build() -> dict[str, Tensor]:
        web, criterion = WebData(seed), calrobust.MultimodalContrastiveLoss()
        optimizer = Optimizer(clip.train(), recipe.steps, recipe.learning_rate, weight_decay=0.05, warm_up=1 / 6)
        bar.reset(recipe.steps)
        for _ in range(recipe.steps):
            pictures, captions = web.batch(recipe.per_style)
            optimizer.step(criterion(*clip(pictures.double(), captions)))
            bar.update()
        weights: dict[str, Tensor] = clip.state_dict()
        return weights

    name = f"shift_table_{recipe.steps}{'_nudged' * recipe.nudged}_{seed}.clip"
    clip.load_state_dict(load_or_build(cache / name, {**asdict(recipe), "seed": seed}, build))
    return clip.eval()
