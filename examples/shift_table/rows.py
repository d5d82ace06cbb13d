"""The rows of the table: one pre-trained model, fine-tuned in the ways that the paper compares, and in some others.

Every row sees the same batches in the same order, with the same optimiser, for the same number of steps. Models stay in
eval mode throughout: BatchNorm keeps its pre-trained statistics, so that averaged weights fit the buffers beside them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import calrobust as cr
from shift_table.data import CONTEXTS, Split, class_captions, random_texts, tokenize
from shift_table.model import Classifier, Optimizer, zero_shot

Penalty = Callable[[Tensor, Tensor], Tensor]  # of the features of images, and of those that the pre-trained model gives

BATCH = 64


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of a row; a row ignores what it has no use for."""

    learning_rate: float = 1e-3
    label_smoothing: float = 0.0
    distillation_weight: float = 0.0
    teacher_decay: float = 1.0
    orthogonality: float = 0.0


class FineTuning:
    """The pre-trained model and the training images; each method fine-tunes a fresh copy of the model."""

    def __init__(self, clip: open_clip.CLIP, train: Split, epochs: int, seed: int, bar: tqdm) -> None:
        self.clip, self.zero_shot = clip, zero_shot(clip)
        self.train = Split(train.images.to(clip.logit_scale.dtype), train.target)
        self.epochs, self.seed, self.bar = epochs, seed, bar

    def ft(self, recipe: Recipe, penalty: Penalty | None = None) -> Classifier:
        """FT: the image tower and the zero-shot head, by cross-entropy, which is one direction of our loss."""
        model = copy.deepcopy(self.zero_shot)
        criterion = cr.MultimodalContrastiveLoss(label_smoothing=recipe.label_smoothing, direction="image_to_text")
        optimizer, classes = self._optimizer(model, recipe), torch.arange(len(model.weight))
        for images, _, target in self._batches():
            features = model.features(images)
            loss = criterion(features, model.weight, 1.0, labels=(target, classes))
            if penalty:
                with torch.no_grad():
                    pretrained = self.zero_shot.features(images)
                loss = loss + penalty(features, pretrained)
            optimizer.step(loss)
        return model

    def flyp(self, recipe: Recipe) -> Classifier:
        """FLYP: both towers, by the loss they were pre-trained with."""
        model = copy.deepcopy(self.clip)
        criterion = cr.MultimodalContrastiveLoss(label_smoothing=recipe.label_smoothing)
        optimizer = self._optimizer(model, recipe)
        for images, captions, _ in self._batches():
            optimizer.step(criterion(*model(images, captions)))
        return zero_shot(model)

    def carot(self, recipe: Recipe) -> Classifier:
        """CaRot: FLYP with label smoothing, held to a teacher that follows the student; NeurIPS: + orthogonality."""
        model = copy.deepcopy(self.clip)
        teacher = cr.EMATeacher(model, decay=recipe.teacher_decay)
        criterion = cr.CaRotLoss(label_smoothing=recipe.label_smoothing, distillation_weight=recipe.distillation_weight)
        orthogonality = cr.OrthogonalityLoss()
        optimizer = self._optimizer(model, recipe)
        for images, captions, _ in self._batches():
            loss = criterion(*model(images, captions), *teacher(images, captions))
            if recipe.orthogonality:
                loss = loss + recipe.orthogonality * orthogonality(model.visual.attnpool.c_proj)
            optimizer.step(loss)
            teacher.update(model)
        return zero_shot(model)

    def tracer(self, recipe: Recipe) -> Classifier:
        """TRACER: FLYP, with features and softmaxes held to a Beta-weighted mean of the student's path."""
        model = copy.deepcopy(self.clip)
        teacher = cr.EMATeacher(model, decay=cr.schedules.beta(0.5, 0.5, updates=self.steps))
        contrastive, distillation = cr.MultimodalContrastiveLoss, cr.MultimodalDistillationLoss
        features = 2 / self.zero_shot.weight.shape[1] * 2000  # its authors' mean is over all entries
        criterion = contrastive() + 0.9 * (0.5 * distillation() + features * cr.FeatureDistillationLoss())
        images_to_texts, texts_to_images = (
            0.9 * 0.5 * (contrastive(direction=way) + distillation(direction=way))
            for way in ("image_to_text", "text_to_image")
        )
        optimizer = self._optimizer(model, recipe)
        for images, captions, _ in self._batches():
            (x, y, scale), (x0, y0, scale0) = model(images, captions), teacher(images, captions)
            loss = criterion(x, y, scale, x0, y0, scale0)
            loss = loss + images_to_texts(x, y0, scale, x0, y0, scale0) + texts_to_images(x0, y, scale, x0, y0, scale0)
            optimizer.step(loss)
            teacher.update(model)
        return zero_shot(model)

    def car_ft(self, recipe: Recipe) -> Classifier:
        """CAR-FT: FT that keeps the pre-trained model's softmax of each image over prompts of contexts."""
        contexts, scale = self._encoded(tokenize(CONTEXTS)), self._scale()
        distillation = cr.MultimodalDistillationLoss(direction="image_to_text")
        return self.ft(recipe, lambda x, pretrained: distillation(x, contexts, scale, pretrained, contexts, scale))

    def lipsum_ft(self, recipe: Recipe) -> Classifier:
        """Lipsum-FT: FT that keeps the pre-trained model's logits of each image with random texts, new ones a step."""
        rng, scale = np.random.default_rng(self.seed), self._scale()

        def penalty(x: Tensor, pretrained: Tensor) -> Tensor:
            texts = self._encoded(random_texts(rng))
            return 0.1 * F.mse_loss(scale * x @ texts.T, scale * pretrained @ texts.T) / 2

        return self.ft(recipe, penalty)

    def wise_ft(self, fine_tuned: Classifier, alpha: float) -> Classifier:
        """WiSE-FT: between the weights of the zero-shot and of a fine-tuned classifier."""
        model = copy.deepcopy(self.zero_shot)
        model.load_state_dict(cr.interpolate(self.zero_shot, fine_tuned, alpha))
        return model

    @property
    def steps(self) -> int:
        """The number of steps of a row; the last, incomplete batch of an epoch is left out."""
        return self.epochs * (len(self.train.target) // BATCH)

    def _scale(self) -> float:
        return float(self.clip.logit_scale.exp().item())

    @torch.no_grad()
    def _encoded(self, texts: Tensor) -> Tensor:
        features: Tensor = self.clip.encode_text(texts, normalize=True)
        return features

    def _optimizer(self, model: nn.Module, recipe: Recipe) -> Optimizer:
        return Optimizer(model, self.steps, recipe.learning_rate, weight_decay=0.1, warm_up=0.1)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Images, captions and targets of one whole run, alike for every row; a caption's template is random.

        Captions of one class in a batch are each other's negatives, as in the paper. If a class had one caption, that
        would only add a constant to the loss; with four it changes little. Passing ``labels`` to the loss avoids it.
        """
        rng, captions = np.random.default_rng(self.seed), class_captions()
        self.bar.reset(self.steps)
        for _ in range(self.epochs):
            order = torch.from_numpy(rng.permutation(len(self.train.target)))
            for batch in order[: len(order) // BATCH * BATCH].split(BATCH):
                target = self.train.target[batch]
                template = torch.from_numpy(rng.integers(0, captions.shape[1], BATCH))
                yield self.train.images[batch], captions[target, template], target
                self.bar.update()


WAYS: dict[str, Callable[[FineTuning, Recipe], Classifier]] = {
    "FT": FineTuning.ft,
    "FT w/ LS": FineTuning.ft,
    "FLYP": FineTuning.flyp,
    "FLYP w/ LS": FineTuning.flyp,
    "CaRot": FineTuning.carot,
    "CaRot (NeurIPS)": FineTuning.carot,
    "TRACER": FineTuning.tracer,
    "CAR-FT": FineTuning.car_ft,
    "Lipsum-FT": FineTuning.lipsum_ft,
}
AVERAGED = {"FT": "WiSE-FT", "FT w/ LS": "WiSE-FT w/ LS"}  # what is averaged with the zero-shot classifier
ROWS = ("ZS", "FT", "FT w/ LS", "WiSE-FT", "WiSE-FT w/ LS", "FLYP", "FLYP w/ LS", "CaRot", "CaRot (NeurIPS)")
FURTHER_ROWS = ("TRACER", "CAR-FT", "Lipsum-FT")  # not in the table unless --rows asks for them

RECIPES = {  # the choices of protocol.md
    "FT": Recipe(2.828e-3),
    "FT w/ LS": Recipe(1.414e-3, label_smoothing=0.025),
    "FLYP": Recipe(2.828e-3),
    "FLYP w/ LS": Recipe(2e-3, label_smoothing=0.0125),
    "CaRot": Recipe(2e-3, label_smoothing=0.0125, distillation_weight=0.1875, teacher_decay=0.9571),
    "CaRot (NeurIPS)": Recipe(
        2e-3, label_smoothing=0.0125, distillation_weight=0.04688, teacher_decay=0.9893, orthogonality=0.8
    ),
    "TRACER": Recipe(2.828e-3),  # FLYP's
    "CAR-FT": Recipe(2.828e-3),  # FT's
    "Lipsum-FT": Recipe(2.828e-3),
}
ALPHAS = {"WiSE-FT": 0.1, "WiSE-FT w/ LS": 0.1}  # of the fine-tuned weights
