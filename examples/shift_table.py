"""CaRot's table on real handwriting, from nothing, on a CPU: fine-tuning, accuracy and calibration under shift.

    python examples/shift_table.py                 # one seed, under five minutes on two cores, no download
    python examples/shift_table.py --seeds 0 1 2   # mean ± standard deviation over three seeds
    python examples/shift_table.py --rows ZS FT CAR-FT Lipsum-FT FLYP TRACER CaRot   # other methods beside the paper's

A small CLIP is pre-trained on rendered characters in many styles, fine-tuned on scikit-learn's handwritten digits in
the ways the paper compares, and tested in distribution (ID) and under five shifts (OOD). Printed and written to
``--out`` are the table (``table.md``), its figures for every data set (``results.csv``), reliability diagrams
(``reliability.png``), calibration against accuracy (``shift.png``) and samples of the data (``domains.png``). On the
CPU of one machine, the same seed gives the same numbers. Read on in ``examples/shift_table/``; ``rows.py`` is where
calrobust does its work.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from platformdirs import user_cache_path
from shift_table.data import ID_DOMAIN, Data, make_data
from shift_table.pretraining import Pretraining, pretrained_clip
from shift_table.results import FILES, summarize, write_results
from shift_table.rows import FURTHER_ROWS, ROWS, FineTuning, fine_tuned_rows

import calrobust

FULL = Pretraining(), FineTuning()
FAST = Pretraining(steps=60, per_style=9), FineTuning(epochs=3)  # shows that everything runs; its numbers mean little


def run_seed(
    data: Data,
    pretraining: Pretraining,
    fine_tuning: FineTuning,
    rows: Sequence[str],
    *,
    seed: int,
    device: torch.device,
    cache: Path,
) -> calrobust.ShiftReport:
    """Pre-trains a model, fine-tunes it in every way and reports on every row."""
    clip = pretrained_clip(pretraining, seed, device, cache)
    report = calrobust.ShiftReport(id_domain=ID_DOMAIN)
    for row, classifier in fine_tuned_rows(clip, data.train.to(device), fine_tuning, seed, rows):
        logits, target = calrobust.collect_logits(classifier, data.validation.batches(), device=device, progress=False)
        report.fit_temperature(row, logits, target)  # on the validation split alone: no test image chooses T
        for domain, split in data.test.items():
            logits, target = calrobust.collect_logits(classifier, split.batches(), device=device, progress=False)
            report.add(row, domain, logits, target)
    return report


def main() -> None:
    """Reads the options, runs every seed, prints what came out and writes it down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run each (default: 0)")
    known = (*ROWS, *FURTHER_ROWS)
    parser.add_argument(
        "--rows", nargs="+", choices=known, default=ROWS, metavar="ROW", help=f"methods, of {', '.join(known)}"
    )
    parser.add_argument("--fast", action="store_true", help="a minute's miniature, to see that every part runs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the models run (default: cpu)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1; more gain little)")
    parser.add_argument("--out", type=Path, default=Path("shift_table_results"), help="folder for the results")
    parser.add_argument(
        "--cache", type=Path, default=user_cache_path("calrobust"), help="folder for pre-trained models"
    )
    options = parser.parse_args()
    if len(set(options.seeds)) < len(options.seeds):
        parser.error(f"--seeds must differ from each other, got {options.seeds}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA GPU that this PyTorch can use; leave it out to run on the CPU")
    if len(set(options.rows)) < len(options.rows):
        parser.error(f"--rows must differ from each other, got {', '.join(options.rows)}")
    options.out.mkdir(parents=True, exist_ok=True)  # fails now rather than after the last seed
    torch.set_num_threads(options.threads)

    data = make_data()
    pretraining, fine_tuning = FAST if options.fast else FULL
    device = torch.device(options.device)
    reports = {
        seed: run_seed(data, pretraining, fine_tuning, options.rows, seed=seed, device=device, cache=options.cache)
        for seed in options.seeds
    }
    provenance = (
        f"`shift_table.py`, seed {', '.join(map(str, options.seeds))}: {pretraining.steps} steps of pre-training, "
        f"{fine_tuning.steps(data.train)} of fine-tuning for each row."
    )
    if len(reports) > 1:
        provenance += f" The diagrams and the scatter plot are of seed {options.seeds[0]}."
    if options.fast:
        provenance += " With --fast, everything runs and the numbers mean nothing."
    summary = summarize(reports, provenance)
    print(f"\n{summary}\n")
    try:
        write_results(options.out, summary, reports, data)
    except OSError as error:
        parser.exit(1, f"{parser.prog}: error: the results cannot be written: {error}\n")
    print(f"Written to {options.out}: {', '.join(FILES)}")


if __name__ == "__main__":
    main()
