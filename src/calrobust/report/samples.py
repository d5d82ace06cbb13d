"""What a report keeps and estimates."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from calrobust._checks import check_kind, check_label_values, check_predictions
from calrobust.functional.fitting import best_temperature
from calrobust.functional.intervals import (
    FEWEST,
    bin_moments,
    mean_accuracy,
    mean_interval,
    mean_of_intervals,
    n_deciding,
    score_interval,
)
from calrobust.functional.scoring import log_losses, probability_blocks, risk_contributions, squared_errors

LEVEL = 0.95  # also in captions
ENDS = ("", "_low", "_high")
ECE_PARTS = ("", "_debiased", "_low", "_high", "_floor", "_p")
SCORES = ("nll", "nll_ts", "nll_own_t", "brier", "aurc")
FIGURES = (
    *(f"accuracy{end}" for end in ENDS),
    *(f"ece{ts}{part}" for ts in ("", "_ts") for part in ECE_PARTS),
    *(f"{score}{end}" for score in SCORES for end in ENDS),
)
DUPLICATES = 0.01  # share of samples that may be both fitted and scored
HASHED = 64  # logits of each row


class Fit(NamedTuple):
    """A method's T and the data of its fit."""

    temperature: float
    fingerprints: Tensor


class Samples:
    """One method in one domain: some numbers for each sample, and logits, as batches."""

    def __init__(self, keep_logits: bool, n_classes: int) -> None:
        self.keep_logits, self.n_classes = keep_logits, n_classes
        self.columns: dict[str, list[Tensor]] = {}
        self.logits: list[Tensor] = []
        self.unscaled: list[tuple[Tensor, Tensor]] = []  # logits and target

    def __getitem__(self, name: str) -> Tensor:
        batches = self.columns[name]
        batches[:] = [torch.cat(batches)]
        return batches[0]

    def add(self, logits: Tensor, columns: dict[str, Tensor]) -> None:
        """Adds a batch; the caller may reuse the buffers."""
        self._append(columns)
        self.columns.pop("nll_own_t", None)
        self.unscaled.append((logits.clone(), columns["target"]))
        if self.keep_logits:
            self.logits.append(self.unscaled[-1][0])

    def _append(self, columns: dict[str, Tensor]) -> None:
        for name, column in columns.items():
            self.columns.setdefault(name, []).append(column)

    def scale(self, temperature: float) -> None:
        """Adds ``confidences_ts`` and ``nll_ts`` of batches that lack them."""
        for batch in self.unscaled:
            self._append(columns_of(*batch, temperature))
        self.unscaled = []

    def has(self, score: str) -> bool:
        """Whether :meth:`scores` can be given."""
        return score in ("accuracy", "aurc", *self.columns) or (score == "nll_own_t" and self.keep_logits)

    def scores(self, name: str) -> Tensor:
        """``[N]`` numbers whose mean is a score."""
        if name == "accuracy":
            return self["correct"]
        if name == "aurc":
            return risk_contributions(self["confidences"], self["correct"])
        if name not in self.columns:  # nll_own_t
            nll, target = self["nll"], self["target"]
            if nll.isfinite().all():  # else a label is of a masked class, and no T makes the score finite
                logits = torch.cat(self.logits)
                nll = columns_of(logits, target, best_temperature(logits, target)[0])["nll_ts"]
            self.columns[name] = [nll]
        return self[name]


def columns_of(logits: Tensor, target: Tensor, temperature: float | None = None) -> dict[str, Tensor]:
    """What is kept of each sample; of logits / temperature, only what depends on it."""
    rows, ts = [], "_ts" * (temperature is not None)
    for block in probability_blocks(logits, target, True, validate=False, temperature=temperature):
        row = {f"confidences{ts}": block.confidences, f"nll{ts}": log_losses(block)}
        if not ts:
            row |= {"target": block.target.clone(), "correct": block.correct, "brier": squared_errors(block)}
            row["fingerprints"] = fingerprints_of(block.scores, block.target)
        rows.append(row)
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


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
    """``[N]`` int64 hashes of rows and labels: of the label's logit, which no mask hides, and of some others."""
    some = logits[:, :: max(1, -(-logits.shape[1] // HASHED))]
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(1, 2**22 // HASHED, some.shape[1:], generator=generator).double()
    own = logits.gather(1, target[:, None])[:, 0]
    others = _bits(some).double() @ weights  # exact, below 2^53
    return (others.long() * 1_000_003 + _bits(own)) * 1_000_003 + target


def _bits(logits: Tensor) -> Tensor:
    return (logits.float() + 0.0).view(torch.int32)


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


def mean_figures(data: Sequence[Samples], n_bins: int) -> dict[str, float]:
    """``FIGURES`` by name: means over data sets, or NaN."""
    found = dict.fromkeys(FIGURES, math.nan)
    if not data:
        return found
    all_correct = [samples["correct"] for samples in data]
    hits, counts = torch.tensor([(int(each.sum()), len(each)) for each in all_correct], dtype=torch.float64).T
    found |= zip(FIGURES, map(float, mean_accuracy(hits, counts, LEVEL)), strict=False)
    for ts in ("", "_ts"):
        if all(f"nll{ts}" in samples.columns for samples in data):
            moments = [bin_moments(samples[f"confidences{ts}"], samples["correct"], n_bins) for samples in data]
            estimates = mean_interval(torch.stack(moments, 1), LEVEL)
            found |= {f"ece{ts}{part}": float(value) for part, value in zip(ECE_PARTS, estimates, strict=True)}
    is_enough = (hits.minimum(counts - hits) >= FEWEST).all()
    for name in SCORES:
        if all(samples.has(name) for samples in data):
            parts = [score_interval(samples.scores(name), LEVEL) for samples in data]
            value, *ends = mean_of_intervals(torch.stack(parts, -1)).tolist()
            found[name] = value
            if is_enough:
                found |= zip((f"{name}_low", f"{name}_high"), ends, strict=True)
    return found


def differences(pairs: Sequence[tuple[Samples, Samples]], a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    """``a`` - ``b`` of each figure, with ends: those of pairs of data sets with the same samples."""
    found: dict[str, float] = {}
    same = all(first.columns.keys() == second.columns.keys() for first, second in pairs) and all(
        torch.equal(first[name], second[name]) for first, second in pairs for name in first.columns
    )
    for name in ("accuracy", "ece", "ece_ts", *SCORES):
        difference = a[name] - b[name]
        ends = [difference if same else math.nan] * 2
        if not same and "ece" not in name and all(samples.has(name) for pair in pairs for samples in pair):
            parts = torch.stack([_difference(*pair, name) for pair in pairs], -1)
            ends = mean_of_intervals(parts)[1:].tolist()
        found |= zip((f"{name}{end}" for end in ENDS), (difference, *ends), strict=True)
    return found


def _difference(a: Samples, b: Samples, name: str) -> Tensor:
    """The difference and the ends of its interval, which are NaN if it is that of a few samples."""
    difference = a.scores(name).double() - b.scores(name).double()
    ends = score_interval(difference, LEVEL, paired=True)
    # Ranks and hits may agree where predictions do not.
    deciding = n_deciding(a["correct"].double() - b["correct"].double() if name == "aurc" else difference)
    if deciding < FEWEST or (deciding.isnan() and name in ("accuracy", "aurc")):
        ends[1:] = math.nan
    return ends
