"""How a wrong call is written down, and how it is seen that it has changed nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Target(NamedTuple):
    """A public callable by its name, and arguments that it takes, made anew for each call."""

    name: str
    call: Callable[..., object]
    arguments: Callable[[], dict[str, Any]]


class Wrong(NamedTuple):
    """Arguments in the place of good ones, the error, and its whole message.

    Without a message: one that begins with the name of an argument that was changed, and is written out elsewhere.
    """

    change: dict[str, Any]
    error: type[Exception]
    message: str = ""


Table = Sequence[tuple[Sequence[Target], Sequence[Wrong]]]


def contents(value: Any) -> Any:
    """All that a call might have changed: the bytes of tensors, and what containers and our objects hold."""
    if isinstance(value, Tensor):
        if value.is_meta or value.is_nested or value.layout != torch.strided:
            return None  # refused before it is read
        # The storage, since a tensor may be an expanded one, far larger than what it holds.
        return [value.dtype, value.shape, value.stride(), bytes(value.untyped_storage().tolist())]
    if isinstance(value, (list, tuple)):
        return [contents(item) for item in value]
    if isinstance(value, Mapping):
        return {key: contents(item) for key, item in value.items()}
    if type(value).__module__.startswith(("calrobust", "torch.nn")) and hasattr(value, "__dict__"):
        return contents(vars(value))
    return value


class Odd:
    """No value that anything takes; reads alike in every message."""

    def __repr__(self) -> str:
        return "<odd>"


DEEP = (
    "{0} must have shape [{1}], one label for each row, got {2}; pass {0}.argmax(1) if it is one-hot, {0}.squeeze(1) "
    "if it is a column"
)
NESTED = torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)], layout=torch.jagged)
