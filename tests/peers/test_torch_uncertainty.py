"""torch-uncertainty's metrics and temperature, which are torchmetrics' with more names."""

from __future__ import annotations

import logging
import math
import warnings
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import assume, given
from strategies import classifier, seeds
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassCalibrationError

import calrobust as cr
from calrobust import functional as F
from calrobust.functional.calibration import Norm
from calrobust.metrics import BrierScore, CalibrationError
from calrobust.plotting import reliability_diagram

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it depends on
    from torch_uncertainty.metrics import classification as theirs
    from torch_uncertainty.post_processing import TemperatureScaler

CLASSES, BINS = 5, 10


def value(metric: Any, logits: Tensor, target: Tensor) -> Tensor:
    """Of one batch of probabilities."""
    metric.update(logits.softmax(1), target)
    result: Tensor = metric.compute()
    return result


@given(seed=seeds())
def test_scores_are_ours(seed: int) -> None:
    """Brier score and likelihood, up to its float32 sums."""
    logits, target = classifier(300, CLASSES, seed)
    ours = F.brier_score(logits, target).item(), F.negative_log_likelihood(logits, target).item()
    other = value(theirs.BrierScore(CLASSES), logits, target), value(theirs.CategoricalNLL(), logits, target)
    assert ours == pytest.approx(tuple(float(v) for v in other), rel=1e-5)


def test_the_score_of_estimators_is_that_of_all_their_rows() -> None:
    """Theirs takes [N, E, C]; ours refuses it with labels [N], because a third axis holds pixels."""
    logits, target = classifier(60, CLASSES, 0)
    estimators = logits.unflatten(0, (20, 3)).softmax(2)
    target = target[:20]
    metric = theirs.BrierScore(CLASSES)
    metric.update(estimators, target)
    ours = BrierScore(from_logits=False)
    with pytest.raises(ValueError, match="one label for each row"):
        ours.update(estimators, target)
    ours.update(estimators.flatten(0, 1), target.repeat_interleave(3))
    assert ours.compute().item() == pytest.approx(metric.compute().item(), rel=1e-5)


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
@given(seed=seeds())
def test_equal_mass_errors_are_ours_where_bins_hold_equally_many(norm: Norm, seed: int) -> None:
    """N a multiple of the number of bins, and no ties."""
    logits, target = classifier(300, CLASSES, seed, dtype=torch.float64)
    options = {"num_classes": CLASSES, "num_bins": BINS, "norm": norm}
    ours = F.adaptive_calibration_error(logits, target, n_bins=BINS, norm=norm).item()
    other = value(theirs.AdaptiveCalibrationError("multiclass", **options), logits, target)
    assert ours == pytest.approx(float(other), rel=1e-4)


@pytest.mark.parametrize("generalized", [False, True])
@given(seed=seeds())
def test_selective_risk_is_theirs_without_ties_up_to_the_rule_of_integration(generalized: bool, seed: int) -> None:
    """They take trapezoids between the coverages 1/N and 1; ours is the mean over coverages (Geifman's definition)."""
    p = classifier(200, CLASSES, seed)
    assume(len(p.logits.softmax(1).amax(1).unique()) == 200)  # no ties
    curve = F.risk_coverage_curve(*F.top_label(*p))
    curve *= torch.arange(1, 201) / 200 if generalized else 1
    trapezoids = (curve.sum() - (curve[0] + curve[-1]) / 2) / 199
    other = value(theirs.AUGRC() if generalized else theirs.AURC(), p.logits, p.target)
    assert trapezoids.item() == pytest.approx(float(other), rel=1e-4)
    assert F.selective_risk(*p, generalized=generalized).item() == pytest.approx(float(curve.mean()), rel=1e-6)


def test_ties_depend_on_their_order_in_theirs_and_not_in_ours() -> None:
    """A constant model: the risk is the error rate at every coverage, whichever way the samples lie."""
    logits, target = torch.tensor([[1.0, 0.0]]).expand(100, 2), (torch.arange(100) >= 50).long()
    for labels in (target, target.flip(0)):
        assert F.selective_risk(logits, labels) == 0.5
    first, second = (float(value(theirs.AURC(), logits.softmax(1), labels)) for labels in (target, target.flip(0)))
    assert abs(first - second) > 0.5


@given(seed=seeds())
def test_classwise_errors_reduce_classes_otherwise_than_ours(seed: int) -> None:
    """l1 alike; the mean of per-class roots against the root of the mean; the mean of maxima against the maximum."""
    logits, target = classifier(300, CLASSES, seed, sharpness=0.5)

    def per_class(norm: Norm) -> list[float]:
        metric = theirs.ClasswiseCalibrationError(CLASSES, num_bins=BINS, norm=norm, reduction="none")
        errors: list[float] = value(metric, logits, target).tolist()
        return errors

    def ours(norm: Norm) -> float:
        return F.classwise_calibration_error(logits, target, n_bins=BINS, norm=norm).item()

    assert ours("l1") == pytest.approx(sum(per_class("l1")) / CLASSES, rel=1e-3)
    assert ours("l2") == pytest.approx(math.sqrt(sum(e * e for e in per_class("l2")) / CLASSES), rel=1e-3)
    assert ours("max") == pytest.approx(max(per_class("max")), rel=1e-3)
    for norm in ("l1", "l2", "max"):
        metric = theirs.ClasswiseCalibrationError(CLASSES, num_bins=BINS, norm=norm)
        assert value(metric, logits, target).item() == pytest.approx(sum(per_class(norm)) / CLASSES, rel=1e-4)


def test_temperature_is_ours() -> None:
    """As near as its L-BFGS gets in 100 iterations; its list holds T."""
    logits, target = classifier(2000, CLASSES, 0, sharpness=0.5)
    scaler = TemperatureScaler(init_temperature=2.0, lr=0.1, max_iter=100)
    logging.disable(logging.WARNING)  # that it has no model
    try:
        scaler.fit(DataLoader(TensorDataset(logits, target), batch_size=2000), progress=False)
    finally:
        logging.disable(logging.NOTSET)
    ours = cr.TemperatureScaler().fit(logits, target)
    assert scaler.temperature[0].item() == pytest.approx(float(ours.temperature), rel=0.02)
    for option in ({"init_temperature": 2.0}, {"lr": 0.1}, {"max_iter": 100}):
        with pytest.raises(TypeError, match="unexpected keyword"):
            cr.TemperatureScaler(**option)
    scaler.set_temperature(3.0)
    assert scaler.temperature[0].item() == pytest.approx(3)
    assert not hasattr(ours, "set_temperature")


def test_the_calibration_error_is_torchmetrics() -> None:
    """The diagram apart."""
    metric = theirs.CalibrationError("multiclass", num_classes=CLASSES, num_bins=BINS)
    assert isinstance(metric, MulticlassCalibrationError)
    logits, target = classifier(300, CLASSES, 0, sharpness=0.5)
    ours = F.calibration_error(logits, target, n_bins=BINS).item()
    assert value(metric, logits, target).item() == pytest.approx(ours, rel=1e-4)


def test_the_score_has_no_reduction_and_no_top_class() -> None:
    """Theirs adds up, or lists samples, or scores the top label alone; ours is the mean over samples."""
    logits, target = classifier(60, CLASSES, 0)
    ours = F.brier_score(logits, target).item()
    total = value(theirs.BrierScore(CLASSES, reduction="sum"), logits, target)
    each = value(theirs.BrierScore(CLASSES, reduction="none"), logits, target)
    assert [total.item() / 60, each.mean().item()] == pytest.approx([ours, ours], rel=1e-5)
    confidences, correct = F.top_label(logits, target)
    top = value(theirs.BrierScore(CLASSES, top_class=True), logits, target)
    assert top.item() == pytest.approx((confidences - correct.double()).square().mean().item(), rel=1e-5)
    for option in ({"reduction": "sum"}, {"top_class": True}):
        with pytest.raises((TypeError, ValueError), match=r"[Uu]nexpected keyword"):
            BrierScore(**option)


def test_plot_is_a_diagram_of_two_panels_where_ours_shows_the_value() -> None:
    """The diagram of ours takes the metric's bins."""
    logits, target = classifier(60, CLASSES, 0)
    metric = theirs.CalibrationError("multiclass", num_classes=CLASSES)
    metric.update(logits.softmax(1), target)
    ours = CalibrationError()
    ours.update(logits, target)
    panels = [len(figure.axes) for figure in (metric.plot()[0], ours.plot()[0])]
    assert panels == [2, 1]
    assert reliability_diagram(ours.bins).get_xlim() == (0, 1)
    plt.close("all")


def test_targets_are_labels_alone() -> None:
    """Theirs also takes indicators and probabilities."""
    logits, target = classifier(60, CLASSES, 0)
    indicators = torch.nn.functional.one_hot(target, CLASSES)
    both = [theirs.BrierScore(CLASSES) for _ in range(2)]
    for metric, given_as in zip(both, (target, indicators), strict=True):
        metric.update(logits.softmax(1), given_as)
    assert both[0].compute() == both[1].compute()
    with pytest.raises(ValueError, match="one label for each row"):
        BrierScore().update(logits, indicators)
    with pytest.raises(ValueError, match="one label for each row"):
        F.fit_temperature(logits, indicators.double())
