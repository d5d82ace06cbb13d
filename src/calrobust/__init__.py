"""Calibrated robust fine-tuning of CLIP-like models."""

import importlib
from typing import TYPE_CHECKING, Any

from calrobust import functional, schedules
from calrobust.evaluation import PlattScaler, TemperatureScaler, collect_logits, zero_shot_classifier
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
    "PlattScaler",
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
    # On first use, since torchmetrics imports slowly.
    if name in {"metrics", "plotting"}:
        return importlib.import_module(f"calrobust.{name}")
    hint = ""
    for home in ("metrics",) if name[0].isupper() else ("functional", "plotting", "schedules"):
        if name[0] != "_" and name in importlib.import_module(f"calrobust.{home}").__all__:
            hint = f"; did you mean calrobust.{home}.{name}?"
    raise AttributeError(f"module 'calrobust' has no attribute {name!r}{hint}")


def __dir__() -> list[str]:
    return [*globals(), "metrics", "plotting"]
