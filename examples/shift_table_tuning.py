"""How the recipes of ``examples/shift_table.py`` were chosen, and how far a rounding error moves its figures.

    python examples/shift_table_tuning.py           # an hour on two cores: writes shift_table/tuning.csv
    python examples/shift_table_tuning.py --nudge   # some minutes: one weight is moved by its last digit

``shift_table/protocol.md`` has the rules and what came out. No set that the table reports is drawn here: a candidate is
judged by its negative log-likelihood (NLL) on ID validation pictures, after pre-trainings of seeds that no table uses.
"""

from __future__ import annotations

import argparse
import copy
import csv
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache, partial
from itertools import count, product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

import torch
from platformdirs import user_cache_path
from shift_table.data import train_split, validation_split
from shift_table.model import Classifier, Pretraining, pretrained
from shift_table.rows import AVERAGED, RECIPES, WAYS, FineTuning, Recipe
from tqdm import tqdm

import calrobust as cr
from calrobust.functional import calibration_error, negative_log_likelihood

SEEDS = (100, 101)
STEPS = {  # where a hyper-parameter starts: docs/guides/choosing.md, for 140 steps; and the factor to its neighbours
    "learning_rate": (1e-3, 2**0.5),
    "label_smoothing": (0.05, 2.0),
    "distillation_weight": (1.5, 2.0),
    "forgetting": (3 / 140, 2.0),  # 1 - the teacher's decay
    "orthogonality": (0.2, 4.0),
}
SIZES = {"FT": 1, "FT w/ LS": 2, "FLYP": 1, "FLYP w/ LS": 2, "CaRot": 4, "CaRot (NeurIPS)": 5}  # how many a row has
ALPHAS = [tenths / 10 for tenths in range(11)]  # 0 is ZS and 1 is FT
CACHE = user_cache_path("calrobust")
TABLE = Path(__file__).parent / "shift_table" / "tuning.csv"

Point = tuple[int, ...]  # how many steps each hyper-parameter is from its start
Figures = dict[str, float]


def recipe_at(point: Point) -> Recipe:
    """The recipe at a point of the grid."""
    values = {name: start * factor**k for (name, (start, factor)), k in zip(STEPS.items(), point, strict=False)}
    if "forgetting" in values:
        values["teacher_decay"] = 1 - values.pop("forgetting")
    return Recipe(**values)


def next_point(tried: Mapping[Point, float], size: int) -> Point:
    """The point nearest to the best so far that is untried; of equally near ones, away from the second best."""
    best, second = [*sorted(tried, key=lambda point: tried[point]), (0,) * size, (0,) * size][:2]
    gain = tuple(b - a for a, b in zip(second, best, strict=True))

    def key(offset: Point) -> tuple[object, ...]:
        return sum(k * k for k in offset), offset != gain, [(-abs(k), -k) for k in offset]

    reach = max(3, 40 // size**2)
    around = sorted(product(range(-reach, reach + 1), repeat=size), key=key)
    points = (tuple(b + k for b, k in zip(best, offset, strict=True)) for offset in around)
    return next(point for point in points if point not in tried)


def is_inside(best: Point, tried: Mapping[Point, float]) -> bool:
    """Whether every neighbour of the best, one step up or down in one hyper-parameter, was tried."""
    steps = ((axis, step) for axis in range(len(best)) for step in (1, -1))
    return all((*best[:axis], best[axis] + step, *best[axis + 1 :]) in tried for axis, step in steps)


@cache
def fine_tuning(seed: int, *, nudged: bool = False, exact: bool = False) -> FineTuning:
    """A pre-trained model and the training pictures; candidates are trained in float32, in half the time."""
    torch.set_num_threads(1)
    bar = tqdm(disable=True)
    clip = pretrained(Pretraining(nudged=nudged), seed, CACHE, bar)
    return FineTuning(clip if exact else clip.float(), train_split(), 20, seed, bar)


def figures(model: Classifier) -> Figures:
    """NLL, accuracy and ECE on plain and on blurred validation pictures."""
    model, found = copy.deepcopy(model).float(), {}
    for name, style in {"": "plain", "blurred_": "blurred"}.items():
        logits, target = cr.collect_logits(model, validation_split(style).batches(), progress=False)
        found[f"{name}nll"] = float(negative_log_likelihood(logits, target))
        found[f"{name}accuracy"] = float((logits.argmax(1) == target).float().mean())
        found[f"{name}ece"] = float(calibration_error(logits, target))
    return found


def measured(seed: int, row: str, recipe: Recipe) -> Figures:
    """The figures of one candidate."""
    return figures(WAYS[row](fine_tuning(seed), recipe))


def errors_of_averages(seed: int, row: str, recipe: Recipe) -> list[float]:
    """WiSE-FT's ECE on ID validation pictures, for each alpha."""
    tuning = fine_tuning(seed)
    tuned = WAYS[row](tuning, recipe)
    return [figures(tuning.wise_ft(tuned, alpha))["ece"] for alpha in ALPHAS]


def tune() -> None:
    """Tries as many candidates of each row, more where a choice is at an edge; then chooses WiSE-FT's alphas."""
    tried: dict[str, dict[Point, float]] = {row: {} for row in SIZES}
    lines, best = [], dict.fromkeys(SIZES, Point())
    with ProcessPoolExecutor(len(SEEDS), get_context("spawn")) as pool:
        for candidates in count(24, 8):
            for row, own in tried.items():
                for _ in tqdm(range(len(own), candidates), desc=row):
                    point = next_point(own, SIZES[row])
                    recipe = recipe_at(point)
                    each = [*pool.map(partial(measured, row=row, recipe=recipe), SEEDS)]
                    means = {name: mean(one[name] for one in each) for name in each[0]}
                    own[point] = means["nll"]
                    lines.append({"row": row, **asdict(recipe), **means})
                best[row] = min(own, key=lambda point: own[point])
            if all(is_inside(best[row], tried[row]) for row in SIZES):
                break
        for row, point in best.items():
            print(f"{row}: {recipe_at(point)}, NLL {tried[row][point]:.4f}, inside: {is_inside(point, tried[row])}")
        for row, name in AVERAGED.items():
            errors = [*pool.map(partial(errors_of_averages, row=row, recipe=recipe_at(best[row])), SEEDS)]
            means = {str(alpha): mean(of_seeds) for alpha, *of_seeds in zip(ALPHAS, *errors, strict=True)}
            print(f"{name}: ID validation ECE by alpha: {means}")
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in line.items()} for line in lines)


def nudge() -> None:
    """How far figures on validation pictures move when a rounding error is put into a pre-training."""
    for row in ("ZS", "FT", "CaRot"):
        for nudged in (False, True):
            tuning = fine_tuning(SEEDS[0], nudged=nudged, exact=True)
            model = WAYS[row](tuning, RECIPES[row]) if row in WAYS else tuning.zero_shot
            print(f"{row}{' (nudged)' * nudged}: {figures(model)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nudge", action="store_true", help="measure what a rounding error does, and tune nothing")
    nudge() if parser.parse_args().nudge else tune()
