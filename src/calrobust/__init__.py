"""Calibrated robust fine-tuning of CLIP-like models."""

import importlib
from typing import TYPE_CHECKING, Any

from calrobust import functional, schedules
from calrobust.evaluation import TemperatureScaler, collect_logits, zero_shot_classifier
from calrobust.losses import (
    CaRotLoss,
    FeatureDistillationLoss,
    MultimodalContrastiveLoss,
    MultimodalDistillationLoss,
    OrthogonalityLoss,
    SigmoidContrastiveLoss,
    SigmoidDistillationLoss,
)
from calrobust.report import ShiftReport
from calrobust.teacher import EMATeacher
from calrobust.weights import average, interpolate, model_stock

if TYPE_CHECKING:
    from calrobust import metrics, plotting

__all__ = [
    "CaRotLoss",
    "EMATeacher",
    "FeatureDistillationLoss",
    "MultimodalContrastiveLoss",
    "MultimodalDistillationLoss",
    "OrthogonalityLoss",
    "ShiftReport",
    "SigmoidContrastiveLoss",
    "SigmoidDistillationLoss",
    "TemperatureScaler",
    "average",
    "collect_logits",
    "functional",
    "interpolate",
    "metrics",
    "model_stock",
    "plotting",
    "schedules",
    "zero_shot_classifier",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Loaded on first use: torchmetrics alone takes longer to import than the rest of the package.
    if name in {"metrics", "plotting"}:
        return importlib.import_module(f"calrobust.{name}")
    homes = (
        () if name.startswith("_") else ("metrics",) if name[0].isupper() else ("functional", "plotting", "schedules")
    )
    for home in homes:
        if name in importlib.import_module(f"calrobust.{home}").__all__:
            raise AttributeError(f"module 'calrobust' has no attribute {name!r}; did you mean calrobust.{home}.{name}?")
    raise AttributeError(f"module 'calrobust' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), "metrics", "plotting"]
