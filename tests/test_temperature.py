from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from strategies import Predictions, classifier, predictions
from torch import Tensor, nn
from torch.testing import assert_close

from calrobust.evaluation import PlattScaler, TemperatureScaler
from calrobust.functional.fitting import fit_temperature


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    """Returns overconfident logits and their labels."""
    return classifier(300, 5, 0, sharpness=0.5)


@pytest.fixture
def scaler(data: tuple[Tensor, Tensor]) -> TemperatureScaler:
    """Returns a fitted scaler."""
    return TemperatureScaler().fit(*data)


def test_fit_returns_the_scaler_and_holds_the_functions_temperature(data: tuple[Tensor, Tensor]) -> None:
    """It holds T itself, not its inverse or its logarithm (trap 27)."""
    scaler = TemperatureScaler()
    assert not scaler.is_fitted
    assert scaler.fit(*data) is scaler
    assert scaler.is_fitted is True
    assert torch.equal(scaler.temperature, fit_temperature(*data))
    assert scaler.temperature > 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_divides_logits_and_keeps_their_dtype(scaler: TemperatureScaler, dtype: torch.dtype) -> None:
    """Logits may have any shape and masked classes. The order of the classes stays."""
    logits = torch.tensor([[[3.0, -1.0, -torch.inf]]], dtype=dtype)
    scaled = scaler(logits)
    assert scaled.dtype == dtype
    assert_close(scaled, (logits.double() / scaler.temperature).to(dtype))
    assert_close(scaled.argsort(), logits.argsort())


@given(predictions(min_classes=2), predictions(min_classes=2))
def test_the_highest_logit_stays_the_highest(fitted: Predictions, p: Predictions) -> None:
    """This holds for every T, and also where two logits become equal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # any T will do
        scaled = TemperatureScaler().fit(*fitted)(p.logits)
    assert torch.equal(scaled.gather(1, p.logits.argmax(1, keepdim=True))[:, 0], scaled.amax(1))


def test_is_differentiable_in_the_logits_and_has_nothing_to_train(scaler: TemperatureScaler) -> None:
    """The gradient is 1/T; an optimizer finds no parameter."""
    logits = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
    scaler(logits).sum().backward()
    assert logits.grad is not None
    assert_close(logits.grad, torch.ones_like(logits) / scaler.temperature)
    assert list(scaler.parameters()) == []


def test_forward_before_fit_raises() -> None:
    """The scaler never divides by one silently."""
    message = r"^TemperatureScaler is not fitted; call fit with validation data or load a fitted state$"
    with pytest.raises(RuntimeError, match=message):
        TemperatureScaler()(torch.zeros(1, 2))


def test_state_dict_keeps_temperature_and_fitted_flag_bit_for_bit(scaler: TemperatureScaler) -> None:
    """This holds through a file, alone and inside a model (trap 31)."""
    assert set(scaler.state_dict()) == {"temperature", "is_fitted"}
    for source, fresh in (
        (scaler, TemperatureScaler()),
        (nn.Sequential(nn.Linear(2, 2), scaler), nn.Sequential(nn.Linear(2, 2), TemperatureScaler())),
    ):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        fresh.load_state_dict(torch.load(file, weights_only=True))
        loaded = fresh if isinstance(fresh, TemperatureScaler) else fresh[1]
        assert isinstance(loaded, TemperatureScaler)
        assert loaded.is_fitted is True
        assert torch.equal(loaded.temperature, scaler.temperature)
        assert torch.equal(loaded(torch.ones(3)), scaler(torch.ones(3)))


def test_an_unfitted_state_loads_as_unfitted(scaler: TemperatureScaler) -> None:
    """The flag is loaded even if it is False (trap 31)."""
    scaler.load_state_dict(TemperatureScaler().state_dict())
    assert not scaler.is_fitted


def test_a_state_without_the_flag_is_refused() -> None:
    """The error lists it as a missing key, unless strict=False."""
    state = {"temperature": torch.tensor(2.0, dtype=torch.float64)}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "is_fitted"'):
        TemperatureScaler().load_state_dict(state)
    loaded = TemperatureScaler()
    loaded.load_state_dict(state, strict=False)
    assert not loaded.is_fitted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": None}, r'Missing key\(s\) in state_dict: "temperature"'),
        ({"extra": torch.zeros(1)}, r'Unexpected key\(s\) in state_dict: "extra"'),
        ({"temperature": torch.ones(2, dtype=torch.float64)}, r"size mismatch for temperature"),
    ],
)
def test_a_state_of_something_else_is_refused(
    scaler: TemperatureScaler, change: dict[str, Tensor | None], message: str
) -> None:
    """The message of torch names a key that is missing, unexpected or of another shape."""
    state = {name: value for name, value in {**scaler.state_dict(), **change}.items() if value is not None}
    with pytest.raises(RuntimeError, match=message):
        TemperatureScaler().load_state_dict(state)


def test_the_temperature_is_where_its_scaler_is(data: tuple[Tensor, Tensor], scaler: TemperatureScaler) -> None:
    """It stays there through a move with a cast, and through a fit on logits from another device."""
    assert scaler.state_dict(keep_vars=True)["temperature"] is scaler.to("cpu").temperature
    scaler.to("meta", torch.float16)
    assert (scaler.temperature.device.type, scaler.temperature.dtype) == ("meta", torch.float64)
    assert scaler.fit(*data).temperature.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_cast_of_the_model_leaves_the_temperature_alone(scaler: TemperatureScaler, dtype: torch.dtype) -> None:
    """It stays float64 and keeps every bit."""
    model = nn.Sequential(nn.Linear(2, 2), copy.deepcopy(scaler)).to(dtype)
    cast = model[1]
    assert isinstance(cast, TemperatureScaler)
    assert cast.temperature.dtype == torch.float64
    assert torch.equal(cast.temperature, scaler.temperature)
    assert cast(torch.ones(2, dtype=dtype)).dtype == dtype


def test_fitting_runs_no_model() -> None:
    """It takes logits. A model is refused, because its BatchNorm statistics would change (trap 30)."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match=r"logits must be a torch\.Tensor, got Sequential"):
        TemperatureScaler().fit(model, torch.zeros(2, dtype=torch.int64))  # type: ignore[arg-type]  # the mistake under test
    with torch.no_grad():
        logits = model.eval()(torch.randn(50, 4))
    TemperatureScaler().fit(logits, logits.argmax(1).where(torch.arange(50) < 40, 0))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_failed_fit_leaves_the_scaler_as_it_was(scaler: TemperatureScaler) -> None:
    """Neither T nor the flag changes."""
    before = scaler.temperature.clone()
    fresh = TemperatureScaler()
    for candidate in (scaler, fresh):
        with pytest.raises(ValueError, match="got NaN"):
            candidate.fit(torch.full((2, 2), torch.nan), torch.tensor([0, 1]))
    assert scaler.is_fitted
    assert torch.equal(scaler.temperature, before)
    assert not fresh.is_fitted


def test_a_temperature_fitted_in_inference_mode_passes_gradients_outside(data: tuple[Tensor, Tensor]) -> None:
    """The buffer is an ordinary tensor that can be saved, loaded into and divided by."""
    with torch.inference_mode():
        scaler = TemperatureScaler().fit(*data)
    logits = torch.ones(2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(scaler(logits).sum(), logits)
    assert_close(gradient, 1 / scaler.temperature.float().expand(2, 3))
    scaler.load_state_dict(scaler.state_dict())


def test_repr_shows_the_temperature() -> None:
    """Before a fit it says that there is none."""
    scaler = TemperatureScaler()
    assert repr(scaler) == "TemperatureScaler(not fitted)"
    scaler.fit(torch.tensor([[8.0, 0.0]]).expand(4, 2), torch.tensor([0, 0, 0, 1]))
    assert repr(scaler) == "TemperatureScaler(temperature=7.28191)"  # 8 / log 3


def test_integer_logits_are_refused(scaler: TemperatureScaler) -> None:
    """They are probably class indices."""
    with pytest.raises(TypeError, match=r"logits must be floating point, got torch\.int64"):
        scaler(torch.zeros(2, 2, dtype=torch.int64))


@pytest.mark.parametrize("kind", [TemperatureScaler, PlattScaler])
def test_serves_logits_of_the_cpu_under_another_default_device(kind: Any) -> None:
    """As those of `collect_logits`; a scalar on the CPU serves logits of any device."""
    similarities, matched = torch.tensor([8.0, 8, 8, 8, 0, 0, 0, 0]), torch.tensor([1, 1, 1, 0, 1, 0, 0, 0])
    logits = torch.stack([torch.full((8,), 4.0), similarities], 1)
    given = (logits, matched) if kind is TemperatureScaler else (similarities, matched.bool())
    expected = kind().fit(*given)(given[0])
    with torch.device("meta"):
        found = kind().fit(*given)(given[0])
    assert torch.equal(found, expected)


def test_captures_as_one_graph(scaler: TemperatureScaler) -> None:
    """The check for a fit reads no tensor."""
    logits = torch.randn(4, 5)
    assert_close(torch.compile(scaler, fullgraph=True, backend="eager")(logits), scaler(logits))
