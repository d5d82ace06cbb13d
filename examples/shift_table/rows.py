"""The rows of the table: one pre-trained model, fine-tuned in the ways that the paper compares, and in some others.

Every row sees the same batches in the same order, with the same optimiser, for the same number of steps. Models stay in
eval mode throughout: BatchNorm keeps its pre-trained statistics, so that averaged weights fit the buffers beside them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

import open_clip
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import calrobust
from calrobust.functional import orthogonality_loss
from shift_table.data import Split, class_captions, context_captions, random_texts
from shift_table.model import DigitClassifier, zero_shot_classifier
from shift_table.training import optimizer_for, optimizer_step

ROWS = ("ZS", "FT", "FT w/ LS", "WiSE-FT", "WiSE-FT w/ LS", "FLYP", "FLYP w/ LS", "CaRot", "CaRot (NeurIPS)")
FURTHER_ROWS = ("TRACER", "CAR-FT", "Lipsum-FT")  # not in the table unless --rows asks for them
Penalty = Callable[[Tensor, Tensor], Tensor]  # of the features of images, and of those that the pre-trained model gives


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
    tracer: float = 0.9
    tracer_features: float = 2000.0  # times a mean over all entries, as its authors count
    contexts: float = 1.0
    random_texts: float = 0.1

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

    def ft(self, *, label_smoothing: float = 0.0, penalty: Penalty | None = None) -> DigitClassifier:
        """FT: the image tower and the zero-shot head, by cross-entropy."""
        model = copy.deepcopy(self.zero_shot)
        optimizer, schedule = self._optimizer(model)
        for images, _, target in self._batches():
            features = model.features(images)
            loss = F.cross_entropy(features @ model.weight.T, target, label_smoothing=label_smoothing)
            if penalty:
                with torch.no_grad():
                    pretrained = self.zero_shot.features(images)
                loss = loss + penalty(features, pretrained)
            loss.backward()
            optimizer_step(model, optimizer, schedule)
        return model

    def car_ft(self) -> DigitClassifier:
        """CAR-FT: FT that keeps the pre-trained model's softmax of each image over prompts of contexts."""
        contexts, scale = self._encoded(context_captions()), self._scale()
        distillation = self.recipe.contexts * calrobust.MultimodalDistillationLoss(direction="image_to_text")
        return self.ft(penalty=lambda x, pretrained: distillation(x, contexts, scale, pretrained, contexts, scale))

    def lipsum_ft(self) -> DigitClassifier:
        """Lipsum-FT: FT that keeps the pre-trained model's logits of each image with random texts, new ones a step."""
        generator, scale = Generator().manual_seed(self.seed), self._scale()

        def penalty(x: Tensor, pretrained: Tensor) -> Tensor:
            texts = self._encoded(random_texts(generator))
            return self.recipe.random_texts * F.mse_loss(scale * x @ texts.T, scale * pretrained @ texts.T) / 2

        return self.ft(penalty=penalty)

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

    def tracer(self) -> DigitClassifier:
        """TRACER: FLYP, with features and softmaxes held to a Beta-weighted mean of the student's path."""
        model = copy.deepcopy(self.clip)
        decay = calrobust.schedules.beta(0.5, 0.5, updates=self.recipe.steps(self.train))
        teacher = calrobust.EMATeacher(model, decay=decay)
        contrastive, distillation = calrobust.MultimodalContrastiveLoss, calrobust.MultimodalDistillationLoss
        # A mean over all entries is 2 / D times the mean of half the squared distances.
        features = 2 / self.zero_shot.weight.shape[1] * self.recipe.tracer_features
        near = 0.5 * distillation() + features * calrobust.FeatureDistillationLoss()
        criterion = contrastive() + self.recipe.tracer * near
        images_to_texts, texts_to_images = (
            0.5 * self.recipe.tracer * (contrastive(direction=way) + distillation(direction=way))
            for way in ("image_to_text", "text_to_image")
        )
        optimizer, schedule = self._optimizer(model)
        for images, captions, _ in self._batches():
            (x, y, scale), (x0, y0, scale0) = model(images, captions), teacher(images, captions)
            loss = criterion(x, y, scale, x0, y0, scale0)
            loss = loss + images_to_texts(x, y0, scale, x0, y0, scale0) + texts_to_images(x0, y, scale, x0, y0, scale0)
            loss.backward()
            optimizer_step(model, optimizer, schedule)
            teacher.update(model)
        return zero_shot_classifier(model)

    def _scale(self) -> float:
        return float(self.clip.logit_scale.exp().item())

    @torch.no_grad()
    def _encoded(self, texts: Tensor) -> Tensor:
        """Features of tokens by the pre-trained text tower."""
        features: Tensor = self.clip.encode_text(texts.to(self.clip.logit_scale.device), normalize=True)
        return features

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
    clip: open_clip.CLIP, train: Split, recipe: FineTuning, seed: int, rows: Sequence[str] = ROWS
) -> Iterator[tuple[str, DigitClassifier]]:
    """The name and classifier of each of ``rows``, made when it is asked for."""
    trained = {row.removeprefix("WiSE-") for row in rows} - {"ZS"}  # WiSE-FT averages weights of rows that are trained
    with tqdm(total=len(trained) * recipe.steps(train), unit="step") as progress:
        trainer = Trainer(clip, train, recipe, seed, progress)
        ft, smoothing = cache(trainer.ft), {"label_smoothing": recipe.label_smoothing}
        ways: dict[str, Callable[[], DigitClassifier]] = {
            "ZS": lambda: trainer.zero_shot,
            "FT": ft,
            "FT w/ LS": partial(ft, **smoothing),
            "WiSE-FT": lambda: trainer.wise_ft(ft()),
            "WiSE-FT w/ LS": lambda: trainer.wise_ft(ft(**smoothing)),
            "FLYP": trainer.flyp,
            "FLYP w/ LS": partial(trainer.flyp, **smoothing),
            "CaRot": trainer.carot,
            "CaRot (NeurIPS)": partial(trainer.carot, orthogonality=recipe.orthogonality),
            "TRACER": trainer.tracer,
            "CAR-FT": trainer.car_ft,
            "Lipsum-FT": trainer.lipsum_ft,
        }
        for row in rows:
            progress.set_description(f"seed {seed}: {row}")
            yield row, ways[row]()
