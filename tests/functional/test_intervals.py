from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import classifier, confidences_and_correct
from torch import Tensor

from calrobust.functional.bootstrap import bootstrap_interval, reflected_interval
from calrobust.functional.calibration import Norm, bin_confidences, binned_error, top_label

NORMS: tuple[Norm, ...] = get_args(Norm)
Samples = tuple[Tensor, Tensor]


def resampled(samples: Samples, n: int, seed: int, n_bins: int, norm: Norm) -> Tensor:
    """Errors of resamples, drawn and binned one by one."""
    generator = torch.Generator().manual_seed(seed)
    confidences, correct = samples
    errors = []
    for _ in range(n):
        draw = torch.randint(len(correct), (len(correct),), generator=generator)
        errors.append(binned_error(bin_confidences(confidences[draw], correct[draw], n_bins=n_bins), norm=norm))
    return torch.stack(errors)


@pytest.mark.parametrize(("sharpness", "n_bins", "norm"), [(0.3, 15, "l1"), (1.0, 15, "l1"), (0.3, 5, "l2")])
def test_bootstrap_is_that_of_samples_drawn_one_by_one(sharpness: float, n_bins: int, norm: Norm) -> None:
    """The ends are reflected quantiles of the naive loop, within the noise of the quantiles."""
    samples = top_label(*classifier(400, 10, 0, sharpness=sharpness))
    value = binned_error(bin_confidences(*samples, n_bins=n_bins), norm=norm)
    errors = resampled(samples, 3000, 1, n_bins, norm)
    low, high = bootstrap_interval(
        *samples, n_bins=n_bins, norm=norm, n_resamples=3000, generator=torch.Generator().manual_seed(2)
    )
    noise = 4 * errors.std() / 3000**0.5 * 3  # a quantile at 2.5 % is about three times as noisy as a mean
    assert (low - (2 * value - errors.quantile(0.975)).clamp(min=0)).abs() < noise
    assert (high - torch.maximum(value, 2 * value - errors.quantile(0.025))).abs() < noise


@given(confidences_and_correct(), st.integers(1, 20), st.sampled_from(NORMS))
def test_bootstrap_interval_holds_the_value(samples: Samples, n_bins: int, norm: Norm) -> None:
    """For any data, bins and norm, within [0, 1]."""
    value = binned_error(bin_confidences(*samples, n_bins=n_bins), norm=norm)
    low, high = bootstrap_interval(*samples, n_bins=n_bins, norm=norm, n_resamples=20)
    assert 0 <= low <= value + 1e-12
    assert value - 1e-12 <= high <= 1


def test_bootstrap_interval_tells_noise_from_miscalibration() -> None:
    """Most calibrated models of 1,000 samples get an interval from about 0 up, overconfident ones none (trap 26)."""
    lows: dict[float, list[float]] = {1.0: [], 0.3: []}
    for sharpness, values in lows.items():
        for seed in range(20):
            samples = top_label(*classifier(1000, 10, seed, sharpness=sharpness))
            values.append(bootstrap_interval(*samples, n_resamples=200).low.item())
    assert sorted(lows[1.0])[10] < 0.01
    assert min(lows[0.3]) > 0.2


def test_bootstrap_interval_covers_the_true_error() -> None:
    """With miscalibration above the noise, about as often as its level says."""
    held = 0
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        confidences = 0.5 + 0.5 * torch.rand(1000, generator=generator, dtype=torch.float64)
        correct = torch.rand(1000, generator=generator, dtype=torch.float64) < confidences - 0.1
        low, high = bootstrap_interval(confidences, correct, n_resamples=200, generator=generator)
        held += int(low <= 0.1 <= high)
    assert held >= 48  # 57 expected; fewer than 48 has a chance of 1e-4


def test_bootstrap_repeats_with_its_generator() -> None:
    """And leaves torch's own generator alone."""
    samples = top_label(*classifier(300, 5, 0))
    state = torch.get_rng_state()
    first, second = (bootstrap_interval(*samples, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)


def test_the_ends_are_reflected_quantiles_of_each_column() -> None:
    """By hand: of 0, 0.01, ..., 1 around 1/2 at level 0.9 they are 0.05 and 0.95, of their halves 0.025 and 0.475."""
    resampled = torch.arange(101, dtype=torch.float64)[:, None] / 100 * torch.tensor([1.0, 0.5])
    low, high = reflected_interval(torch.tensor([0.5, 0.25], dtype=torch.float64), resampled, 0.9)
    assert low.tolist() == pytest.approx([0.05, 0.025])
    assert high.tolist() == pytest.approx([0.95, 0.475])


def test_bootstrap_has_its_documented_defaults() -> None:
    """15 bins, "l1", a level of 0.95 and a thousand resamples."""
    samples, (first, second) = top_label(*classifier(300, 5, 0)), (torch.Generator().manual_seed(7) for _ in range(2))
    told = bootstrap_interval(*samples, n_bins=15, norm="l1", level=0.95, n_resamples=1000, generator=first)
    assert bootstrap_interval(*samples, generator=second) == told


def test_bootstrap_of_a_single_sample_has_no_width() -> None:
    """Drawn anew it is itself: both ends are the value."""
    low, high = bootstrap_interval(torch.tensor([0.25]), torch.tensor([True]))
    assert low == high == 0.75


def test_bootstrap_of_no_samples_is_nan() -> None:
    """Both ends."""
    assert all(end.isnan() for end in bootstrap_interval(torch.empty(0), torch.empty(0, dtype=torch.bool)))
