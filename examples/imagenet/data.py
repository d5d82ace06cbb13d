"""Which pictures there are and what is on them; everything that is wrong with the folders is found here, at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from torch import Generator, Tensor

from imagenet.errors import RunError
from imagenet.options import Options
from imagenet.processes import Processes

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}
ID_DOMAIN = "ID"
Samples = list[tuple[str, int]]  # path and target


@dataclass(frozen=True)
class Classes:
    """Synset ids and names, in the order of the logits."""

    synsets: tuple[str, ...]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Domain:
    """A test set. Its class ``k`` is any of the model's classes ``columns[k]``."""

    samples: Samples
    columns: list[list[int]]

    def logits(self, scores: Tensor) -> Tensor:
        """Those of its own classes; of several synsets, the highest counts."""
        return torch.stack([scores[:, columns].amax(1) for columns in self.columns], 1)


@dataclass(frozen=True)
class Data:
    """Train, the part of it that is held out, and the test sets, ID first."""

    classes: Classes
    train: Samples
    held_out: Domain
    domains: dict[str, Domain]


def read_data(options: Options, processes: Processes) -> Data:
    """Finds all pictures and checks that the classes match."""
    classes = read_classes(options)
    everything = _domain("--train", options.train, classes, None)
    domains = {ID_DOMAIN: _domain("--val", options.val, classes, None)}
    for option, domain in (("--train", everything), ("--val", domains[ID_DOMAIN])):
        if missing := len(classes.synsets) - len(domain.columns):
            raise RunError(f"{option}: {missing} of {len(classes.synsets)} classes have no folder; see --classes")
    for name, folder in options.ood.items():
        domains[name] = _domain(f"--ood {name}", folder, classes, options.maps.get(name))
    order = torch.randperm(len(everything.samples), generator=Generator().manual_seed(options.seed)).tolist()
    count = max(1, round(options.held_out * len(order)))
    held_out = Domain([everything.samples[index] for index in order[:count]], everything.columns)
    train = [everything.samples[index] for index in sorted(order[count:])]
    if len(train) < options.batch_size:
        raise RunError(f"--train: {len(train)} pictures to train on are no batch of {options.batch_size}")
    if options.batch_size % (options.accumulate * processes.world_size):
        raise RunError(
            f"--batch-size {options.batch_size} must be divisible by --accumulate {options.accumulate} times "
            f"{processes.world_size} processes"
        )
    for name, domain in {"--held-out": held_out, **domains}.items():
        if len(domain.samples) < processes.world_size:
            raise RunError(f"{name}: {len(domain.samples)} pictures do not give {processes.world_size} processes one")
    return Data(classes, train, held_out, domains)


def read_classes(options: Options) -> Classes:
    """From ``--classes``; without it, the 1,000 folders of ``--train`` in order have open_clip's names."""
    if options.classes is None:
        synsets = _folders("--train", options.train)
        if len(synsets) != len(open_clip.IMAGENET_CLASSNAMES):
            raise RunError(
                f"--train: {options.train} has {len(synsets)} class folders, ImageNet has 1000; "
                "name the classes with --classes FILE, in lines of a folder and its names"
            )
        return Classes(tuple(synsets), tuple(open_clip.IMAGENET_CLASSNAMES))
    lines = [line.split(maxsplit=1) for line in _lines("--classes", options.classes)]
    if short := [line[0] for line in lines if len(line) < 2]:
        raise RunError(f"--classes: {options.classes} gives {short[0]} no name")
    synsets = [synset for synset, _ in lines]
    if len(set(synsets)) < len(synsets) or len(synsets) < 2:
        raise RunError(f"--classes: {options.classes} must list at least two classes, each once")
    return Classes(tuple(synsets), tuple(names.split(",")[0].strip() for _, names in lines))


def _domain(option: str, root: Path, classes: Classes, mapping: Path | None) -> Domain:
    folders = _folders(option, root)
    index = {synset: position for position, synset in enumerate(classes.synsets)}
    if mapping is not None:
        columns = {}
        for folder, *synsets in (line.split("\t") for line in _lines("--map", mapping)):
            if not synsets or (unknown := [synset for synset in synsets if synset not in index]):
                raise RunError(f"--map: {mapping} gives {folder} {unknown[0] if synsets else 'no synset'}, "
                               "which is no class of --train; a tab goes between a folder and each id")  # fmt: skip
            columns[folder] = [index[synset] for synset in synsets]
        if missing := sorted(columns.keys() - set(folders)):
            raise RunError(f"{option}: {root} has no folder {missing[0]}, which {mapping} lists")
    elif all(folder.isdigit() for folder in folders) and not index.keys() & set(folders):
        columns = {folder: [int(folder)] for folder in folders}  # as in ImageNetV2
        if (highest := max(map(int, folders))) >= len(index):
            raise RunError(f"{option}: folder {highest} of {root} is no class: there are {len(index)}, from 0")
    else:
        if unknown := [folder for folder in folders if folder not in index]:
            raise RunError(
                f"{option}: {len(unknown)} of the {len(folders)} folders in {root} are no class, {unknown[0]} for "
                "one; classes come from --classes or --train, and --map NAME=FILE translates the folders of an --ood"
            )
        columns = {folder: [index[folder]] for folder in folders}
    ordered = sorted(columns, key=lambda folder: columns[folder])
    samples = [(path, target) for target, folder in enumerate(ordered) for path in _pictures(option, root / folder)]
    return Domain(samples, [columns[folder] for folder in ordered])


def _folders(option: str, root: Path) -> list[str]:
    if not root.is_dir():
        raise RunError(f"{option}: {root} is no folder")
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise RunError(f"{option}: {root} holds no class folders; pictures are looked for in {root}/CLASS/")
    return folders


def _pictures(option: str, folder: Path) -> Sequence[str]:
    pictures = sorted(str(path) for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS)
    if not pictures:
        raise RunError(f"{option}: {folder} holds no picture")
    return pictures


def _lines(option: str, path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{option}: {path} cannot be read: {error}") from None
    return [line for line in lines if line]
