"""The losses of sigmoid models such as SigLIP as modules, which add to all other losses on pairs."""

from typing import Unpack

from calrobust.functional.pairs import PairOptions
from calrobust.functional.similarity import SigmoidContrastive, SigmoidDistillation
from calrobust.losses import _TermLoss

__all__ = ["SigmoidContrastiveLoss", "SigmoidDistillationLoss"]


class SigmoidContrastiveLoss(_TermLoss):
    """Binary cross-entropy of every pair of an image and a text, as SigLIP is trained with.

    Module form of :func:`~calrobust.functional.sigmoid_contrastive_loss`, which has formula, shapes and errors. A model
    that returns no logit bias is taken to have one of 0.

    Example:
        >>> import torch
        >>> from calrobust import SigmoidContrastiveLoss
        >>> criterion = SigmoidContrastiveLoss()
        >>> criterion(torch.eye(2), torch.eye(2), 1.0, 0.0)  # log(1 + 1/e) + log(2)
        tensor(1.0064)
    """

    _kind = SigmoidContrastive

    def __init__(self, **options: Unpack[PairOptions]) -> None:
        super().__init__(options)


class SigmoidDistillationLoss(_TermLoss):
    """Divergence of a sigmoid model's probabilities from those of a teacher.

    Module form of :func:`~calrobust.functional.sigmoid_distillation_loss`, which has formula, shapes and errors. The
    temperature is an attribute, which may change while training.

    Example:
        >>> import torch
        >>> from calrobust import SigmoidContrastiveLoss, SigmoidDistillationLoss
        >>> criterion = SigmoidContrastiveLoss() + 1.5 * SigmoidDistillationLoss()
        >>> image = text = torch.eye(2)
        >>> criterion(image, text, 1.0, 0.0, image, text, 1.0, 0.0)
        tensor(1.0064)
    """

    _kind = SigmoidDistillation
    temperature: float

    def __init__(self, *, temperature: float = 1.0, **options: Unpack[PairOptions]) -> None:
        super().__init__(options, temperature=temperature)
