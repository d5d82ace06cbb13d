"""What the table says, in words that are computed from it: who is best, what fine-tuning costs, where CaRot wins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean

Figures = Mapping[str, Mapping[str, float]]  # row -> column -> value in percent, of one seed

COLUMNS = {  # of the report's summary, and how the text calls them
    "id_accuracy": "ID accuracy",
    "ood_accuracy": "OOD accuracy",
    "id_ece": "ID ECE",
    "ood_ece": "OOD ECE",
    "id_ece_ts": "ID ECE + TS",
    "ood_ece_ts": "OOD ECE + TS",
}
LEVEL = 1.0  # two rows that are less than a point apart are called level: the test sets do not tell them apart


def findings(seeds: Sequence[Figures]) -> list[str]:
    """Sentences about one table for each seed; rows are compared within a seed, then averaged over seeds."""
    rows = list(seeds[0])
    fine_tuned = [row for row in rows if row != "ZS" and not row.startswith("WiSE-FT")]
    scope = (
        f"means of {len(seeds)} seeds" if len(seeds) > 1 else "one seed: another one moves OOD figures by some points"
    )
    level = f"less than {LEVEL:g} apart" + (", or seeds that disagree," if len(seeds) > 1 else "")
    sentences = [f"In points of percent; {scope}; {level} is called level.", "Best of all rows: " + _best(seeds, rows)]
    if fine_tuned:
        sentences.append("Best of the fine-tuned rows, WiSE-FT's averages left out: " + _best(seeds, fine_tuned))
    if {"FT", "ZS"} <= {*rows}:
        sentences.append(_against(seeds, "FT", "ZS"))
    if "CaRot" in rows and len(rows) > 1:
        sentences += [_comparison(seeds, "CaRot", column) for column in COLUMNS.values()]
    return [*sentences, *(_scaling(seeds, row) for row in ("FT", "CaRot") if row in rows)]


def _mean(seeds: Sequence[Figures], row: str, column: str) -> float:
    return mean(figures[row][column] for figures in seeds)


def _winner(seeds: Sequence[Figures], rows: Iterable[str], column: str) -> str:
    best = max if column.endswith("accuracy") else min
    return best(rows, key=lambda row: _mean(seeds, row, column))


def _best(seeds: Sequence[Figures], rows: Sequence[str]) -> str:
    """The best row in every column, and in how many of them that is a CaRot row, if there is one."""
    winners = {column: _winner(seeds, rows, column) for column in COLUMNS.values()}
    named = (f"{column} {row} ({_mean(seeds, row, column):.1f})" for column, row in winners.items())
    carot = [column for column, row in winners.items() if row.startswith("CaRot")]
    wins = f"CaRot is first in {len(carot)} of {len(winners)}" + (f" ({', '.join(carot)})" if carot else "")
    return f"{', '.join(named)}." + (f" {wins}." if any(row.startswith("CaRot") for row in rows) else "")


def _difference(seeds: Sequence[Figures], row: str, other: str, column: str) -> str:
    differences = [figures[row][column] - figures[other][column] for figures in seeds]
    spread = f", {min(differences):+.1f} to {max(differences):+.1f}" if len(seeds) > 1 else ""
    return f"{mean(differences):+.1f}{spread}"


def _against(seeds: Sequence[Figures], row: str, other: str) -> str:
    parts = (f"{column} {_difference(seeds, row, other, column)}" for column in COLUMNS.values())
    return f"{row} minus {other}: " + "; ".join(parts) + "."


def _comparison(seeds: Sequence[Figures], row: str, column: str) -> str:
    """Which rows ``row`` beats in ``column``, in every seed, which it is level with and which beat it."""
    groups: dict[str, list[str]] = {"better than": [], "level with": [], "worse than": []}
    for other in seeds[0]:
        if other != row:
            sign = 1 if column.endswith("accuracy") else -1
            gains = [sign * (figures[row][column] - figures[other][column]) for figures in seeds]
            level = abs(mean(gains)) < LEVEL or min(gains) < 0 < max(gains)
            group = "level with" if level else "better than" if gains[0] > 0 else "worse than"
            groups[group].append(f"{other} ({_difference(seeds, row, other, column)})")
    return (
        f"{row}, {column}: " + "; ".join(f"{group} {', '.join(them)}" for group, them in groups.items() if them) + "."
    )


def _scaling(seeds: Sequence[Figures], row: str) -> str:
    moves = (
        f"{domain} ECE from {_mean(seeds, row, f'{domain} ECE'):.1f} to {_mean(seeds, row, f'{domain} ECE + TS'):.1f}"
        for domain in ("ID", "OOD")
    )
    return f"Temperature scaling on ID validation images takes {row}'s " + " and its ".join(moves) + "."
