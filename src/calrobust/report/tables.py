"""How a report is printed."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from calrobust._checks import check_choice

HEADINGS = {"temperature": "T"} | {  # column of the summary -> of the printed tables
    f"{group.lower()}_{figure}": f"{group} {heading}"
    for group in ("ID", "OOD")
    for figure, heading in {
        "accuracy": "accuracy",
        "ece": "ECE",
        "ece_ts": "ECE + TS",
        "nll": "NLL",
        "nll_ts": "NLL + TS",
        "nll_own_t": "NLL at own T",
        "brier": "Brier score",
        "aurc": "AURC",
    }.items()
}
DEFAULT = "id_accuracy", "ood_accuracy", "id_ece", "ood_ece", "temperature", "id_ece_ts", "ood_ece_ts"
MISSING = "\N{EN DASH}"
BRACKETS = (
    " In brackets: the 95 % interval of the accuracy, or of the ECE without noise, which can lie below the value; then "
    "the noise floor, which is the ECE that a perfectly calibrated model shows. An ECE without an interval, such as "
    "the mean of several domains, has in brackets its debiased value, noise floor and p-value against perfect "
    "calibration."
)
NOTES = {  # of columns whose name holds the word
    "nll": "NLL: negative log-likelihood in nats.",
    "own": "At own T: each data set at the T that is best for it, a diagnosis that no method may claim as its result.",
    "brier": "Brier score: over all classes, in [0, 2].",
    "aurc": "AURC: area under the risk-coverage curve, in per cent.",
}
MARKDOWN = str.maketrans({"|": r"\|"})
LATEX = str.maketrans(
    {mark: "\\" + mark for mark in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", MISSING: "--"}
    | {"<": r"\textless{}", ">": r"\textgreater{}"}
)


def caption(columns: Iterable[str], intervals: bool, id_domain: str, ood_domains: list[str], n_bins: int) -> str:
    """What a reader of the table must know."""
    ood = f"plain mean over {', '.join(ood_domains)}" if ood_domains else "no data"
    figures = f"Accuracy and ECE ({n_bins} bins) in per cent; ID: {id_domain}; OOD: {ood}; "
    scaling = "+ TS: logits divided by T, which was fitted on held-out data."
    notes = [note for word, note in NOTES.items() if any(word in column for column in columns)]
    notes += ["Other figures have their 95 % interval in brackets."] * bool(notes and intervals)
    return " ".join((figures + scaling + BRACKETS * intervals).split() + notes)


def cells(summary: Callable[[], list[dict[str, Any]]], columns: Sequence[str], intervals: bool) -> list[list[str]]:
    """Headings, then a list for each row."""
    check_columns(columns)
    body = [[" ".join(row["method"].split()), *(_cell(row, name, intervals) for name in columns)] for row in summary()]
    return [["Method", *map(HEADINGS.__getitem__, columns)], *body]


def check_columns(columns: Any) -> None:
    """Raises unless they are names of figures."""
    if not isinstance(columns, (list, tuple)):
        raise TypeError(f"columns must be a list of names, got {type(columns).__name__} {columns!r}")
    for i, column in enumerate(columns):
        check_choice(tuple(HEADINGS), **{f"columns[{i}]": column})


def scale_of(column: str) -> tuple[int, int]:
    """What a figure is multiplied with when it is shown, and its number of decimals."""
    return (1, 3) if "nll" in column or "brier" in column else (100, 2 if "aurc" in column else 1)


def markdown(table: list[list[str]], caption: str) -> str:
    """The table and its caption."""
    table = [[cell.translate(MARKDOWN) for cell in row] for row in table]
    widths = [max(3, *map(len, column)) for column in zip(*table, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
        for row in (table[0], rule, *table[1:])
    ]
    return "\n".join([*lines, "", caption])


def latex(table: list[list[str]], caption: str) -> str:
    """The same for booktabs."""
    head, *body = (" & ".join(cell.translate(LATEX) for cell in row) + r" \\" for row in table)
    begin, end = rf"\begin{{tabular}}{{l{'r' * (len(table[0]) - 1)}}}", r"\end{tabular}"
    return "\n".join(["% " + caption, begin, r"\toprule", head, r"\midrule", *body, r"\bottomrule", end])


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
