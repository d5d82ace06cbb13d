"""The maths: pure functions of tensors."""

from calrobust.functional.carot import carot_loss
from calrobust.functional.contrastive import multimodal_contrastive_loss
from calrobust.functional.distillation import multimodal_distillation_loss
from calrobust.functional.orthogonality import orthogonality_loss

__all__ = [
    "carot_loss",
    "multimodal_contrastive_loss",
    "multimodal_distillation_loss",
    "orthogonality_loss",
]
