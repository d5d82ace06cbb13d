"""Intervals of calibration errors and accuracies; docs/derivations.md has the formulas."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from calrobust._checks import check_fraction, check_positive
from calrobust.functional.calibration import bin_index, sum_by_bin, valid_confidences

BISECTIONS = 36
LEAST_VARIANCE = 50  # sum of c * (1 - c) from which an ECE has an interval
FEWEST = 10  # right and wrong predictions from which the mean of a score has one


class CalibrationInterval(NamedTuple):
    """An ECE, its interval and its noise floor, all float64.

    Example:
        >>> import torch
        >>> from calrobust.functional import calibration_interval
        >>> calibration_interval(torch.full((200,), 0.5), torch.arange(200) < 120).value  # |100 - 120| / 200
        tensor(0.1000, dtype=torch.float64)
    """

    value: Tensor
    """The ECE of the samples, which is error and noise together."""
    debiased: Tensor
    """The value minus what noise adds to it on average; 0 if the value is below the noise floor."""
    low: Tensor
    """Lower end of the interval for the error without noise, or NaN."""
    high: Tensor
    """Upper end of the interval for the error without noise, or NaN."""
    floor: Tensor
    """The noise floor, which is the mean ECE of a perfectly calibrated model of these confidences."""
    p_value: Tensor
    """Chance that a perfectly calibrated model of these confidences shows an ECE at least as large."""


def calibration_interval(
    confidences: Tensor, correct: Tensor, *, n_bins: int = 15, level: float = 0.95
) -> CalibrationInterval:
    r"""Interval and noise floor of the expected calibration error (ECE), and a test against perfect calibration.

    The interval and the debiased value are about the ECE of infinitely many samples in the same bins, so the whole
    interval may lie below the value. There is no interval if the sum of :math:`c (1 - c)` over the confidences c is
    below 50, as for up to about 300 samples, or 1,400 of a very confident model. :doc:`/derivations` has the formulas,
    their sources and the simulated coverage.

    Args:
        confidences: shape ``[N]``, as for :func:`~calrobust.functional.bin_confidences`.
        correct: shape ``[N]``, likewise.
        n_bins: likewise.
        level: share of data sets whose interval contains the true error, in (0, 1).

    Returns:
        Six float64 scalars; all NaN without samples.

    Raises:
        TypeError, ValueError: as for :func:`~calrobust.functional.bin_confidences`, or ``level`` is not in (0, 1).

    Example:
        >>> import torch
        >>> from calrobust.functional import calibration_interval
        >>> confidences, correct = torch.full((200,), 0.5), torch.arange(200) < 120  # 120 of 200 right, 100 expected
        >>> value, debiased, low, high, floor, p_value = calibration_interval(confidences, correct)
        >>> value, floor  # |100 - 120| / 200, and sqrt(2 * 50 / pi) / 200
        (tensor(0.1000, dtype=torch.float64), tensor(0.0282, dtype=torch.float64))

    Reference: Bröcker and Smith, 2007, *Increasing the Reliability of Reliability Diagrams*. Interval and debiased
    value are our own.
    """
    check_positive(level=level)
    check_fraction(closed=False, level=level)
    return mean_interval(bin_moments(confidences, correct, n_bins)[:, None], level)


def bin_moments(confidences: Tensor, correct: Tensor, n_bins: int) -> Tensor:
    """float64 ``[4, n_bins]``: the three sums of ``bin_confidences``, and those of c * (1 - c)."""
    confidences = valid_confidences(confidences, correct, n_bins)
    variances = (confidences * (1 - confidences)).clamp(min=0)
    return sum_by_bin(bin_index(confidences, n_bins), n_bins, confidences, correct, variances)


def mean_interval(moments: Tensor, level: float) -> CalibrationInterval:
    """:func:`calibration_interval` of the mean ECE of D data sets, from moments ``[4, ..., D, n_bins]``."""
    counts, confidence_sums, correct_sums, variances = moments
    total, n_sets = counts.sum(-1), counts.shape[-2]
    values = (confidence_sums - correct_sums).abs().sum(-1) / total
    floors = (2 / math.pi * variances).sqrt().sum(-1) / total
    deviations = ((1 - 2 / math.pi) * variances.sum(-1)).clamp(min=1e-300).sqrt() / total
    low, debiased, high = _errors(moments, level)
    if n_sets > 1:
        debiased = torch.where(values < floors, values - floors, debiased)  # a mean of values cut at 0 has a bias
    value, floor = values.mean(-1), floors.mean(-1)
    p_value = torch.special.ndtr((floor - value) / (deviations.norm(dim=-1) / n_sets))
    has_interval = (variances.sum(-1) >= LEAST_VARIANCE).all(-1) & (n_sets == 1)
    low, high = (torch.where(has_interval, end.mean(-1), math.nan) for end in (low, high))
    return CalibrationInterval(value, debiased.mean(-1).clamp(min=0), low, high, floor, p_value)


def _errors(moments: Tensor, level: float) -> Tensor:
    """Lower end, debiased value and upper end, ``[3, ...]``, from moments ``[4, ..., n_bins]``."""
    counts, confidence_sums, correct_sums, variances = moments
    total, filled = counts.sum(-1), counts.clamp(min=1)
    observed = (confidence_sums - correct_sums).abs()
    # Underconfident bins are mirrored.
    largest_gaps = torch.where(confidence_sums > correct_sums, confidence_sums, counts - confidence_sums)
    confidences = largest_gaps / filled
    # Confidences that differ within a bin make d vary less.
    equal = confidences * (1 - confidences)
    effective = torch.where(equal > 0, variances / equal, counts).clamp(1e-6 * counts, counts)
    accuracies = (largest_gaps - observed + 0.5) / (counts + 1)
    deviations = (effective * accuracies * (1 - accuracies)).sqrt()
    least = torch.minimum(0.5 / (counts + 1), confidences)

    def gaps(t: Tensor) -> Tensor:
        steps = t[..., None] * deviations
        tried = torch.where(steps > 0, (observed - steps).clamp(min=0), observed.hypot(steps))
        return tried.minimum(largest_gaps)

    def distribution(gaps: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of the sum of ``|d|``, and the standard deviation of its difference from the observed sum."""
        accuracies = (confidences - gaps / filled).clamp(min=least)
        variances = effective * accuracies * (1 - accuracies)
        scaled = gaps / (2 * variances).clamp(min=1e-300).sqrt()
        slopes, squares = torch.erf(scaled), gaps.square()  # d mean / d gap
        means = (2 / math.pi * variances).sqrt() * (-scaled.square()).exp() + gaps * slopes
        # To first order the difference is a sum of |d| with these weights.
        free = torch.where((gaps > 0) & (gaps < largest_gaps), deviations, 0)
        slope = (slopes * free).sum(-1, keepdim=True) / free.sum(-1, keepdim=True).clamp(min=1e-300)
        weights = torch.where(free > 0, 1 - slopes + slope, 1)
        folded = weights.square() * (squares + variances - means.square()).clamp(min=0)
        between = weights.square() * squares / filled  # how many samples fall into a bin varies
        spread = (folded + between).sum(-1) - (weights * gaps).sum(-1).square() / total
        return means.sum(-1), spread.clamp(min=0).sqrt()

    # For the lower end the observed sum is this many deviations above its mean.
    quantile = torch.special.ndtri(total.new_tensor((1 + level) / 2))
    quantiles = torch.stack((quantile, 0 * quantile, -quantile)).view(3, *[1] * total.ndim)
    positive = deviations.clamp(min=1e-12)
    most = ((observed / positive).amax(-1) + 1).expand(3, *total.shape)  # there all gaps are 0
    fewest = -(largest_gaps / positive).amax(-1).expand(3, *total.shape)  # there all gaps are as large as possible
    for _ in range(BISECTIONS):
        t = (fewest + most) / 2
        mean, deviation = distribution(gaps(t))
        too_small = mean + quantiles * deviation < observed.sum(-1)
        fewest, most = torch.where(too_small, fewest, t), torch.where(too_small, t, most)
    return torch.div(gaps(most).sum(-1), total)


def mean_accuracy(correct: Tensor, counts: Tensor, level: float) -> Tensor:
    """Mean accuracy of data sets ``[..., D]``, and the ends of its interval: ``[3, ...]``."""
    z = torch.special.ndtri(counts.new_tensor((1 + level) / 2))
    shares = correct / counts
    centres = (correct + z.square() / 2) / (counts + z.square())
    halves = z / (counts + z.square()) * (correct * (1 - shares) + z.square() / 4).sqrt()
    return mean_of_intervals(torch.stack((shares, centres - halves, centres + halves))).clamp(0, 1)


def mean_of_intervals(parts: Tensor) -> Tensor:
    """The mean of independent values and the ends of its interval, ``[3, ...]``, from those of each ``[3, ..., D]``."""
    values, lows, highs = parts
    mean = values.mean(-1)
    distances = torch.stack((values - lows, highs - values)).square().sum(-1).sqrt() / values.shape[-1]
    return torch.stack((mean, mean - distances[0], mean + distances[1]))


def score_interval(scores: Tensor, level: float, *, paired: bool = False) -> Tensor:
    """The mean of scores ``[N]``, or of ``paired`` differences, and the ends of its interval: ``[3]``."""
    scores, n = scores.double(), len(scores)
    mean = scores.mean()
    centred = scores - mean
    deviation = (centred.square().sum() / (n * (n - 1))).sqrt() if n > 1 else mean * math.nan
    skewness = (centred / (n * deviation)).pow(3).sum().nan_to_num()  # of the mean
    skewness = torch.where(skewness.abs() < 1e-6, 1e-6, skewness)
    z = torch.special.ndtri(mean.new_tensor([(1 + level) / 2, (1 - level) / 2]))
    if paired:  # quantiles of Student's t
        freedom = n_deciding(scores).nan_to_num(math.inf)
        z = z + z * (z.square() + 1) / (4 * freedom) + z * (5 * z**4 + 16 * z**2 + 3) / (96 * freedom**2)
    cubes = 1 + skewness * (z - skewness / 6)
    steps = 3 / skewness * (cubes.sign() * cubes.abs().pow(1 / 3) - 1)
    return torch.cat((mean[None], mean - deviation * steps))


def n_deciding(scores: Tensor) -> Tensor:
    """How many scores would, if they alone differed from the mean and by as much, have the same kurtosis."""
    squares = (scores.double() - scores.double().mean()).square()
    return squares.sum().square() / squares.square().sum()
