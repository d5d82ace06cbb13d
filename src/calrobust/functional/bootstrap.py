"""Bootstrap intervals: how much of a calibration error may be noise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from calrobust._checks import check_confidences, check_fraction, check_positive_integer
from calrobust.functional.calibration import Bins, Norm, bin_index, binned_error, check_norm, valid_confidences

BLOCK_DRAWS = 2**18  # at a time: their table of counts stays in cache


class Interval(NamedTuple):
    """The ends of an interval, float64.

    Example:
        >>> import torch
        >>> from calrobust.functional import bootstrap_interval
        >>> interval = bootstrap_interval(torch.full((10,), 0.5), torch.ones(10, dtype=torch.bool))
        >>> interval.low
        tensor(0.5000, dtype=torch.float64)
    """

    low: Tensor
    high: Tensor


def bootstrap_interval(
    confidences: Tensor,
    correct: Tensor,
    *,
    n_bins: int = 15,
    norm: Norm = "l1",
    level: float = 0.95,
    n_resamples: int = 1000,
    generator: torch.Generator | None = None,
) -> Interval:
    r"""Bootstrap interval for a calibration error, by reflected percentiles.

    Samples are drawn anew, N out of N with replacement, and :math:`q_\alpha` is the α-quantile of the errors
    :math:`\hat e^*` of the resamples. With :math:`\hat e` the error of the samples themselves and
    :math:`\alpha = (1 - \mathrm{level}) / 2`,

    .. math::
        \Bigl[\max\bigl(0,\; \min(\hat e,\; 2 \hat e - q_{1 - \alpha})\bigr),\;
        \min\bigl(1,\; \max(\hat e,\; 2 \hat e - q_\alpha)\bigr)\Bigr]

    The noise of each bin's accuracy raises :math:`\hat e`, and resampling raises :math:`\hat e^*` once more. The plain
    percentiles :math:`[q_\alpha, q_{1-\alpha}]` would carry that bias twice, reflected ones take it off: for samples
    whose noise outweighs their miscalibration they hold the true value far more often, though at a true value near 0
    still less often than ``level``. The interval always holds :math:`\hat e`, so that it can stand next to the value it
    belongs to. An interval that reaches 0 says that the value may be noise alone: at N = 1,000 a
    perfectly calibrated model has an ECE of about 0.03 over 15 bins.

    Args:
        confidences: shape ``[N]``, floating, in [0, 1].
        correct: shape ``[N]``, bool.
        n_bins: number of bins of equal width.
        norm: ``"l1"``, ``"l2"`` or ``"max"``.
        level: nominal share of data sets whose interval holds the true value, in (0, 1).
        n_resamples: number of resamples.
        generator: source of the draws, on the device of ``confidences``; None is torch's own.

    Returns:
        ``Interval(low, high)``, two float64 scalars; NaN without samples.

    Raises:
        TypeError: ``confidences`` is not floating or ``correct`` is not bool.
        ValueError: the two differ in shape or device, or a number is out of range.

    Example:
        >>> import torch
        >>> from calrobust.functional import bootstrap_interval
        >>> confidences, correct = torch.full((100,), 0.5), torch.ones(100, dtype=torch.bool)
        >>> low, high = bootstrap_interval(confidences, correct)  # every resample misses by 1 - 0.5
        >>> low, high
        (tensor(0.5000, dtype=torch.float64), tensor(0.5000, dtype=torch.float64))

    Reference: Davison and Hinkley, 1997, *Bootstrap Methods and their Application*, equation 5.6 (basic interval).
    """
    check_confidences(confidences, correct)
    check_positive_integer(n_bins=n_bins, n_resamples=n_resamples)
    check_norm(norm)
    check_fraction(closed=False, level=level)
    confidences = valid_confidences(confidences)
    # Sorted by bin, so that a bin's sum is a difference of two running sums.
    index, order = bin_index(confidences, n_bins).sort()
    ends = torch.searchsorted(index, torch.arange(n_bins, device=index.device), right=True)
    gaps = (confidences - correct.to(confidences.dtype))[order]

    def error(weights: Tensor) -> Tensor:
        """Of samples that count as often as the rows of ``weights`` say, ``[r, N]``."""
        running = torch.stack((weights, weights * gaps)).cumsum(-1)
        running = torch.nn.functional.pad(running, (1, 0))[..., ends]
        counts, gap_sums = running.diff(dim=-1, prepend=torch.zeros_like(running[..., :1]))
        return binned_error(Bins(counts, gap_sums, torch.zeros_like(gap_sums)), norm)

    value = error(torch.ones_like(confidences)[None])[0]
    if len(confidences) == 0:
        return Interval(value, value.clone())
    counts = resample_counts(len(confidences), n_resamples, generator, confidences.device)
    return reflected_interval(value, torch.cat([error(block) for block in counts]), level)


def resample_counts(
    n: int, n_resamples: int, generator: torch.Generator | None, device: torch.device
) -> Iterator[Tensor]:
    """How often each of n samples is drawn, n out of n with replacement: float64 blocks ``[r, n]`` of all resamples."""
    step = max(1, BLOCK_DRAWS // n)
    for start in range(0, n_resamples, step):
        rows = min(step, n_resamples - start)
        draws = torch.randint(n, (rows, n), generator=generator, device=device)
        draws += n * torch.arange(rows, device=device)[:, None]
        yield torch.bincount(draws.flatten(), minlength=rows * n).view(rows, n).double()


def reflected_interval(value: Tensor, resampled: Tensor, level: float) -> Interval:
    """Of fractions ``[...]`` with resamples ``[n_resamples, ...]``: the formula of :func:`bootstrap_interval`."""
    low, high = torch.quantile(resampled, value.new_tensor([(1 - level) / 2, (1 + level) / 2]), dim=0)
    return Interval(
        torch.minimum(value, 2 * value - high).clamp(min=0), torch.maximum(value, 2 * value - low).clamp(max=1)
    )
