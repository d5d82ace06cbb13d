"""Public functions and modules on whatever may come: a value, or a ValueError or TypeError, and nothing changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bad_input import calibration, losses, models
from bad_input.table import Target, contents
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import anything
from torch import Tensor, nn
from torch.testing import assert_close

from calrobust.functional import carot_loss

# A target, and its arguments: those it must have, and those that some wrong call of it names. Not what it belongs to.
FUZZED: dict[str, tuple[Target, list[str]]] = {}
for targets, wrongs in (*losses.TABLE, *calibration.TABLE, *models.TABLE):
    for one in targets:
        mentioned = {*one.arguments(), *(name for wrong in wrongs for name in wrong.change)}
        _, known = FUZZED.get(one.name, (one, []))
        FUZZED[one.name] = one, sorted({*known, *mentioned} - {"metric", "scaler", "teacher", "progress"})


@pytest.mark.parametrize("name", FUZZED)
@settings(max_examples=settings().max_examples // 10)
@given(data=st.data())
def test_anything_gives_a_value_or_says_what_is_wrong(name: str, data: st.DataObject) -> None:
    """One to three arguments of a good call replaced by anything."""
    target, names = FUZZED[name]
    arguments = target.arguments()
    for argument in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)):
        arguments[argument] = data.draw(anything(), label=argument)
    before = contents(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of data that do not determine a temperature
        try:
            target.call(**arguments)
        except (ValueError, TypeError):
            changed = contents(arguments) != before
        else:
            changed = False  # what belongs to a metric or a teacher may
    assert not changed


@torch.inference_mode()
def made_in_inference_mode(tensor: Tensor) -> Tensor:
    """As the features of a frozen tower may be."""
    return tensor.clone()


ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
    "strided": lambda x: torch.stack([x, x.roll(1)], -1)[..., 0],
    "inside a larger one": lambda x: torch.cat([x, x])[len(x) :],
    "requiring a gradient": lambda x: x.clone().requires_grad_(x.is_floating_point()),
    "a parameter": lambda x: nn.Parameter(x.clone(), requires_grad=x.is_floating_point()),
    "made in inference mode": made_in_inference_mode,
}


def tensors(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Those among the arguments."""
    return {name: value for name, value in arguments.items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
@pytest.mark.parametrize("name", [n for n, (t, _) in FUZZED.items() if tensors(t.arguments()) and ".update" not in n])
def test_odd_tensors_are_as_good_as_plain_ones(name: str, odd: Callable[[Tensor], Tensor]) -> None:
    """The same value, NaN where there is none, and nothing changed."""
    target, _ = FUZZED[name]
    arguments = target.arguments()
    odd_ones = {key: odd(value) for key, value in tensors(arguments).items()}
    before = contents(odd_ones)
    value, expected = target.call(**arguments | odd_ones), target.call(**target.arguments())
    if isinstance(value, nn.Module) and isinstance(expected, nn.Module):  # a scaler
        value, expected = value.state_dict(), expected.state_dict()
    assert_close(value, expected, equal_nan=True)  # two samples have no calibration interval
    assert contents(odd_ones) == before


@pytest.mark.parametrize("impl", ["auto", "dense", "tiled"])
@pytest.mark.parametrize("frozen", ["text_features", "teacher_image_features", "teacher_logit_scale", "logit_scale"])
def test_a_gradient_passes_by_what_was_made_in_inference_mode(frozen: str, impl: str) -> None:
    """To the other features, where autograd alone would refuse."""
    arguments = losses.taught(label_smoothing=0.1, distillation_weight=1.5, impl=impl)
    gradients = []
    for odd in (torch.clone, made_in_inference_mode):
        image = arguments["image_features"].clone().requires_grad_()
        others = arguments | {"image_features": image, frozen: odd(torch.as_tensor(arguments[frozen]))}
        carot_loss(**others).backward()
        gradients.append(image.grad)
    assert_close(*gradients, rtol=0, atol=0)
