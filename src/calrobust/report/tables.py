"""The rows of a report as Markdown, LaTeX and CSV."""

import csv
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

HEADINGS = {  # column of the summary -> of the printed tables
    "id_accuracy": "ID accuracy",
    "ood_accuracy": "OOD accuracy",
    "id_ece": "ID ECE",
    "ood_ece": "OOD ECE",
    "temperature": "T",
    "id_ece_ts": "ID ECE + TS",
    "ood_ece_ts": "OOD ECE + TS",
}
MISSING = "\N{EN DASH}"
BRACKETS = (
    " In brackets: the 95 % interval of the accuracy, or of the ECE without noise, which can lie below the value; then "
    "the noise floor, which is the ECE that a perfectly calibrated model shows. An ECE without an interval, such as "
    "the mean of several domains, has in brackets its debiased value, noise floor and p-value against perfect "
    "calibration."
)
MARKDOWN = str.maketrans({"|": r"\|"})
LATEX = str.maketrans(
    {mark: "\\" + mark for mark in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", MISSING: "--"}
    | {"<": r"\textless{}", ">": r"\textgreater{}"}
)


def caption(n_bins: int, id_domain: str, ood_domains: Sequence[str], intervals: bool) -> str:
    """What the figures of the printed tables are, in one line."""
    ood = f"plain mean over {', '.join(ood_domains)}" if ood_domains else "no data"
    figures = f"Accuracy and ECE ({n_bins} bins) in per cent; ID: {id_domain}; OOD: {ood}; "
    scaling = "+ TS: logits divided by T, which was fitted on held-out data."
    return " ".join((figures + scaling + BRACKETS * intervals).split())


def markdown(rows: Sequence[Row], caption: str, intervals: bool) -> str:
    """The summary in per cent with aligned columns, and its caption."""
    table = _cells(rows, intervals, MARKDOWN)
    widths = [max(3, *map(len, column)) for column in zip(*table, strict=True)]  # a rule has three characters
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
        for row in (table[0], rule, *table[1:])
    ]
    return "\n".join([*lines, "", caption])


def latex(rows: Sequence[Row], caption: str, intervals: bool) -> str:
    """The summary in per cent as a ``tabular``, with its caption as a comment."""
    head, *body = (" & ".join(row) + r" \\" for row in _cells(rows, intervals, LATEX))
    begin, end = rf"\begin{{tabular}}{{l{'r' * len(HEADINGS)}}}", r"\end{tabular}"
    return "\n".join(["% " + caption, begin, r"\toprule", head, r"\midrule", *body, r"\bottomrule", end])


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Replaces the file at once, or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # a rename is atomic within a folder
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(map(without_nan, rows))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def without_nan(row: Row) -> Row:
    """With None in place of NaN: JSON has no NaN, and CSV writes None as an empty field."""
    return {name: None if value != value else value for name, value in row.items()}


def _cells(rows: Sequence[Row], intervals: bool, escapes: dict[int, str]) -> list[list[str]]:
    body = [[" ".join(row["method"].split()), *(_cell(row, name, intervals) for name in HEADINGS)] for row in rows]
    return [["Method", *HEADINGS.values()], *([cell.translate(escapes) for cell in cells] for cells in body)]


def _cell(row: Row, column: str, intervals: bool) -> str:
    value = row[column]
    if math.isnan(value):
        return MISSING
    if column == "temperature":
        return f"{value:.2f}" if 0.1 <= value < 100 else f"{value:.3g}"
    shown = f"{100 * value:.1f}"
    if not intervals:
        return shown
    ends = (f"{100 * row.get(column + end, math.nan):.1f}" for end in ("_low", "_high", "_debiased", "_floor"))
    low, high, debiased, floor = ends
    if "accuracy" in column:
        return f"{shown} ({low}{MISSING}{high})"
    if low != "nan":
        return f"{shown} ({low}{MISSING}{high}; {floor})"
    p = row[column + "_p"]
    return f"{shown} ({debiased}; {floor}; " + (f"p = {p:.3f})" if p >= 0.001 else "p < 0.001)")
