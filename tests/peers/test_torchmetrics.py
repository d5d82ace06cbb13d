"""torchmetrics' values, where they are right: below a confidence of one and off the edges."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from strategies import classifier, seeds
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryCalibrationError, MulticlassCalibrationError
from torchmetrics.functional.classification import multiclass_calibration_error
from torchmetrics.wrappers import BootStrapper

from calrobust.functional.calibration import Norm, bin_confidences, binned_error, calibration_error
from calrobust.functional.fitting import fit_temperature
from calrobust.metrics import CalibrationError


def inside(seed: int) -> tuple[Tensor, Tensor]:
    """Probabilities whose highest lies well inside one of 15 bins."""
    logits, target = classifier(400, 6, seed, sharpness=0.6)
    probs = logits.softmax(1)
    top = 15 * probs.amax(1)
    keep = (top - top.round()).abs() > 1e-4
    return probs[keep], target[keep]


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
@given(seed=seeds())
def test_error_is_torchmetrics(norm: Norm, seed: int) -> None:
    """All three norms, up to torchmetrics' float32 sums."""
    probs, target = inside(seed)
    ours = calibration_error(probs, target, norm=norm, from_logits=False).item()
    theirs = multiclass_calibration_error(probs, target, num_classes=6, n_bins=15, norm=norm).item()
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


def test_a_confidence_of_one_shares_the_last_bin_with_us_alone() -> None:
    """Torchmetrics gives it a bin of its own: .2650 where netcal and we say .2350 (trap 17)."""
    probs = torch.tensor([[1, 0], [1, 0], [0.97, 0.03], [0.97, 0.03]])
    target = torch.tensor([0, 1, 0, 0])
    ours = calibration_error(probs, target, n_bins=10, from_logits=False).item()
    theirs = multiclass_calibration_error(probs, target, num_classes=2, n_bins=10).item()
    assert (round(ours, 4), round(theirs, 4)) == (0.235, 0.265)


def test_an_empty_metric_is_nan_where_theirs_raises() -> None:
    """Both warn that nothing came before."""
    with pytest.warns(UserWarning, match="before"), pytest.raises(ValueError, match="No samples"):
        MulticlassCalibrationError(4).compute()
    with pytest.warns(UserWarning, match="before"):
        assert CalibrationError().compute().isnan()


def test_what_its_users_write_is_an_error_or_the_same() -> None:
    """A position for the classes, probabilities without a word, int32 labels; and labels of pixels."""
    logits, target = classifier(60, 4, 0)
    with pytest.raises(TypeError, match="positional"):
        CalibrationError(4)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="from_logits=False"):
        calibration_error(logits.softmax(1), target)
    with pytest.raises(ValueError, match="logits"):
        fit_temperature(logits.softmax(1), target)
    with pytest.raises(TypeError, match="long"):
        calibration_error(logits, target.int())
    pixels = logits.unflatten(0, (10, 6)).movedim(2, 1), target.unflatten(0, (10, 6))
    ours = calibration_error(*pixels).item()
    theirs = multiclass_calibration_error(pixels[0].softmax(1), pixels[1], num_classes=4, n_bins=15).item()
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours == pytest.approx(calibration_error(logits, target).item())


def test_its_bootstrap_takes_quantiles_in_float64() -> None:
    """The dtype of our values, which torch.quantile wants."""
    logits, target = classifier(200, 4, 0)
    quantile = torch.tensor([0.05, 0.95], dtype=torch.float64)
    wrapped = BootStrapper(CalibrationError(), num_bootstraps=20, quantile=quantile)
    wrapped.update(logits, target)
    low, high = wrapped.compute()["quantile"]
    assert 0 < low < high < 1
    wrapped.quantile = quantile.float()
    with pytest.raises(RuntimeError, match="same dtype"):
        wrapped.compute()


def test_the_dtype_of_sums_stays_where_theirs_changes() -> None:
    """Counts are exact in float64 alone."""
    assert MulticlassCalibrationError(4).set_dtype(torch.float16).dtype == torch.float16
    metric = CalibrationError()
    with pytest.raises(ValueError, match="float64"):
        metric.set_dtype(torch.float16)
    assert metric.dtype == metric.counts.dtype == torch.float64


def test_metrics_that_synchronise_each_step_merge_where_theirs_refuse() -> None:
    """The sums are those of this rank; and what is no state is a TypeError, not a ValueError."""
    with pytest.raises(RuntimeError, match="not supported"):
        MulticlassCalibrationError(4, dist_sync_on_step=True).merge_state(MulticlassCalibrationError(4))
    with pytest.raises(ValueError, match="incoming state"):
        MulticlassCalibrationError(4).merge_state(2)  # type: ignore[arg-type]
    logits, target = classifier(60, 4, 0)
    ours = [CalibrationError(dist_sync_on_step=True) for _ in range(2)]
    for metric, half in zip(ours, (slice(20), slice(20, 60)), strict=True):
        metric.update(logits[half], target[half])
    ours[0].merge_state(ours[1])
    assert ours[0].compute().item() == pytest.approx(calibration_error(logits, target).item())
    with pytest.raises(TypeError, match="incoming_state"):
        ours[0].merge_state(2)  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
@given(seed=seeds())
def test_the_binary_error_is_that_of_the_probability_and_the_label(norm: Norm, seed: int) -> None:
    """Not of the more probable class: theirs compares the probability of class 1 with how often the label is 1."""
    logits, target = classifier(400, 2, seed, sharpness=0.6)
    probs = logits.softmax(1)[:, 1]
    keep = (15 * probs - (15 * probs).round()).abs() > 1e-4
    probs, target = probs[keep], target[keep]
    theirs = BinaryCalibrationError(n_bins=15, norm=norm)
    theirs.update(probs, target)
    ours = binned_error(bin_confidences(probs, target == 1, n_bins=15), norm=norm)
    assert ours.item() == pytest.approx(theirs.compute().item(), rel=1e-5, abs=1e-6)


def test_options_and_collections_are_the_same() -> None:
    """``ignore_index``, ``validate_args``, further keywords, and ``forward`` of both metrics in one collection."""
    logits, target = classifier(200, 4, 0, sharpness=0.6)
    target[:50] = -1
    options = {"n_bins": 15, "ignore_index": -1, "validate_args": False, "sync_on_compute": False}
    ours, theirs = CalibrationError(**options), MulticlassCalibrationError(4, **options)  # type: ignore[arg-type]
    values = MetricCollection({"ours": ours, "theirs": theirs})(logits, target)
    assert values["ours"].item() == pytest.approx(values["theirs"].item(), rel=1e-5)
    assert values["ours"].item() == pytest.approx(calibration_error(logits[50:], target[50:]).item())


def test_their_state_grows_by_eight_bytes_a_sample_and_ours_is_24_a_bin() -> None:
    """Two float32 numbers for each sample, against three float64 sums."""
    logits, target = classifier(200, 4, 0)
    sizes = []
    for metric in (MulticlassCalibrationError(4, n_bins=15), CalibrationError(n_bins=15)):
        metric.update(logits, target)
        states = [getattr(metric, name) for name in metric._defaults]
        tensors = [t for state in states for t in (state if isinstance(state, list) else [state])]
        sizes.append(sum(t.numel() * t.itemsize for t in tensors))
    assert sizes == [8 * 200, 24 * 15]


def test_plots_show_the_value_and_synchronising_merges_as_theirs_do() -> None:
    """One point at the value; a second rank's samples join for one value, and leave again."""
    (probs, target), (others, other_target) = inside(0), inside(1)
    options: Any = {"n_bins": 15, "sync_on_compute": False}
    for make in (partial(CalibrationError, from_logits=False), partial(MulticlassCalibrationError, 6)):
        here, there, both = (make(**options) for _ in range(3))
        here.update(probs, target)
        there.update(others, other_target)
        both.update(torch.cat([probs, others]), torch.cat([target, other_target]))
        alone = here.compute().item()
        axes: Any = here.plot()[1]
        assert axes.lines[0].get_ydata() == pytest.approx(alone)
        states = [getattr(there, name) for name in there._reductions]
        told = iter([torch.cat(state) if isinstance(state, list) else state for state in states])
        here.sync(dist_sync_fn=lambda state, group, told=told: [state, next(told)], distributed_available=lambda: True)
        for expected in (both.compute().item(), alone):
            here._computed = None
            assert here.compute().item() == pytest.approx(expected, rel=1e-6)
