"""What a report keeps of predictions, and what it estimates from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from calrobust._checks import check_kind, check_label_values, check_predictions, check_softmax_exists
from calrobust.functional._rows import as_rows, block_rows
from calrobust.functional.calibration import top_label
from calrobust.functional.intervals import Moments, bin_moments, mean_accuracy, mean_interval

LEVEL = 0.95  # of every interval
ECE_PARTS = ("", "_low", "_high", "_floor", "_p")
FIGURES = (
    *("accuracy", "accuracy_low", "accuracy_high"),
    *(f"{name}{part}" for name in ("ece", "ece_ts") for part in ECE_PARTS),
)
DUPLICATES = 0.01  # share of samples that a data set may have in common with the one that T was fitted on


class Fit(NamedTuple):
    """A method's T, and what it was fitted on."""

    temperature: float
    fingerprints: Tensor


class Samples:
    """One method in one domain: sums over bins, and the logits until there is a temperature."""

    def __init__(self, n_bins: int) -> None:
        self.n_bins = n_bins
        self.plain = self.scaled = Moments(*torch.zeros(4, n_bins, dtype=torch.float64))
        self.fingerprints: list[Tensor] = []
        self.unscaled: list[tuple[Tensor, Tensor]] = []  # logits, and whether each sample is correct

    def add(self, logits: Tensor, target: Tensor, fingerprints: Tensor) -> None:
        """Keeps a batch. Raises ``ValueError`` for a row without a softmax, and then keeps nothing."""
        confidences, correct = top_label(logits, target)
        if confidences.isnan().any():
            check_softmax_exists(target, logits=logits)
        self.plain += bin_moments(confidences, correct, self.n_bins)
        self.fingerprints.append(fingerprints)
        self.unscaled.append((logits, correct))

    def scale(self, temperature: float) -> None:
        """Takes the sums of logits / T, and forgets the logits."""
        for logits, correct in self.unscaled:
            dtype = torch.promote_types(logits.dtype, torch.float32)
            step = min(block_rows(logits, dtype), len(logits))
            buffer, confidences = (torch.empty(shape, dtype=dtype) for shape in ((step, logits.shape[1]), len(logits)))
            for rows, highest in zip(logits.split(step), confidences.split(step), strict=True):
                scaled = buffer[: len(rows)].copy_(rows).div_(temperature)  # not in half precision
                torch.amax(torch.softmax(scaled, 1, out=scaled), 1, out=highest)
            self.scaled += bin_moments(confidences, correct, self.n_bins)
        self.unscaled = []


def on_cpu(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Checked, and without gradient."""
    check_predictions(target, logits=logits)
    logits, target = as_rows(target.cpu(), logits=logits.detach().cpu())
    if len(logits) == 0:
        raise ValueError(f"logits must hold at least one sample, got shape {list(logits.shape)}; is the loader empty?")
    check_label_values(target, logits.shape[1])
    check_kind(from_logits=True, logits=logits)
    return logits, target


def fingerprints_of(logits: Tensor, target: Tensor) -> Tensor:
    """``[N]`` int64 hashes of each row's values in float32 and its label; -0.0 counts as 0.0.

    Of very many classes, evenly spread ones are enough to tell rows apart: at least 256.

    The bits of each float32, as an integer, are multiplied by a random number of their column and summed. Numbers are
    so small that the float64 sum is exact in any order, hence a fast matrix product gives it; two rows that differ
    agree with a probability of some 1e-10.
    """
    logits = logits[:, :: max(1, logits.shape[1] // 256)]
    n_classes = logits.shape[1]
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(1, max(2, 2**22 // n_classes), (n_classes,), generator=generator).double()
    step = min(block_rows(logits, torch.float64), len(logits))
    hashes = torch.empty(len(logits), dtype=torch.float64)
    values, integers = torch.empty(step, n_classes), torch.empty(step, n_classes, dtype=torch.float64)
    for rows, result in zip(logits.split(step), hashes.split(step), strict=True):
        floats = torch.add(rows, 0.0, out=values[: len(rows)])
        bits = integers[: len(rows)].copy_(floats.view(torch.int32))  # below 2^31, so that sums are below 2^53
        torch.mv(bits, weights, out=result)
    return hashes.long() * 1_000_003 + target


def check_held_out(method: str, domain: str, fitted: Tensor, scored: Tensor) -> None:
    """Raises ``ValueError`` if more samples are both fitted and scored than duplicates and coincidences explain.

    Coincidences happen where few different rows exist, such as those of two classes in 16 bits, and then within each
    set as well: the share of rows that have a twin in the larger set is what to expect of the smaller set's rows. So is
    the share within the smaller set, in proportion to the sizes; a set whose rows were only repeated passes one alone.
    """
    smaller, larger = sorted((fitted, scored), key=len)
    shared = int(torch.isin(smaller, larger).sum())
    coincidences = min(_with_twins(larger), _with_twins(smaller) * len(larger) / len(smaller))
    expected = len(smaller) * min(1.0, DUPLICATES + coincidences)
    if shared > expected + 3 * math.sqrt(expected):  # three standard deviations
        raise ValueError(
            f"the temperature of {method!r} must be fitted on data that the report does not score, got {shared} of "
            f"{len(smaller)} samples with the same logits and label in domain {domain!r}; fit it on a validation split"
        )


def _with_twins(fingerprints: Tensor) -> float:
    """Share of samples that are there more than once."""
    counts = fingerprints.unique(return_counts=True)[1]
    return int(counts[counts > 1].sum()) / len(fingerprints)


def mean_figures(data: Sequence[Samples], is_fitted: bool) -> dict[str, float]:
    """Means over data sets of ``FIGURES``, NaN where there is nothing to average."""
    kinds = [[samples.plain for samples in data], [samples.scaled for samples in data if is_fitted]]
    plain, scaled = (Moments(*map(torch.stack, zip(*kind, strict=True))) if kind else None for kind in kinds)
    nothing = [math.nan] * len(FIGURES)
    values = [
        *(mean_accuracy(plain.correct_sums.sum(-1), plain.counts.sum(-1), LEVEL) if plain else nothing[:3]),
        *(mean_interval(plain, LEVEL) if plain else nothing[:5]),
        *(mean_interval(scaled, LEVEL) if scaled else nothing[:5]),
    ]
    return dict(zip(FIGURES, map(float, values), strict=True))
