"""Calibration errors and their intervals."""

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from calrobust._checks import check_bins, check_choice, check_flag, check_fraction, check_n_bins, check_positive
from calrobust.functional.scoring import (
    Bins,
    Block,
    as_rows,
    places,
    probability_blocks,
    top_label,
    valid_confidences,
)

Norm = Literal["l1", "l2", "max"]

BISECTIONS = 36
LEAST_VARIANCE = 50  # sum of c * (1 - c) for an interval


def bin_index(confidences: Tensor, n_bins: int) -> Tensor:
    edges = torch.arange(1, n_bins, dtype=torch.float64, device=confidences.device) * (1 / n_bins)
    return torch.bucketize(confidences, edges, right=True)


def bin_confidences(confidences: Tensor, correct: Tensor, *, n_bins: int = 15) -> Bins:
    """Sums over bins of equal width, for :func:`~calrobust.functional.binned_error`.

    Bins are ``[lo, hi)``, the last one closed, with edges ``arange(n_bins + 1) * (1 / n_bins)`` in float64.

    Args:
        confidences: shape ``[N]``, floating, in [0, 1], else the value is NaN.
        correct: shape ``[N]``, bool.
        n_bins: number of bins.

    Raises:
        TypeError: ``confidences`` is not floating or ``correct`` is not bool.
        ValueError: the two differ in shape or device, or ``n_bins`` < 1.

    Example:
        >>> import torch
        >>> from calrobust.functional import bin_confidences
        >>> bins = bin_confidences(torch.tensor([0.25, 0.5, 1.0]), torch.tensor([True, False, True]), n_bins=2)
        >>> bins.confidence_sums  # 0.5 is in [0.5, 1]
        tensor([0.2500, 1.5000], dtype=torch.float64)
    """
    confidences = valid_confidences(confidences, correct, n_bins)
    return Bins(*sum_by_bin(bin_index(confidences, n_bins), n_bins, confidences, correct))


def equal_mass_bins(confidences: Tensor, correct: Tensor, *, n_bins: int) -> Bins:
    confidences, order = valid_confidences(confidences, correct, n_bins).sort()
    ends = torch.searchsorted(confidences, confidences) + torch.searchsorted(confidences, confidences, right=True) - 1
    index = (ends * n_bins // (2 * max(1, len(confidences)))).clamp(max=n_bins - 1)  # for NaN
    return Bins(*sum_by_bin(index, n_bins, confidences, correct[order]))


def sum_by_bin(index: Tensor, n_bins: int, *values: Tensor) -> Tensor:
    """``[1 + len(values), n_bins]``: counts and sums."""
    stacked = torch.stack((torch.ones_like(values[0]), *values))
    return stacked.new_zeros(len(stacked), n_bins).index_add(1, index, stacked)


def binned_error(bins: Bins, *, norm: Norm = "l1", debiased: bool = False) -> Tensor:
    r"""Distance between accuracy and mean confidence over bins.

    With :math:`n_b` of N samples in bin b, accuracy :math:`a_b` and mean confidence :math:`c_b`:

    .. math::
        \mathrm{ECE} = \sum_b \tfrac{n_b}{N} |a_b - c_b|, \quad
        \mathrm{RMSCE} = \sqrt{\sum_b \tfrac{n_b}{N} (a_b - c_b)^2}, \quad
        \mathrm{MCE} = \max_b |a_b - c_b|

    The result is float64 in [0, 1], NaN without samples, one value for each row of bins.

    Args:
        bins: sums of shape ``[..., n_bins]``, see :func:`~calrobust.functional.bin_confidences`.
        norm: ``"l1"`` (ECE), ``"l2"`` (RMSCE) or ``"max"`` (MCE).
        debiased: only for ``"l2"``: subtract the bias of each square, :math:`a_b (1 - a_b) / (n_b - 1)`. Bins of one
            sample and negative sums count 0.

    Raises:
        TypeError: ``bins`` are not three floating tensors.
        ValueError: their shapes or devices differ, ``norm`` is unknown, or ``debiased`` is set without ``"l2"``.

    Example:
        >>> import torch
        >>> from calrobust.functional import bin_confidences, binned_error
        >>> confidences, correct = torch.tensor([0.25, 0.25, 0.75, 1.0]), torch.tensor([False, False, True, True])
        >>> binned_error(bin_confidences(confidences, correct, n_bins=2))  # (2 * 0.25 + 2 * 0.125) / 4
        tensor(0.1875, dtype=torch.float64)

    Reference: Guo et al., 2017, :arxiv:`1706.04599`, equations 3 and 5; ``debiased``: Kumar et al., 2019,
    :arxiv:`1909.10155`, section 5.
    """
    check_norm(norm, debiased=debiased)
    check_bins(bins)
    counts, confidence_sums, correct_sums = bins
    total = counts.sum(-1)
    filled = counts.where(counts > 0, 1)
    gaps = (confidence_sums - correct_sums).abs()
    if norm == "l1":
        return gaps.sum(-1) / total
    if norm == "max":
        return (gaps / filled).amax(-1).where(total > 0, torch.nan)
    squares = gaps.square() / filled
    if debiased:
        accuracies = correct_sums / filled
        noise = counts * accuracies * (1 - accuracies) / (counts - 1)
        squares = torch.where(counts > 1, squares - noise, 0 * squares)
    return (squares.sum(-1) / total).clamp(min=0).sqrt()


def check_norm(norm: Norm, *, debiased: bool = False) -> None:
    check_choice(get_args(Norm), norm=norm)
    check_flag(debiased=debiased)
    if debiased and norm != "l2":
        raise ValueError(f"debiased must be False unless norm is 'l2', whose bias is known, got norm={norm!r}")


def calibration_error(
    preds: Tensor,
    target: Tensor,
    *,
    n_bins: int = 15,
    norm: Norm = "l1",
    debiased: bool = False,
    from_logits: bool = True,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Expected calibration error of the top label (ECE), or another norm of its gaps.

    .. math:: \mathrm{ECE} = \sum_b \tfrac{n_b}{N} |a_b - c_b|

    The result is a float64 scalar in [0, 1], NaN without samples or with NaN in ``preds``.

    Args:
        preds: shape ``[N, C]`` or ``[N, C, ...]``, floating: logits, where ``-inf`` masks a class, or probabilities.
        target: shape ``[N]`` or ``[N, ...]``, int64 labels in [0, C).
        n_bins: number of bins of equal width.
        norm: as for :func:`~calrobust.functional.binned_error`, which has the symbols.
        debiased: likewise.
        from_logits: whether ``preds`` are logits.
        ignore_index: samples with this label are left out.

    Raises:
        TypeError: ``preds`` is not floating, ``target`` is not int64, or an option is of another type.
        ValueError: shapes or devices do not fit, there is a single class, or an option is out of range. Only on a CPU:
            labels are out of range, or ``from_logits`` is wrong.

    Example:
        >>> import torch
        >>> from calrobust.functional import calibration_error
        >>> probs = torch.tensor([[0.75, 0.25], [0.75, 0.25]])
        >>> calibration_error(probs, torch.tensor([0, 1]), from_logits=False)  # right half of the time
        tensor(0.2500, dtype=torch.float64)

    Reference: Guo et al., 2017, :arxiv:`1706.04599`, equation 3.
    """
    confidences, correct = top_label(preds, target, from_logits=from_logits, ignore_index=ignore_index)
    return binned_error(bin_confidences(confidences, correct, n_bins=n_bins), norm=norm, debiased=debiased)


def adaptive_calibration_error(
    preds: Tensor,
    target: Tensor,
    *,
    n_bins: int = 15,
    norm: Norm = "l1",
    from_logits: bool = True,
    ignore_index: int | None = None,
) -> Tensor:
    """Calibration error of the top label over bins that hold equally many samples.

    Equal confidences share the bin of the middle sample among them.
    Arguments, result and errors are those of :func:`~calrobust.functional.calibration_error` without ``debiased``.

    Example:
        >>> import torch
        >>> from calrobust.functional import adaptive_calibration_error
        >>> probs = torch.tensor([[0.75, 0.25], [0.75, 0.25], [1.0, 0.0], [1.0, 0.0]])
        >>> target = torch.tensor([0, 1, 0, 0])  # (2 * 0.25 + 0) / 4
        >>> adaptive_calibration_error(probs, target, n_bins=2, from_logits=False)
        tensor(0.1250, dtype=torch.float64)

    Reference: Nguyen and O'Connor, 2015, :arxiv:`1508.05154`.
    """
    confidences, correct = top_label(preds, target, from_logits=from_logits, ignore_index=ignore_index)
    return binned_error(equal_mass_bins(confidences, correct, n_bins=n_bins), norm=norm)


def bin_classes(blocks: Iterable[Block], n_bins: int) -> Bins:
    """Sums ``[C, n_bins]`` of all probabilities."""
    sums = torch.empty(0)
    for block in blocks:
        probs, own, n_classes = block.probs, block.own.double(), block.probs.shape[1]
        if not sums.numel():
            sums = probs.new_zeros(3, n_classes * n_bins, dtype=torch.float64)
        counts, confidence_sums, correct_sums = sums
        correct_sums.index_add_(0, block.target * n_bins + bin_index(own, n_bins), torch.ones_like(own))
        # All go into the first bin, then high ones move.
        counts[::n_bins] += len(probs)
        confidence_sums[::n_bins] += probs.sum(0, dtype=torch.float64)
        flat = probs.flatten()
        high = places(flat >= 0.5 / n_bins)
        moved, first = flat[high].double(), high % n_classes * n_bins
        index, ones = torch.cat((first, first + bin_index(moved, n_bins))), torch.ones_like(moved)
        counts.index_add_(0, index, torch.cat((-ones, ones)))
        confidence_sums.index_add_(0, index, torch.cat((-moved, moved)))
    return Bins(*sums.unflatten(1, (-1, n_bins)))


def classwise_error(bins: Bins, norm: Norm) -> Tensor:
    return binned_error(Bins(*(sums.flatten(-2) for sums in bins)), norm=norm)


def classwise_calibration_error(
    preds: Tensor,
    target: Tensor,
    *,
    n_bins: int = 15,
    norm: Norm = "l1",
    from_logits: bool = True,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Calibration error of the probabilities of all classes (static calibration error).

    .. math:: \frac{1}{C} \sum_c \sum_b \tfrac{n_{bc}}{N} |a_{bc} - p_{bc}|

    :math:`n_{bc}` samples have a probability of class c in bin b, :math:`p_{bc}` on average. A share :math:`a_{bc}` of
    them is of that class.
    Arguments, result and errors are those of :func:`~calrobust.functional.calibration_error` without ``debiased``.

    Example:
        >>> import torch
        >>> from calrobust.functional import classwise_calibration_error
        >>> probs = torch.tensor([[0.75, 0.25], [0.75, 0.25]])  # both classes happen half of the time
        >>> classwise_calibration_error(probs, torch.tensor([0, 1]), from_logits=False)
        tensor(0.2500, dtype=torch.float64)

    Reference: Nixon et al., 2019, :arxiv:`1904.01685`.
    """
    check_n_bins(n_bins)
    blocks = probability_blocks(*as_rows(target, ignore_index, preds=preds), from_logits)
    return classwise_error(bin_classes(blocks, n_bins), norm)


class CalibrationInterval(NamedTuple):
    """An ECE, its interval and its noise floor, all float64.

    Example:
        >>> import torch
        >>> from calrobust.functional import calibration_interval
        >>> confidences, correct = torch.full((200,), 0.5), torch.arange(200) < 120  # 120 of 200 right, 100 expected
        >>> calibration_interval(confidences, correct).value  # |100 - 120| / 200
        tensor(0.1000, dtype=torch.float64)
    """

    value: Tensor
    """The ECE of the samples."""
    debiased: Tensor
    """The value minus what noise adds; 0 below the noise floor."""
    low: Tensor
    """Lower end of the interval of the error without noise, or NaN."""
    high: Tensor
    """Its upper end, or NaN."""
    floor: Tensor
    """The mean ECE of a perfectly calibrated model of these confidences, the noise floor."""
    p_value: Tensor
    """Chance that a perfectly calibrated model of these confidences shows an ECE at least as large."""


def calibration_interval(
    confidences: Tensor, correct: Tensor, *, n_bins: int = 15, level: float = 0.95
) -> CalibrationInterval:
    r"""Interval and noise floor of the ECE, and a test against perfect calibration.

    Interval and debiased value are about infinitely many samples, so the interval may lie below the value. There is
    none if the sum of c * (1 - c) is below 50, as for up to about 300 samples, or 5,000 with c = 0.99.
    :doc:`/derivations` has formulas and coverage.

    Args:
        confidences: as for :func:`~calrobust.functional.bin_confidences`.
        correct: likewise.
        n_bins: likewise.
        level: how often intervals hold the true error, in (0, 1).

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

    Reference: Bröcker and Smith, 2007, *Increasing the Reliability of Reliability Diagrams*, and our own.
    """
    check_positive(level=level)
    check_fraction(closed=False, level=level)
    return mean_interval(bin_moments(confidences, correct, n_bins)[:, None], level)


def bin_moments(confidences: Tensor, correct: Tensor, n_bins: int) -> Tensor:
    """``[4, n_bins]``: the sums of ``bin_confidences``, and of c * (1 - c)."""
    confidences = valid_confidences(confidences, correct, n_bins)
    variances = (confidences * (1 - confidences)).clamp(min=0)
    return sum_by_bin(bin_index(confidences, n_bins), n_bins, confidences, correct, variances)


def mean_interval(moments: Tensor, level: float) -> CalibrationInterval:
    """:func:`calibration_interval` of the mean of D sets, from ``[4, ..., D, n_bins]``."""
    counts, confidence_sums, correct_sums, variances = moments
    total, n_sets = counts.sum(-1), counts.shape[-2]
    values = (confidence_sums - correct_sums).abs().sum(-1) / total
    floors = (2 / math.pi * variances).sqrt().sum(-1) / total
    deviations = ((1 - 2 / math.pi) * variances.sum(-1)).clamp(min=1e-300).sqrt() / total
    low, debiased, high = _errors(moments, level)
    debiased = torch.where(values < floors, values - floors, debiased)  # not yet cut at 0
    value, floor = values.mean(-1), floors.mean(-1)
    p_value = torch.special.ndtr((floor - value) / (deviations.norm(dim=-1) / n_sets))
    has_interval = (variances.sum(-1) >= LEAST_VARIANCE).all(-1) & (n_sets == 1)
    low, high = (torch.where(has_interval, end.mean(-1), math.nan) for end in (low, high))
    return CalibrationInterval(value, debiased.mean(-1).clamp(min=0), low, high, floor, p_value)


def _errors(moments: Tensor, level: float) -> Tensor:
    """Lower end, debiased value and upper end, ``[3, ...]``."""
    counts, confidence_sums, correct_sums, variances = moments
    total, filled = counts.sum(-1), counts.clamp(min=1)
    observed = (confidence_sums - correct_sums).abs()
    # Underconfident bins are mirrored.
    largest_gaps = torch.where(confidence_sums > correct_sums, confidence_sums, counts - confidence_sums)
    confidences = largest_gaps / filled
    equal = confidences * (1 - confidences)
    effective = torch.where(equal > 0, variances / equal, counts).clamp(1e-6 * counts, counts)
    accuracies = (largest_gaps - observed + 0.5) / (counts + 1)
    deviations = (effective * accuracies * (1 - accuracies)).sqrt()
    least = torch.minimum(0.5 / (counts + 1), confidences)

    def gaps_at(t: Tensor) -> Tensor:
        steps = t[..., None] * deviations
        tried = torch.where(steps > 0, (observed - steps).clamp(min=0), observed.hypot(steps))
        return tried.minimum(largest_gaps)

    tails = total.new_tensor([(1 + level) / 2, 0.5, (1 - level) / 2])
    quantiles = torch.special.ndtri(tails).view(3, *[1] * total.ndim)
    positive = deviations.clamp(min=1e-12)
    most = (observed / positive).amax(-1) + 1  # there all gaps are 0
    fewest = -(largest_gaps / positive).amax(-1)  # and here the largest
    for _ in range(BISECTIONS):
        t = (fewest + most) / 2
        gaps = gaps_at(t)
        accuracies = (confidences - gaps / filled).clamp(min=least)
        variances = effective * accuracies * (1 - accuracies)
        scaled = gaps / (2 * variances).clamp(min=1e-300).sqrt()
        slopes, squares = torch.erf(scaled), gaps.square()  # d mean / d gap
        means = (2 / math.pi * variances).sqrt() * (-scaled.square()).exp() + gaps * slopes
        free = torch.where((gaps > 0) & (gaps < largest_gaps), deviations, 0)
        slope = (slopes * free).sum(-1, keepdim=True) / free.sum(-1, keepdim=True).clamp(min=1e-300)
        weights = torch.where(free > 0, 1 - slopes + slope, 1)
        folded = weights.square() * (squares + variances - means.square()).clamp(min=0)
        between = weights.square() * squares / filled  # a bin's count varies
        spread = (folded + between).sum(-1) - (weights * gaps).sum(-1).square() / total  # of the observed sum
        too_small = means.sum(-1) + quantiles * spread.clamp(min=0).sqrt() < observed.sum(-1)
        fewest, most = torch.where(too_small, fewest, t), torch.where(too_small, t, most)
    return torch.div(gaps_at(most).sum(-1), total)
