"""Models made of other models' weights."""

import copy
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from calrobust._checks import check_flag, check_instance, check_number, check_tensor
from calrobust._state import EXTRA, check_model, check_same_state, check_values, tensors, unwrapped

StateDict = dict[str, Tensor]
Weights = Mapping[str, Tensor] | nn.Module


def interpolate(
    zero_shot: Weights, fine_tuned: Weights, alpha: float | Callable[[str], float], *, extrapolate: bool = False
) -> StateDict:
    r"""The straight line between two models (WiSE-FT).

    .. math:: \theta = (1 - \alpha)\, \theta_0 + \alpha\, \theta_1

    ``alpha`` is in [0, 1], any finite number with ``extrapolate=True``, or a function of each floating tensor's name,
    as in LiNeS (:doc:`/guides/recipes`). At the ends, floating entries are exact. Models, result and
    errors are as for :func:`average` of ``[zero_shot, fine_tuned]``. Give both heads the same scale first.

    Example:
        >>> import torch
        >>> from calrobust import interpolate
        >>> zero_shot, fine_tuned = {"w": torch.tensor([0.0])}, {"w": torch.tensor([4.0])}
        >>> interpolate(zero_shot, fine_tuned, alpha=0.25)
        {'w': tensor([1.])}

    Reference: Wortsman et al., 2022, :arxiv:`2109.01903`, equation 1.
    """
    check_flag(extrapolate=extrapolate)

    def checked(what: str, value: float) -> float:
        check_number(**{what: value})
        if not (extrapolate or 0 <= value <= 1):
            raise ValueError(f"{what} must be in [0, 1], got {value!r}; pass extrapolate=True to leave the line")
        return float(value)

    if not callable(alpha):
        alpha = checked("alpha", alpha)

    def between(name: str, tensors: list[Tensor], usable: Tensor) -> Tensor:
        share = checked(f"alpha({name!r})", alpha(name)) if callable(alpha) else alpha
        if share in (0, 1):
            return tensors[int(share)]
        moved = tensors[0].lerp(tensors[1], share).where(usable, tensors[1])
        return moved.clamp(min=0) if name.endswith("running_var") else moved

    return _combine({"zero_shot": zero_shot, "fine_tuned": fine_tuned}, between)


def average(models: Iterable[Weights], weights: Iterable[float] | None = None) -> StateDict:
    r"""The weighted or uniform mean of models (a model soup).

    .. math:: \theta = \sum_k w_k \theta_k / \sum_k w_k

    ``models`` are state dicts or modules of the same names and shapes; ``weights`` are numbers ≥ 0, where 0 leaves a
    model out. The result is a new state dict with the names, dtypes and devices of the first.

    Parameters and the running statistics of torch's normalisation layers are averaged, in float32 or better. The
    rest, and values that are not finite in some model, are the last model's. If no model is a module, which knows its
    buffers, all floating entries are averaged.

    Raises:
        ValueError: there is no model, names or shapes differ, or ``weights`` are wrong.
        TypeError: an argument has the wrong type, or a model is quantised.

    Example:
        >>> import torch
        >>> from calrobust import average
        >>> average([{"w": torch.tensor([1.0])}, {"w": torch.tensor([5.0])}], weights=[3, 1])  # 0.75 * 1 + 0.25 * 5
        {'w': tensor([2.])}

    Reference: Wortsman et al., 2022, :arxiv:`2203.05482`.
    """
    listed = _listed(models, at_least=1)
    shares = [1.0] * len(listed)
    if weights is not None:
        check_instance(Iterable, "pass a list with a number for each model", weights=weights)
        given = {f"weights[{k}]": share for k, share in enumerate(weights)}
        check_number(**given)
        shares = [float(share) for share in given.values()]
        if len(shares) != len(listed) or min(shares) < 0 or max(shares) == 0:
            raise ValueError(f"weights must be {len(listed)} numbers >= 0, one for each model, not all 0, got {shares}")
        listed = {name: model for (name, model), share in zip(listed.items(), shares, strict=True) if share}
        shares = [share / max(shares) for share in shares if share]
    total = sum(shares)

    def mean(name: str, tensors: list[Tensor], usable: Tensor) -> Tensor:
        parts = (tensor * (share / total) for tensor, share in zip(tensors, shares, strict=True))  # no overflow
        return reduce(torch.add, parts).where(usable, tensors[-1])

    return _combine(listed, mean)


def model_stock(pretrained: Weights, models: Iterable[Weights]) -> StateDict:
    r"""The mean of models, drawn to the pre-trained one if they disagree (Model Stock).

    .. math::
        \theta = t\, \bar\theta + (1 - t)\, \theta_0, \qquad t = \frac{K \cos\varphi}{1 + (K - 1) \cos\varphi}

    for each tensor. Here :math:`\bar\theta` is the mean of the K ≥ 2 models, and :math:`\cos\varphi` ≥ 0 the mean
    cosine of any two of their differences from the pre-trained :math:`\theta_0`. Models, result and errors are as for
    :func:`average` of ``[pretrained, *models]``.

    Example:
        >>> import torch
        >>> from calrobust import model_stock
        >>> models = {"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([2.0, 2.0])}
        >>> model_stock({"w": torch.zeros(2)}, models)  # t = 0.8284, mean [2, 1]
        {'w': tensor([1.6569, 0.8284])}

    Reference: Jang et al., 2024, :arxiv:`2403.19522`, equation 7.
    """
    return _combine({"pretrained": pretrained, **_listed(models, at_least=2)}, _stock)


def _stock(name: str, tensors: list[Tensor], usable: Tensor) -> Tensor:
    start, *models = (tensor.where(usable, 0) for tensor in tensors)
    k = len(models)
    directions = torch.stack([nn.functional.normalize((model - start).flatten(), dim=0, eps=1e-38) for model in models])
    gram = (directions @ directions.mH).real
    cosine = ((gram.sum() - gram.trace()) / (k * (k - 1))).clamp(0, 1)
    stock = start.lerp(torch.stack([model / k for model in models]).sum(0), k * cosine / (1 + (k - 1) * cosine))
    return stock.where(usable, tensors[-1])


def _listed(models: Iterable[Weights], at_least: int) -> dict[str, Weights]:
    if not isinstance(models, Iterable) or isinstance(models, (str, Mapping, nn.Module)):
        raise TypeError(f"models must be an iterable of models, got {type(models).__name__}")
    # Else each may reuse the memory of one.
    one_by_one = not isinstance(models, Collection)
    listed = {f"models[{k}]": copy.deepcopy(model) if one_by_one else model for k, model in enumerate(models)}
    if len(listed) < at_least:
        raise ValueError(f"models must be at least {at_least}, got {len(listed)}; is it a used generator?")
    return listed


@torch.no_grad()
def _combine(models: Mapping[str, Weights], combination: Callable[[str, list[Tensor], Tensor], Tensor]) -> StateDict:
    given = {model: _checked(model, weights) for model, weights in models.items()}
    states = {m: {name: state[key] for name, key in unwrapped(state, m).items()} for m, state in given.items()}
    first, *others = states
    for model in others:
        check_same_state(**{first: states[first], model: states[model]})
    # Buffers, and the unit vectors of spectral_norm.
    copied = {name for name in states[first] if re.search(r"parametrizations\..*\._[uv]$", name)}
    copied |= {name[:-5] + end for name in states[first] if name.endswith("_orig") for end in ("_u", "_v")}
    for state, averaged in (tensors(model) for model in models.values() if isinstance(model, nn.Module)):
        copied |= state.keys() - averaged
    combined: dict[str, Any] = {}
    for name, key in unwrapped(given[first], first).items():
        entries = [state[name] for state in states.values()]
        if name.endswith(EXTRA):
            combined[key] = copy.deepcopy(entries[-1])
            continue
        device, dtype = entries[0].device, entries[0].dtype
        if len({(entry.is_floating_point(), entry.is_complex()) for entry in entries}) > 1:
            kinds = " and ".join(str(entry.dtype) for entry in entries)
            raise TypeError(f"{first}[{key!r}] must be of one kind in all models, got {kinds}; convert one with .to()")
        if dtype.is_floating_point or dtype.is_complex:
            values = [entry.to(device, torch.promote_types(dtype, torch.float32)) for entry in entries]
            usable = torch.stack([value.isfinite() for value in values]).all(0) & (name not in copied)
            result = combination(name, values, usable)
            same = torch.stack([value == values[0] for value in values]).all(0)
            result = values[0].where(same, result)
        else:
            result = entries[-1].to(device)
            few = result.ndim < 2 and (dtype.itemsize > 1 or result.numel() < 2)
            counted = few or dtype in (torch.bool, torch.int64)
            if not counted and any((entry.to(device) != result).any() for entry in entries):
                _refuse_quantised(f"{first}[{key!r}]", f"{dtype} values that differ between the models")
        combined[key] = result.to(dtype, copy=True)
    return combined


def _checked(name: str, model: Weights) -> Mapping[str, Any]:
    if not isinstance(model, (nn.Module, Mapping)):
        raise TypeError(f"{name} must be a state dict or a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.Module):
        check_model(**{name: model})
        model = model.state_dict()
    for key, value in model.items():
        if not isinstance(key, str):
            raise TypeError(f"{name} must map names to tensors, got the key {key!r}; is it a state dict?")
        if key.endswith(EXTRA):
            continue
        entry = f"{name}[{key!r}]"
        check_tensor(**{entry: value})
        check_values(**{name: {key: value}})
        plain = type(value) in (Tensor, nn.Parameter, nn.Buffer) or hasattr(value, "full_tensor")
        floating = value.is_complex() or (value.is_floating_point() and value.dtype.itemsize > 1)
        if not plain or not (floating or re.fullmatch(r"torch\.(bool|u?int(8|16|32|64))", str(value.dtype))):
            _refuse_quantised(entry, f"{type(value).__name__} of {value.dtype}")
    return model


def _refuse_quantised(entry: str, kind: str) -> None:
    raise TypeError(
        f"{entry} must not be quantised, because integers cannot be averaged apart from their scales, got {kind}; "
        "combine the models before, or dequantise them"
    )
