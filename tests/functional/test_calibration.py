from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import get_args

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss
from strategies import Predictions, classifier, confidences_and_correct, predictions, seeds
from torch import Tensor
from torch.testing import assert_close

from calrobust.functional.calibration import (
    Norm,
    adaptive_calibration_error,
    bin_classes,
    bin_confidences,
    bin_index,
    binned_error,
    calibration_error,
    classwise_calibration_error,
    classwise_error,
    equal_mass_bins,
)
from calrobust.functional.scoring import Bins, brier_decomposition, probability_blocks, top_label

NORMS: tuple[Norm, ...] = get_args(Norm)
ERRORS = [calibration_error, adaptive_calibration_error, classwise_calibration_error]
Samples = tuple[Tensor, Tensor]


@given(predictions(min_samples=0))
def test_top_label_is_the_maximum_of_a_float64_softmax(p: Predictions) -> None:
    """Confidence and correctness are those of the whole batch's softmax."""
    confidences, correct = top_label(*p)
    expected = p.logits.double().softmax(1).amax(1)
    assert confidences.dtype == p.logits.dtype
    assert_close(confidences.double(), expected, rtol=1e-6 if p.logits.dtype == torch.float32 else 1e-14, atol=0)
    assert correct.tolist() == (p.logits.argmax(1) == p.target).tolist()


def test_blocks_do_not_show() -> None:
    """Many blocks, of which the last is smaller, give what single rows give."""
    logits, target = classifier(1500, 1000, 0)
    confidences, correct = top_label(logits, target)
    rows = [top_label(logits[i : i + 1], target[i : i + 1]) for i in range(0, 1500, 37)]
    assert_close(confidences[::37], torch.cat([c for c, _ in rows]), rtol=3e-7, atol=0)
    assert_close(correct[::37], torch.cat([k for _, k in rows]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("from_logits", [True, False])
def test_the_first_of_equal_scores_is_the_prediction(dtype: torch.dtype, from_logits: bool) -> None:
    """torch.argmax decides every pattern of ties among four classes, for every label."""
    patterns = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)))[1:]
    scores = patterns if from_logits else patterns / patterns.sum(1, keepdim=True)
    scores = scores.to(dtype).repeat_interleave(4, dim=0)
    target = torch.arange(4).repeat(15)
    _, correct = top_label(scores, target, from_logits=from_logits)
    assert correct.tolist() == (scores.argmax(1) == target).tolist()


@pytest.mark.parametrize("n_classes", [2, 3, 50])
def test_the_highest_logit_is_the_prediction_though_probabilities_round_to_the_same(n_classes: int) -> None:
    """torch.argmax of the logits decides, even if they differ by less than float32's softmax can show."""
    generator = torch.Generator().manual_seed(0)
    logits = 1e-8 * torch.randn(300, n_classes, generator=generator)
    target = torch.randint(0, n_classes, (300,), generator=generator)
    target[::2] = logits[::2].argmax(1)
    confidences, correct = top_label(logits, target)
    assert (confidences == confidences[0]).all()
    assert correct.tolist() == (logits.argmax(1) == target).tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_get_a_float32_softmax(dtype: torch.dtype) -> None:
    """The only loss is the rounding of the logits themselves."""
    logits, target = classifier(200, 30, 0, dtype=dtype)
    confidences, correct = top_label(logits, target)
    assert confidences.dtype == torch.float32
    assert_close(confidences, top_label(logits.float(), target)[0], rtol=0, atol=0)
    assert correct.tolist() == (logits.argmax(1) == target).tolist()


def test_masked_classes_have_no_probability() -> None:
    """Classes with logits of -inf count as absent."""
    logits, target = classifier(50, 5, 0)
    masked = torch.cat([logits, torch.full((50, 3), -torch.inf)], dim=1)
    assert_close(top_label(masked, target), top_label(logits, target), rtol=3e-7, atol=0)
    assert_close(calibration_error(masked, target), calibration_error(logits, target))
    assert_close(classwise_calibration_error(masked, target), classwise_calibration_error(logits, target) * 5 / 8)


def test_huge_logits_do_not_overflow() -> None:
    """The maximum is subtracted before exponentials are taken."""
    confidences, _ = top_label(torch.tensor([[1e4, -1e4], [3e38, 0.0]]), torch.tensor([0, 0]))
    assert confidences.tolist() == [1.0, 1.0]


def test_logits_that_need_a_gradient_are_taken_as_they_are() -> None:
    """A metric is a number that keeps no graph."""
    logits, target = classifier(10, 3, 0)
    for error in ERRORS:
        assert not error(logits.clone().requires_grad_(), target).requires_grad


def test_nan_gives_nan_never_a_finite_wrong_value() -> None:
    """A NaN row never leaves a finite value (trap 21)."""
    logits, target = classifier(20, 3, 0)
    logits[3, 1] = torch.nan
    for error, norm in itertools.product(ERRORS, NORMS):
        assert error(logits, target, norm=norm).isnan()


@pytest.mark.parametrize("wrong", [-0.01, 1.01, 87.0, math.nan, math.inf])
@pytest.mark.parametrize("bins_of", [bin_confidences, equal_mass_bins])
def test_a_confidence_that_is_no_probability_gives_nan(wrong: float, bins_of: Callable[..., Bins]) -> None:
    """Percentages and logits are not binned as if they were confidences."""
    bins = bins_of(torch.tensor([0.5, wrong]), torch.tensor([True, False]), n_bins=10)
    assert bins.counts.sum() == 2
    assert all(binned_error(bins, norm=norm).isnan() for norm in NORMS)


def test_a_label_out_of_range_is_not_counted_as_wrong() -> None:
    """On the CPU the functions check the labels too, because that costs nothing there (trap 21)."""
    for label in (3, -1):
        with pytest.raises(ValueError, match=r"target must be in \[0, 3\).*got"):
            top_label(torch.zeros(2, 3), torch.tensor([0, label]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_edge_opens_its_bin(dtype: torch.dtype) -> None:
    """Comparison with k * (1 / B) in float64 decides for k/B and its neighbours, for B = 1 ... 50 (trap 18)."""
    for n_bins in range(1, 51):
        edges = torch.tensor([k / n_bins for k in range(n_bins + 1)], dtype=dtype)
        around = [torch.nextafter(edges, torch.tensor(limit, dtype=dtype)).clamp(0, 1) for limit in (0.0, 1.0)]
        values = torch.cat([edges, *around])
        correct = torch.arange(len(values)) % 2 == 0
        bins = bin_confidences(values, correct, n_bins=n_bins)
        expected = [max(k for k in range(n_bins) if k * (1 / n_bins) <= v) for v in values.double().tolist()]
        assert bins.counts.tolist() == torch.bincount(torch.tensor(expected), minlength=n_bins).tolist()


def test_float32_confidences_near_an_edge_are_not_misplaced() -> None:
    """float32 .2, .4 and .4666667 lie just above 3/15, 6/15 and 7/15, where float32 edges lose them (trap 18)."""
    confidences = torch.tensor([0.2, 0.4, 0.4666667])
    bins = bin_confidences(confidences, torch.ones(3, dtype=torch.bool), n_bins=15)
    assert bins.counts.nonzero()[:, 0].tolist() == [3, 6, 7]


def test_edges_equal_numpy_linspace_for_200_bin_counts() -> None:
    """They are equal to the bit, as torch.linspace's are not (trap 18)."""
    for n_bins in range(1, 201):
        edges = torch.from_numpy(np.linspace(0, 1, n_bins + 1)[1:-1])
        below = torch.nextafter(edges, torch.zeros_like(edges))
        assert bin_index(edges, n_bins).tolist() == list(range(1, n_bins))
        assert bin_index(below, n_bins).tolist() == list(range(n_bins - 1))


def test_a_confidence_of_one_is_in_the_last_bin_and_of_zero_in_the_first() -> None:
    """It has no bin of its own: this example gives .2350, not .2650 (trap 17)."""
    bins = bin_confidences(torch.tensor([0.0, 1.0]), torch.tensor([False, True]), n_bins=10)
    assert bins.counts.tolist() == [1.0] + [0.0] * 8 + [1.0]
    confidences = torch.tensor([1, 1, 0.97, 0.97], dtype=torch.float64)
    value = binned_error(bin_confidences(confidences, torch.tensor([True, False, True, True]), n_bins=10))
    assert_close(value, torch.tensor(0.2350, dtype=torch.float64))


@given(confidences_and_correct(), st.integers(1, 20), st.sampled_from(NORMS))
def test_is_the_definition_sample_by_sample(samples: Samples, n_bins: int, norm: Norm) -> None:
    """This holds for bins of equal width and all three norms."""
    value = binned_error(bin_confidences(*samples, n_bins=n_bins), norm=norm)
    assert value.item() == pytest.approx(oracles.calibration_error(*samples, n_bins, norm), rel=1e-9, abs=1e-12)


@given(confidences_and_correct(), st.integers(1, 20), st.integers(0, 60))
def test_sums_of_batches_add_up(samples: Samples, n_bins: int, cut: int) -> None:
    """The sums of two parts are the sums of the whole, so their error is too."""
    confidences, correct = samples
    parts = bin_confidences(confidences[:cut], correct[:cut], n_bins=n_bins) + bin_confidences(
        confidences[cut:], correct[cut:], n_bins=n_bins
    )
    assert isinstance(parts, Bins)
    assert_close(tuple(parts), tuple(bin_confidences(*samples, n_bins=n_bins)), rtol=1e-14, atol=1e-15)


@given(confidences_and_correct(), st.integers(1, 20), st.booleans())
def test_norms_are_ordered_and_in_the_unit_interval(samples: Samples, n_bins: int, adaptive: bool) -> None:
    """The order is 0 <= l1 <= l2 <= max <= 1."""
    bins = (equal_mass_bins if adaptive else bin_confidences)(*samples, n_bins=n_bins)
    l1, l2, largest = (binned_error(bins, norm=norm).item() for norm in NORMS)
    assert 0 <= l1 <= l2 + 1e-12 <= largest + 2e-12 <= 1 + 3e-12


@given(confidences_and_correct(), st.integers(1, 12), st.integers(2, 5))
def test_refining_bins_never_lowers_l1(samples: Samples, n_bins: int, factor: int) -> None:
    """Gaps of opposite sign cancel within a bin, not across bins."""
    # Off the edges: 1 / n_bins * k and 1 / (factor * n_bins) * (factor * k) may round differently.
    confidences = samples[0] * 0.999 + 1e-7
    coarse, fine = (binned_error(bin_confidences(confidences, samples[1], n_bins=n)) for n in (n_bins, factor * n_bins))
    assert fine >= coarse - 1e-12


@given(predictions(), seeds(), st.sampled_from(NORMS))
def test_order_of_samples_does_not_matter(p: Predictions, seed: int, norm: Norm) -> None:
    """This holds for all three errors."""
    order = torch.randperm(len(p.target), generator=torch.Generator().manual_seed(seed))
    for error in ERRORS:
        assert_close(error(p.logits[order], p.target[order], norm=norm), error(*p, norm=norm), rtol=0, atol=1e-12)


def test_an_empty_bin_weighs_nothing_and_no_samples_give_nan() -> None:
    """The value is neither 0 nor an exception."""
    one = bin_confidences(torch.tensor([0.9]), torch.tensor([False]), n_bins=1000)
    none = bin_confidences(torch.empty(0), torch.empty(0, dtype=torch.bool), n_bins=3)
    for norm in NORMS:
        assert binned_error(one, norm=norm).item() == pytest.approx(0.9)
        assert binned_error(none, norm=norm).isnan()
    for error in ERRORS:
        assert error(torch.empty(0, 3), torch.empty(0, dtype=torch.int64)).isnan()


def test_sums_are_float64_whatever_the_confidences() -> None:
    """A full bin still takes small terms, such as a million confident samples in float32 (trap 19)."""
    generator = torch.Generator().manual_seed(0)
    confidences = torch.sigmoid((2 * torch.randn(10**6, generator=generator) + 3).abs())
    correct = torch.rand(10**6, generator=generator) < confidences
    bins = bin_confidences(confidences, correct, n_bins=10)
    exact = math.fsum(confidences[confidences.double() >= 0.9].tolist())
    assert bins.confidence_sums[9].item() == pytest.approx(exact, rel=1e-12)
    assert bins.counts.sum() == 10**6


def test_the_value_is_that_of_all_samples_not_a_mean_over_batches() -> None:
    """The mean over batches of 512 would be ten times the value of a calibrated model (trap 22)."""
    logits, target = classifier(2**16, 10, 0)
    confidences, correct = top_label(logits, target)
    batches = [
        bin_confidences(c, k, n_bins=10) for c, k in zip(confidences.split(512), correct.split(512), strict=True)
    ]
    merged = Bins(*(torch.stack(sums).sum(0) for sums in zip(*batches, strict=True)))
    value = calibration_error(logits, target, n_bins=10)
    assert_close(binned_error(merged), value)
    assert torch.stack([binned_error(b) for b in batches]).mean() > 8 * value
    with pytest.raises(ValueError, match=r"bins must be as many to be added, got \[10\] and \[1\]"):
        batches[0] + bin_confidences(confidences, correct, n_bins=1)  # which would broadcast


def test_a_calibrated_model_has_an_error_above_zero() -> None:
    """It is about .029 at N = 1,000 with 15 bins: the documented bias, below its documented bound (trap 26)."""
    values = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        confidences = 0.25 + 0.75 * torch.rand(1000, generator=generator)
        correct = torch.rand(1000, generator=generator) < confidences
        values.append(binned_error(bin_confidences(confidences, correct)).item())
    assert 0.02 < sum(values) / 200 < 0.4 * math.sqrt(15 / 1000)


def test_debiased_l2_of_a_calibrated_model_is_zero_on_average_before_the_root() -> None:
    """The plain square is above zero on average, and a negative sum of squares gives 0, not NaN."""
    generator = torch.Generator().manual_seed(1)
    plain, debiased = [], []
    for _ in range(300):
        confidences = torch.rand(500, generator=generator).mul(10).floor().add(0.5).div(10)
        bins = bin_confidences(confidences, torch.rand(500, generator=generator) < confidences, n_bins=10)
        accuracies = bins.correct_sums / bins.counts
        noise = (bins.counts * accuracies * (1 - accuracies) / (bins.counts - 1)).sum() / 500
        plain.append(binned_error(bins, norm="l2").square())
        debiased.append(plain[-1] - noise)
        value = binned_error(bins, norm="l2", debiased=True)
        assert_close(value, debiased[-1].clamp(min=0).sqrt())
    mean, spread = torch.stack(debiased).mean(), torch.stack(debiased).std() / 300**0.5
    assert mean.abs() < 3 * spread < torch.stack(plain).mean() / 3


def test_debiased_l2_of_single_samples_is_zero() -> None:
    """The noise of a bin of one is unknown, so the bin is left out instead of dividing by zero."""
    bins = bin_confidences(torch.tensor([0.1, 0.9]), torch.tensor([True, False]), n_bins=2)
    assert binned_error(bins, norm="l2", debiased=True) == 0


@pytest.mark.parametrize(("norm", "debiased"), [("l1", False), ("l2", False), ("l2", True), ("max", False)])
def test_leading_dimensions_are_errors_of_their_own(norm: Norm, debiased: bool) -> None:
    """Sums ``[..., n_bins]`` give a value for each row, also with bins of one, two and no samples."""
    confidences = torch.tensor([0.1, 0.15, 0.3, 0.6, 0.65, 0.9])
    rows = [
        bin_confidences(confidences[:n], torch.tensor([False, True, True, False, False, True])[:n], n_bins=4)
        for n in (2, 5, 6)
    ]
    stacked = Bins(*(torch.stack(sums) for sums in zip(*rows, strict=True)))
    expected = torch.stack([binned_error(bins, norm=norm, debiased=debiased) for bins in rows])
    assert expected.unique().numel() > 1
    assert torch.equal(binned_error(stacked, norm=norm, debiased=debiased), expected)


def test_debiased_l2_by_hand() -> None:
    """One of two right at 1/4: (1/4)² less (1/4) / 1 is negative. Two of two right at 3/4: (1/4)² less 0."""
    two = bin_confidences(torch.tensor([0.25, 0.25]), torch.tensor([True, False]), n_bins=1)
    assert binned_error(two, norm="l2") == 0.25
    assert binned_error(two, norm="l2", debiased=True) == 0
    both = bin_confidences(torch.full((2,), 0.75), torch.ones(2, dtype=torch.bool), n_bins=1)
    assert binned_error(both, norm="l2", debiased=True) == 0.25
    perfect = bin_confidences(torch.ones(1), torch.ones(1, dtype=torch.bool), n_bins=1)
    assert binned_error(perfect, norm="l2", debiased=True) == 0


def equal_mass_oracle(confidences: Tensor, correct: Tensor, n_bins: int, norm: Norm) -> float:
    """Finds ranks by counting; the middle rank of a tie decides."""
    values = confidences.tolist()
    middle = [sum(w < v for w in values) + sum(w <= v for w in values) - 1 for v in values]
    bins = [m * n_bins // (2 * len(values)) for m in middle]
    return oracles.calibration_error(confidences, correct, n_bins, norm, bins)


@given(confidences_and_correct(), st.integers(1, 20), st.sampled_from(NORMS))
def test_equal_mass_bins_go_by_rank(samples: Samples, n_bins: int, norm: Norm) -> None:
    """The bins are those of counting sample by sample."""
    value = binned_error(equal_mass_bins(*samples, n_bins=n_bins), norm=norm)
    assert value.item() == pytest.approx(equal_mass_oracle(*samples, n_bins, norm), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("n", [1, 14, 15, 16, 1000])
def test_equal_mass_bins_differ_by_at_most_one_sample_without_ties(n: int) -> None:
    """Each holds N / B samples."""
    confidences = torch.rand(n, dtype=torch.float64)
    counts = equal_mass_bins(confidences, confidences > 0.5, n_bins=15).counts
    assert counts.sum() == n
    assert counts.max() - counts.min() <= 1


def test_ties_are_never_split_and_order_does_not_matter() -> None:
    """A calibrated model that knows two confidences is found calibrated, sorted or shuffled (trap 23)."""
    confidences = torch.tensor([0.5] * 500 + [0.8] * 500, dtype=torch.float64)
    correct = torch.tensor(([True] * 250 + [False] * 250) + ([True] * 400 + [False] * 100))
    values = []
    for order in (torch.arange(1000), torch.randperm(1000), torch.arange(999, -1, -1)):
        bins = equal_mass_bins(confidences[order], correct[order], n_bins=15)
        assert bins.counts[bins.counts > 0].tolist() == [500, 500]
        values.append(binned_error(bins).item())
    assert values[0] == values[1] == values[2] == pytest.approx(0, abs=1e-12)


def class_bins(logits: Tensor, target: Tensor, n_bins: int) -> Bins:
    """Returns the sums that the function and the metric use."""
    return bin_classes(probability_blocks(logits, target, True, None), n_bins)


@given(predictions(), st.integers(1, 12), st.sampled_from(NORMS))
def test_classwise_error_is_the_definition(p: Predictions, n_bins: int, norm: Norm) -> None:
    """Every probability of every class falls into a bin of that class."""
    probs = p.logits.softmax(1)
    n, n_classes = probs.shape
    hits = p.target[:, None] == torch.arange(n_classes)
    bins = [
        c * n_bins + max(k for k in range(n_bins) if k * (1 / n_bins) <= value)
        for row in probs.double().tolist()
        for c, value in enumerate(row)
    ]
    expected = oracles.calibration_error(probs.flatten(), hits.flatten(), n_bins, norm, bins)
    value = classwise_calibration_error(*p, n_bins=n_bins, norm=norm)
    assert value.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    counts, _, correct_sums = class_bins(*p, n_bins=n_bins)
    assert counts.sum(1).tolist() == [n] * n_classes
    assert correct_sums.sum(1).tolist() == torch.bincount(p.target, minlength=n_classes).tolist()


def test_sums_over_classes_are_those_of_all_blocks() -> None:
    """A batch of several blocks has the sums of its parts."""
    logits, target = classifier(900, 1000, 0)
    whole, start, end = (
        class_bins(logits[rows], target[rows], n_bins=15) for rows in (slice(None), slice(100), slice(100, None))
    )
    assert_close(whole, start + end)
    assert whole.counts.sum() == logits.numel()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_over_classes_are_float64_whatever_the_logits(dtype: torch.dtype) -> None:
    """Logits of low precision have the sums of their float32 copies, to the bit (trap 19)."""
    logits, target = classifier(900, 100, 0, dtype=dtype)
    low, full = (class_bins(scores, target, n_bins=15) for scores in (logits, logits.float()))
    assert_close(low, full, rtol=0, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_an_error_is_that_of_its_bins(norm: Norm) -> None:
    """The functions of logits pass norm, bins and options on. The defaults are 15 bins and "l1"."""
    logits, target = classifier(400, 6, 0)
    samples = top_label(logits, target)
    for error, bins_of in ((calibration_error, bin_confidences), (adaptive_calibration_error, equal_mass_bins)):
        assert torch.equal(error(logits, target, norm=norm), binned_error(bins_of(*samples, n_bins=15), norm=norm))
        assert torch.equal(
            error(logits, target, n_bins=4, norm=norm), binned_error(bins_of(*samples, n_bins=4), norm=norm)
        )
        assert torch.equal(error(logits, target), binned_error(bins_of(*samples, n_bins=15), norm="l1"))
    debiased = binned_error(bin_confidences(*samples), norm="l2", debiased=True)
    assert torch.equal(calibration_error(logits, target, norm="l2", debiased=True), debiased)
    assert debiased < calibration_error(logits, target, norm="l2")
    bins = class_bins(logits, target, n_bins=15)
    assert torch.equal(classwise_calibration_error(logits, target, norm=norm), classwise_error(bins, norm))
    assert torch.equal(classwise_calibration_error(logits, target), classwise_error(bins, "l1"))


def test_classwise_error_sees_what_the_top_label_hides() -> None:
    """A model that mixes up its second classes is calibrated at the top and not below."""
    probs = torch.tensor([[0.5, 0.4, 0.1]]).expand(10, 3)
    target = torch.tensor([0] * 5 + [2] * 4 + [1])
    assert calibration_error(probs, target, from_logits=False) == pytest.approx(0, abs=1e-7)
    assert classwise_calibration_error(probs, target, from_logits=False) == pytest.approx((0 + 0.3 + 0.3) / 3)


@given(predictions(), st.sampled_from(ERRORS))
def test_ignored_samples_are_as_good_as_absent(p: Predictions, error: Callable[..., Tensor]) -> None:
    """Their rows may hold anything, NaN included."""
    logits = torch.cat([p.logits, torch.full((2, p.logits.shape[1]), torch.nan, dtype=p.logits.dtype)])
    target = torch.cat([p.target, torch.tensor([-100, -100])])
    assert_close(error(logits, target, ignore_index=-100), error(*p), rtol=0, atol=1e-7)


def test_probabilities_and_their_logits_agree() -> None:
    """from_logits decides, and nothing is guessed from values: cosines in [0, 1] are logits (trap 20)."""
    logits, target = classifier(500, 10, 0, dtype=torch.float64)
    for error in ERRORS:
        assert_close(error(logits.softmax(1), target, from_logits=False), error(logits, target))
    cosines = torch.rand(500, 10, dtype=torch.float64)
    assert_close(top_label(cosines, target)[0], cosines.softmax(1).amax(1))


@pytest.mark.parametrize("error", ERRORS)
def test_captures_as_one_graph(error: Callable[..., Tensor]) -> None:
    """No value is read back on the way, and no shape depends on one."""
    logits, target = classifier(40, 5, 0)
    compiled = torch.compile(error, fullgraph=True, backend="aot_eager")
    assert_close(compiled(logits, target), error(logits, target))


@given(confidences_and_correct(), st.integers(1, 20))
def test_the_parts_of_a_brier_score_sum_to_it(data: tuple[Tensor, Tensor], n_bins: int) -> None:
    """That of confidences replaced by the means of their bins, sample by sample; each part is in [0, 1/4] or [0, 1]."""
    confidences, correct = data
    bins = bin_confidences(confidences, correct, n_bins=n_bins)
    index = (confidences[:, None] >= torch.arange(1, n_bins, dtype=torch.float64) * (1 / n_bins)).sum(1)
    forecasts = (bins.confidence_sums / bins.counts)[index]
    reliability, resolution, uncertainty = brier_decomposition(bins)
    score = (forecasts - correct.double()).square().mean()
    assert_close(reliability - resolution + uncertainty, score, rtol=0, atol=1e-12)
    assert reliability >= 0
    assert 0 <= resolution <= uncertainty + 1e-12 <= 0.25 + 2e-12


def test_the_parts_of_a_brier_score_are_scikit_learns_score() -> None:
    """Where all confidences of a bin are equal, the sum is the Brier score itself."""
    generator = torch.Generator().manual_seed(0)
    confidences = (torch.randint(0, 10, (500,), generator=generator).double() + 0.5) / 10
    correct = torch.rand(500, generator=generator) < confidences
    reliability, resolution, uncertainty = brier_decomposition(bin_confidences(confidences, correct, n_bins=10))
    expected = brier_score_loss(correct.numpy(), confidences.numpy())
    assert float(reliability - resolution + uncertainty) == pytest.approx(expected, abs=1e-12)


def test_a_row_of_bins_has_parts_of_its_own() -> None:
    """Bins ``[2, 3]`` give two values of each part, and no samples give NaN."""
    rows = [
        bin_confidences(torch.tensor([0.1, 0.9, 0.8]), torch.tensor([False, True, i > 0]), n_bins=3) for i in (0, 1)
    ]
    both = brier_decomposition(Bins(*map(torch.stack, zip(*rows, strict=True))))
    for part, expected in zip(both, zip(*map(brier_decomposition, rows), strict=True), strict=True):
        assert_close(part, torch.stack(expected))
    assert all(part.isnan() for part in brier_decomposition(Bins(*torch.zeros(3, 4))))
