"""The rows of a report as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Callable, Sequence
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
LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", MISSING: "--"}


def markdown(rows: Sequence[Row], caption: str, intervals: bool) -> str:
    """The summary in per cent, columns aligned, and its caption."""
    table = _cells(rows, intervals, escape=lambda text: text.replace("|", r"\|"))
    widths = [max(3, *map(len, column)) for column in zip(*table, strict=True)]  # a rule has three characters
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
        for row in (table[0], rule, *table[1:])
    ]
    return "\n".join([*lines, "", caption])


def latex(rows: Sequence[Row], caption: str, intervals: bool) -> str:
    """The summary in per cent as a ``tabular``, its caption as a comment."""
    head, *body = (" & ".join(row) + r" \\" for row in _cells(rows, intervals, escape=_escape_latex))
    return "\n".join(
        [
            "% " + caption,
            rf"\begin{{tabular}}{{l{'r' * len(HEADINGS)}}}",
            r"\toprule",
            head,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Replaces the file at once, or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # a rename is atomic within a folder
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows({name: "" if is_nan(value) else value for name, value in row.items()} for row in rows)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def without_nan(row: Row) -> Row:
    """None in the place of NaN, which JSON does not know."""
    return {name: None if is_nan(value) else value for name, value in row.items()}


def is_nan(value: object) -> bool:
    """Of a float; nothing else is."""
    return isinstance(value, float) and math.isnan(value)


def _cells(rows: Sequence[Row], intervals: bool, escape: Callable[[str], str]) -> list[list[str]]:
    table = [["Method", *HEADINGS.values()]]
    for row in rows:
        cells = [" ".join(row["method"].split())]
        for column in HEADINGS:
            value = row[column]
            if is_nan(value):
                cells.append(MISSING)
            elif column == "temperature":
                cells.append(f"{value:.2f}" if 0.1 <= value < 100 else f"{value:.3g}")
            elif intervals:
                cells.append(f"{100 * value:.1f} ({_in_brackets(row, column)})")
            else:
                cells.append(f"{100 * value:.1f}")
        table.append([escape(cell) for cell in cells])
    return table


def _in_brackets(row: Row, column: str) -> str:
    """The interval, where there is one, and the noise floor of an ECE."""
    low, high = row[f"{column}_low"], row[f"{column}_high"]
    parts = [] if is_nan(low) else [f"{100 * low:.1f}{MISSING}{100 * high:.1f}"]
    if f"{column}_floor" in row:
        parts.append(f"{100 * row[f'{column}_floor']:.1f}")
    return "; ".join(parts)


def _escape_latex(text: str) -> str:
    return re.sub(rf"[\\~^{MISSING}&%$#_{{}}]", lambda match: LATEX.get(match[0], "\\" + match[0]), text)
