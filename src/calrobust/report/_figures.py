import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calrobust._checks import check_choice, check_kind, check_label_values, check_predictions
from calrobust.functional.calibration import bin_moments, mean_interval
from calrobust.functional.fitting import best_temperature
from calrobust.functional.scoring import (
    as_rows,
    certainties,
    log_losses,
    probability_blocks,
    risk_contributions,
    squared_errors,
)

FEWEST = 10  # right predictions, and wrong ones, for an interval
LEVEL = 0.95
Z = 1.959963984540054  # normal quantile
ENDS = ("", "_low", "_high")
ECE_PARTS = ("", "_debiased", "_low", "_high", "_floor", "_p")
PRINTED = {
    "accuracy": "accuracy",
    "ece": "ECE",
    "ece_ts": "ECE + TS",
    "nll": "NLL",
    "nll_ts": "NLL + TS",
    "nll_own_t": "NLL at own T",
    "brier": "Brier score",
    "aurc": "AURC",
}
SCORES = tuple(PRINTED)[3:]
FIGURES = (
    *(f"accuracy{end}" for end in ENDS),
    *(f"ece{ts}{part}" for ts in ("", "_ts") for part in ECE_PARTS),
    *(f"{score}{end}" for score in SCORES for end in ENDS),
)
HEADINGS = {"temperature": "T"} | {  # of columns of the summary
    f"{group.lower()}_{figure}": f"{group} {heading}" for group in ("ID", "OOD") for figure, heading in PRINTED.items()
}
DEFAULT = "id_accuracy", "ood_accuracy", "id_ece", "ood_ece", "temperature", "id_ece_ts", "ood_ece_ts"
MISSING = "\N{EN DASH}"
BRACKETS = (
    "In brackets: the 95 % interval of the accuracy, or of the ECE without noise, which can lie below the value; then "
    "the noise floor, the ECE that a perfectly calibrated model shows on as many samples. An ECE without an interval, "
    "such as a mean of domains, has its debiased value, noise floor and p-value against perfect calibration."
)
NOTES = {  # of columns whose name holds the word
    "nll": "NLL: negative log-likelihood in nats.",
    "own": "At own T: each data set at its best T, a diagnosis that no method may claim as its result.",
    "brier": "Brier score: over all classes, in [0, 2].",
    "aurc": "AURC: area under the risk-coverage curve, in per cent.",
}
MARKDOWN = str.maketrans({"|": r"\|", "\\": r"\\"})
LATEX = str.maketrans(
    {mark: "\\" + mark for mark in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", MISSING: "--"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "[": "{[}", "*": "{*}"}
)
DUPLICATES = 0.01  # share that may be both fitted and scored
HASHED = 64  # logits of each row


class Fit(NamedTuple):
    temperature: float
    fingerprints: Tensor
    n_classes: int


class Samples:
    """Batches of a method in a domain."""

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
        self._append(columns)
        self.columns.pop("nll_own_t", None)
        self.unscaled.append((logits.clone(), columns["target"]))  # callers may reuse buffers
        if self.keep_logits:
            self.logits.append(self.unscaled[-1][0])

    def _append(self, columns: dict[str, Tensor]) -> None:
        for name, column in columns.items():
            self.columns.setdefault(name, []).append(column)

    def scale(self, temperature: float) -> None:
        for batch in self.unscaled:
            self._append(columns_of(*batch, temperature))
        self.unscaled = []

    def has(self, score: str) -> bool:
        return score in ("accuracy", "aurc", *self.columns) or (score == "nll_own_t" and self.keep_logits)

    def scores(self, name: str) -> Tensor:
        """``[N]`` numbers whose mean is a score."""
        if name == "accuracy":
            return self["correct"]
        if name == "aurc":
            return risk_contributions(self["certainties"], self["correct"])
        if name not in self.columns:  # nll_own_t
            nll, target = self["nll"], self["target"]
            if nll.isfinite().all():  # else no T makes the score finite
                logits = torch.cat(self.logits)
                nll = columns_of(logits, target, best_temperature(logits, target)[0])["nll_ts"]
            self.columns[name] = [nll]
        return self[name]


def columns_of(logits: Tensor, target: Tensor, temperature: float | None = None) -> dict[str, Tensor]:
    rows, ts = [], "" if temperature is None else "_ts"
    for block in probability_blocks(logits, target, True, validate=False, temperature=temperature):
        row = {f"confidences{ts}": block.confidences, f"nll{ts}": log_losses(block)}
        if not ts:
            row |= {"target": block.target.clone(), "correct": block.correct, "brier": squared_errors(block)}
            row |= {"certainties": certainties(block), "fingerprints": fingerprints_of(block.scores, block.target)}
        rows.append(row)
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def on_cpu(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    check_predictions(target, logits=logits)
    logits, target = as_rows(target.cpu(), logits=logits.cpu())
    if len(logits) == 0:
        raise ValueError(f"logits must hold at least one sample, got shape {list(logits.shape)}; is the loader empty?")
    check_label_values(target, logits.shape[1])
    check_kind(from_logits=True, logits=logits)
    return logits, target


def fingerprints_of(logits: Tensor, target: Tensor) -> Tensor:
    """``[N]`` hashes of labels, their logits, which no mask hides, and some others."""
    some = logits[:, :: max(1, -(-logits.shape[1] // HASHED))]
    generator = torch.Generator("cpu").manual_seed(0)
    weights = torch.randint(1, 2**22 // HASHED, some.shape[1:], generator=generator, device="cpu").double()
    own = logits.gather(1, target[:, None])[:, 0]
    others = _bits(some).double() @ weights  # exact, below 2^53
    return (others.long() * 1_000_003 + _bits(own)) * 1_000_003 + target


def _bits(logits: Tensor) -> Tensor:
    return (logits.float() + 0.0).view(torch.int32)


def check_held_out(method: str, domain: str, fitted: Tensor, scored: Tensor) -> None:
    # Rows alike by chance have twins in both sets, repeated ones only in one.
    smaller, larger = sorted((fitted, scored), key=len)
    shared = int(torch.isin(smaller, larger).sum())
    rows, counts = larger.unique(return_counts=True)
    known = int(torch.isin(smaller, rows[counts > 1]).sum()) / len(smaller)
    coincidences = min(max(_with_twins(larger), known), _with_twins(smaller) * len(larger) / len(smaller))
    expected = len(smaller) * min(1.0, DUPLICATES + coincidences)
    if shared > expected + 3 * math.sqrt(expected):
        raise ValueError(
            f"the temperature of {method!r} must be fitted on data that the report does not score, got {shared} of "
            f"{len(smaller)} samples with the same logits and label in domain {domain!r}; fit it on a validation split"
        )


def _with_twins(fingerprints: Tensor) -> float:
    counts = fingerprints.unique(return_counts=True)[1]
    return int(counts[counts > 1].sum()) / len(fingerprints)


def mean_figures(data: Sequence[Samples], n_bins: int) -> dict[str, float]:
    found = dict.fromkeys(FIGURES, math.nan)
    if not data:
        return found
    rates = [(int(samples["correct"].sum()), len(samples["correct"])) for samples in data]
    hits, counts = torch.tensor(rates, dtype=torch.float64, device="cpu").T
    found |= zip((f"accuracy{end}" for end in ENDS), mean_accuracy(hits, counts).tolist(), strict=True)
    for ts in ("", "_ts"):
        if all(f"nll{ts}" in samples.columns for samples in data):
            moments = [bin_moments(samples[f"confidences{ts}"], samples["correct"], n_bins) for samples in data]
            estimates = mean_interval(torch.stack(moments, 1), LEVEL)
            found |= {f"ece{ts}{part}": float(value) for part, value in zip(ECE_PARTS, estimates, strict=True)}
    is_enough = (hits.minimum(counts - hits) >= FEWEST).all()
    for name in SCORES:
        if all(samples.has(name) for samples in data):
            parts = [score_interval(samples.scores(name)) for samples in data]
            found[name], *ends = mean_of_intervals(torch.stack(parts, -1)).tolist()
            if is_enough:
                found |= zip((f"{name}_low", f"{name}_high"), ends, strict=True)
    return found


def mean_accuracy(correct: Tensor, counts: Tensor) -> Tensor:
    """The mean accuracy of data sets ``[..., D]`` and the ends of its interval, ``[3, ...]``."""
    shares = correct / counts
    centres = (correct + Z**2 / 2) / (counts + Z**2)
    halves = Z / (counts + Z**2) * (correct * (1 - shares) + Z**2 / 4).sqrt()
    return mean_of_intervals(torch.stack((shares, centres - halves, centres + halves))).clamp(0, 1)


def mean_of_intervals(parts: Tensor) -> Tensor:
    """The same of D independent values, from each one and its ends ``[3, ..., D]``."""
    values, lows, highs = parts
    mean = values.mean(-1)
    distances = torch.stack((values - lows, highs - values)).square().sum(-1).sqrt() / values.shape[-1]
    return torch.stack((mean, mean - distances[0], mean + distances[1]))


def score_interval(scores: Tensor, *, paired: bool = False) -> Tensor:
    """The mean of scores ``[N]`` and its ends, ``[3]``."""
    scores, n = scores.double(), len(scores)
    mean = scores.mean()
    centred = scores - mean
    deviation = (centred.square().sum() / (n * (n - 1))).sqrt()  # NaN if n = 1
    skewness = (centred / (n * deviation)).pow(3).sum().nan_to_num()  # of the mean
    skewness = torch.where(skewness.abs() < 1e-6, 1e-6, skewness)
    z = mean.new_tensor([Z, -Z])
    if paired:  # quantiles of Student's t
        freedom = n_deciding(scores).nan_to_num(math.inf)
        z = z + z * (z**2 + 1) / (4 * freedom) + z * (5 * z**4 + 16 * z**2 + 3) / (96 * freedom**2)
    cubes = 1 + skewness * (z - skewness / 6)
    steps = 3 / skewness * (cubes.sign() * cubes.abs().pow(1 / 3) - 1)
    return torch.cat((mean[None], mean - deviation * steps))


def n_deciding(scores: Tensor) -> Tensor:
    squares = (scores - scores.mean()).square()
    return squares.sum().square() / squares.square().sum()


def differences(pairs: Sequence[tuple[Samples, Samples]], a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    found: dict[str, float] = {}
    same = all(first.columns.keys() == second.columns.keys() for first, second in pairs) and all(
        torch.equal(first[name], second[name]) for first, second in pairs for name in first.columns
    )
    for name in PRINTED:
        difference = a[name] - b[name]
        ends = [difference if same else math.nan] * 2
        if not same and "ece" not in name and all(samples.has(name) for pair in pairs for samples in pair):
            parts = torch.stack([_difference(*pair, name) for pair in pairs], -1)
            ends = mean_of_intervals(parts)[1:].tolist()
        found |= zip((f"{name}{end}" for end in ENDS), (difference, *ends), strict=True)
    return found


def _difference(a: Samples, b: Samples, name: str) -> Tensor:
    difference = a.scores(name).double() - b.scores(name).double()
    ends = score_interval(difference, paired=True)
    deciding = n_deciding(a["correct"].double() - b["correct"].double() if name == "aurc" else difference)
    if deciding < FEWEST or (deciding.isnan() and name in ("accuracy", "aurc")):
        ends[1:] = math.nan
    return ends


def caption(columns: Iterable[str], intervals: bool, id_domain: str, ood_domains: list[str], n_bins: int) -> str:
    names = " ".join(columns)
    ood = f"plain mean over {', '.join(ood_domains)}" if ood_domains else "no data"
    named = {"accuracy": "Accuracy", "ece": f"ECE ({n_bins} bins)"}
    rates = " and ".join(text for word, text in named.items() if word in names)
    first = f"ID: {id_domain}; OOD: {ood}"
    if rates:
        first = f"{rates} in per cent; {first}"
    if "temperature" in names or "_ts" in names:
        first += "; + TS: logits divided by T, which was fitted on held-out data"
    notes = [note for word, note in NOTES.items() if word in names]
    if intervals and "ece" in names:
        notes = [BRACKETS, *notes, "Other figures have their 95 % interval in brackets."] if notes else [BRACKETS]
    elif intervals and (rates or notes):
        notes.append("In brackets: the 95 % interval.")
    return " ".join([*f"{first}.".split(), *notes])


def cells(summary: list[dict[str, Any]], columns: Sequence[str], intervals: bool) -> list[list[str]]:
    body = [[" ".join(row["method"].split()), *(_cell(row, name, intervals) for name in columns)] for row in summary]
    return [["Method", *map(HEADINGS.__getitem__, columns)], *body]


def check_choices(choices: Sequence[str], **lists: Any) -> None:
    for name, values in lists.items():
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise TypeError(f"{name} must be a list of names, got {type(values).__name__} {values!r}")
        if not values:
            raise ValueError(f"{name} must hold at least one name, got {values!r}; leave it out for the usual ones")
        check_choice(choices, **{f"{name}[{i}]": value for i, value in enumerate(values)})


def scale_of(column: str) -> tuple[int, int]:
    """Factor and decimals of a figure."""
    return (1, 3) if "nll" in column or "brier" in column else (100, 2 if "aurc" in column else 1)


def markdown(table: list[list[str]], caption: str) -> str:
    table = [[cell.translate(MARKDOWN) for cell in row] for row in table]
    widths = [max(3, *map(len, column)) for column in zip(*table, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
        for row in (table[0], rule, *table[1:])
    ]
    return "\n".join([*lines, "", caption])


def latex(table: list[list[str]], caption: str) -> str:
    head, *body = (" & ".join(cell.translate(LATEX) for cell in row) + r" \\" for row in table)
    begin = rf"\begin{{tabular}}{{l{'r' * (len(table[0]) - 1)}}}"
    return "\n".join(["% " + caption, begin, r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"])


def _cell(row: dict[str, Any], column: str, intervals: bool) -> str:
    value = row[column]
    if math.isnan(value):
        return MISSING
    if column == "temperature":
        return f"{value:.2f}" if 0.1 <= value < 100 else f"{value:.3g}"
    factor, digits = scale_of(column)
    shown = f"{factor * value:.{digits}f}"
    if not intervals:
        return shown
    endings = "_low", "_high", "_debiased", "_floor"
    low, high, debiased, floor = (f"{factor * row.get(column + end, math.nan):.{digits}f}" for end in endings)
    if "ece" not in column:
        return shown if low == "nan" else f"{shown} ({low}{MISSING}{high})"
    if low != "nan":
        return f"{shown} ({low}{MISSING}{high}; {floor})"
    p = row[column + "_p"]
    return f"{shown} ({debiased}; {floor}; " + (f"p = {p:.3f})" if p >= 0.001 else "p < 0.001)")
