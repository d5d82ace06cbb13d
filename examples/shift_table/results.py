"""The results as a table and as files."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from atomic import write_atomically
from matplotlib.figure import Figure

import calrobust
from shift_table.data import Data
from shift_table.findings import COLUMNS, Figures, findings
from shift_table.sheet import contact_sheet

FILES = ("table.md", "results.csv", "reliability.png", "shift.png", "domains.png")
Reports = Mapping[int, calrobust.ShiftReport]  # by seed


def summarize(reports: Reports, provenance: str) -> str:
    """The table, what it says and where it comes from; with intervals for one seed, as mean ± std for several."""
    seeds = [_in_percent(report) for report in reports.values()]
    first = next(iter(reports.values()))
    if len(seeds) == 1:
        table = first.to_markdown()
    else:
        caption = first.to_markdown(intervals=False).splitlines()[-1]
        spread = f"Mean ± standard deviation over {len(seeds)} seeds, each with its own pre-training."
        table = f"{_table_over_seeds(seeds)}\n\n{caption} {spread}"
    return "\n".join([table, "", *(f"- {sentence}" for sentence in findings(seeds)), "", provenance])


def write_results(out: Path, summary: str, reports: Reports, data: Data) -> None:
    """Writes ``FILES`` into ``out``; the pictures of results are of the first seed."""
    first = next(iter(reports.values()))
    scatter = Figure(figsize=(5.2, 3.8), dpi=200, layout="constrained")
    calrobust.plotting.shift_scatter(first, ax=scatter.add_subplot())
    content = (
        f"{summary}\n".encode(),
        _csv(reports),
        _png(calrobust.plotting.reliability_grid(first)),
        _png(scatter),
        _png(contact_sheet(data)),
    )
    for name, written in zip(FILES, content, strict=True):
        write_atomically(out / name, written)


def _in_percent(report: calrobust.ShiftReport) -> Figures:
    return {
        row["method"]: {"T": row["temperature"]} | {title: 100 * row[name] for name, title in COLUMNS.items()}
        for row in report.summary()
    }


def _table_over_seeds(seeds: Sequence[Figures]) -> str:
    def cell(row: str, column: str) -> str:
        values = [figures[row][column] for figures in seeds]
        digits = 2 if column == "T" else 1
        return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"

    columns = [*COLUMNS.values(), "T"]
    lines = [["Method", *columns], ["---", *["---:"] * len(columns)]]
    lines += [[row, *(cell(row, column) for column in columns)] for row in seeds[0]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _csv(reports: Reports) -> bytes:
    """Every figure of every row on every data set, as fractions."""
    rows = [{"seed": seed} | figures for seed, report in reports.items() for figures in report.per_domain()]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
