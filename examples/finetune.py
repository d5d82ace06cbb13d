r"""Fine-tunes any CLIP on folders of pictures, by CaRot and the methods it is compared with, and reports on shifts.

    python examples/finetune.py --model ViT-B-32-quickgelu --pretrained openai --train pets/train --test pets/test \
        --ood sketches=pets/sketches --method zs flyp carot --out runs/pets

Each class is a folder of pictures, named as a caption would name it: ``maine_coon`` reads "a photo of a maine coon.".
``--model hf:openai/clip-vit-base-patch32`` takes a model of Transformers. Temperatures, and WiSE-FT's alpha, are chosen
on ``--val``, or on a part of ``--train`` that no step sees. ``--out`` gets a report over all methods that were ever run
there, its pictures, and a folder for each method with weights, logits, log and checkpoint. The same command again goes
on where it was cut off. ``torchrun --nproc-per-node 8 examples/finetune.py ...`` uses eight GPUs. Read on in
``examples/finetune/``; ``training.py`` is where calrobust does its work.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from atomic import write_atomically
from finetune import RunError
from finetune.models import Classifier, Clip, load_clip, local_weights
from finetune.pictures import ID_DOMAIN, VALIDATION, Batch, Domain, Pictures, batches, read_data
from finetune.training import METHODS, RECIPES, Training
from torch import Tensor, nn

import calrobust
from calrobust.functional import calibration_error

Scored = tuple[Tensor, Tensor]  # logits and target


def run(options: argparse.Namespace, device: torch.device, rank: int, world_size: int) -> None:
    """Trains and scores every method, writes down what came out, and reports."""
    if options.batch_size % world_size:
        raise RunError(f"--batch-size {options.batch_size} must be divisible by {world_size} processes")
    data, weights = read_data(options), local_weights(options)
    vars(options).update(weights)
    origin = hashlib.sha256(repr((options.model, options.pretrained, data, *weights.values())).encode()).hexdigest()
    unreadable: set[str] = set()
    for method in options.method:
        torch.manual_seed(options.seed)
        clip = load_clip(options, device)
        training = Training(options, method, clip, data, rank, world_size)
        training.run(unreadable)
        classifier = training.classifier()
        score = partial(score_domain, options, clip, classifier, unreadable, rank, world_size)
        if training.row.interpolates:
            alpha = interpolate(
                classifier, training.zero_shot, partial(score, data.domains[VALIDATION]), training.recipe.alpha
            )
            if rank == 0:
                print(f"{training.row.name}: alpha is {alpha}")
        scored = {name: score(domain) for name, domain in data.domains.items()}
        if rank == 0:  # the former as open_clip's --pretrained takes it; for Transformers, load_state_dict
            saved = {"state_dict": clip.network.state_dict(), "head": classifier.head.data, "classes": data.names}
            saved |= {} if classifier.bias is None else {"bias": classifier.bias.data}
            for name, content in (("weights.pt", saved), ("logits.pt", {"origin": origin, "sets": scored})):
                write_atomically(options.out / method / name, partial(torch.save, content))
    if rank == 0:
        print(f"\n{report_on(options.out, origin, scored)}\n")
        if bins := RECIPES[options.recipe].batch_bins:
            for name, sets in scored.items():
                ece = ece_of_batches(*sets, options.batch_size, bins)
                print(f"{training.row.name} on {name}: mean ECE of batches, {bins} bins: {100 * ece:.1f}")
        print(f"Written to {options.out}. Pictures that could not be read: {len(unreadable)}.")


def score_domain(
    options: argparse.Namespace,
    clip: Clip,
    classifier: Classifier,
    unreadable: set[str],
    rank: int,
    world_size: int,
    domain: Domain,
) -> Scored:
    """Logits and targets of a whole set, in its order, on every process; each scores its share."""
    device, n = classifier.head.device, len(domain.samples)
    share = [(0, index) for index in range(n * rank // world_size, n * (rank + 1) // world_size)]
    size = options.batch_size // world_size
    keys = [share[start : start + size] for start in range(0, len(share), size)]
    reader = batches(Pictures(domain.samples, clip.preprocess), keys, options.workers, unreadable)

    def forward(model: nn.Module, batch: Batch) -> Scored:
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            return domain.logits(model(batch.images.to(device))), batch.target

    first, own = next(reader, None), None
    if first is not None:
        own = calrobust.collect_logits(classifier, chain([first], reader), forward=forward, progress=rank == 0)
    shares = [own] * world_size
    if world_size > 1:
        dist.all_gather_object(shares, own)
    if not any(shares):
        raise RunError(f"none of {n} pictures can be read, {domain.samples[0][0]} for one")
    logits, target = map(torch.cat, zip(*filter(None, shares), strict=True))
    if logits.isnan().any():
        raise RunError("the logits are NaN, so training went wrong; pass a smaller --learning-rate, and another --out")
    return logits, target


def interpolate(
    classifier: Classifier, zero_shot: dict[str, Tensor], score: Callable[[], Scored], alpha: float | None
) -> float:
    """WiSE-FT with this alpha, or with the one of highest accuracy; of equal ones, the nearest to zero-shot."""
    fine_tuned = {name: value.clone() for name, value in classifier.state_dict().items()}

    def accuracy(alpha: float) -> float:
        classifier.load_state_dict(calrobust.interpolate(zero_shot, fine_tuned, alpha))
        logits, target = score()
        return (logits.argmax(1) == target).float().mean().item()

    alpha = max((step / 10 for step in range(11)), key=accuracy) if alpha is None else alpha
    classifier.load_state_dict(calrobust.interpolate(zero_shot, fine_tuned, alpha))
    return alpha


def ece_of_batches(logits: Tensor, target: Tensor, size: int, n_bins: int) -> float:
    """The mean over batches of their calibration errors, as the paper's scripts report it."""
    parts = zip(logits.split(size), target.split(size), strict=True)
    ece = sum(len(part[1]) * calibration_error(*part, n_bins=n_bins) for part in parts)
    return float(ece) / len(target)


def report_on(out: Path, origin: str, scored: dict[str, Scored]) -> calrobust.ShiftReport:
    """The table and its pictures, of all methods whose logits lie in ``out``.

    ``scored`` holds this run's own logits, and ``origin`` stands for its model and pictures. Other runs are left out.
    """
    report = calrobust.ShiftReport(id_domain=ID_DOMAIN)
    for method, row in METHODS.items():
        path = out / method / "logits.pt"
        content = torch.load(path, weights_only=True) if path.exists() else {}
        sets: dict[str, Scored] = content["sets"] if content.get("origin") == origin else {}
        if sets and all(torch.equal(sets[name][1], target) for name, (_, target) in scored.items()):
            report.fit_temperature(row.name, *sets.pop(VALIDATION))
            for name, (logits, target) in sets.items():
                report.add(row.name, name, logits, target)
        elif content:
            print(f"{path} is of another model or other pictures, so it is left out; repeat its command to renew it.")
    write_atomically(out / "report.md", f"{report.to_markdown()}\n".encode())
    report.to_csv(out / "report.csv", per_domain=True)
    figures = {"reliability.png": calrobust.plotting.reliability_grid(report)}
    if len(report.domains) > 1:
        figures["shift.png"] = calrobust.plotting.shift_scatter(report).get_figure(root=True)
    for name, figure in figures.items():
        write_atomically(out / name, partial(figure.savefig, format="png", dpi=150))
    return report


def number(kind: Callable[[str], Any], rule: str, holds: Callable[[Any], bool]) -> Callable[[str], Any]:
    """Makes a type for argparse: numbers for which the rule holds."""

    def read(text: str) -> Any:
        value = kind(text)
        if not holds(value):
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text}")
        return value

    read.__name__ = kind.__name__  # argparse prints it where the text is no number
    return read


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; options that it leaves out are taken from the method's row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    count = number(int, "at least 1", lambda value: value >= 1)
    weight = number(float, "at least 0 and finite", lambda value: 0 <= value < math.inf)
    part = number(float, "greater than 0 and less than 1", lambda value: 0 < value < 1)
    smoothing = number(float, "at least 0 and less than 1", lambda value: 0 <= value < 1)
    processes = number(int, "at least 0", lambda value: value >= 0)
    seed = number(int, "at least 0 and less than 2**63", lambda value: 0 <= value < 2**63)
    add("--method", nargs="+", choices=METHODS, default=["carot"], help="rows of the table (default: carot)")
    add("--model", required=True, help="a model of open_clip, or hf: and a name or folder of Transformers")
    add("--pretrained", help="tag or file of open_clip's weights; without it, they are random")
    add("--train", type=Path, required=True, help="folder of class folders")
    add("--test", type=Path, help="the ID test set, of the same classes; default: a part of --train")
    add("--val", type=Path, help="what T and alpha are fitted on; default: a part of --train")
    add("--share", type=part, default=0.1, help="of each class, for each part that is split off --train (0.1)")
    add("--ood", action="append", default=[], metavar="NAME=DIR", help="a shifted test set, any number; "
        "of all classes, or of some, which are then the only ones to choose from")  # fmt: skip
    add("--map", action="append", default=[], metavar="NAME=FILE", help="for an --ood with other folders: "
        "lines of a folder and its folders in --train, tabs between")  # fmt: skip
    add("--classes", type=Path, help="lines of a folder and its class name, with a tab or a space between")
    add("--template", default="a photo of a {}.", help="or SIMPLE or OPENAI for open_clip's 7 or 80 of ImageNet")
    add("--out", type=Path, required=True, help="folder of the report, with a folder for each method")
    add("--epochs", type=count, default=10)
    add("--batch-size", type=count, default=512, help="pictures a step, over all devices (default: 512)")
    add("--learning-rate", type=weight, help="default: the method's, as those of the next two")
    add("--label-smoothing", type=smoothing)
    add("--distillation-weight", type=weight)
    add("--recompute", action="store_true", help="less memory, a third more time, the same gradients")
    add("--checkpoint-every", type=count, default=1000, metavar="STEPS", help="(default: 1000)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--recipe", choices=RECIPES, default="ours", help="released: as the paper's scripts do where ours differ")
    add("--precision", choices=("bf16", "fp32"), help="of autocast (default: bf16, or fp16 by --recipe released)")
    add("--workers", type=processes, default=4, help="processes that read pictures, for each device (default: 4)")
    add("--seed", type=seed, default=0)
    options = parser.parse_args(arguments)
    options.precision = options.precision or RECIPES[options.recipe].precision
    for option in ("ood", "map"):
        given = [text.partition("=") for text in getattr(options, option)]
        named = {name: Path(path) for name, _, path in given if path and name not in ("", ID_DOMAIN, VALIDATION)}
        if len(named) < len(given):
            parser.error(f"--{option} takes NAME=PATH, each name once, and neither {ID_DOMAIN} nor {VALIDATION}")
        setattr(options, option, named)
    if stray := options.map.keys() - options.ood.keys():
        parser.error(f"--map {min(stray)}=...: no --ood has this name")
    if "{}" not in options.template and options.template not in ("SIMPLE", "OPENAI"):
        parser.error(f"--template must hold {{}} where the class name goes, got {options.template!r}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the options, joins torchrun's processes and runs; what the user can mend is said in one line."""
    options = parse(arguments)
    together, cuda = "RANK" in os.environ, options.device == "cuda"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    try:
        if cuda:
            torch.cuda.set_device(device)
        if together:
            dist.init_process_group("nccl" if cuda else "gloo")
        run(options, device, dist.get_rank() if together else 0, dist.get_world_size() if together else 1)
    except (RunError, OSError) as error:  # the latter when a folder is missing or the disk is full
        sys.exit(f"finetune.py: error: {error}")
    finally:
        if together:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
