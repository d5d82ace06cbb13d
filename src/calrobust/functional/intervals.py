"""How much of a calibration error is noise, and intervals for it and for the accuracy: all in closed form, no draws."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from calrobust._checks import check_confidences, check_fraction, check_n_bins, check_positive
from calrobust.functional.calibration import bin_index, valid_confidences

BISECTIONS = 36  # of an interval of t that is some 10 to 1,000 wide


class CalibrationInterval(NamedTuple):
    """An ECE and what may be said about it, float64.

    Example:
        >>> import torch
        >>> from calrobust.functional import calibration_interval
        >>> interval = calibration_interval(torch.full((100,), 0.5), torch.arange(100) < 50)  # half are right
        >>> interval.value, interval.low
        (tensor(0., dtype=torch.float64), tensor(0., dtype=torch.float64))
    """

    value: Tensor
    """The ECE of the samples, as :func:`~calrobust.functional.calibration_error` gives it: error and noise together."""
    low: Tensor
    """Lower end of the interval for the error without noise."""
    high: Tensor
    """Upper end of the interval for the error without noise."""
    floor: Tensor
    """The noise floor, the ECE that a perfectly calibrated model of these confidences shows on average."""
    p_value: Tensor
    """Chance that a perfectly calibrated model of these confidences shows an ECE as large as this one."""


class Moments(NamedTuple):
    """Sums over the samples of each bin, float64 ``[..., n_bins]``; ``a + b`` holds the samples of both."""

    counts: Tensor
    confidence_sums: Tensor
    correct_sums: Tensor
    variances: Tensor  # of correct_sums, if the model is calibrated: sums of c * (1 - c)

    def __add__(self, other: Moments) -> Moments:  # type: ignore[override]  # as that of Bins
        return Moments(*(a + b for a, b in zip(self, other, strict=True)))


def calibration_interval(
    confidences: Tensor, correct: Tensor, *, n_bins: int = 15, level: float = 0.95
) -> CalibrationInterval:
    r"""Interval for the expected calibration error (ECE), its noise floor, and a test against perfect calibration.

    In bin b let :math:`d_b` be the sum of confidences less the number of correct samples, so that the ECE is
    :math:`\sum_b |d_b| / N`. Noise makes every :math:`|d_b|` larger than the true gap. For a calibrated model, with
    :math:`v_b = \sum c (1 - c)` over the confidences c of the bin, the ECE has

    .. math::
        \text{mean } \frac{1}{N} \sum_b \sqrt{2 v_b / \pi}, \qquad
        \text{variance } \frac{1 - 2 / \pi}{N^2} \sum_b v_b .

    The mean is the noise floor. The p-value is one-sided and takes the ECE as normal.

    The interval is for the ECE that infinitely many samples would show over the same bins. It asks which true gaps
    :math:`\mu_b` agree with the ECE that was observed. They are taken from the observed ones,
    :math:`\mu_b = \max(0, |d_b| - t s_b)` with :math:`s_b` the standard deviation of :math:`d_b`; the larger t, the
    smaller the error. Given the gaps, :math:`|d_b|` is a folded normal variable, so mean and variance of the ECE are
    known, and those t form the interval for which the observed ECE lies within ``level`` of that law. So the lower end
    is 0 exactly where a two-sided test does not reject calibration, and because the value contains noise, the whole
    interval may lie below it.

    ``python tests/benchmarks/run.py --only coverage`` measures that 95 % intervals hold the true error in 92 to 98 % of
    data sets, for calibrated and overconfident models, sharp and diffuse confidences, N from 300 to 50,000. For sharp
    underconfident models, which make few errors, it is up to 99.6 %: there the intervals are too wide.

    Args:
        confidences: shape ``[N]``, floating, in [0, 1].
        correct: shape ``[N]``, bool.
        n_bins: number of bins of equal width.
        level: share of data sets whose interval holds the true error, in (0, 1).

    Returns:
        :class:`~calrobust.functional.CalibrationInterval` of five float64 scalars; all NaN without samples.

    Raises:
        TypeError: ``confidences`` is not floating or ``correct`` is not bool.
        ValueError: the two differ in shape or device, or a number is out of range.

    Example:
        >>> import torch
        >>> from calrobust.functional import calibration_interval
        >>> confidences, correct = torch.full((100,), 0.5), torch.arange(100) < 60  # 60 of 100 right, 50 expected
        >>> value, low, high, floor, p_value = calibration_interval(confidences, correct)
        >>> value, floor  # |50 - 60| / 100, and sqrt(2 * 25 / pi) / 100
        (tensor(0.1000, dtype=torch.float64), tensor(0.0399, dtype=torch.float64))

    Reference: Bröcker and Smith, 2007, *Increasing the Reliability of Reliability Diagrams* (the noise of calibrated
    forecasts); Leone, Nelson and Nottingham, 1961, *The Folded Normal Distribution*.
    """
    check_confidences(confidences, correct)
    check_n_bins(n_bins)
    check_positive(level=level)
    check_fraction(closed=False, level=level)
    return ece_interval(bin_moments(confidences, correct, n_bins), level)


def bin_moments(confidences: Tensor, correct: Tensor, n_bins: int) -> Moments:
    """Sums over the bins of :func:`~calrobust.functional.bin_confidences`; arguments as there."""
    confidences = valid_confidences(confidences)
    variances = (confidences * (1 - confidences)).clamp(min=0)
    values = torch.stack((torch.ones_like(confidences), confidences, correct.to(confidences.dtype), variances))
    return Moments(*values.new_zeros(4, n_bins).index_add(1, bin_index(confidences, n_bins), values))


def ece_interval(moments: Moments, level: float) -> CalibrationInterval:
    """Of each data set of moments ``[..., n_bins]``; :func:`calibration_interval` says what is done."""
    counts, confidence_sums, correct_sums, variances = moments
    total, filled = counts.sum(-1), counts.clamp(min=1)
    observed = (confidence_sums - correct_sums).abs()
    confidences = confidence_sums / filled
    # Confidences within a bin differ, which makes d vary less: as much as that of fewer samples of equal confidence.
    equal = confidences * (1 - confidences)
    effective = torch.where(equal > 0, variances / equal, counts).clamp(1e-6 * counts, counts)
    edge = 0.5 / (counts + 1)  # no accuracy is taken to be 0 or 1: more samples need not agree
    least, most = torch.minimum(edge, confidences), torch.maximum(1 - edge, confidences)
    accuracies = (correct_sums + 0.5) / (counts + 1)
    deviations = (effective * accuracies * (1 - accuracies)).sqrt()
    # Below its deviation a gap may have either sign; the one that leaves more room is taken.
    over = torch.where(observed < deviations, confidences >= 0.5, confidence_sums > correct_sums)
    room, sign = torch.where(over, confidence_sums, counts - confidence_sums), torch.where(over, 1.0, -1.0)

    def gaps(t: Tensor) -> Tensor:
        return torch.minimum((observed - t[..., None] * deviations).clamp(min=0), room)

    def distribution(gaps: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the sum of ``|d|``."""
        accuracies = (confidences - sign * gaps / filled).clamp(least, most)
        variances = effective * accuracies * (1 - accuracies)
        scaled = gaps / (2 * variances).clamp(min=1e-300).sqrt()
        means = (2 / math.pi * variances).sqrt() * (-scaled.square()).exp() + gaps * torch.erf(scaled)
        squares = gaps.square()
        between = (squares / filled).sum(-1) - gaps.sum(-1).square() / total  # the counts of the bins vary too
        return means.sum(-1), ((squares + variances - means.square()).sum(-1) + between).clamp(min=0).sqrt()

    # Both ends at once, the lower one first: there the observed sum is this many deviations above its mean.
    quantile = torch.special.ndtri(total.new_tensor((1 + level) / 2))
    quantiles = torch.stack((quantile, -quantile)).view(2, *[1] * total.ndim)
    positive = deviations.clamp(min=1e-12)
    largest = ((observed / positive).amax(-1) + 1).expand(2, *total.shape)  # there all gaps are 0
    smallest = -(room / positive).amax(-1).expand(2, *total.shape)  # there all gaps fill their room
    for _ in range(BISECTIONS):
        t = (smallest + largest) / 2
        mean, deviation = distribution(gaps(t))
        too_small = mean + quantiles * deviation < observed.sum(-1)
        smallest, largest = torch.where(too_small, smallest, t), torch.where(too_small, t, largest)
    low, high = gaps(largest).sum(-1) / total
    return CalibrationInterval(observed.sum(-1) / total, low, high, *_noise(moments))


def mean_interval(moments: Moments, level: float) -> CalibrationInterval:
    """Of the mean ECE of D data sets, moments ``[D, n_bins]``; several of them have no interval.

    A mean has less noise but the same bias, which depends on how the gaps are spread over the bins. No construction
    that was tried held the true mean as often as it said.
    """
    each = ece_interval(moments, level)
    if len(each.value) == 1:
        return CalibrationInterval(*(figure[0] for figure in each))
    nothing = torch.full_like(each.value[0], math.nan)
    return CalibrationInterval(each.value.mean(), nothing, nothing, *_noise(moments, mean=True))


def _noise(moments: Moments, *, mean: bool = False) -> tuple[Tensor, Tensor]:
    """Floor and p-value of each data set of moments ``[..., n_bins]``, or of their mean."""
    total = moments.counts.sum(-1)
    value = (moments.confidence_sums - moments.correct_sums).abs().sum(-1) / total
    floor = (2 / math.pi * moments.variances).sqrt().sum(-1) / total
    variance = (1 - 2 / math.pi) * moments.variances.sum(-1) / total.square()
    if mean:
        value, floor, variance = value.mean(), floor.mean(), variance.mean() / len(total)
    return floor, 0.5 * torch.erfc((value - floor) / (2 * variance).clamp(min=1e-300).sqrt())


def mean_accuracy(correct: Tensor, counts: Tensor, level: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean accuracy of data sets ``[..., D]``, and an interval: distances to Wilson's ends add up in squares.

    Reference: Wilson, 1927 (a data set); Zou and Donner, 2008, *Construction of confidence limits about effect
    measures* (several).
    """
    z = torch.special.ndtri(counts.new_tensor((1 + level) / 2))
    shares = correct / counts
    centres = (correct + z.square() / 2) / (counts + z.square())
    halves = z / (counts + z.square()) * (correct * (1 - shares) + z.square() / 4).sqrt()
    below, above = (shares - centres + halves).norm(dim=-1), (centres + halves - shares).norm(dim=-1)
    value, n_sets = shares.mean(-1), counts.shape[-1]
    return value, (value - below / n_sets).clamp(min=0), (value + above / n_sets).clamp(max=1)
