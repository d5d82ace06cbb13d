"""From paths to batches; a picture that cannot be read is reported, counted, and replaced or left out."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import open_clip
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from imagenet.data import Classes, Samples
from imagenet.errors import RunError

Transform = Callable[[Image.Image], Tensor]
Tokenizer = Callable[[list[str]], Tensor]
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises


class Batch(NamedTuple):
    """Pictures ``[N, 3, H, W]``, targets ``[N]``, captions ``[N, L]`` (training alone), and what could not be read."""

    images: Tensor
    target: Tensor
    captions: Tensor
    bad: list[tuple[str, str]]


class BadImages:
    """Counts unreadable pictures, each once, and names them; or stops at the first."""

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self.seen: set[str] = set()

    def report(self, bad: list[tuple[str, str]]) -> None:
        """Takes the paths and reasons that a batch brought."""
        for path, reason in bad:
            if self.policy == "stop":
                raise RunError(f"{path} cannot be read: {reason}; --on-bad-image skip goes on without it")
            if path not in self.seen:
                self.seen.add(path)
                print(f"skipped {path}, which cannot be read: {reason}", file=sys.stderr, flush=True)

    def __str__(self) -> str:
        return f"Unreadable pictures seen by this process: {len(self.seen)}."


class TestPictures(Dataset[Batch]):
    """Batches of one picture, or of none where it is unreadable."""

    def __init__(self, samples: Samples, transform: Transform) -> None:
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Batch:
        path, target = self.samples[index]
        none = torch.zeros(1, 0, dtype=torch.int64)
        try:
            image = self.transform(_read(path))
        except UNREADABLE as error:
            return Batch(torch.zeros(0), torch.zeros(0, dtype=torch.int64), none[:0], [(path, _reason(error))])
        return Batch(image[None], torch.tensor([target]), none, [])


class TrainingPictures(Dataset[Batch]):
    """Batches of one picture with a caption in a random template; an unreadable one gives way to the next.

    A key is ``(epoch, index)``; augmentation and template depend on it and the seed alone.
    """

    def __init__(
        self, samples: Samples, transform: Transform, classes: Classes, tokenizer: Tokenizer, seed: int
    ) -> None:
        self.samples, self.transform, self.classes, self.tokenizer = samples, transform, classes, tokenizer
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        epoch, index = key
        bad = []
        with _seeded(hash((self.seed, epoch, index)) % 2**63):
            template = open_clip.OPENAI_IMAGENET_TEMPLATES[random.randrange(len(open_clip.OPENAI_IMAGENET_TEMPLATES))]
            for offset in range(len(self.samples)):
                path, target = self.samples[(index + offset) % len(self.samples)]
                try:
                    image = self.transform(_read(path))
                except UNREADABLE as error:
                    bad.append((path, _reason(error)))
                else:
                    caption = self.tokenizer([template(self.classes.names[target])])
                    return Batch(image[None], torch.tensor([target]), caption, bad)
        raise RunError(f"none of the {len(self.samples)} training pictures can be read, {bad[0][0]} for one")


class Order:
    """The keys of each batch of one process, from step ``start`` to the end: a sampler that can begin anywhere."""

    def __init__(
        self, size: int, *, start: int, steps: int, batch_size: int, parts: int, rank: int, world_size: int, seed: int
    ) -> None:
        self.size, self.start, self.steps, self.batch_size = size, start, steps, batch_size
        self.parts, self.rank, self.world_size, self.seed = parts, rank, world_size, seed

    def __len__(self) -> int:
        return (self.steps - self.start) * self.parts

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        a_epoch = self.size // self.batch_size  # the last, incomplete batch is left out
        share = self.batch_size // (self.parts * self.world_size)
        order, ordered = torch.empty(0), -1
        for step in range(self.start, self.steps):
            epoch, position = divmod(step, a_epoch)
            if epoch != ordered:
                order = torch.randperm(self.size, generator=Generator().manual_seed(hash((self.seed, epoch)) % 2**63))
                ordered = epoch
            batch = order[position * self.batch_size :][: self.batch_size].tolist()
            for part in range(self.parts):
                begin = (part * self.world_size + self.rank) * share
                yield [(epoch, index) for index in batch[begin : begin + share]]


def loader(dataset: Dataset[Batch], workers: int, **batching: object) -> DataLoader[Batch]:
    """Reads pictures in ``workers`` processes."""
    options = {"num_workers": workers, "collate_fn": _joined, "pin_memory": torch.cuda.is_available()}
    return DataLoader(dataset, **options, **batching)  # type: ignore[arg-type] # a dict of options of several types


def _joined(batches: list[Batch]) -> Batch:
    readable = [batch for batch in batches if len(batch.target)] or batches[:1]
    images, target, captions, _ = zip(*readable, strict=True)
    return Batch(torch.cat(images), torch.cat(target), torch.cat(captions), [b for batch in batches for b in batch.bad])


def _read(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds the generators that augmentations draw from, those of the CPU, and puts them back."""
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
