"""netcal's values for the same samples, in its one-dimensional form: confidence, correct."""

from __future__ import annotations

import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import classifier, confidences_and_correct, seeds
from torch import Tensor

from calrobust.functional.calibration import (
    bin_confidences,
    binned_error,
    calibration_error,
    equal_mass_bins,
)
from calrobust.functional.fitting import fit_temperature
from calrobust.functional.scoring import top_label
from calrobust.plotting import reliability_diagram

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # netcal's own dependencies, on import
    from netcal.metrics import ACE, ECE, MCE
    from netcal.presentation import ReliabilityDiagram
    from netcal.scaling import TemperatureScaling

Samples = tuple[Tensor, Tensor]

# netcal keeps confidences one rounding error away from 0 and 1.
TOLERANCE = 2e-7


def netcal_value(metric: type, samples: Samples, n_bins: int, *, equal_intervals: bool = True) -> float:
    """At most two distinct values of the second argument make netcal take the first one as it is (trap 24).

    float32 confidences are handed over as the same numbers in float64, for the reason that the last test but one shows.
    """
    confidences, correct = samples[0].double().numpy(), samples[1].numpy().astype(np.int64)
    return float(metric(n_bins, equal_intervals=equal_intervals).measure(confidences, correct))


@given(confidences_and_correct(), st.integers(1, 50), st.sampled_from([torch.float32, torch.float64]))
def test_error_is_netcals(samples: Samples, n_bins: int, dtype: torch.dtype) -> None:
    """ECE and MCE, in the precision that the confidences have."""
    samples = samples[0].to(dtype), samples[1]
    bins = bin_confidences(*samples, n_bins=n_bins)
    assert binned_error(bins, norm="l1").item() == pytest.approx(netcal_value(ECE, samples, n_bins), abs=TOLERANCE)
    assert binned_error(bins, norm="max").item() == pytest.approx(netcal_value(MCE, samples, n_bins), abs=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_edge_is_netcals(dtype: torch.dtype) -> None:
    """k/B for B = 1 ... 50, 0 and 1 included, one by one and all at once."""
    for n_bins in range(1, 51):
        edges = torch.tensor([k / n_bins for k in range(n_bins + 1)], dtype=dtype)
        correct = torch.arange(n_bins + 1) % 3 == 0
        # Beside a sample inside each bin, so that an edge in a wrong bin changes the value.
        inside = torch.tensor([(k + 0.37) / n_bins for k in range(n_bins)], dtype=dtype)
        samples = torch.cat([edges, inside]), torch.cat([correct, torch.arange(n_bins) % 2 == 0])
        ours = binned_error(bin_confidences(*samples, n_bins=n_bins)).item()
        assert ours == pytest.approx(netcal_value(ECE, samples, n_bins), abs=TOLERANCE), n_bins
        for edge in edges:
            pair = torch.stack([edge, inside[n_bins // 2]]), torch.tensor([True, False])
            ours = binned_error(bin_confidences(*pair, n_bins=n_bins)).item()
            assert ours == pytest.approx(netcal_value(ECE, pair, n_bins), abs=TOLERANCE), (n_bins, float(edge))


@given(seeds(), st.integers(3, 10))
def test_error_of_probabilities_is_netcals(seed: int, n_classes: int) -> None:
    """In its matrix form, which needs three distinct labels (trap 24)."""
    logits, target = classifier(200, n_classes, seed, sharpness=0.5)
    probs = logits.softmax(1)
    ours = calibration_error(probs, target, from_logits=False).item()
    assert ours == pytest.approx(float(ECE(15).measure(probs.numpy(), target.numpy())), abs=TOLERANCE)


@given(seeds(), st.integers(1, 12), st.integers(2, 9))
def test_equal_mass_error_is_netcals(seed: int, n_bins: int, each: int) -> None:
    """Without ties and with N a multiple of B: otherwise netcal interpolates its edges, or raises on ties."""
    generator = torch.Generator().manual_seed(seed)
    confidences = torch.rand(n_bins * each, dtype=torch.float64, generator=generator)
    samples = confidences, torch.rand(n_bins * each, generator=generator) < 0.5
    ours = binned_error(equal_mass_bins(*samples, n_bins=n_bins)).item()
    assert ours == pytest.approx(netcal_value(ECE, samples, n_bins, equal_intervals=False), abs=TOLERANCE)


def test_equal_mass_bins_of_netcal_are_interpolated_where_they_cannot_be_equal() -> None:
    """Eleven samples in four bins: its edges then lie elsewhere than between the samples of ours."""
    confidences, correct = torch.linspace(0.05, 0.95, 11, dtype=torch.float64).square(), torch.arange(11) % 3 == 0
    ours = binned_error(equal_mass_bins(confidences, correct, n_bins=4)).item()
    assert abs(ours - netcal_value(ECE, (confidences, correct), 4, equal_intervals=False)) > 0.01


def test_netcal_loses_float32_samples_between_an_edge_and_its_rounding() -> None:
    """It counts with float64 edges and averages with float32 ones: float32 5/6 is in neither of its bins."""
    confidences, correct = torch.tensor([5 / 6, 3.37 / 6]), torch.tensor([True, False])
    as_float32 = float(ECE(6).measure(confidences.numpy(), correct.numpy().astype(np.int64)))
    by_hand = ((1 - 5 / 6) + 3.37 / 6) / 2
    assert as_float32 == pytest.approx(3.37 / 6 / 2, abs=TOLERANCE)
    assert netcal_value(ECE, (confidences, correct), 6) == pytest.approx(by_hand, abs=TOLERANCE)
    assert binned_error(bin_confidences(confidences, correct, n_bins=6)).item() == pytest.approx(by_hand, abs=TOLERANCE)


def test_temperature_is_the_inverse_of_netcals() -> None:
    """In float64; netcal's attribute is 1/T, and its optimiser stops within a part in a thousand (trap 27)."""
    logits, target = classifier(2000, 5, 0, sharpness=0.5, dtype=torch.float64)
    scaling = TemperatureScaling()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its optimiser
        scaling.fit(logits.softmax(1).numpy(), target.numpy())
    assert 1 / float(scaling.temperature[0]) == pytest.approx(fit_temperature(logits, target).item(), rel=2e-3)


def test_average_calibration_error_gives_every_bin_the_same_weight() -> None:
    """Their ACE, which is not the adaptive error; from our sums it is a plain mean over the bins that are not empty."""
    logits, target = classifier(300, 6, 0, sharpness=0.5, dtype=torch.float64)
    samples = top_label(logits, target)
    bins = bin_confidences(*samples, n_bins=10)
    filled = bins.counts > 0
    gaps = ((bins.confidence_sums - bins.correct_sums).abs() / bins.counts)[filled]
    assert not filled.all()
    assert netcal_value(ACE, samples, 10) == pytest.approx(gaps.mean().item(), abs=TOLERANCE)
    assert abs(netcal_value(ACE, samples, 10) - binned_error(bins).item()) > 0.005


def test_reliability_diagrams_have_the_same_bars() -> None:
    """The accuracy of each bin that is not empty; theirs takes samples, ours the sums over bins."""
    confidences, correct = top_label(*classifier(300, 6, 0, sharpness=0.5, dtype=torch.float64))
    drawn = ReliabilityDiagram(10).plot(confidences.numpy(), correct.numpy().astype(np.int64))
    ours = reliability_diagram(bin_confidences(confidences, correct, n_bins=10))
    bars = [{round(bar.get_height(), 6) for bar in ax.patches} for ax in (*drawn.axes, ours)]
    bins = bin_confidences(confidences, correct, n_bins=10)
    accuracies = {round(float(a), 6) for a in bins.correct_sums / bins.counts if a == a}
    assert accuracies <= bars[-1]
    assert any(accuracies <= heights for heights in bars[:-1])
    plt.close("all")


def test_equal_mass_bins_of_netcal_refuse_ties_where_ours_keep_them_together() -> None:
    """So many samples of one confidence that two of its four edges are the same."""
    samples = torch.tensor([0.5] * 15 + [0.6] * 5).double(), torch.arange(20) % 3 == 0
    with pytest.raises(ValueError, match="smallest edge difference"):
        netcal_value(ECE, samples, 4, equal_intervals=False)
    assert (equal_mass_bins(*samples, n_bins=4).counts > 0).sum() == 2
