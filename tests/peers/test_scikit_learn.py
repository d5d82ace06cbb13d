"""scikit-learn's temperature and scores."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import brier_score_loss, log_loss
from strategies import classifier, seeds

from calrobust import ShiftReport
from calrobust import functional as F


class Given(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # untyped
    """A fitted classifier whose decision function is its input."""

    def fit(self, logits: Any, target: Any) -> Given:
        """Learns how many classes there are."""
        self.classes_ = np.unique(target)
        return self

    def decision_function(self, logits: Any) -> Any:
        """The input."""
        return logits

    def predict(self, logits: Any) -> Any:
        """The class of the highest logit."""
        return logits.argmax(1)


@given(seed=seeds())
def test_beta_is_one_over_our_temperature(seed: int) -> None:
    """Of ``CalibratedClassifierCV(FrozenEstimator(classifier), method="temperature")``."""
    logits, target = classifier(400, 4, seed, sharpness=0.5, dtype=torch.float64)
    arrays = logits.numpy(), target.numpy()
    calibrated = CalibratedClassifierCV(FrozenEstimator(Given().fit(*arrays)), method="temperature").fit(*arrays)
    (fold,) = calibrated.calibrated_classifiers_
    (scaling,) = fold.calibrators
    assert float(scaling.beta_) == pytest.approx(1 / F.fit_temperature(logits, target).item(), rel=1e-4)


@given(seed=seeds())
def test_the_likelihood_at_a_domains_own_temperature_is_theirs(seed: int) -> None:
    """Their log loss after their temperature, fitted on the very data: refinement over temperatures."""
    logits, target = classifier(400, 4, seed, sharpness=0.5, dtype=torch.float64)
    arrays = logits.numpy(), target.numpy()
    calibrated = CalibratedClassifierCV(FrozenEstimator(Given().fit(*arrays)), method="temperature").fit(*arrays)
    report = ShiftReport(id_domain="photo")
    report.add("FT", "photo", logits, target)
    expected = log_loss(arrays[1], calibrated.predict_proba(arrays[0]), labels=range(4))
    assert report.summary()[0]["id_nll_own_t"] == pytest.approx(expected, abs=1e-7)


@given(seed=seeds())
def test_the_parts_of_a_brier_score_are_theirs_up_to_what_bins_hide(seed: int) -> None:
    """Their score of the top label, less the variance of confidences within bins, plus twice the covariance."""
    confidences, correct = F.top_label(*classifier(300, 4, seed, sharpness=0.5, dtype=torch.float64))
    reliability, resolution, uncertainty = F.brier_decomposition(F.bin_confidences(confidences, correct, n_bins=10))
    p, hits = confidences.numpy(), correct.double().numpy()
    hidden, index = np.zeros(2), np.floor(10 * p)
    for inside in (index == b for b in range(10)):
        if inside.any():
            distances = p[inside] - p[inside].mean()
            hidden += distances @ distances, 2 * (distances @ hits[inside])
    variance, covariance = hidden / len(p)
    assert variance > 1e-4
    parts = float(reliability - resolution + uncertainty)
    assert parts + variance - covariance == pytest.approx(brier_score_loss(correct.numpy(), p), abs=1e-12)


@given(seed=seeds())
def test_scores_are_ours(seed: int) -> None:
    """With ``scale_by_half=False``: its default halves the Brier score of two classes."""
    logits, target = classifier(200, 4, seed, dtype=torch.float64)
    probs = logits.softmax(1).numpy()
    brier = brier_score_loss(target.numpy(), probs, labels=range(4), scale_by_half=False)
    assert F.brier_score(logits, target).item() == pytest.approx(brier)
    assert F.negative_log_likelihood(logits, target).item() == pytest.approx(
        log_loss(target.numpy(), probs, labels=range(4))
    )


def test_the_default_of_the_brier_score_halves_that_of_two_classes() -> None:
    """And that of two alone."""
    for classes, share in ((2, 0.5), (3, 1.0)):
        logits, target = classifier(100, classes, 0, dtype=torch.float64)
        probs = logits.softmax(1).numpy()
        theirs = brier_score_loss(target.numpy(), probs[:, 1] if classes == 2 else probs)
        assert theirs == pytest.approx(share * F.brier_score(logits, target).item())


def test_likelihoods_start_from_logits() -> None:
    """Where the softmax underflows, theirs is that of the smallest probability it allows."""
    logits, target = torch.tensor([[0.0, 1000.0], [1000.0, 0.0]]), torch.tensor([0, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert log_loss(target.numpy(), logits.softmax(1).numpy(), labels=[0, 1]) < 100
    assert F.negative_log_likelihood(logits, target) == 500
