"""The results as tables, sentences and pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

from atomic import write_atomically
from matplotlib.figure import Figure
from scipy.stats import t as student

import calrobust as cr
from calrobust.plotting import reliability_grid, shift_scatter
from shift_table.data import ID, Split

PAPER = {  # column of the report's summary -> of the table
    "id_accuracy": "ID accuracy",
    "ood_accuracy": "OOD accuracy",
    "id_ece": "ID ECE",
    "ood_ece": "OOD ECE",
    "id_ece_ts": "ID ECE + TS",
    "ood_ece_ts": "OOD ECE + TS",
    "temperature": "T",
}
BEHIND = {"ood_nll": "OOD NLL", "ood_nll_own_t": "OOD NLL at own T", "ood_aurc": "OOD AURC"}
COMPARED = {column: title for column, title in (PAPER | BEHIND).items() if column != "temperature"}
SAID = {"ood_accuracy": "OOD accuracy", "ood_ece": "OOD ECE", "ood_nll": "OOD NLL"}
CAPTION = (
    "Accuracy, ECE and area under the risk-coverage curve (AURC) in per cent, negative log-likelihood (NLL) in nats; "
    "{seeds}. ID: {id}; OOD: mean over {ood}. + TS: logits divided by T, which was fitted on ID validation pictures. "
    "At own T: each set at the temperature that is best for it, which no method can know."
)
Reports = Mapping[int, cr.ShiftReport]  # by seed
Gaps = dict[str, dict[str, tuple[float, float]]]  # column -> row -> mean, and half of its 95 % interval


def summarize(reports: Reports) -> str:
    """The tables, and what the paired differences say."""
    first = next(iter(reports.values()))
    seeds = f"mean ± standard deviation of {len(reports)} seeds" if len(reports) > 1 else "one seed"
    caption = CAPTION.format(seeds=seeds, id=ID, ood=", ".join(first.domains[1:]))
    parts = [_table(reports, PAPER), _table(reports, BEHIND), caption]
    if gaps := differences(reports):
        rows = [[row, *(_signed(column, gaps[column][row]) for column in gaps)] for row in gaps["ood_ece"]]
        parts += [_markdown([["CaRot minus", *(COMPARED[column] for column in gaps)], *rows])]
        parts += [f"Paired by seed, with 95 % t-intervals over {len(reports)} seeds. " + sentences(gaps)]
    return "\n\n".join(parts)


def differences(reports: Reports) -> Gaps:
    """CaRot minus each other row, paired within a seed; nothing for a single seed, a single row or without CaRot."""
    rows = next(iter(reports.values())).methods
    if len(reports) < 2 or len(rows) < 2 or "CaRot" not in rows:
        return {}
    quantile = float(student.ppf(0.975, len(reports) - 1))
    gaps: Gaps = {column: {} for column in COMPARED}
    for row in rows:
        if row != "CaRot":
            each = [report.compare("CaRot", row) for report in reports.values()]
            for column, own in gaps.items():
                values = [of_seed[column] for of_seed in each]
                own[row] = mean(values), quantile * stdev(values) / sqrt(len(values))
    return gaps


def sentences(gaps: Gaps) -> str:
    """For accuracy, ECE and NLL under shift, which rows CaRot beats, and which beat it."""
    said = []
    for column, title in SAID.items():
        better = 1 if column.endswith("accuracy") else -1
        shown = {row: better * middle for row, (middle, half) in gaps[column].items() if abs(middle) > half}
        groups = {
            "better than": [row for row, gain in shown.items() if gain > 0],
            "worse than": [row for row, gain in shown.items() if gain < 0],
            "not shown to differ from": [row for row in gaps[column] if row not in shown],
        }
        said.append(
            f"{title}: CaRot is " + "; ".join(f"{how} {', '.join(rows)}" for how, rows in groups.items() if rows)
        )
    return ". ".join(said) + "."


def _table(reports: Reports, columns: Mapping[str, str]) -> str:
    seeds = [{row["method"]: row for row in report.summary()} for report in reports.values()]
    body = [
        [method, *(_spread(column, [figures[method][column] for figures in seeds]) for column in columns)]
        for method in seeds[0]
    ]
    return _markdown([["Method", *columns.values()], *body])


def _shown(column: str, value: float, sign: str = "") -> str:
    return f"{value:{sign}.2f}" if "nll" in column or column == "temperature" else f"{100 * value:{sign}.1f}"


def _spread(column: str, values: Sequence[float]) -> str:
    shown = _shown(column, mean(values))
    return f"{shown} ± {_shown(column, stdev(values))}" if len(values) > 1 else shown


def _signed(column: str, gap: tuple[float, float]) -> str:
    return f"{_shown(column, gap[0], '+')} ± {_shown(column, gap[1])}"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(4, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = (
        [line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in (lines[0], rule, *lines[1:])
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def write_results(out: Path, summary: str, reports: Reports, test: Mapping[str, Split]) -> list[str]:
    """Writes tables and pictures into ``out`` and gives their names; a picture of one model is of the first seed."""
    first = next(iter(reports.values()))
    scatter = Figure(figsize=(5.2, 3.8), dpi=200, layout="constrained")
    shift_scatter(first, ax=scatter.add_subplot())
    typical = [row for row in ("FT", "FLYP", "CaRot") if row in first.methods]
    pictures = {
        "domains.png": contact_sheet(test),
        "shift.png": scatter,
        "reliability.png": reliability_grid(first, typical or None),
    }
    if gaps := differences(reports):
        pictures["differences.png"] = difference_plot(gaps)
    content = {"table.md": f"{summary}\n".encode(), "results.csv": _csv(reports)}
    content |= {name: _png(figure) for name, figure in pictures.items()}
    for name, written in content.items():
        write_atomically(out / name, written)
    return [*content]


def contact_sheet(test: Mapping[str, Split]) -> Figure:
    """One line for each test set: typical digits, five dark on light and five light on dark."""
    figure = Figure(figsize=(7.4, 4.2), dpi=110, layout="compressed")
    grid = figure.subplots(len(test), 10)
    for axes, (name, (images, target)) in zip(grid, test.items(), strict=True):
        paper = images[:, :, (0, 0, -1, -1), (0, -1, 0, -1)].mean((1, 2))  # at the corners
        for digit, ax in enumerate(axes):
            shown = (target == digit) & (paper > 0.6 if digit < 5 else paper < 0.4)
            ax.imshow(images[shown][0].permute(1, 2, 0).numpy())
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        axes[0].set_ylabel(f"{name}{' (ID)' * (name == ID)}", rotation=0, ha="right", va="center", fontsize=9)
    grid[0, 2].set_title("dark on light", fontsize=9)
    grid[0, 7].set_title("light on dark", fontsize=9)
    return figure


def difference_plot(gaps: Gaps) -> Figure:
    """CaRot minus each row and its interval, for accuracy, ECE and NLL under shift."""
    figure = Figure(figsize=(7.4, 2.9), dpi=200, layout="constrained")
    for ax, (column, title) in zip(figure.subplots(1, len(SAID), sharey=True), SAID.items(), strict=True):
        scale, unit = (1, "nats") if "nll" in column else (100, "points")
        good, side = (1, "right") if column.endswith("accuracy") else (-1, "left")
        ax.axvline(0, color="0.6", linewidth=0.8)
        for y, (middle, half) in enumerate(gaps[column].values()):
            colour = "0.55" if abs(middle) <= half else "#0072B2" if good * middle > 0 else "#D55E00"
            ax.errorbar(scale * middle, y, xerr=scale * half, fmt="o", color=colour, markersize=4, capsize=2.5)
        ax.set_yticks(range(len(gaps[column])), [*gaps[column]])
        ax.set_title(f"{title} ({unit}); {side} is better", fontsize=8)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(labelsize=8)
        ax.tick_params(axis="y", length=0)
    figure.axes[0].invert_yaxis()
    figure.supxlabel(
        "CaRot minus this row, with its 95 % interval; blue: better, orange: worse, grey: neither", fontsize=8
    )
    return figure


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
    figure.savefig(picture, format="png", bbox_inches="tight")
    return picture.getvalue()
