"""Models made of other models' weights: WiSE-FT, uniform soups, Model Stock."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from calrobust._checks import check_floating, check_fraction, check_same_state, check_sequence, check_tensor

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
        A new state dict for ``load_state_dict``, of the dtypes and devices of ``zero_shot``. Integer and bool entries
        are those of ``fine_tuned``. Low-precision weights are averaged in float32.

    Raises:
        ValueError: names or shapes differ, or ``alpha`` is outside [0, 1].
        TypeError: an argument is neither a module nor a state dict of tensors.

    Example:
        >>> import torch
        >>> from calrobust import interpolate
        >>> interpolate({"w": torch.tensor([0.0])}, {"w": torch.tensor([4.0])}, alpha=0.25)
        {'w': tensor([1.])}

    Reference: Wortsman et al., 2022, :arxiv:`2109.01903`, equation 1.
    """
    check_fraction(closed=True, alpha=alpha)
    states = _states({"zero_shot": zero_shot, "fine_tuned": fine_tuned})
    if alpha in (0, 1):  # not through arithmetic, where 0 * inf would be NaN
        return _combine(states, lambda tensors: tensors[int(alpha)])
    return _combine(states, lambda tensors: tensors[0].lerp(tensors[1], alpha))


def average(models: Sequence[Weights]) -> StateDict:
    r"""The uniform mean of models (a model soup).

    .. math:: \theta = \tfrac{1}{K} \sum_{k=1}^{K} \theta_k

    Args:
        models: K ≥ 1 state dicts or modules of the same names and shapes; not changed.

    Returns:
        A new state dict, of the dtypes and devices of the first; integer and bool entries are those of the last.

    Raises:
        ValueError: there is no model, or names or shapes differ.
        TypeError: ``models`` is no sequence, or one of them neither a module nor a state dict of tensors.

    Example:
        >>> import torch
        >>> from calrobust import average
        >>> average([{"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])}, {"w": torch.tensor([6.0])}])
        {'w': tensor([3.])}

    Reference: Wortsman et al., 2022, :arxiv:`2203.05482`, uniform soup.
    """
    check_sequence(models=models)
    if len(models) == 0:
        raise ValueError("models must hold at least one model, got none")
    return _combine(_states({f"models[{k}]": model for k, model in enumerate(models)}), _mean)


def model_stock(pretrained: Weights, models: Sequence[Weights]) -> StateDict:
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
        A new state dict, of the dtypes and devices of ``pretrained``; integer and bool entries are those of the last
        model.

    Raises:
        ValueError: there are fewer than two models, or names or shapes differ.
        TypeError: ``models`` is no sequence, or one of them neither a module nor a state dict of tensors.

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
    check_sequence(models=models)
    if len(models) < 2:
        raise ValueError(f"models must hold at least two models, whose angle matters, got {len(models)}")
    states = _states({"pretrained": pretrained, **{f"models[{k}]": model for k, model in enumerate(models)}})
    return _combine(states, _stock)


def _mean(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).mean(0)


def _stock(tensors: list[Tensor]) -> Tensor:
    start, *models = tensors
    k = len(models)
    directions = torch.stack([nn.functional.normalize((model - start).flatten(), dim=0) for model in models])
    gram = directions @ directions.T
    cosine = ((gram.sum() - gram.trace()) / (k * (k - 1))).clamp(min=0)
    return start.lerp(_mean(models), k * cosine / (1 + (k - 1) * cosine))


def _states(models: Mapping[str, Weights]) -> list[Mapping[str, Tensor]]:
    states: dict[str, Mapping[str, Tensor]] = {}
    for name, model in models.items():
        if not isinstance(model, (nn.Module, Mapping)):
            raise TypeError(f"{name} must be a state dict or a torch.nn.Module, got {type(model).__name__}")
        states[name] = model.state_dict() if isinstance(model, nn.Module) else model
        for key, value in states[name].items():
            if not isinstance(key, str):
                raise TypeError(f"{name} must map names to tensors, got the key {key!r}; is it a state dict?")
            if not key.endswith("_extra_state"):  # a whole checkpoint has numbers and dicts elsewhere
                check_tensor(**{f"{name}[{key!r}]": value})
                if value.is_floating_point():
                    check_floating(**{f"{name}[{key!r}]": value})
    (first, reference), *others = states.items()
    for name, state in others:
        check_same_state(**{first: reference, name: state})
    return list(states.values())


@torch.no_grad()
def _combine(states: list[Mapping[str, Tensor]], combination: Callable[[list[Tensor]], Tensor]) -> StateDict:
    """Applies ``combination`` to the floating (or complex) tensors of each name; others come from the last state."""
    combined: dict[str, Any] = {}
    for name, reference in states[0].items():
        if not isinstance(reference, Tensor):  # what a module's get_extra_state gave
            combined[name] = copy.deepcopy(states[-1][name])
        elif reference.is_floating_point() or reference.is_complex():
            precise = torch.promote_types(reference.dtype, torch.float32)
            tensors = [state[name].to(reference.device, precise) for state in states]
            # What all agree on stays: attention masks hold -inf, and inf - inf is NaN.
            agreed = torch.stack([tensor == tensors[0] for tensor in tensors]).all(0)
            combined[name] = torch.where(agreed, tensors[0], combination(tensors)).to(reference.dtype)
        else:
            combined[name] = states[-1][name].detach().to(reference.device, copy=True)
    return combined
