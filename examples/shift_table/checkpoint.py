"""A checkpoint that is whole or not there, and knows which recipe it came from.

A checkpoint is three parts: a line of JSON that names the recipe, a line with the SHA-256 of the other two, and what
``torch.save`` wrote. Nothing is unpickled before the sum agrees, and nothing is used that another recipe made.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from atomic import write_atomically
from torch import Tensor


def load_or_build(
    path: Path, recipe: Mapping[str, object], build: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The weights that ``path`` holds for ``recipe``; where it holds none, says why, calls ``build`` and keeps them."""
    try:
        return _load(path, recipe)
    except FileNotFoundError:
        pass
    except OSError as error:
        print(f"{path} cannot be read ({error.strerror}); building it anew.")
    except UnusableCheckpointError as problem:
        print(f"{path} {problem}; building it anew.")
    weights = build()
    try:
        _save(path, recipe, weights)
    except OSError as error:  # a cache that cannot be written costs the next run a minute, not this one its result
        print(f"The pre-trained model was not kept: {error}. Name a folder that can be written with --cache.")
    return weights


class UnusableCheckpointError(Exception):
    """What is wrong with a checkpoint, as the end of a sentence that starts with its path."""


def _load(path: Path, recipe: Mapping[str, object]) -> dict[str, Tensor]:
    head, _, rest = path.read_bytes().partition(b"\n")
    checksum, _, payload = rest.partition(b"\n")
    if checksum != _checksum(head, payload):
        raise UnusableCheckpointError("is damaged, or no checkpoint of this example")
    if head != _head(recipe):
        raise UnusableCheckpointError("was made by another recipe, version or machine setting")
    weights: dict[str, Tensor] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    return weights


def _save(path: Path, recipe: Mapping[str, object], weights: dict[str, Tensor]) -> None:
    payload = io.BytesIO()
    torch.save(weights, payload)
    head = _head(recipe)
    write_atomically(path, b"\n".join([head, _checksum(head, payload.getvalue()), payload.getvalue()]))


def _head(recipe: Mapping[str, object]) -> bytes:
    return json.dumps(recipe, sort_keys=True).encode()


def _checksum(head: bytes, payload: bytes) -> bytes:
    return hashlib.sha256(head + payload).hexdigest().encode()
