"""Prints the tables, and writes them with their plots for the documentation."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path

from benchmarks.measure import Table, header, slope

MODULES = {
    "losses": "losses",
    "cuda": "cuda",
    "compile": "compiler",
    "ema": "ema",
    "metrics": "metrics",
    "temperature": "temperature",
    "import": "weight",
    "coverage": "coverage",
}
PART = re.compile(r"(<!-- (\w+) -->).*?(<!-- end \2 -->)", re.DOTALL)
DOCS = Path(__file__).parents[2] / "docs"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time and memory of calrobust beside its peers.")
    parser.add_argument("--only", choices=MODULES, help="one group of tables")
    parser.add_argument("--write", action="store_true", help="refresh docs/benchmarks.md and its plots")
    options = parser.parse_args(arguments)
    _say(header())
    for name in [options.only] if options.only else MODULES:
        tables = []
        for table in importlib.import_module(f"benchmarks.{MODULES[name]}").tables():
            _say(f"\n{table.text()}")
            tables.append(table)
        if options.write:
            write(name, tables, DOCS)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()  # the next table may take minutes


def write(group: str, tables: list[Table], folder: Path) -> None:
    """Replaces what stands between the group's marks in ``benchmarks.md``, and its plot in ``folder/benchmarks``."""
    page = folder / "benchmarks.md"
    sections = [table.markdown() for table in tables]
    curves = {label: lines for table in tables for label, lines in table.curves.items()}
    if curves:
        (folder / "benchmarks").mkdir(parents=True, exist_ok=True)
        draw(curves, folder / "benchmarks" / f"{group}.svg")
        sections += [
            f"![Time and extra memory over the batch size, both axes logarithmic](benchmarks/{group}.svg)",
            "In brackets the slope on logarithmic axes: 1 is linear in B, 2 quadratic.",
        ]
    tables_text = "\n\n".join([*sections, f"```text\n{header()}\n```"])
    text = PART.sub(
        lambda part: f"{part[1]}\n\n{tables_text}\n\n{part[3]}" if part[2] == group else part[0],
        page.read_text(encoding="utf-8"),
    )
    page.write_text(text, encoding="utf-8")


def draw(curves: dict[str, dict[str, dict[int, float]]], path: Path) -> None:
    """One panel for each axis label, one line for each candidate."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "calrobust", "font.size": 9}):  # the same bytes for the same figures
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        for axes, (label, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
            for name, line in lines.items():
                ours = "Loss" not in name
                shown = f"{'calrobust, ' if ours else 'open_clip '}{name} ({slope(line):.2f})"
                axes.loglog(list(line), list(line.values()), "o-" if ours else "s--", label=shown, markersize=4)
            sizes = sorted({size for line in lines.values() for size in line})
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.minorticks_off()
            axes.set(xlabel="B, pairs", ylabel=label)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        figure.savefig(path, metadata={"Date": None})
