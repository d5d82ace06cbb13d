"""What a report keeps of predictions, and what it estimates from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from calrobust._checks import check_label_values, check_not_empty, check_predictions, check_softmax_exists
from calrobust.functional.bootstrap import resampled_bins
from calrobust.functional.calibration import bin_confidences, binned_error, top_label

N_RESAMPLES = 1000
ESTIMATED = ("accuracy", "ece", "ece_ts")
HASH_ROWS = 4096  # rows at a time, so that their float64 copies stay small


class Fit(NamedTuple):
    """A method's T, and what it was fitted on."""

    temperature: float
    fingerprints: Tensor


@dataclass
class Samples:
    """One method in one domain, batch by batch."""

    fingerprints: list[Tensor] = field(default_factory=list)
    correct: list[Tensor] = field(default_factory=list)
    confidences: list[Tensor] = field(default_factory=list)
    scaled: list[Tensor] = field(default_factory=list)  # confidences of logits / T; empty until there is T
    logits: list[Tensor] = field(default_factory=list)  # empty once there is T
    fitted: Tensor | None = None  # which of the samples that T was fitted on are among these


class Estimates(NamedTuple):
    """Of ``ESTIMATED``: ``[3]``, and ``[N_RESAMPLES, 3]`` of resampled data."""

    values: Tensor
    resampled: Tensor


def on_cpu(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Checked, and without gradient."""
    check_predictions(target, logits=logits)
    check_not_empty(logits=logits)
    logits, target = logits.detach().cpu(), target.cpu()
    check_label_values(target, logits.shape[1])
    check_softmax_exists(target, logits=logits)
    return logits, target


def scaled_confidences(logits: Tensor, temperature: float) -> Tensor:
    """Highest probabilities of ``logits / T``."""
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return top_label(scaled, torch.zeros(len(scaled), dtype=torch.int64))[0]


def fingerprints_of(logits: Tensor, target: Tensor) -> Tensor:
    """``[N]`` int64 hashes of each row's values and label; equal values give equal hashes in any dtype that holds them.

    The bits of each float64 are mixed, multiplied by a random odd number for their column and summed modulo 2^64, so
    that two different rows agree with a probability near 2^-64.
    """
    generator = torch.Generator().manual_seed(0)
    odd = torch.randint(-(2**62), 2**62, (logits.shape[1] + 1,), generator=generator) * 2 + 1
    hashes = []
    for scores, labels in zip(logits.split(HASH_ROWS), target.split(HASH_ROWS), strict=True):
        values = scores.double() + 0.0  # -0.0 becomes 0.0
        bits = torch.cat((values.contiguous().view(torch.int64), labels[:, None]), 1) * odd[-1]
        bits ^= bits >> 32  # the low bits of a float32's float64 are all zero
        hashes.append((bits * odd).sum(1))
    return torch.cat(hashes)


def estimate(samples: Samples, n_bins: int, seed: int) -> Estimates:
    """Accuracy, ECE and ECE at T, and the same of N samples drawn from the N with replacement."""
    order = torch.cat(samples.fingerprints).argsort()  # by content, so that no draw depends on the order of batches
    correct = torch.cat(samples.correct)[order]
    kinds = [torch.cat(kind)[order].double() for kind in (samples.confidences, samples.scaled) if kind]
    bins = [bin_confidences(confidences, correct, n_bins=n_bins) for confidences in kinds]
    missing = [torch.tensor(math.nan, dtype=torch.float64)] * (2 - len(kinds))
    values = torch.stack([correct.double().mean(), *map(binned_error, bins), *missing])

    generator = torch.Generator().manual_seed(seed)
    drawn = [resampled_bins(confidences, correct, n_bins, N_RESAMPLES, generator) for confidences in kinds]
    accuracies = drawn[0].correct_sums.sum(-1) / len(correct)
    nothing = [torch.full_like(accuracies, math.nan)] * (2 - len(kinds))
    return Estimates(values, torch.stack([accuracies, *map(binned_error, drawn), *nothing], 1))
