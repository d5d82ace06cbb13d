"""Pure functions of tensors."""

from calrobust.functional.calibration import (
    CalibrationInterval,
    adaptive_calibration_error,
    bin_confidences,
    binned_error,
    calibration_error,
    calibration_interval,
    classwise_calibration_error,
)
from calrobust.functional.fitting import fit_temperature
from calrobust.functional.losses import (
    carot_loss,
    feature_distillation_loss,
    multimodal_contrastive_loss,
    multimodal_distillation_loss,
    orthogonality_loss,
    sigmoid_contrastive_loss,
    sigmoid_distillation_loss,
)
from calrobust.functional.pairs import PairOptions
from calrobust.functional.scoring import (
    Bins,
    brier_decomposition,
    brier_score,
    negative_log_likelihood,
    risk_coverage_curve,
    selective_risk,
    top_label,
)

__all__ = [
    "Bins",
    "CalibrationInterval",
    "PairOptions",
    "adaptive_calibration_error",
    "bin_confidences",
    "binned_error",
    "brier_decomposition",
    "brier_score",
    "calibration_error",
    "calibration_interval",
    "carot_loss",
    "classwise_calibration_error",
    "feature_distillation_loss",
    "fit_temperature",
    "multimodal_contrastive_loss",
    "multimodal_distillation_loss",
    "negative_log_likelihood",
    "orthogonality_loss",
    "risk_coverage_curve",
    "selective_risk",
    "sigmoid_contrastive_loss",
    "sigmoid_distillation_loss",
    "top_label",
]
