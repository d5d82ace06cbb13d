"""CaRot's table on real handwriting, from nothing, on a CPU: fine-tuning, accuracy and calibration under shift.

    python examples/shift_table.py                     # one seed, some minutes, no download
    python examples/shift_table.py --seeds 0 1 2 3 4   # the README's: mean ± standard deviation, paired differences
    python examples/shift_table.py --rows ZS FT CAR-FT Lipsum-FT FLYP TRACER CaRot   # other methods beside the paper's

A small CLIP is pre-trained on rendered characters in many styles, fine-tuned on MNIST's digits in the ways that the
paper compares, and tested in distribution (ID) and under five shifts (OOD). Printed and written to ``--out`` are the
tables (``table.md``), all figures for every data set (``results.csv``), reliability diagrams, calibration against
accuracy, samples of the data and, for several seeds, paired differences. One machine gives the same digits each time.
Read on in ``examples/shift_table/``: ``rows.py`` is where calrobust does its work, ``protocol.md`` says what was
decided before the first table was made.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from platformdirs import user_cache_path
from shift_table.cache import load_or_build
from shift_table.data import ID, test_splits, train_split, validation_split
from shift_table.model import Classifier, Pretraining, pretrained
from shift_table.results import summarize, write_results
from shift_table.rows import ALPHAS, AVERAGED, FURTHER_ROWS, RECIPES, ROWS, WAYS, FineTuning, Recipe
from torch import Tensor
from tqdm import tqdm

import calrobust as cr

FULL = Pretraining(), 20  # and the epochs of fine-tuning
FAST = Pretraining(steps=60, per_style=8), 2  # shows that everything runs; its numbers mean nothing


def run_seed(seed: int, rows: Sequence[str], *, fast: bool, cache: Path, bar: tqdm) -> cr.ShiftReport:
    """Pre-trains a model, fine-tunes it in every way and reports on every row."""
    pretraining, epochs = FAST if fast else FULL
    phases = ["pre-training", *dict.fromkeys(row.removeprefix("WiSE-") for row in rows)]  # WiSE-FT is made of FT

    def say(phase: str, more: str = "") -> None:
        bar.set_description(f"seed {seed}, {phases.index(phase) + 1} of {len(phases)}: {phase}{more}")

    say("pre-training")
    clip = pretrained(pretraining, seed, cache, bar)
    tuning = FineTuning(clip, train_split(), epochs, seed, bar)
    validation, test = validation_split(), test_splits()

    def judged(row: str, classifier: Classifier) -> dict[str, Tensor]:
        splits = {"validation": validation, **test}
        single = copy.deepcopy(classifier).float()  # enough to look at pictures
        found = {name: cr.collect_logits(single, split.batches(), progress=False) for name, split in splits.items()}
        return {f"{row}, {name}": logits for name, (logits, _) in found.items()}

    def trained(row: str) -> dict[str, Tensor]:
        say(row)
        classifier = WAYS[row](tuning, RECIPES[row]) if row in WAYS else tuning.zero_shot
        say(row, ", predicting")
        logits = judged(row, classifier)
        if averaged := AVERAGED.get(row):
            logits |= judged(averaged, tuning.wise_ft(classifier, ALPHAS[averaged]))
        return logits

    logits: dict[str, Tensor] = {}
    for row in phases[1:]:
        recipe = {"seed": seed, "epochs": tuning.epochs, "pretraining": asdict(pretraining)}
        recipe |= {"recipe": asdict(RECIPES.get(row, Recipe())), "alpha": ALPHAS.get(AVERAGED.get(row, ""))}
        path = cache / f"shift_table_{pretraining.steps}_{seed}_{row.replace(' ', '_').replace('/', '')}.logits"
        logits |= load_or_build(path, recipe, partial(trained, row))
    report = cr.ShiftReport(id_domain=ID)
    for row in rows:
        report.fit_temperature(row, logits[f"{row}, validation"], validation.target)  # no test picture chooses T
        for domain, split in test.items():
            report.add(row, domain, logits[f"{row}, {domain}"], split.target)
    return report


def main() -> None:
    """Reads the options, runs every seed, prints what came out and writes it down."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    known = (*ROWS, *FURTHER_ROWS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run each (default: 0)")
    parser.add_argument(
        "--rows", nargs="+", choices=known, default=ROWS, metavar="ROW", help=f"methods, of {', '.join(known)}"
    )
    parser.add_argument("--fast", action="store_true", help="a minute's miniature, to see that every part runs")
    parser.add_argument("--out", type=Path, default=Path("shift_table_results"), help="folder for the results")
    parser.add_argument("--cache", type=Path, default=user_cache_path("calrobust"), help="folder for what took long")
    options = parser.parse_args()
    for name in ("seeds", "rows"):
        values = getattr(options, name)
        if len(set(values)) < len(values):
            parser.error(f"--{name} must differ from each other, got {' '.join(map(str, values))}")
    options.out.mkdir(parents=True, exist_ok=True)  # fails now rather than after the last seed
    torch.set_num_threads(1)  # whatever the environment says: another number rounds otherwise

    with tqdm(desc="drawing pictures", unit="step") as bar:
        reports = {
            seed: run_seed(seed, options.rows, fast=options.fast, cache=options.cache, bar=bar)
            for seed in options.seeds
        }
    summary = summarize(reports)
    if options.fast:
        summary += "\n\nWith --fast, everything runs and the numbers mean nothing."
    print(f"\n{summary}\n")
    try:
        files = write_results(options.out, summary, reports, test_splits())
    except OSError as error:
        parser.exit(1, f"{parser.prog}: error: the results cannot be written: {error}\n")
    print(f"Written to {options.out}: {', '.join(files)}")


if __name__ == "__main__":
    main()
