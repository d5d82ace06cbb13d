"""The methods, their hyper-parameters and what else can be chosen."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Preset:
    """One row of the paper's table. Common to all: AdamW, weight decay 0.1, batch 512, 10 epochs, 500 warm-up steps."""

    row: str
    trains: Literal["nothing", "classifier", "both towers"]
    learning_rate: float = 0.0
    label_smoothing: float = 0.0
    distillation_weight: float = 0.0
    orthogonality: float = 0.0
    interpolates: bool = False  # WiSE-FT


LABEL_SMOOTHING = 0.05  # our choice, not the paper's: tune it on the held-out part
METHODS = {
    "zs": Preset("ZS", "nothing"),
    "ft": Preset("FT", "classifier", 3e-5),
    "ft-ls": Preset("FT w/ LS", "classifier", 3e-5, LABEL_SMOOTHING),
    "wise-ft": Preset("WiSE-FT", "classifier", 3e-5, interpolates=True),
    "wise-ft-ls": Preset("WiSE-FT w/ LS", "classifier", 3e-5, LABEL_SMOOTHING, interpolates=True),
    "flyp": Preset("FLYP", "both towers", 1e-5),
    "flyp-ls": Preset("FLYP w/ LS", "both towers", 1e-5, LABEL_SMOOTHING),
    "carot": Preset("CaRot", "both towers", 1e-5, LABEL_SMOOTHING, distillation_weight=1.5),
    "carot-neurips": Preset("CaRot (NeurIPS)", "both towers", 1e-5, LABEL_SMOOTHING, 1.5, orthogonality=0.2),
}


@dataclass(frozen=True)
class Options:
    """The command line, read."""

    method: str
    model: str
    pretrained: str | None
    model_config: Path | None
    train: Path
    val: Path
    ood: dict[str, Path]
    maps: dict[str, Path]
    classes: Path | None
    held_out: float
    on_bad_image: Literal["skip", "stop"]
    out: Path
    resume: bool
    checkpoint_every: int
    evaluate_every: int
    log: tuple[str, ...]
    log_every: int
    device: str
    precision: str
    workers: int
    seed: int
    epochs: int
    batch_size: int
    accumulate: int
    warm_up: int
    weight_decay: float
    teacher_every: int
    learning_rate: float
    label_smoothing: float
    distillation_weight: float
    orthogonality: float

    @property
    def preset(self) -> Preset:
        """The method's."""
        return METHODS[self.method]

    def recipe(self) -> dict[str, object]:
        """All that decides which weights come out, for a checkpoint to be compared with."""
        silent = ("out", "resume", "checkpoint_every", "evaluate_every", "log", "log_every", "workers", "device", "val")
        chosen = {name: value for name, value in asdict(self).items() if name not in (*silent, "ood", "maps")}
        return {name: str(value) if isinstance(value, Path) else value for name, value in chosen.items()}


def parse(arguments: Sequence[str] | None) -> Options:
    """Reads the command line; what it leaves open, the method's preset says."""
    parser = argparse.ArgumentParser(description="Fine-tunes an open_clip model on ImageNet and reports on its shifts.")
    add = parser.add_argument
    add("--method", choices=METHODS, required=True, help="the row of the table")
    add("--model", default="ViT-B-16", help="a model of open_clip (default: ViT-B-16)")
    add("--pretrained", help="its pre-trained tag, or a file of weights; without it, weights are random")
    add("--model-config", type=Path, help="a JSON file that describes --model, if open_clip does not ship it")
    add("--train", type=Path, required=True, help="folder of class folders")
    add("--val", type=Path, required=True, help="the ID test set, of the same classes")
    add("--ood", type=_named, action="append", default=[], metavar="NAME=DIR", help="a shifted test set; any number")
    add("--map", type=_named, action="append", default=[], dest="maps", metavar="NAME=FILE",
        help="for an --ood of other folder names: lines of a folder and its synset ids, tabs between")  # fmt: skip
    add("--classes", type=Path, help="lines of a synset id and names, as LOC_synset_mapping.txt; default: open_clip's")
    add("--held-out", type=_fraction, default=0.01, help="share of --train that T and alpha are fitted on (0.01)")
    add("--on-bad-image", choices=("skip", "stop"), default="skip", help="what an unreadable picture does")
    add("--out", type=Path, required=True, help="folder for checkpoints, logs and results")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    add("--checkpoint-every", type=_count, default=1000, metavar="STEPS", help="(default: 1000)")
    add("--evaluate-every", type=int, default=1, metavar="EPOCHS", help="0: only at the end (default: 1)")
    add("--log", nargs="+", choices=("csv", "tensorboard"), default=["csv"], help="(default: csv)")
    add("--log-every", type=_count, default=10, metavar="STEPS", help="(default: 10)")
    add("--device", choices=("cpu", "cuda"), default="cuda")
    add("--precision", choices=("bf16", "fp32"), default="bf16", help="of autocast (default: bf16)")
    add("--workers", type=int, default=8, help="processes that read pictures, for each device (default: 8)")
    add("--seed", type=int, default=0)
    add("--epochs", type=_count, default=10)
    add("--batch-size", type=_count, default=512, help="pictures a step, over all devices (default: 512)")
    add("--accumulate", type=_count, default=1, metavar="PARTS",
        help="parts in which a batch is worked off; the pairs of one part are contrasted with each other alone, "
        "examples/large_batch.py shows how to avoid that")  # fmt: skip
    add("--warm-up", type=int, default=500, metavar="STEPS", help="(default: 500)")
    add("--weight-decay", type=float, default=0.1)
    add("--teacher-every", type=_count, default=500, metavar="STEPS", help="between updates of the teacher")
    for name in ("learning-rate", "label-smoothing", "distillation-weight", "orthogonality"):
        add(f"--{name}", type=float, help="default: the method's")
    values = vars(parser.parse_args(arguments))
    preset = asdict(METHODS[values["method"]])
    values |= {name: preset[name] for name in preset if name in values and values[name] is None}
    for option in ("ood", "maps"):
        if len(dict(values[option])) < len(values[option]):
            parser.error(f"--{'map' if option == 'maps' else option}: two have the same name")
    if stray := dict(values["maps"]).keys() - dict(values["ood"]).keys():
        parser.error(f"--map {sorted(stray)[0]}=...: no --ood has this name")
    values |= {"ood": dict(values["ood"]), "maps": dict(values["maps"]), "log": tuple(values["log"])}
    return Options(**values)


def _named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"must be NAME=PATH, got {text!r}")
    if name == "ID":
        raise argparse.ArgumentTypeError("ID is the name of --val; choose another")
    return name, Path(path)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def _fraction(text: str) -> float:
    if not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text!r}")
    return float(text)
