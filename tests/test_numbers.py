"""NumPy's numbers are as good as Python's, wherever a number is asked for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from strategies import classifier, unit_rows
from torch.testing import assert_close

import calrobust as cr
from calrobust import functional as F
from calrobust import metrics, schedules

LOGITS, TARGET = classifier(30, 5, 0)
PROBS = LOGITS.softmax(1)
CONFIDENCES, CORRECT = F.top_label(LOGITS, TARGET)
X, Y = unit_rows(6, 4, 0, torch.float32), unit_rows(6, 4, 1, torch.float32)


def value_of(metric: Any) -> Any:
    """After a batch."""
    metric.update(LOGITS, TARGET)
    return metric.compute()


def loss_of(criterion: Any, scale: Any) -> Any:
    """Of a student that is its own teacher."""
    return criterion(X, Y, scale, Y, X, scale)


Number = Callable[[float], Any]
CALLS: dict[str, Callable[[Number, Number], Any]] = {  # integers made by i, fractions by f
    "metric": lambda i, f: value_of(metrics.CalibrationError(n_bins=i(7), ignore_index=i(2))),
    "adaptive": lambda i, f: value_of(metrics.AdaptiveCalibrationError(n_bins=i(7))),
    "classwise": lambda i, f: value_of(metrics.ClasswiseCalibrationError(num_classes=i(5), n_bins=i(7))),
    "summary": lambda i, f: value_of(metrics.CalibrationSummary(n_bins=i(7)))["ece"],
    "function": lambda i, f: F.calibration_error(LOGITS, TARGET, n_bins=i(7), ignore_index=i(2)),
    "adaptive function": lambda i, f: F.adaptive_calibration_error(LOGITS, TARGET, n_bins=i(7)),
    "classwise function": lambda i, f: F.classwise_calibration_error(LOGITS, TARGET, n_bins=i(7)),
    "bins": lambda i, f: tuple(F.bin_confidences(CONFIDENCES, CORRECT, n_bins=i(7))),
    "smoothing": lambda i, f: loss_of(cr.CaRotLoss(label_smoothing=f(0.25), distillation_weight=f(1.5)), f(10.0)),
    "loss": lambda i, f: cr.MultimodalContrastiveLoss(label_smoothing=f(0.25))(X, Y, i(10)),
    "weight": lambda i, f: loss_of(cr.MultimodalContrastiveLoss() + f(0.5) * cr.MultimodalDistillationLoss(), f(10.0)),
    "warm-up": lambda i, f: torch.tensor(float(schedules.linear_warmup(f(0.25), f(0.5), i(10))(3))),
    "teacher": lambda i, f: cr.EMATeacher(torch.nn.Linear(1, 1), decay=f(0.5), update_every=i(2)).update_every * 1,
}
INTEGERS: list[Number] = [np.int64, np.int32, np.uint8]
FRACTIONS: list[Number] = [np.float32, np.float64, np.float32]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("integer", "fraction"), list(zip(INTEGERS, FRACTIONS, strict=True)))
def test_numpys_numbers_are_as_good_as_pythons(
    call: Callable[[Number, Number], Any], integer: Number, fraction: Number
) -> None:
    """The same value, without a warning; float32 would overflow if compared with the largest float."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(call(integer, fraction), call(int, float), rtol=1e-6, atol=0)


@pytest.mark.parametrize("wrong", [np.float32("nan"), np.float64("inf"), np.float16("-inf"), np.bool_(True)])
def test_what_is_wrong_of_pythons_numbers_is_wrong_of_numpys(wrong: Any) -> None:
    """NaN, infinities and truth values."""
    with pytest.raises((TypeError, ValueError), match=r"label_smoothing must be (finite|a real number)"):
        cr.MultimodalContrastiveLoss(label_smoothing=wrong)
    with pytest.raises(TypeError, match="n_bins must be an int"):
        metrics.CalibrationError(n_bins=wrong)
