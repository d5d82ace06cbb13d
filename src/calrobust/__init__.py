"""Calibrated robust fine-tuning of CLIP-like models."""

from calrobust import functional
from calrobust.losses import CaRotLoss, MultimodalContrastiveLoss, MultimodalDistillationLoss, OrthogonalityLoss

__all__ = [
    "CaRotLoss",
    "MultimodalContrastiveLoss",
    "MultimodalDistillationLoss",
    "OrthogonalityLoss",
    "functional",
]

__version__ = "0.1.0"
