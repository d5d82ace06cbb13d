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

from calrobust.functional.calibration import mean_interval
from calrobust.functional.scoring import risk_contributions
from calrobust.report._figures import FEWEST, mean_accuracy, n_deciding, score_interval

SIZES = (300, 1_000, 2_000, 5_000, 50_000)
DATA_SETS = 5_000  # the share that is measured has a standard error of 0.3 %
N_BINS, POINTS = 15, 8  # points of the grid in a bin
DOMAINS = 4
BIASED = 1_000  # samples
SCORED, SCORED_SIZES, CLASSES = 1_000, (300, 1_000), 10  # of NLL, Brier score, AURC
SCORED_MODELS = "calibrated", "overconfident by 0.04", "T = 2 would calibrate", "T = 0.5 would calibrate"
PAIRS = (
    ("medium", "calibrated", "calibrated"),
    ("medium", "overconfident by 0.04", "calibrated"),
    ("sharp", "T = 2 would calibrate", "overconfident by 0.1"),
    ("peaked", "T = 0.5 would calibrate", "calibrated"),
    ("diffuse", "gaps of 0.05, signs alternate", "T = 2 would calibrate"),
)
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
    conditions = f"Per cent of {SCORED:,} data sets; N = {', '.join(f'{n:,}' for n in SCORED_SIZES)};"
    table = Table(
        "Coverage: scores",
        f"{conditions} all of {', '.join(CONFIDENCES)} confidences, where at least a tenth of the data sets has an "
        f"interval; {CLASSES} classes, of which the top label leaves the same to all others; float64.",
    )
    for model in SCORED_MODELS:
        found = [scores_coverage(model, kind, n) for kind in CONFIDENCES for n in SCORED_SIZES]
        for score in found[0]:
            table.rows += _rows(f"{score}, {model}", [each[score] for each in found if not math.isnan(each[score])])
    yield table
    table = Table(
        "Coverage: paired differences",
        f"{conditions} two models of one latent difficulty, which agree mostly; float64.",
    )
    for kind, *models in PAIRS:
        found = [differences_coverage(kind, models, n, rho) for n in SCORED_SIZES for rho in (0.8, 0.98)]
        for score in found[0]:
            shares = [each[score] for each in found if not math.isnan(each[score])]
            table.rows += _rows(f"{score}, {kind}: {models[0]}; {models[1]}", shares)
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


Scored = dict[str, torch.Tensor]  # of each sample of each data set, [SCORED, n]


def draw(kind: str, model: str, z: np.ndarray, u: np.ndarray) -> tuple[Scored, dict[str, float]]:
    """Scores of samples of difficulty z and luck u, both standard normal, and the true means."""
    weights, shares = CONFIDENCES[kind] / CONFIDENCES[kind].sum(), MODELS[model]().clip(0, 1)
    point = np.searchsorted(weights.cumsum(), _normal_cdf(z)).clip(max=len(GRID) - 1)
    correct = _normal_cdf(u) < shares[point]
    rest = (1 - GRID) / (CLASSES - 1)
    right = {"nll": -np.log(GRID), "brier": (1 - GRID) ** 2 + (CLASSES - 1) * rest**2}
    wrong = {"nll": -np.log(rest), "brier": GRID**2 + (1 - rest) ** 2 + (CLASSES - 2) * rest**2}
    found = {name: torch.tensor(np.where(correct, right[name][point], wrong[name][point])) for name in right}
    rows = zip(torch.tensor(GRID[point]), torch.tensor(correct), strict=True)
    found["aurc"] = torch.stack([risk_contributions(*row) for row in rows])
    found["accuracy"] = torch.tensor(correct).double()
    truth = {name: float((weights * (shares * right[name] + (1 - shares) * wrong[name])).sum()) for name in right}
    mass, errors = weights[::-1], (weights * (1 - shares))[::-1]
    before, rate = mass.cumsum() - mass, (1 - shares)[::-1]
    logs = np.log(mass.cumsum() / before.clip(min=1e-300)).clip(max=700)
    truth["aurc"] = float((errors + (errors.cumsum() - errors - before * rate) * logs * (before > 0)).sum())
    truth["accuracy"] = float((weights * shares).sum())
    return found, truth


def _normal_cdf(z: np.ndarray) -> np.ndarray:
    shares: np.ndarray = torch.special.ndtr(torch.tensor(z)).numpy()
    return shares


def _held(intervals: list[torch.Tensor], given: torch.Tensor, truth: float) -> float:
    _, low, high = torch.stack(intervals, 1)
    held = (low <= truth) & (truth <= high)
    return 100 * float(held[given].double().mean()) if given.double().mean() >= 0.1 else math.nan


def scores_coverage(model: str, kind: str, n: int) -> dict[str, float]:
    """Per cent of intervals that hold the true NLL, Brier score and AURC."""
    generator = np.random.default_rng(0)
    z, u = generator.standard_normal((2, SCORED, n))
    found, truth = draw(kind, model, z, u)
    right = found["accuracy"].sum(1)
    given = right.minimum(n - right) >= FEWEST
    scores = {name: rows for name, rows in found.items() if name != "accuracy"}
    return {name: _held([score_interval(row) for row in rows], given, truth[name]) for name, rows in scores.items()}


def differences_coverage(kind: str, models: list[str], n: int, rho: float) -> dict[str, float]:
    """Per cent of intervals for the difference of two models, whose difficulty and luck have correlation rho."""
    generator = np.random.default_rng(0)
    (z, other_z), (u, other_u) = generator.standard_normal((2, 2, SCORED, n))
    a, truth = draw(kind, models[0], z, u)
    rest = math.sqrt(1 - rho**2)
    b, other_truth = draw(kind, models[1], rho * z + rest * other_z, rho * u + rest * other_u)
    shares = {}
    for name in truth:
        rows = a[name] - b[name]
        deciding = a["accuracy"] - b["accuracy"] if name == "aurc" else rows
        given = torch.stack([n_deciding(row) for row in deciding]) >= FEWEST
        intervals = [score_interval(row, paired=True) for row in rows]
        shares[name] = _held(intervals, given, truth[name] - other_truth[name])
    return shares


def accuracy_coverage(accuracy: float, n: int, domains: int) -> float:
    """Per cent of data sets of ``domains`` times n samples whose interval for the mean accuracy holds the true one."""
    correct = torch.tensor(np.random.default_rng(0).binomial(n, accuracy, size=(DATA_SETS, domains))).double()
    _, low, high = mean_accuracy(correct, torch.full_like(correct, n))
    return 100 * float(((low <= accuracy) & (accuracy <= high)).double().mean())
