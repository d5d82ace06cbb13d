"""The rows of the table: one pre-trained model, fine-tuned in the ways that the paper compares.

Every row sees the same batches in the same order, with the same optimiser, for the same number of steps. Models stay in
eval mode throughout: BatchNorm keeps its pre-trained statistics, so that averaged weights fit the buffers beside them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import open_clip
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import calrobust
from calrobust.functional import orthogonality_loss
from shift_table.data import Split, class_captions
from shift_table.model import DigitClassifier, zero_shot_classifier
from shift_table.training import optimizer_for, optimizer_step

ROWS = ("ZS", "FT", "FT w/ LS", "WiSE-FT", "WiSE-FT w/ LS", "FLYP", "FLYP w/ LS", "CaRot", "CaRot (NeurIPS)")
TRAINED_ROWS = 6  # the others are the pre-trained model and averages of weights


@dataclass(frozen=True)
class FineTuning:
    """How every row is fine-tuned."""

    epochs: int = 60
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    label_smoothing: float = 0.02  # small, because the run is short: 0.1 would leave ID confidence far too low
    distillation_weight: float = 0.5
    teacher_decay: float = 0.99  # fits 240 steps: at 0.97 the teacher has soon forgotten, at 0.999 it hardly moves
    orthogonality: float = 0.2
    wise_ft_alpha: float = 0.5

    def steps(self, train: Split) -> int:
        """Optimiser steps of one row; the last, incomplete batch of an epoch is left out."""
        return self.epochs * (len(train.target) // self.batch_size)


class Trainer:
    """The pre-trained model, the training images and the recipe; each method fine-tunes a fresh copy of the model."""

    def __init__(self, clip: open_clip.CLIP, train: Split, recipe: FineTuning, seed: int, progress: tqdm) -> None:
        self.clip = clip
        self.zero_shot = zero_shot_classifier(clip)
        self.train = train
        self.recipe = recipe
        self.seed = seed
        self.progress = progress

    def ft(self, *, label_smoothing: float = 0.0) -> DigitClassifier:
        """FT: the image tower and the zero-shot head, by cross-entropy."""
        model = copy.deepcopy(self.zero_shot)
        optimizer, schedule = self._optimizer(model)
        for images, _, target in self._batches():
            loss = F.cross_entropy(model(images), target, label_smoothing=label_smoothing)
            loss.backward()
            optimizer_step(model, optimizer, schedule)
        return model

    def wise_ft(self, fine_tuned: DigitClassifier) -> DigitClassifier:
        """WiSE-FT: halfway between the weights of the zero-shot and of a fine-tuned classifier."""
        model = copy.deepcopy(self.zero_shot)
        model.load_state_dict(calrobust.interpolate(self.zero_shot, fine_tuned, self.recipe.wise_ft_alpha))
        return model

    def flyp(self, *, label_smoothing: float = 0.0) -> DigitClassifier:
        """FLYP: both towers, by the loss they were pre-trained with."""
        model = copy.deepcopy(self.clip)
        criterion = calrobust.MultimodalContrastiveLoss(label_smoothing=label_smoothing)
        optimizer, schedule = self._optimizer(model)
        for images, captions, _ in self._batches():
            loss = criterion(*model(images, captions))
            loss.backward()
            optimizer_step(model, optimizer, schedule)
        return zero_shot_classifier(model)

    def carot(self, *, orthogonality: float = 0.0) -> DigitClassifier:
        """CaRot: FLYP with label smoothing, held to a teacher that follows the student; NeurIPS: + orthogonality."""
        model = copy.deepcopy(self.clip)
        teacher = calrobust.EMATeacher(model, decay=self.recipe.teacher_decay)
        criterion = calrobust.CaRotLoss(
            label_smoothing=self.recipe.label_smoothing, distillation_weight=self.recipe.distillation_weight
        )
        optimizer, schedule = self._optimizer(model)
        for images, captions, _ in self._batches():
            loss = criterion(*model(images, captions), *teacher(images, captions))
            if orthogonality:
                loss = loss + orthogonality * orthogonality_loss(model.visual.attnpool.c_proj)
            loss.backward()
            optimizer_step(model, optimizer, schedule)
            teacher.update(model)
        return zero_shot_classifier(model)

    def _optimizer(self, model: nn.Module) -> tuple[AdamW, LambdaLR]:
        return optimizer_for(
            model,
            steps=self.recipe.steps(self.train),
            learning_rate=self.recipe.learning_rate,
            weight_decay=self.recipe.weight_decay,
            betas=(0.9, 0.999),
            warm_up=0.1,
        )

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Images, captions and targets of one whole run, alike for every row; a caption's template is random.

        Captions of one class in a batch are each other's negatives, as in the paper. If a class had one caption, that
        would only add a constant to the loss; with four it changes little. Passing ``labels`` to the loss avoids it.
        """
        generator = Generator().manual_seed(self.seed)
        captions = class_captions().to(self.train.target.device)
        size = self.recipe.batch_size
        for _ in range(self.recipe.epochs):
            order = torch.randperm(len(self.train.target), generator=generator)
            for batch in torch.split(order[: len(order) // size * size], size):
                target = self.train.target[batch]
                template = torch.randint(0, captions.shape[1], (size,), generator=generator)
                yield self.train.images[batch], captions[target, template.to(target.device)], target
                self.progress.update()


def fine_tuned_rows(
    clip: open_clip.CLIP, train: Split, recipe: FineTuning, seed: int
) -> Iterator[tuple[str, DigitClassifier]]:
    """Every row's name and classifier, each made when it is asked for."""
    with tqdm(total=TRAINED_ROWS * recipe.steps(train), unit="step") as progress:
        trainer = Trainer(clip, train, recipe, seed, progress)

        def phase(row: str) -> str:
            progress.set_description(f"seed {seed}: {row}")
            return row

        smoothing = recipe.label_smoothing
        yield phase("ZS"), trainer.zero_shot
        yield phase("FT"), (ft := trainer.ft())
        yield phase("FT w/ LS"), (ft_smoothed := trainer.ft(label_smoothing=smoothing))
        yield phase("WiSE-FT"), trainer.wise_ft(ft)
        yield phase("WiSE-FT w/ LS"), trainer.wise_ft(ft_smoothed)
        yield phase("FLYP"), trainer.flyp()
        yield phase("FLYP w/ LS"), trainer.flyp(label_smoothing=smoothing)
        yield phase("CaRot"), trainer.carot()
        yield phase("CaRot (NeurIPS)"), trainer.carot(orthogonality=recipe.orthogonality)
