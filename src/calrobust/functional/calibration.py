"""Calibration errors: logits -> confidences -> binned sums -> value."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from calrobust._checks import check_bins, check_choice, check_flag, check_n_bins
from calrobust.functional.scoring import (
    Block,
    as_rows,
    can_read_values,
    check_confidences,
    probability_blocks,
    top_label,
)

Norm = Literal["l1", "l2", "max"]


class Bins(NamedTuple):
    """Sums over each bin, float64 ``[..., n_bins]``; ``a + b`` holds the samples of both.

    Example:
        >>> import torch
        >>> from calrobust.functional import bin_confidences
        >>> first = bin_confidences(torch.tensor([0.25]), torch.tensor([True]), n_bins=2)
        >>> second = bin_confidences(torch.tensor([0.375, 0.75]), torch.tensor([True, False]), n_bins=2)
        >>> (first + second).counts
        tensor([2., 1.], dtype=torch.float64)
    """

    counts: Tensor
    """Number of samples."""
    confidence_sums: Tensor
    """Sum of their confidences."""
    correct_sums: Tensor
    """Number of correct ones."""

    def __add__(self, other: Bins) -> Bins:  # type: ignore[override]  # joining two tuples of sums has no meaning
        return Bins(*(a + b for a, b in zip(self, other, strict=True)))


def bin_index(confidences: Tensor, n_bins: int) -> Tensor:
    """The bin of each float64 confidence."""
    edges = torch.arange(1, n_bins, dtype=torch.float64, device=confidences.device) * (1 / n_bins)
    return torch.bucketize(confidences, edges, right=True)


def bin_confidences(confidences: Tensor, correct: Tensor, *, n_bins: int = 15) -> Bins:
    """Sums over bins of equal width, for :func:`~calrobust.functional.binned_error`.

    Bins are ``[lo, hi)``, and the last one is closed. The edges are ``arange(n_bins + 1) * (1 / n_bins)`` in float64.

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
    """Sums over bins of equally many samples; equal confidences share a bin."""
    confidences, order = valid_confidences(confidences, correct, n_bins).sort()
    ends = torch.searchsorted(confidences, confidences) + torch.searchsorted(confidences, confidences, right=True) - 1
    index = (ends * n_bins // (2 * max(1, len(confidences)))).clamp(max=n_bins - 1)  # the clamp is for NaN
    return Bins(*sum_by_bin(index, n_bins, confidences, correct[order]))


def valid_confidences(confidences: Tensor, correct: Tensor, n_bins: int) -> Tensor:
    """Checks them; returns float64, with NaN outside [0, 1]."""
    check_confidences(confidences, correct)
    check_n_bins(n_bins)
    confidences = confidences.detach().double()
    return confidences.where((confidences - 0.5).abs() <= 0.5 + 1e-6, torch.nan)  # rounding


def sum_by_bin(index: Tensor, n_bins: int, *values: Tensor) -> Tensor:
    """float64 ``[1 + len(values), n_bins]``: counts and sums."""
    stacked = torch.stack((torch.ones_like(values[0]), *values))
    return stacked.new_zeros(len(stacked), n_bins).index_add(1, index, stacked)


def binned_error(bins: Bins, *, norm: Norm = "l1", debiased: bool = False) -> Tensor:
    r"""Distance between accuracy and mean confidence over bins.

    With :math:`n_b` of N samples in bin b, of accuracy :math:`a_b` and mean confidence :math:`c_b`:

    .. math::
        \mathrm{ECE} = \sum_b \tfrac{n_b}{N} |a_b - c_b|, \quad
        \mathrm{RMSCE} = \Bigl(\sum_b \tfrac{n_b}{N} (a_b - c_b)^2\Bigr)^{1/2}, \quad
        \mathrm{MCE} = \max_b |a_b - c_b|

    The result is float64 in [0, 1], or NaN without samples, one value for each row of bins.

    Args:
        bins: sums of shape ``[..., n_bins]``, see :func:`~calrobust.functional.bin_confidences`.
        norm: ``"l1"`` (ECE), ``"l2"`` (RMSCE) or ``"max"`` (MCE).
        debiased: only for ``"l2"``: subtract from each square what noise adds to it on average,
            :math:`a_b (1 - a_b) / (n_b - 1)`. A bin of one sample counts 0. A negative sum gives 0.

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


def brier_decomposition(bins: Bins) -> tuple[Tensor, Tensor, Tensor]:
    r"""Reliability, resolution and uncertainty, Murphy's parts of the Brier score of the top label.

    .. math::
        \sum_b \tfrac{n_b}{N} (a_b - c_b)^2, \quad \sum_b \tfrac{n_b}{N} (a_b - \bar a)^2, \quad \bar a (1 - \bar a)

    with the accuracy :math:`\bar a`; other symbols, ``bins``, results and errors are those of
    :func:`~calrobust.functional.binned_error`. Reliability - resolution + uncertainty is the mean squared distance of
    the confidence from 1 for right and 0 for wrong predictions, after each confidence is replaced by the mean of its
    bin. Reliability is better when low, resolution when high.

    Example:
        >>> import torch
        >>> from calrobust.functional import bin_confidences, brier_decomposition
        >>> bins = bin_confidences(torch.tensor([0.25, 0.75]), torch.tensor([False, True]), n_bins=2)
        >>> reliability, resolution, uncertainty = brier_decomposition(bins)
        >>> reliability - resolution + uncertainty  # 0.25²
        tensor(0.0625, dtype=torch.float64)

    Reference: Murphy, 1973, *A New Vector Partition of the Probability Score*, equation 12.
    """
    check_bins(bins)
    counts, confidence_sums, correct_sums = bins
    total = counts.sum(-1)
    accuracy = correct_sums.sum(-1) / total
    gaps = torch.stack((confidence_sums, counts * accuracy[..., None])) - correct_sums
    reliability, resolution = (gaps.square() / counts.where(counts > 0, 1)).sum(-1) / total
    return reliability, resolution, accuracy * (1 - accuracy)


def check_norm(norm: Norm, *, debiased: bool = False) -> None:
    """Raises for invalid options."""
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
    r"""Calibration error of the top label over bins that hold equally many samples.

    .. math:: \sum_b \tfrac{n_b}{N} |a_b - c_b|, \qquad n_b \approx N / n_\mathrm{bins}

    Samples of equal confidence share the bin of the middle one. Arguments, result and errors are those of
    :func:`~calrobust.functional.calibration_error` without ``debiased``.

    Example:
        >>> import torch
        >>> from calrobust.functional import adaptive_calibration_error
        >>> probs = torch.tensor([[0.75, 0.25], [0.75, 0.25], [1.0, 0.0], [1.0, 0.0]])
        >>> target = torch.tensor([0, 1, 0, 0])  # (2 * 0.25 + 0) / 4
        >>> adaptive_calibration_error(probs, target, n_bins=2, from_logits=False)
        tensor(0.1250, dtype=torch.float64)

    Reference: Nguyen and O'Connor, 2015, :arxiv:`1508.05154`, adaptive binning.
    """
    confidences, correct = top_label(preds, target, from_logits=from_logits, ignore_index=ignore_index)
    return binned_error(equal_mass_bins(confidences, correct, n_bins=n_bins), norm=norm)


def bin_classes(blocks: Iterable[Block], n_bins: int) -> Bins:
    """Sums ``[C, n_bins]`` over the probabilities of each class."""
    sums = torch.empty(0)
    for block in blocks:
        probs, own, n_classes = block.probs, block.own.double(), block.probs.shape[1]
        if not sums.numel():
            sums = probs.new_zeros(3, n_classes * n_bins, dtype=torch.float64)
        counts, confidence_sums, correct_sums = sums
        correct_sums.index_add_(0, block.target * n_bins + bin_index(own, n_bins), torch.ones_like(own))
        # All go into the first bin of their class, then the few high ones from there into their own bin. Half a bin's
        # width keeps away from rounding at the edge.
        counts[::n_bins] += len(probs)
        confidence_sums[::n_bins] += probs.sum(0, dtype=torch.float64)
        flat = probs.flatten()
        if can_read_values(flat):
            high = (flat >= 0.5 / n_bins).nonzero()[:, 0]
        else:  # no shape may depend on values
            high = torch.arange(len(flat), device=flat.device)
        moved, first = flat[high].double(), high % n_classes * n_bins
        index, ones = torch.cat((first, first + bin_index(moved, n_bins))), torch.ones_like(moved)
        counts.index_add_(0, index, torch.cat((-ones, ones)))
        confidence_sums.index_add_(0, index, torch.cat((-moved, moved)))
    return Bins(*sums.unflatten(1, (-1, n_bins)))


def classwise_error(bins: Bins, norm: Norm) -> Tensor:
    """:func:`binned_error` of the bins of all classes together."""
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

    where :math:`n_{bc}` samples have a probability of class c in bin b, :math:`p_{bc}` on average, and belong to it
    with frequency :math:`a_{bc}`. Arguments, result and errors are those of
    :func:`~calrobust.functional.calibration_error` without ``debiased``.

    Example:
        >>> import torch
        >>> from calrobust.functional import classwise_calibration_error
        >>> probs = torch.tensor([[0.75, 0.25], [0.75, 0.25]])  # both classes happen half of the time
        >>> classwise_calibration_error(probs, torch.tensor([0, 1]), from_logits=False)
        tensor(0.2500, dtype=torch.float64)

    Reference: Nixon et al., 2019, :arxiv:`1904.01685`, static calibration error.
    """
    check_n_bins(n_bins)
    check_norm(norm)
    blocks = probability_blocks(*as_rows(target, ignore_index, preds=preds), from_logits)
    return classwise_error(bin_classes(blocks, n_bins), norm)
