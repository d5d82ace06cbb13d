"""A checkpoint is whole or not there, knows its recipe, and is read without running anything that is in it."""

from __future__ import annotations

import os
import pickle
import shutil
from contextlib import suppress
from pathlib import Path

import torch

from imagenet.errors import RunError
from imagenet.methods import Method
from imagenet.options import Options

NAME = "checkpoint.pt"
VERSION = 2  # of what is in it
# What torch.load raises, and what follows from content of another kind.
DAMAGE = (OSError, RuntimeError, EOFError, AttributeError, KeyError, TypeError, ValueError, pickle.UnpicklingError)


def write_atomically(path: Path, content: object) -> None:
    """Bytes, or ``torch.save`` of all else, beside ``path``, then a rename: nobody ever sees half a file."""
    temporary = path.with_name(f".{path.name}.tmp")  # one name, so that killed runs leave one such file at most
    try:
        with temporary.open("wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save gives the latter
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunError(f"--out: {path} cannot be written, and is as it was before: {error}") from None


def save_checkpoint(options: Options, method: Method, step: int, logged: int) -> None:
    """All that the next step depends on, and how long the log is by now; what is random follows from the step."""
    content = {
        "version": VERSION,
        "recipe": options.recipe(),
        "step": step,
        "logged": logged,
        "network": method.network.state_dict(),
        "optimizer": method.optimizer.state_dict(),
        "teacher": method.teacher.state_dict() if method.teacher is not None else None,
    }
    write_atomically(options.out / NAME, content)


def load_checkpoint(options: Options, method: Method) -> tuple[int, int]:
    """Puts the method back to where the checkpoint left it; gives the steps done and the log's length, or zeros."""
    path = options.out / NAME
    if not path.exists():
        return 0, 0
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        version, recipe = content.get("version", 1), content["recipe"]
        if version != VERSION:
            raise RunError(
                f"--resume: {path} is of version {version}, this example reads {VERSION}; name another --out"
            )
        step, logged = int(content["step"]), int(content["logged"])
        state = content["network"], content["optimizer"], content["teacher"]
    except DAMAGE as error:
        raise RunError(f"--resume: {path} is damaged, or no checkpoint of this example: {error}") from None
    if different := [name for name, value in options.recipe().items() if recipe.get(name) != value]:
        name = different[0]
        raise RunError(
            f"--resume: {path} was made with {name}={recipe.get(name)!r}, not {options.recipe()[name]!r}; "
            "give the options it was made with, or another --out"
        )
    network, optimizer, teacher = state
    try:
        method.network.load_state_dict(network)
        method.optimizer.load_state_dict(optimizer)
        if method.teacher is not None:
            method.teacher.load_state_dict(teacher)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"--resume: {path} is of another model: {error}") from None
    return step, logged


def check_fresh(options: Options) -> None:
    """Makes ``--out``; a run that is there is not overwritten."""
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--out: {options.out} cannot be made: {error.strerror}") from None
    if not options.resume and (options.out / NAME).exists():
        raise RunError(f"--out: {options.out} holds a checkpoint; go on with --resume, or name another folder")


def check_disk(options: Options, method: Method) -> None:
    """Room for two checkpoints, as the old one stays until the new one is whole, and for the weights."""
    size = sum(tensor.nbytes for tensor in method.network.state_dict().values())
    teacher = 0 if method.teacher is None else size
    needed = 2 * (3 * size + teacher) + size  # AdamW holds two moments of each weight
    free = shutil.disk_usage(options.out).free
    if free < needed:
        raise RunError(f"--out: {options.out} has {free / 1e9:.2f} GB free, checkpoints need {needed / 1e9:.2f} GB")
