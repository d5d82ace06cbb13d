"""How often 95 % intervals hold the true value, and the bias of an ECE, for models that are calibrated or not.

Confidences lie on a grid of a few points in each bin, so that the true error is known exactly and a data set is drawn
as counts, whatever its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from benchmarks.measure import Row, Table

from calrobust.functional.intervals import mean_accuracy, mean_interval

SIZES = (300, 1_000, 2_000, 5_000, 50_000)
DATA_SETS = 5_000  # the share that is measured has a standard error of 0.3 %
N_BINS, POINTS = 15, 8  # points of the grid in a bin
DOMAINS = 4
BIASED = 1_000  # samples
LEVEL, LEAST, MOST = 0.95, 92, 98  # per cent
GRID = (np.arange(N_BINS * POINTS) + 0.5) / (N_BINS * POINTS)
ODDS = np.log(GRID / (1 - GRID))

CONFIDENCES = {  # how they are distributed: weights on the grid
    "diffuse": np.where(GRID > 0.1, 1.0, 0.0),
    "medium": np.exp(-0.5 * (ODDS - 1) ** 2) / (GRID * (1 - GRID)),
    "sharp": np.exp(-0.5 * ((ODDS - 4) / 1.5) ** 2) / (GRID * (1 - GRID)),
    "peaked": np.exp(-0.5 * ((GRID - 0.75) / 0.04) ** 2),
}
BIN = np.arange(N_BINS * POINTS) // POINTS
MODELS: dict[str, Callable[[], np.ndarray]] = {  # how often a prediction of that confidence is right
    "calibrated": lambda: GRID,
    "overconfident by 0.005": lambda: GRID - 0.005,
    "overconfident by 0.01": lambda: GRID - 0.01,
    "overconfident by 0.02": lambda: GRID - 0.02,
    "overconfident by 0.04": lambda: GRID - 0.04,
    "overconfident by 0.1": lambda: GRID - 0.1,
    "T = 1.2 would calibrate": lambda: 1 / (1 + np.exp(-ODDS / 1.2)),
    "T = 2 would calibrate": lambda: 1 / (1 + np.exp(-ODDS / 2)),
    "T = 0.8 would calibrate": lambda: 1 / (1 + np.exp(-ODDS / 0.8)),
    "T = 0.5 would calibrate": lambda: 1 / (1 + np.exp(-ODDS / 0.5)),
    "T = 0.3 would calibrate": lambda: 1 / (1 + np.exp(-ODDS / 0.3)),
    "underconfident by 0.02": lambda: GRID + 0.02,
    "underconfident by 0.05": lambda: GRID + 0.05,
    "gaps of 0.02, signs alternate": lambda: GRID + 0.02 * np.where(BIN % 2, 1, -1),
    "gaps of 0.05, signs alternate": lambda: GRID + 0.05 * np.where(BIN % 2, 1, -1),
    "gap of 0.03 in the last bin only": lambda: GRID - 0.03 * (BIN == N_BINS - 1),
    "gap of 0.1 in the last bin only": lambda: GRID - 0.1 * (BIN == N_BINS - 1),
}


def tables() -> Iterator[Table]:
    """Coverage of the ECE and of the accuracy, and bias of the ECE."""
    torch.set_num_threads(1)
    conditions = (
        f"Per cent of {DATA_SETS:,} data sets whose {100 * LEVEL:g} % interval holds the true value: least and most "
        f"over N = {', '.join(f'{n:,}' for n in SIZES)}"
    )
    table = Table(
        "Coverage: ECE",
        f"{conditions} and all of {', '.join(CONFIDENCES)} confidences, where there is an interval; float64, {N_BINS} "
        "bins.",
    )
    for model in MODELS:
        shares = [ece_coverage(model, kind, n) for kind in CONFIDENCES for n in SIZES]
        table.rows += _rows(model, [share for share in shares if not math.isnan(share)])
    yield table
    table = Table("Coverage: accuracy", f"{conditions}, and over one data set and the mean of {DOMAINS}; float64.")
    for accuracy in (0.5, 0.8, 0.95, 0.99):
        shares = [accuracy_coverage(accuracy, n, domains) for domains in (1, DOMAINS) for n in SIZES]
        table.rows += _rows(f"accuracy {accuracy}", shares)
    yield table
    table = Table(
        "Bias: ECE",
        f"Mean distance from the true ECE in per cent, of the debiased value and of the value, over {DATA_SETS:,} data "
        f"sets of N = {BIASED:,} with {', '.join(CONFIDENCES)} confidences; the largest; float64.",
    )
    for model in MODELS:
        debiased, plain = (max(map(abs, biases)) for biases in zip(*(bias(model, k) for k in CONFIDENCES), strict=True))
        table.rows.append(Row(model, f"{debiased:.2f} %", f"{plain:.2f} %", debiased / plain, "≤", 1))
    yield table


def _rows(what: str, shares: list[float]) -> list[Row]:
    low, high = min(shares), max(shares)
    return [
        Row(f"{what}: lowest", f"{low:.1f} %", "-", low, "≥", LEAST),
        Row(f"{what}: highest", f"{high:.1f} %", "-", high, "≤", MOST),
    ]


def ece_coverage(model: str, confidences: str, n: int) -> float:
    """Per cent of intervals for the ECE of n samples that hold the true one; NaN if few data sets have an interval.

    Whether there is one depends on confidences alone, so the others are not a selection by their outcome.
    """
    moments, truth = data_sets(model, confidences, n)
    found = mean_interval(moments[:, :, None], LEVEL)
    given = ~found.low.isnan()
    if given.double().mean() < 0.1:
        return math.nan
    held = (found.low <= truth + 1e-12) & (truth - 1e-12 <= found.high)
    return 100 * float(held[given].double().mean())


def bias(model: str, confidences: str) -> tuple[float, float]:
    """Of the debiased value and of the value, in per cent."""
    moments, truth = data_sets(model, confidences, BIASED)
    found = mean_interval(moments[:, :, None], LEVEL)
    return 100 * (float(found.debiased.mean()) - truth), 100 * (float(found.value.mean()) - truth)


def data_sets(model: str, confidences: str, n: int) -> tuple[torch.Tensor, float]:
    """Moments ``[4, DATA_SETS, n_bins]``, and the true ECE."""
    weights, shares = CONFIDENCES[confidences] / CONFIDENCES[confidences].sum(), MODELS[model]().clip(0, 1)
    generator = np.random.default_rng(0)
    counts = generator.multinomial(n, weights, size=DATA_SETS)
    correct = generator.binomial(counts, shares)
    sums = (counts, counts * GRID, correct, counts * GRID * (1 - GRID))
    moments = torch.tensor(np.stack(sums)).unflatten(-1, (N_BINS, POINTS)).sum(-1)
    return moments, float(np.abs(((GRID - shares) * weights).reshape(N_BINS, POINTS).sum(1)).sum())


def accuracy_coverage(accuracy: float, n: int, domains: int) -> float:
    """Per cent of data sets of ``domains`` times n samples whose interval for the mean accuracy holds the true one."""
    correct = torch.tensor(np.random.default_rng(0).binomial(n, accuracy, size=(DATA_SETS, domains))).double()
    _, low, high = mean_accuracy(correct, torch.full_like(correct, n), LEVEL)
    return 100 * float(((low <= accuracy) & (accuracy <= high)).double().mean())
