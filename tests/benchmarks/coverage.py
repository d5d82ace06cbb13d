"""How often 95 % intervals hold the true value: a simulation over models that are calibrated and models that are not.

Confidences lie on a grid of a few points in each bin, so that the true error is known exactly and a data set is drawn
as counts, whatever its size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from benchmarks.measure import Row, Table

from calrobust.functional.intervals import Moments, ece_interval, mean_accuracy

SIZES = (300, 1_000, 5_000, 50_000)
DATA_SETS = 4_000  # the share that is measured then has a standard error of 0.3 %
N_BINS, POINTS = 15, 8  # points of the grid in a bin
DOMAINS = 4
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
    "gaps of 0.02, signs alternate": lambda: GRID + 0.02 * np.where(BIN % 2, 1, -1),
    "gaps of 0.05, signs alternate": lambda: GRID + 0.05 * np.where(BIN % 2, 1, -1),
    "gap of 0.03 in the last bin only": lambda: GRID - 0.03 * (BIN == N_BINS - 1),
    "gap of 0.1 in the last bin only": lambda: GRID - 0.1 * (BIN == N_BINS - 1),
}


def tables() -> Iterator[Table]:
    """Of the ECE of one data set, of the mean ECE of several, and of the accuracy."""
    conditions = (
        f"Per cent of {DATA_SETS:,} data sets whose {100 * LEVEL:g} % interval holds the true value: lowest and highest "
        f"over N = {', '.join(f'{n:,}' for n in SIZES)} and {', '.join(CONFIDENCES)} confidences, in float64; "
    )
    for title, domains in (("Coverage: ECE of a data set", 1), (f"Coverage: mean ECE of {DOMAINS} data sets", DOMAINS)):
        table = Table(title, conditions + f"{N_BINS} bins.")
        for model in MODELS:
            shares = [ece_coverage(model, sharpness, n, domains) for sharpness in CONFIDENCES for n in SIZES]
            table.rows += _rows(model, shares)
        yield table
    table = Table("Coverage: accuracy", conditions + f"also the mean accuracy of {DOMAINS} data sets.")
    for accuracy in (0.5, 0.8, 0.95, 0.99):
        shares = [accuracy_coverage(accuracy, n, domains) for domains in (1, DOMAINS) for n in SIZES]
        table.rows += _rows(f"accuracy {accuracy}", shares)
    yield table


def _rows(what: str, shares: list[float]) -> list[Row]:
    low, high = min(shares), max(shares)
    return [
        Row(f"{what}: lowest", f"{low:.1f} %", "-", low, "≥", LEAST),
        Row(f"{what}: highest", f"{high:.1f} %", "-", high, "≤", MOST),
    ]


def ece_coverage(model: str, confidences: str, n: int, domains: int = 1) -> float:
    """Per cent of data sets of ``domains`` times n samples whose interval for the mean ECE holds the true one."""
    weights, shares = CONFIDENCES[confidences], MODELS[model]().clip(0, 1)
    weights = weights / weights.sum()
    generator = np.random.default_rng(0)
    counts = generator.multinomial(n, weights, size=(DATA_SETS, domains))
    correct = generator.binomial(counts, shares)
    sums = (counts, counts * GRID, correct, counts * GRID * (1 - GRID))
    moments = Moments(*(torch.tensor(s).double().unflatten(-1, (N_BINS, POINTS)).sum(-1) for s in sums))
    truth = np.abs(((GRID - shares) * weights).reshape(N_BINS, POINTS).sum(1)).sum()
    interval = mean_interval(moments, LEVEL)
    held = (interval.low <= truth + 1e-12) & (truth - 1e-12 <= interval.high)
    return 100 * float(held.double().mean())


def accuracy_coverage(accuracy: float, n: int, domains: int = 1) -> float:
    """Per cent of data sets of ``domains`` times n samples whose interval for the mean accuracy holds the true one."""
    correct = torch.tensor(np.random.default_rng(0).binomial(n, accuracy, size=(DATA_SETS, domains))).double()
    held = 0
    for own in correct:
        _, low, high = mean_accuracy(own, torch.full((domains,), float(n), dtype=torch.float64), LEVEL)
        held += int(low <= accuracy <= high)
    return 100 * held / DATA_SETS
