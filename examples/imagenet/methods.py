"""The rows of the table: what is trained, and by which loss."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import calrobust
from calrobust.functional import orthogonality_loss
from imagenet.model import Classifier, Model, projection
from imagenet.options import Options
from imagenet.pictures import Batch
from imagenet.processes import Processes

MAX_LOG_SCALE = math.log(100.0)  # CLIP's own bound; an unbounded logit scale is a hidden temperature


class Method(ABC):
    """A network in training; ``steps`` is how long."""

    teacher: calrobust.EMATeacher | None = None

    def __init__(self, options: Options, model: Model, network: nn.Module, steps: int) -> None:
        self.options, self.model, self.network, self.steps = options, model, network, steps
        matrices = [p for p in network.parameters() if p.requires_grad and p.ndim >= 2]
        others = [p for p in network.parameters() if p.requires_grad and p.ndim < 2]  # logit scale, biases, norms
        groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, fused=True)

    @abstractmethod
    def terms(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The loss, term by term; ``network`` is ours, wrapped or not."""

    @abstractmethod
    def classifier(self) -> Classifier:
        """What the network is by now, in the form in which it is tested."""

    def after_step(self) -> dict[str, float]:
        """What follows the optimiser's step; gives values to log."""
        return {}


class Classification(Method):
    """FT: the image tower and a head from the text weights, by cross-entropy. WiSE-FT: α is chosen afterwards."""

    def __init__(self, options: Options, model: Model, steps: int) -> None:
        self.zero_shot = model.classifier(model.clip)
        super().__init__(options, model, copy.deepcopy(self.zero_shot), steps)

    def terms(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy."""
        smoothing = self.options.label_smoothing
        return {"cross_entropy": F.cross_entropy(network(batch.images), batch.target, label_smoothing=smoothing)}

    def classifier(self) -> Classifier:
        """The network itself."""
        return copy.deepcopy(self.network)  # type: ignore[return-value] # a Classifier since __init__

    def interpolated(self, alpha: float) -> Classifier:
        """WiSE-FT: a share ``alpha`` of the way from the zero-shot to the fine-tuned weights."""
        classifier = copy.deepcopy(self.zero_shot)
        classifier.load_state_dict(calrobust.interpolate(self.zero_shot, self.network, alpha))
        return classifier


class Contrast(Method):
    """FLYP and CaRot: both towers, by the loss they were pre-trained with; CaRot holds them to a moving teacher."""

    def __init__(self, options: Options, model: Model, steps: int, processes: Processes) -> None:
        super().__init__(options, model, model.clip, steps)
        gather = processes.world_size > 1
        self.criterion: nn.Module
        if options.distillation_weight:
            self.criterion = calrobust.CaRotLoss(
                label_smoothing=options.label_smoothing,
                distillation_weight=options.distillation_weight,
                gather=gather,
            )
            updates = max(1, steps // 5 // options.teacher_every)  # the first fifth of the training
            decay = calrobust.schedules.linear_warmup(0.05, 0.9, updates=updates)
            self.teacher = calrobust.EMATeacher(self.network, decay, update_every=options.teacher_every)
        else:
            self.criterion = calrobust.MultimodalContrastiveLoss(label_smoothing=options.label_smoothing, gather=gather)
        if options.orthogonality:
            projection(self.network)  # says now if there is none

    def terms(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Contrast, and what CaRot adds to it."""
        pairs = batch.images, batch.captions
        teacher = () if self.teacher is None else self.teacher(*pairs)[:3]
        terms: dict[str, Tensor] = self.criterion.terms(*network(*pairs)[:3], *teacher)
        if self.options.orthogonality:
            weight = projection(self.network)
            with torch.autocast(batch.images.device.type, enabled=False):
                terms["orthogonality"] = self.options.orthogonality * orthogonality_loss(weight)
        return terms

    def classifier(self) -> Classifier:
        """The text tower's."""
        return self.model.classifier(self.network)

    @torch.no_grad()
    def after_step(self) -> dict[str, float]:
        """Bounds the logit scale and moves the teacher."""
        scale: Tensor = self.network.logit_scale  # type: ignore[assignment] # every CLIP has it
        scale.clamp_(0.0, MAX_LOG_SCALE)
        if self.teacher is not None:
            self.teacher.update(self.network)
        return {"logit_scale": scale.exp().item()}


def method_for(options: Options, model: Model, pictures: int, processes: Processes) -> Method:
    """The method that ``--method`` names; the zero-shot row is a classifier that takes no step."""
    steps = options.epochs * (pictures // options.batch_size)
    if options.preset.trains == "both towers":
        return Contrast(options, model, steps, processes)
    return Classification(options, model, steps if options.preset.trains == "classifier" else 0)
