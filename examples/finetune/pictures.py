"""Classes, pictures and batches; what is wrong with the folders is told here, before any training."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from tqdm import tqdm

from finetune import RunError

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises
SYNSET = re.compile(r"n\d{8}")
ID_DOMAIN, VALIDATION = "ID", "validation"
Samples = list[tuple[str, int]]  # path and target
Key = tuple[int, int]  # epoch and index


class Domain(NamedTuple):
    """A set of pictures. Its class ``k`` is any of the model's classes ``columns[k]``."""

    samples: Samples
    columns: list[list[int]]

    def logits(self, scores: Tensor) -> Tensor:
        """The logits of its own classes. Where several of the model's classes are one here, the highest counts."""
        return torch.stack([scores[:, columns].amax(1) for columns in self.columns], 1)


class Data(NamedTuple):
    """Class names, pictures to train on, and the sets to judge on: validation, for T and α, then ID, then shifts."""

    names: list[str]
    train: Samples
    domains: dict[str, Domain]


def read_data(options: argparse.Namespace) -> Data:
    """Finds all pictures; parts that are split off are the same for every method and seed."""
    folders = _folders(options.train)
    train, domains = _domain(options.train, folders).samples, {}
    for name, root in ((VALIDATION, options.val), (ID_DOMAIN, options.test)):
        if root is None:
            held_out, train = _split(train, options.share)
            if not held_out:
                raise RunError(f"{options.train}: no class has a picture to spare for {name}; pass --val and --test")
            domains[name] = Domain(held_out, [[column] for column in range(len(folders))])
        else:
            domains[name] = _domain(root, folders)
            if missing := len(folders) - len(domains[name].columns):
                raise RunError(f"{root}: {missing} of the {len(folders)} classes in {options.train} have no folder")
    domains |= {name: _domain(root, folders, options.map.get(name)) for name, root in options.ood.items()}
    fitted_on = {os.path.realpath(path) for path, _ in domains[VALIDATION].samples}
    for name, domain in domains.items():
        common = [path for path, _ in domain.samples if os.path.realpath(path) in fitted_on]
        if common and name != VALIDATION:
            fix = "pass another --val, or leave it out" if options.val else "pass --val"
            raise RunError(f"{VALIDATION} and {name} must have no picture in common, and have {common[0]}; {fix}")
        if not any(_can_be_read(path) for path, _ in domain.samples):
            count, first = len(domain.samples), domain.samples[0][0]
            raise RunError(f"none of {count} pictures can be read for {name}, {first} for one")
    if len(train) < options.batch_size:
        raise RunError(f"{len(train)} pictures to train on are no batch; pass a smaller --batch-size")
    return Data(_names(options.classes, folders), train, domains)


def _names(path: Path | None, folders: list[str]) -> list[str]:
    names = {folder: re.sub(r"[_\-\s]+", " ", folder).strip() for folder in folders}
    if path is None and SYNSET.fullmatch(folders[0]):
        if len(folders) != len(open_clip.IMAGENET_CLASSNAMES):
            raise RunError(f"{folders[0]} tells a text tower nothing; list folders and class names in --classes FILE")
        return list(open_clip.IMAGENET_CLASSNAMES)  # two of which occur twice, as in every table of ImageNet
    listed = {} if path else names
    for line in _lines(path) if path else ():
        folder, tab, name = line.partition("\t")
        if not tab:  # as LOC_synset_mapping.txt: the longest folder that the line begins with, a space, and names
            folder = max((f for f in folders if f"{line} ".startswith(f"{f} ")), key=len, default="")
            name = line[len(folder) :].split(",")[0]
        if folder and folder in listed:
            raise RunError(f"--classes: {path} must list {folder!r} on one line, and lists it on two")
        listed[folder] = name.strip() or names.get(folder, "")
    if missing := [folder for folder in folders if folder not in listed]:
        raise RunError(f"--classes: {path} does not list {missing[0]!r}, a folder of --train")
    seen: dict[str, str] = {}  # as a text tower reads it
    for folder in folders:
        if not listed[folder]:
            raise RunError(f"the folder {folder!r} gives no class name; write one to --classes FILE")
        other = seen.setdefault(" ".join(listed[folder].lower().split()), folder)
        if other != folder:
            both = f"{other!r} and {folder!r}"
            raise RunError(f"the folders {both} have one class name, {listed[folder]!r}; write two to --classes FILE")
    return [listed[folder] for folder in folders]


def _domain(root: Path, classes: list[str], mapping: Path | None = None) -> Domain:
    folders = _folders(root)
    index = {name: position for position, name in enumerate(classes)}
    if SYNSET.fullmatch(classes[0]):  # as ImageNetV2 numbers its folders
        index |= {str(position): position for position in range(len(classes))}
    meant = {folder: [folder] for folder in folders}
    if mapping is not None:
        lines = [line.split("\t") for line in _lines(mapping)]
        meant = {folder: rest or [folder] for folder, *rest in lines}
        if len(meant) < len(lines):
            folder = Counter(line[0] for line in lines).most_common(1)[0][0]
            raise RunError(f"--map: {mapping} must list {folder!r} on one line, and lists it on several")
    for folder, members in meant.items():
        if folder not in folders:
            raise RunError(f"--map: {root} has no folder {folder!r}, which {mapping} lists")
        if unknown := [name for name in members if name not in index]:
            hint = "--map NAME=FILE lists the folders of an --ood and, after tabs, what they are in --train"
            raise RunError(f"{root}: {unknown[0]!r}, for {folder!r}, is no folder of --train; {hint}")
    columns = {folder: tuple(sorted({index[name] for name in members})) for folder, members in meant.items()}
    own = {several: k for k, several in enumerate(sorted(set(columns.values())))}  # folders of the same classes are one
    if len(own) < 2:
        raise RunError(f"{root}: its folders must stand for two or more classes, and are all one")
    column, times = Counter(chain(*own)).most_common(1)[0]
    if times > 1:
        rule = "of two folders must be the same, or have none in common"
        raise RunError(f"--map: the classes {rule}; {classes[column]!r} is in {times} lists of {mapping}")
    samples = make_dataset(root, {folder: own[columns[folder]] for folder in columns}, extensions=IMG_EXTENSIONS)
    return Domain(samples, [list(several) for several in own])


def _folders(root: Path) -> list[str]:
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and entry.name[0] != ".")
    if len(folders) < 2:
        raise RunError(f"{root} must hold a folder of pictures for each of two or more classes")
    return folders


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _split(samples: Samples, share: float) -> tuple[Samples, Samples]:
    """A share of each class that has two pictures or more, at least one of them, and the rest."""
    generator = Generator().manual_seed(0)
    parts: tuple[Samples, Samples] = ([], [])
    for _, group in groupby(samples, key=itemgetter(1)):
        own = list(group)
        order = torch.randperm(len(own), generator=generator).tolist()
        count = min(max(1, round(share * len(own))), len(own) - 1)
        parts[0].extend(own[index] for index in sorted(order[:count]))
        parts[1].extend(own[index] for index in sorted(order[count:]))
    return parts


class Batch(NamedTuple):
    """Pictures ``[N, 3, H, W]``, targets ``[N]``, templates of the captions ``[N]``, and what could not be read."""

    images: Tensor
    target: Tensor
    template: Tensor
    bad: list[tuple[str, str]]


class Pictures(Dataset[Batch]):
    """Batches of one picture. Augmentation and template depend on the seed and on the key alone.

    An unreadable picture gives way to the next one in training (``templates > 0``), else to an empty batch.
    """

    def __init__(
        self, samples: Samples, transform: Callable[[Image.Image], Tensor], *, templates: int = 0, seed: int = 0
    ) -> None:
        self.samples, self.transform, self.templates, self.seed = samples, transform, templates, seed

    def __getitem__(self, key: Key) -> Batch:
        epoch, index = key
        bad: list[tuple[str, str]] = []
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hash((self.seed, epoch, index)) % 2**63)
            template = torch.randint(max(1, self.templates), (1,))
            for offset in range(len(self.samples) if self.templates else 1):
                path, target = self.samples[(index + offset) % len(self.samples)]
                try:
                    with Image.open(path) as picture:
                        return Batch(self.transform(_rgb(picture))[None], torch.tensor([target]), template, bad)
                except UNREADABLE as error:
                    bad.append((path, f"{type(error).__name__}: {error}"))
        return Batch(torch.zeros(0), template[:0], template[:0], bad)


def _can_be_read(path: str) -> bool:
    with suppress(*UNREADABLE), Image.open(path) as picture:
        return bool(_rgb(picture))
    return False


def _rgb(picture: Image.Image) -> Image.Image:
    """In 8 bits. Pillow cuts deeper greys off at 255, so that 16 bits would become white."""
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
    elif picture.mode in ("I", "F"):
        raise ValueError(f"nothing says which value of Pillow's mode {picture.mode!r} is white; save it in 8 bits")
    return picture.convert("RGB")


def order(
    size: int, *, start: int, steps: int, batch_size: int, rank: int, world_size: int, seed: int
) -> Iterator[list[Key]]:
    """The keys of each batch of one process, from step ``start`` to the end; incomplete batches are left out."""
    for step in range(start, steps):
        epoch, position = divmod(step, size // batch_size)
        if step == start or position == 0:
            generator = Generator().manual_seed(hash((seed, epoch)) % 2**63)
            shuffled = torch.randperm(size, generator=generator).tolist()
        batch = shuffled[position * batch_size :][:batch_size]
        yield [(epoch, index) for index in batch[rank::world_size]]


def batches(pictures: Pictures, keys: Iterable[list[Key]], workers: int, unreadable: set[str]) -> Iterator[Batch]:
    """Reads pictures in ``workers`` processes; each that cannot be read is named once and joins ``unreadable``."""
    pin = torch.cuda.is_available()
    for batch in DataLoader(pictures, batch_sampler=keys, num_workers=workers, collate_fn=_joined, pin_memory=pin):
        for path, reason in batch.bad:
            if path not in unreadable:
                unreadable.add(path)
                tqdm.write(f"skipped {path}, which cannot be read: {reason}", file=sys.stderr)
        if len(batch.target):
            yield batch
        elif pictures.templates:
            raise RunError(f"none of the {len(pictures.samples)} training pictures can be read")


def _joined(singles: list[Batch]) -> Batch:
    readable = [single for single in singles if len(single.target)] or singles[:1]
    images, target, template, _ = map(list, zip(*readable, strict=True))
    bad = [reason for single in singles for reason in single.bad]
    return Batch(torch.cat(images), torch.cat(target), torch.cat(template), bad)
