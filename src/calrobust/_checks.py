"""The only place that raises on bad input: each check names the argument, the rule, what came and the likely fix."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor


def check_tensor(**tensors: Any) -> None:
    """Raises ``TypeError`` for an argument that is not a tensor."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}; convert it with torch.as_tensor")


def check_floating(**tensors: Tensor) -> None:
    """Raises ``TypeError`` for an argument that is not a floating-point tensor."""
    check_tensor(**tensors)
    for name, value in tensors.items():
        if not value.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {value.dtype}; convert it with .float()")


def check_number(**numbers: Any) -> None:
    """Raises ``TypeError`` for an argument that is no real number and ``ValueError`` for NaN and infinities."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a real number, got {type(value).__name__} {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value!r}")


def check_positive(**numbers: Any) -> None:
    """Raises for a number that is not > 0."""
    check_number(**numbers)
    for name, value in numbers.items():
        if value <= 0:
            raise ValueError(f"{name} must be > 0, got {value!r}")


def check_positive_integer(**numbers: Any) -> None:
    """Raises for a number that is not one of 1, 2, 3, ...."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
    check_positive(**numbers)


def check_fraction(*, closed: bool, **numbers: Any) -> None:
    """Raises for a number outside [0, 1], or outside [0, 1) unless ``closed``."""
    check_number(**numbers)
    for name, value in numbers.items():
        if not (0 <= value <= 1 if closed else 0 <= value < 1):
            interval = "[0, 1]" if closed else "[0, 1)"
            hint = f"; did you mean {value / 10:g} or {value / 100:g}?" if 1 <= value <= 100 else ""
            raise ValueError(f"{name} must be in {interval}, got {value!r}{hint}")


def check_choice(choices: tuple[str, ...], **options: Any) -> None:
    """Raises ``ValueError`` for an option that is none of ``choices``."""
    for name, value in options.items():
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_labels(length: int, device: torch.device, **labels: Any) -> None:
    """Raises for labels that are not an ``int64`` tensor of shape ``[length]`` on ``device``."""
    check_tensor(**labels)
    for name, value in labels.items():
        if value.dtype != torch.int64:
            raise TypeError(f"{name} must have dtype torch.int64, got {value.dtype}; convert it with .long()")
        if value.shape != (length,):
            raise ValueError(f"{name} must have shape [{length}], one label for each row, got {list(value.shape)}")
        if value.device != device:
            raise ValueError(f"{name} must be on {device}, as the rows it labels, got {value.device}; move it with .to()")
