"""From a model and a loader to the logits that calibration is judged on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from calrobust._checks import check_module, check_predictions

Forward = Callable[[Any, Any], tuple[Tensor, Tensor]]


def collect_logits(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """Runs a model over a data set, in eval mode and without gradient, and gathers its logits and the labels.

    Every submodule's training flag is as before afterwards, also after an exception, and BatchNorm statistics are not
    touched: what :meth:`TemperatureScaler.fit <calrobust.TemperatureScaler.fit>` and the metrics should be given.

    Args:
        model: gives logits ``[B, C]`` for a batch of inputs; left on its device.
        loader: yields ``(inputs, target)``, or whatever ``forward`` takes.
        forward: ``forward(model, batch) -> (logits, target)`` for models or batches of another kind.
        device: where to move a batch, tuples, lists and dicts of tensors included; None leaves it where it is.
        progress: whether to show a bar on stderr; needs tqdm, and without it there is none.

    Returns:
        Logits ``[N, C]`` and labels ``[N]``, int64, both on the CPU.

    Raises:
        TypeError: ``loader`` cannot be iterated, a batch is no pair of inputs and target, or ``forward`` cannot be
            called or gives no pair of tensors.
        ValueError: the loader is empty, or logits and labels do not fit.

    Example:
        >>> import torch
        >>> from calrobust import collect_logits
        >>> batches = [(torch.eye(2), torch.tensor([0, 1])), (torch.ones(1, 2), torch.tensor([1]))]
        >>> logits, target = collect_logits(torch.nn.Identity(), batches, progress=False)
        >>> logits.shape, target
        (torch.Size([3, 2]), tensor([0, 1, 1]))
    """
    check_module(model=model)
    if not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        raise TypeError(
            f"loader must be something to iterate over, got {_kind(loader)}; pass a DataLoader or a list of batches"
        )
    if forward is not None and not callable(forward):
        raise TypeError(
            f"forward must be callable, got {_kind(forward)}; pass forward=lambda model, batch: (logits, target)"
        )
    logits: list[Tensor] = []
    target: list[Tensor] = []
    with _evaluating(model), torch.no_grad():
        for batch in _with_bar(loader) if progress else loader:
            moved = batch if device is None else _to(batch, device)
            scores, labels = _checked(forward(model, moved) if forward else _call(model, moved))
            if logits and scores.shape[1] != logits[0].shape[1]:
                raise ValueError(
                    "logits must have the same number of classes in every batch, "
                    f"got {logits[0].shape[1]} and then {scores.shape[1]}; is the loader one of a single data set?"
                )
            logits.append(scores.detach().cpu())
            target.append(labels.detach().cpu())
    if not logits:
        raise ValueError("loader must yield at least one batch, got none; an exhausted generator, or drop_last?")
    return torch.cat(logits), torch.cat(target)


def _call(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(
            f"loader must yield (inputs, target), got {_kind(batch)}; "
            "pass forward=lambda model, batch: (logits, target)"
        )
    inputs, target = batch
    return model(inputs), target


def _checked(pair: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise TypeError(f"forward must return (logits, target), got {_kind(pair)}")
    logits, target = pair
    if isinstance(logits, Tensor) and isinstance(target, Tensor):
        target = target.to(logits.device)
    check_predictions(target, logits=logits)
    return logits, target


def _kind(value: Any) -> str:
    return f"{type(value).__name__}{f' of {len(value)}' if isinstance(value, (tuple, list)) else ''}"


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _to(batch: Any, device: torch.device | str) -> Any:
    if callable(getattr(batch, "to", None)):  # tensors, and the batches of tokenizers
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        values = [_to(value, device) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def _with_bar(loader: Iterable[Any]) -> Iterable[Any]:
    try:
        from tqdm import tqdm
    except ImportError:
        return loader
    bar: Iterable[Any] = tqdm(loader, desc="collecting logits", unit="batch", leave=False, file=sys.stderr)
    return bar
