"""Logits, and what calibrates them."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor, nn

from calrobust._checks import check_float64, check_floating, check_instance, check_predictions
from calrobust._state import Keeping, check_model, keeping_dtype
from calrobust.functional.fitting import fit_line, fit_temperature

Forward = Callable[[Any, Any], tuple[Tensor, Tensor]]
Template = str | Callable[[str], str]
_FORWARD = "forward=lambda model, batch: (logits, target)"
_CAPTIONS_AT_ONCE = 256


def collect_logits(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """Collects the logits ``[N, C]`` of a model and the labels ``[N]``, int64, on the CPU.

    The model runs in eval mode without gradient, and its modes are restored.

    Args:
        model: returns logits ``[B, C, ...]``, or an output with ``logits`` or ``logits_per_image``.
        loader: yields ``(inputs, target)``, or keyword arguments with ``labels`` or ``label``. Targets are integers.
        forward: ``forward(model, batch) -> (logits, target)``, for other batches and outputs.
        device: moves each batch there.
        progress: shows a bar of tqdm, if installed.

    Raises:
        TypeError: an argument, batch or output has the wrong type.
        ValueError: there is no batch, or logits and labels do not fit.

    Example:
        >>> import torch
        >>> from calrobust import collect_logits
        >>> batches = [(torch.eye(2), torch.tensor([0, 1]))]
        >>> collect_logits(torch.nn.Identity(), batches, progress=False)
        (tensor([[1., 0.],
                [0., 1.]]), tensor([0, 1]))
    """
    check_instance(nn.Module, "pass the model itself", model=model)
    if not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        raise TypeError(f"loader must be iterable, got {_kind(loader)}; pass a DataLoader or a list of batches")
    if forward is not None and not callable(forward):
        raise TypeError(f"forward must be callable, got {_kind(forward)}; pass {_FORWARD}")
    if progress:
        with suppress(ImportError):
            from tqdm import tqdm

            loader = tqdm(loader, desc="collecting logits", unit="batch", leave=False, file=sys.stderr)
    found: list[tuple[Tensor, Tensor]] = []
    with _evaluating(model):
        for batch in loader:
            found.append(_rows(model, batch if device is None else _to(batch, device), forward))
            if (before := found[0][0].shape[1]) != (now := found[-1][0].shape[1]):
                raise ValueError(
                    f"logits must have the same number of classes in every batch, got {before} and then {now}; is the "
                    "loader one of a single data set?"
                )
    if not found:
        raise ValueError("loader must yield at least one batch, got none; a used generator, or drop_last?")
    logits, target = map(torch.cat, zip(*found, strict=True))
    return logits, target


def _rows(model: nn.Module, batch: Any, forward: Forward | None) -> tuple[Tensor, Tensor]:
    if forward:
        pair: Any = forward(model, batch)
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise TypeError(f"forward must return (logits, target), got {_kind(pair)}")
        logits, target = pair
    else:
        inputs, target = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
        if isinstance(batch, Mapping):
            inputs = dict(batch)
            target = inputs.pop("labels", inputs.pop("label", None))
        if target is None:
            raise TypeError(
                f"loader must yield (inputs, target) or a dict with labels, got {_kind(batch)}; pass {_FORWARD}"
            )
        logits = output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
        if not isinstance(output, Tensor):
            read = output.get if isinstance(output, Mapping) else partial(getattr, output)
            logits = read("logits", read("logits_per_image", None))
        if not isinstance(logits, Tensor):
            raise TypeError(f"model must return a tensor of logits, got {_kind(output)}; pass {_FORWARD}")
    if not isinstance(target, Tensor) and hasattr(target, "__array__"):
        target = torch.tensor(target)
    if isinstance(logits, Tensor) and isinstance(target, Tensor):
        logits, target = logits.detach().cpu(), target.detach().cpu()
        target = target.long() if target.dtype != torch.bool and torch.can_cast(target.dtype, torch.long) else target
    check_predictions(target, logits=logits)
    # Loaders and models may reuse memory.
    return logits.movedim(1, -1).flatten(0, -2).clone(), target.flatten().clone()


def _kind(value: Any) -> str:
    kind = type(value).__name__
    if isinstance(value, Mapping):
        return f"{kind} with {', '.join(map(str, value))}"
    return f"{kind} of {len(value)}" if isinstance(value, (tuple, list)) else kind


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _to(batch: Any, device: torch.device | str) -> Any:
    if callable(getattr(batch, "to", None)):  # also what tokenizers return
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        values = [_to(value, device) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def zero_shot_classifier(
    model: nn.Module,
    tokenizer: Callable[..., Any],
    names: Sequence[str],
    templates: Template | Sequence[Template] = "a photo of a {}.",
) -> Tensor:
    r"""The weights ``[C, D]`` of a linear classifier from captions.

    .. math:: w_c = \frac{m_c}{\|m_c\|}, \quad m_c = \frac{1}{T} \sum_t x_{c,t}

    Features :math:`x_{c,t}` of class c in template t have unit norm. All is in float32 or better. Logits are
    ``logit_scale * image_features @ weight.T``.

    Args:
        model: a CLIP of open_clip or of Transformers.
        tokenizer: the model's own, or a processor of Transformers.
        names: the classes, in the order of the logits.
        templates: a text with ``{}`` for the name, a function of the name, or a list.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: there is no name or template, or a template has no ``{}``.

    Example:
        >>> import torch
        >>> from calrobust import zero_shot_classifier
        >>> model = torch.nn.Linear(1, 1)
        >>> model.encode_text = lambda tokens: tokens  # stands in for a CLIP
        >>> tokenizer = lambda captions: torch.tensor([[3.0, len(caption)] for caption in captions])
        >>> zero_shot_classifier(model, tokenizer, ["gnat"], "{}")  # [3, 4], normalised
        tensor([[0.6000, 0.8000]])

    Reference: Radford et al., 2021, :arxiv:`2103.00020`.
    """
    check_model(model=model)
    several: Any = templates if isinstance(templates, (list, tuple)) else [templates]
    if isinstance(names, str) or not (isinstance(names, Sequence) and all(isinstance(name, str) for name in names)):
        raise TypeError(f"names must be a list of texts, got {_kind(names)}; pass one name for each class")
    if not names or not several:
        raise ValueError(f"names and templates must not be empty, got {len(names)} names and {len(several)} templates")
    for template in several:
        if not (isinstance(template, str) or callable(template)):
            raise TypeError(f"templates must be texts or functions, got {_kind(template)}; pass 'a photo of a {{}}.'")
        if isinstance(template, str) and "{}" not in template:
            raise ValueError(f"templates must hold {{}} where the name goes, got {template!r}")
    captions = [t.replace("{}", name) if isinstance(t, str) else t(name) for name in names for t in several]
    if others := [caption for caption in captions if not isinstance(caption, str)]:
        raise TypeError(f"templates must return texts, got {_kind(others[0])}")
    of_transformers = hasattr(model, "get_text_features")
    if not (of_transformers or hasattr(model, "encode_text")):
        fix = "pass the CLIP of open_clip or of Transformers itself, without a wrapper"
        raise TypeError(f"model must have encode_text or get_text_features, got {type(model).__name__}; {fix}")
    tower: Any = model
    if of_transformers:
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        tokenizer = partial(tokenizer, padding="max_length", truncation=True, return_tensors="pt")
    device = next(chain(model.parameters(), model.buffers()), torch.empty(0, device="cpu")).device
    features = []
    with _evaluating(model):
        for start in range(0, len(captions), _CAPTIONS_AT_ONCE):
            tokens = tokenizer(captions[start : start + _CAPTIONS_AT_ONCE])
            kind, fix = Mapping if of_transformers else Tensor, "pass the model's own tokenizer"
            check_instance(kind, fix, **{"the tokenizer's output": tokens})
            if of_transformers:
                check_instance(Tensor, fix, **tokens)
                output = tower.get_text_features(**_to(dict(tokens), device))
                features.append(getattr(output, "pooler_output", output))  # a tensor in Transformers 4
            else:
                features.append(tower.encode_text(tokens.to(device)))
    found = torch.cat(features)
    found = nn.functional.normalize(found.to(torch.promote_types(found.dtype, torch.float32)))
    return nn.functional.normalize(found.unflatten(0, (len(names), -1)).mean(1))


class _Scaler(Keeping):
    is_fitted: bool
    """Also after a fitted state is loaded."""
    _kept = ("is_fitted",)

    def __init__(self, **values: float) -> None:
        super().__init__()
        self.is_fitted = False
        for name, value in values.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64, device="cpu"))

    def _set(self, *values: Tensor) -> Self:
        with torch.inference_mode(False):
            for name, new in zip(list(self._buffers), values, strict=True):
                setattr(self, name, new.to(getattr(self, name), copy=True))
        self.is_fitted = True
        return self

    def _check(self, **tensors: Tensor) -> None:
        if not self.is_fitted:
            raise RuntimeError(
                f"{type(self).__name__} is not fitted; call fit with validation data or load a fitted state"
            )
        check_floating(**tensors)

    def extra_repr(self) -> str:
        numbers = (f"{name}={value.item():.6g}" for name, value in self.named_buffers())
        return ", ".join(numbers) if self.is_fitted else "not fitted"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        check_float64(scaler=fn(torch.empty(0, device=next(self.buffers()).device)))
        super()._apply(keeping_dtype(fn), recurse)  # type: ignore[no-untyped-call]
        return self


class TemperatureScaler(_Scaler):
    r"""Divides logits by a temperature fitted on held-out data.

    .. math:: z \mapsto z / T, \quad T = \arg\min_{T > 0} \mathrm{NLL}(z_\mathrm{val} / T)

    Example:
        >>> import torch
        >>> from calrobust import TemperatureScaler
        >>> val_logits, val_target = torch.tensor([[8.0, 0.0]]).expand(4, 2), torch.tensor([0, 0, 0, 1])
        >>> scaler = TemperatureScaler().fit(val_logits, val_target)
        >>> scaler(torch.tensor([[8.0, 0.0]])).softmax(1)
        tensor([[0.7500, 0.2500]])
    """

    temperature: Tensor
    """T, a float64 scalar, also after a cast."""

    def __init__(self) -> None:
        super().__init__(temperature=1.0)

    def fit(
        self, logits: Tensor, target: Tensor, *, ignore_index: int | None = None, weight: Tensor | None = None
    ) -> Self:
        """Sets T by :func:`~calrobust.functional.fit_temperature`, and returns the scaler."""
        return self._set(fit_temperature(logits, target, ignore_index=ignore_index, weight=weight))

    def forward(self, logits: Tensor) -> Tensor:
        """Divides logits, in the same dtype. Raises ``RuntimeError`` before :meth:`fit`."""
        self._check(logits=logits)
        return logits / self.temperature


class PlattScaler(_Scaler):
    r"""Maps similarities to the logit of the probability that a pair matches.

    .. math:: z \mapsto a z + b, \quad a, b = \arg\min_{a > 0, b} \sum_i \log(1 + e^{\mp (a z_i + b)})

    with a minus for pairs that match. Fit on pairs that match as often as in use. Data without a minimum give a warning
    (:doc:`/guides/temperature`).

    Example:
        >>> import torch
        >>> from calrobust import PlattScaler
        >>> similarities = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
        >>> scaler = PlattScaler().fit(similarities, torch.tensor([1, 1, 1, 0, 1, 0, 0, 0]).bool())
        >>> scaler(torch.tensor([0.0, 0.5, 1.0])).sigmoid()  # 1 of 4 and 3 of 4 match
        tensor([0.2500, 0.5000, 0.7500])

    Reference: Platt, 1999, *Probabilistic Outputs for Support Vector Machines*.
    """

    slope: Tensor
    """a > 0, a float64 scalar."""
    intercept: Tensor
    """b, a float64 scalar."""

    def __init__(self) -> None:
        super().__init__(slope=1.0, intercept=0.0)

    def fit(self, similarities: Tensor, matched: Tensor) -> Self:
        """Sets a and b, and returns the scaler.

        Args:
            similarities: floating, cosines or logits of any shape.
            matched: whether each pair matches, bool.

        Raises:
            TypeError, ValueError: the arguments are invalid, or there is no pair.
        """
        return self._set(*fit_line(similarities, matched))

    def forward(self, similarities: Tensor) -> Tensor:
        """The calibrated logits, in the same dtype. Raises ``RuntimeError`` before :meth:`fit`."""
        self._check(similarities=similarities)
        precise = similarities.to(torch.promote_types(similarities.dtype, torch.float32))
        return (precise * self.slope + self.intercept).to(similarities.dtype)
