"""Keeps what took long: tensors in a file that is whole or not there, and that answers for one recipe only."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
from atomic import write_atomically
from torch import Tensor

import calrobust

PACKAGES = ("torch", "open_clip_torch", "numpy", "pillow", "matplotlib", "scikit-learn", "mlxtend")


def load_or_build(
    path: Path, recipe: Mapping[str, object], build: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors that ``path`` holds for ``recipe``; where it holds none, says why, calls ``build`` and keeps them."""
    head = json.dumps({**recipe, **surroundings()}, sort_keys=True).encode()
    try:
        checksum, own, payload = path.read_bytes().split(b"\n", 2)
        if checksum != _checksum(own, payload):
            raise ValueError
        if own == head:
            kept: dict[str, Tensor] = torch.load(io.BytesIO(payload), weights_only=True)
            return kept
        print(f"{path} was made by another recipe, version or CPU; building it anew.")
    except FileNotFoundError:
        pass
    except OSError as error:
        print(f"{path} cannot be read ({error.strerror}); building it anew.")
    except ValueError:
        print(f"{path} is damaged, or no file of this example; building it anew.")
    built, file = build(), io.BytesIO()
    torch.save(built, file)
    try:
        write_atomically(path, b"\n".join([_checksum(head, file.getvalue()), head, file.getvalue()]))
    except OSError as error:  # this costs the next run some minutes, not this one its result
        print(f"The results so far were not kept: {error}. Name a folder that can be written with --cache.")
    return built


@cache
def surroundings() -> dict[str, object]:
    """What every tensor here follows from, beside its recipe: code, versions and the instructions of the CPU."""
    code = hashlib.sha256()
    library, example = Path(calrobust.__file__).parent, Path(__file__).parent
    for path in (*sorted(library.rglob("*.py")), *sorted(example.rglob("*.py")), example.with_suffix(".py")):
        if path.name != "results.py":  # which shows, and makes nothing
            code.update(path.read_bytes())
    versions = {name: version(name) for name in PACKAGES}
    return {"code": code.hexdigest(), "cpu": torch.backends.cpu.get_cpu_capability(), **versions}


def _checksum(head: bytes, payload: bytes) -> bytes:
    return hashlib.sha256(head + payload).hexdigest().encode()
