"""Models made of other models' weights: WiSE-FT, uniform soups, Model Stock."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from calrobust._checks import check_floating, check_fraction, check_same_state, check_tensor
from calrobust._state import tensors, unwrapped

StateDict = dict[str, Tensor]
Weights = Mapping[str, Tensor] | nn.Module


def interpolate(zero_shot: Weights, fine_tuned: Weights, alpha: float) -> StateDict:
    r"""The straight line between two models (WiSE-FT).

    .. math:: \theta = (1 - \alpha)\, \theta_0 + \alpha\, \theta_1

    Heads are interpolated as they are: scale both alike, or the shorter one acts as a hidden temperature.

    Args:
        zero_shot: :math:`\theta_0`, a state dict or a module; not changed.
        fine_tuned: :math:`\theta_1`, of the same names and shapes; not changed.
        alpha: in [0, 1]; the ends are exact, bit for bit.

    Returns:
        A new state dict for ``load_state_dict``, of the names, dtypes and devices of ``zero_shot``. Integers, other
        buffers, and what is not finite on either side are those of ``fine_tuned``, as for :func:`average`.

    Raises:
        ValueError: names or shapes differ, or ``alpha`` is outside [0, 1].
        TypeError: an argument is neither a module nor a state dict of tensors, or it is quantised.

    Example:
        >>> import torch
        >>> from calrobust import interpolate
        >>> interpolate({"w": torch.tensor([0.0])}, {"w": torch.tensor([4.0])}, alpha=0.25)
        {'w': tensor([1.])}

    Reference: Wortsman et al., 2022, :arxiv:`2109.01903`, equation 1.
    """
    check_fraction(closed=True, alpha=alpha)
    models, weight = {"zero_shot": zero_shot, "fine_tuned": fine_tuned}, float(alpha)
    if weight in (0, 1):  # an end is exact, whatever the other model holds
        return _combine(models, lambda tensors: tensors[int(weight)], finite=False)
    return _combine(models, lambda tensors: tensors[0].lerp(tensors[1], weight))


def average(models: Iterable[Weights]) -> StateDict:
    r"""The uniform mean of models (a model soup).

    .. math:: \theta = \tfrac{1}{K} \sum_{k=1}^{K} \theta_k

    Parameters and the running statistics of torch's normalisation layers are averaged in float32 or better; other
    buffers, and values that are not finite in some model, are the last model's. A plain state dict does not tell
    parameters from buffers: unless some model is given as a module, all its floating entries are averaged, except the
    vectors of ``spectral_norm``. Prefixes that wrappers such as DDP add to names are ignored.

    Args:
        models: K ≥ 1 state dicts or modules of the same names and shapes, in a list or another iterable; not changed.

    Returns:
        A new state dict, of the names, dtypes and devices of the first model.

    Raises:
        ValueError: there is no model, or names or shapes differ.
        TypeError: ``models`` is no iterable, or one of them neither a module nor a state dict of tensors, or quantised.

    Example:
        >>> import torch
        >>> from calrobust import average
        >>> average([{"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])}, {"w": torch.tensor([6.0])}])
        {'w': tensor([3.])}

    Reference: Wortsman et al., 2022, :arxiv:`2203.05482`, uniform soup.
    """
    return _combine(_listed(models, at_least=1), _mean)


def model_stock(pretrained: Weights, models: Iterable[Weights]) -> StateDict:
    r"""Mean of fine-tuned models, drawn towards the pre-trained one as far as they disagree (Model Stock).

    .. math::
        \theta = t\, \bar\theta + (1 - t)\, \theta_0, \qquad t = \frac{K \cos\varphi}{1 + (K - 1) \cos\varphi}

    for each parameter tensor on its own, with :math:`\bar\theta` the mean of the K models and :math:`\varphi` the angle
    between two of their differences from the pre-trained :math:`\theta_0`, its cosine averaged over all pairs. A
    negative average cosine counts as 0; a tensor that a model did not change has cosine 0 with all others.

    Args:
        pretrained: :math:`\theta_0`, a state dict or a module; not changed.
        models: K ≥ 2 fine-tuned state dicts or modules of the same names and shapes; not changed.

    Returns:
        A new state dict, of the names, dtypes and devices of ``pretrained``. Integers, other buffers, and what is not
        finite somewhere are those of the last model, as for :func:`average`.

    Raises:
        ValueError: there are fewer than two models, or names or shapes differ.
        TypeError: as for :func:`average`.

    Example:
        >>> import torch
        >>> from calrobust import model_stock
        >>> right, up = {"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([2.0, 2.0])}
        >>> model_stock({"w": torch.zeros(2)}, [right, right])  # they agree: their mean
        {'w': tensor([2., 0.])}
        >>> model_stock({"w": torch.zeros(2)}, [right, up])  # cos = 0.7071, t = 0.8284, mean [2, 1]
        {'w': tensor([1.6569, 0.8284])}

    Reference: Jang et al., 2024, :arxiv:`2403.19522`, equation 7.
    """
    return _combine({"pretrained": pretrained, **_listed(models, at_least=2)}, _stock)


def _mean(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).mean(0)


def _stock(tensors: list[Tensor]) -> Tensor:
    start, *models = tensors
    k = len(models)
    directions = torch.stack([nn.functional.normalize((model - start).flatten(), dim=0) for model in models])
    gram = directions @ directions.T
    cosine = ((gram.sum() - gram.trace()) / (k * (k - 1))).clamp(min=0)
    return start.lerp(_mean(models), k * cosine / (1 + (k - 1) * cosine))


def _listed(models: Iterable[Weights], at_least: int) -> dict[str, Weights]:
    if not isinstance(models, Iterable) or isinstance(models, (str, Mapping, nn.Module)):
        raise TypeError(f"models must be a list or another iterable of models, got {type(models).__name__}")
    listed = {f"models[{k}]": model for k, model in enumerate(models)}
    if len(listed) < at_least:
        raise ValueError(f"models must hold at least {at_least} of them, got {len(listed)}; is it a used generator?")
    return listed


@torch.no_grad()
def _combine(
    models: Mapping[str, Weights], combination: Callable[[list[Tensor]], Tensor], *, finite: bool = True
) -> StateDict:
    """Applies ``combination`` to the tensors of each name that are averaged; others come from the last model."""
    own, states = {}, {}
    for model, weights in models.items():
        state = _checked(model, weights)
        own[model] = unwrapped(state, model)
        states[model] = {name: state[key] for name, key in own[model].items()}
    (first, reference), *others = states.items()
    for model, state in others:
        check_same_state(**{first: reference, model: state})
    copied = _copied(models.values(), reference.keys())
    combined: dict[str, Any] = {}
    for name, key in own[first].items():
        entries = [state[name] for state in states.values()]
        if not isinstance(entries[0], Tensor):  # what a module's get_extra_state gave
            combined[key] = copy.deepcopy(entries[-1])
            continue
        device, dtype = entries[0].device, entries[0].dtype
        if dtype.is_floating_point or dtype.is_complex:
            values = [entry.to(device, torch.promote_types(dtype, torch.float32)) for entry in entries]
            if not finite:
                result = combination(values)
            elif name in copied:
                result = values[-1]
            else:
                all_finite = torch.stack([value.isfinite() for value in values]).all(0)
                result = combination([value.where(all_finite, 0) for value in values]).where(all_finite, values[-1])
        else:
            result = entries[-1].to(device)
            packed = result.ndim > 1 or (dtype.itemsize == 1 and result.numel() > 1)
            differ = (entry.to(device) != result for entry in entries)
            if packed and dtype not in (torch.bool, torch.int64) and any(one.any() for one in differ):
                _refuse_quantised(f"{first}[{key!r}]", f"{dtype} values that differ between the models")
        combined[key] = result.detach().to(dtype, copy=True)
    return combined


def _checked(name: str, model: Weights) -> Mapping[str, Any]:
    if not isinstance(model, (nn.Module, Mapping)):
        raise TypeError(f"{name} must be a state dict or a torch.nn.Module, got {type(model).__name__}")
    state: Mapping[str, Any] = model.state_dict() if isinstance(model, nn.Module) else model
    for key, value in state.items():
        if not isinstance(key, str):
            raise TypeError(f"{name} must map names to tensors, got the key {key!r}; is it a state dict?")
        if key.endswith("_extra_state"):  # a whole checkpoint has numbers and dicts elsewhere
            continue
        entry = f"{name}[{key!r}]"
        check_tensor(**{entry: value})
        if type(value) not in (Tensor, nn.Parameter, nn.Buffer) and not hasattr(value, "full_tensor"):
            _refuse_quantised(entry, type(value).__name__)
        if value.is_floating_point():
            check_floating(**{entry: value})
        elif not value.is_complex() and value.dtype not in _INTEGERS:
            _refuse_quantised(entry, str(value.dtype))
    return state


_INTEGERS = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_INTEGERS |= {torch.uint16, torch.uint32, torch.uint64}


def _refuse_quantised(entry: str, kind: str) -> None:
    raise TypeError(
        f"{entry} must not be quantised, because integers cannot be averaged apart from their scales, got {kind}; "
        "combine the models before they are quantised, or dequantise them"
    )


def _copied(models: Iterable[Weights], names: Collection[str]) -> set[str]:
    """The names that are not averaged: other buffers, where a module tells, and the vectors of ``spectral_norm``."""
    told = [tensors(model) for model in models if isinstance(model, nn.Module)]
    vectors = {name for name in names if name.endswith(("._u", "._v")) and "parametrizations." in name}
    vectors |= {name for name in names if name.endswith(("_u", "_v")) and f"{name[:-2]}_orig" in names}
    return vectors.union(*(state.keys() - averaged for state, averaged in told))
