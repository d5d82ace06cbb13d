"""What a report keeps and estimates."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from calrobust._checks import check_kind, check_label_values, check_predictions, check_softmax_exists
from calrobust.functional.calibration import top_label
from calrobust.functional.intervals import bin_moments, mean_accuracy, mean_interval
from calrobust.functional.scoring import block_rows

LEVEL = 0.95  # also in captions
ECE_PARTS = ("", "_debiased", "_low", "_high", "_floor", "_p")
FIGURES = ("accuracy", "accuracy_low", "accuracy_high", *(f"ece{ts}{part}" for ts in ("", "_ts") for part in ECE_PARTS))
DUPLICATES = 0.01  # share of samples that may be both fitted and scored


class Fit(NamedTuple):
    """A method's T and the data of its fit."""

    temperature: float
    fingerprints: Tensor


class Samples:
    """One method in one domain: moments, and the logits until there is a temperature."""

    def __init__(self, n_bins: int) -> None:
        self.plain = self.scaled = torch.zeros(4, n_bins, dtype=torch.float64)
        self.fingerprints: list[Tensor] = []
        self.unscaled: list[tuple[Tensor, Tensor]] = []  # logits, and whether each sample is correct

    def add(self, logits: Tensor, target: Tensor, fingerprints: Tensor, temperature: float | None) -> None:
        """Adds a batch, or raises."""
        confidences, correct = top_label(logits, target)
        if confidences.isnan().any():
            check_softmax_exists(target, logits=logits)
        self.plain = self.plain + bin_moments(confidences, correct, self.plain.shape[1])
        self.fingerprints.append(fingerprints)
        if temperature is None:
            self.unscaled.append((logits.clone(), correct))  # the caller may reuse the buffer
        else:
            self._add_scaled(logits, correct, temperature)

    def scale(self, temperature: float) -> None:
        """Replaces the logits by the moments of logits / T."""
        for logits, correct in self.unscaled:
            self._add_scaled(logits, correct, temperature)
        self.unscaled = []

    def _add_scaled(self, logits: Tensor, correct: Tensor, temperature: float) -> None:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        confidences = []
        for rows in logits.split(block_rows(logits, dtype)):
            scaled = rows.to(dtype, copy=True).div_(temperature)
            confidences.append(torch.softmax(scaled, 1, out=scaled).amax(1))
        self.scaled = self.scaled + bin_moments(torch.cat(confidences), correct, self.plain.shape[1])


def on_cpu(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Checks both; returns them as ``[N, C]`` and ``[N]`` on the CPU."""
    check_predictions(target, logits=logits)
    logits, target = logits.detach().cpu().movedim(1, -1).flatten(0, -2), target.cpu().flatten()
    if len(logits) == 0:
        raise ValueError(f"logits must hold at least one sample, got shape {list(logits.shape)}; is the loader empty?")
    check_label_values(target, logits.shape[1])
    check_kind(from_logits=True, logits=logits)
    return logits, target


def fingerprints_of(logits: Tensor, target: Tensor) -> Tensor:
    """``[N]`` int64 hashes of rows and labels."""
    logits = logits[:, :: max(1, logits.shape[1] // 256)]
    n_classes = logits.shape[1]
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(1, max(2, 2**22 // n_classes), (n_classes,), generator=generator).double()
    blocks = logits.split(block_rows(logits, torch.float64))
    hashes = [(rows.float() + 0.0).view(torch.int32).double() @ weights for rows in blocks]  # exact, below 2^53
    return torch.cat(hashes).long() * 1_000_003 + target


def check_held_out(method: str, domain: str, fitted: Tensor, scored: Tensor) -> None:
    """Raises if more samples are both fitted and scored than duplicates and coincidences explain."""
    # Rows that coincide have twins within each set too. The lower share is taken, because a set may repeat rows.
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
    """Share of samples that occur more than once."""
    counts = fingerprints.unique(return_counts=True)[1]
    return int(counts[counts > 1].sum()) / len(fingerprints)


def mean_figures(data: Sequence[Samples], is_fitted: bool) -> dict[str, float]:
    """``FIGURES`` by name: means over data sets, or NaN."""
    values = dict.fromkeys(FIGURES, math.nan)
    if data:
        plain = torch.stack([samples.plain for samples in data], 1)
        counts, _, correct, _ = plain.sum(-1)
        found = [*mean_accuracy(correct, counts, LEVEL), *mean_interval(plain, LEVEL)]
        if is_fitted:
            found += mean_interval(torch.stack([samples.scaled for samples in data], 1), LEVEL)
        values |= zip(FIGURES, map(float, found), strict=False)
    return values
