"""Pre-training: what makes the model zero-shot. Plain contrastive learning, once per seed, then kept in the cache."""

from __future__ import annotations

import hashlib
import inspect
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import open_clip
import torch
from torch import Generator
from tqdm import tqdm

import calrobust
from shift_table import data, drawing, model, training
from shift_table.checkpoint import load_or_build
from shift_table.data import WebData
from shift_table.model import new_clip
from shift_table.training import optimizer_for, optimizer_step


@dataclass(frozen=True)
class Pretraining:
    """How the zero-shot model is made."""

    steps: int = 600
    per_style: int = 18  # pictures a step in each of the seven styles
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    warm_up: float = 1 / 6


def pretrained_clip(recipe: Pretraining, seed: int, device: torch.device, cache: Path) -> open_clip.CLIP:
    """The pre-trained model on ``device``, in eval mode: from ``cache`` if it holds this very recipe, else made now."""
    clip = new_clip(seed).to(device)
    weights = load_or_build(
        cache / f"shift_table_{recipe.steps}_steps_seed_{seed}.ckpt",
        _fingerprint(recipe, seed, device),
        lambda: pretrain(clip, recipe, seed).state_dict(),
    )
    clip.load_state_dict(weights)
    return clip.eval()


def pretrain(clip: open_clip.CLIP, recipe: Pretraining, seed: int) -> open_clip.CLIP:
    """Trains ``clip`` in place on captioned characters in every style."""
    device = clip.logit_scale.device
    web = WebData(Generator().manual_seed(seed))
    criterion = calrobust.MultimodalContrastiveLoss()
    optimizer, schedule = optimizer_for(
        clip,
        steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        betas=recipe.betas,
        warm_up=recipe.warm_up,
    )
    clip.train()
    for _ in tqdm(range(recipe.steps), desc=f"seed {seed}: pre-training", unit="step"):
        images, captions = web.batch(recipe.per_style)
        loss = criterion(*clip(images.to(device), captions.to(device)))
        loss.backward()
        optimizer_step(clip, optimizer, schedule)
    return clip


def _fingerprint(recipe: Pretraining, seed: int, device: torch.device) -> dict[str, object]:
    """Everything the weights follow from, the code included, so that the cache never answers for another recipe."""
    modules = (drawing, data, model, training, sys.modules[__name__])
    source = "".join(inspect.getsource(module) for module in modules)
    return {
        **asdict(recipe),
        "seed": seed,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
        "code": hashlib.sha256(source.encode()).hexdigest(),
    }
