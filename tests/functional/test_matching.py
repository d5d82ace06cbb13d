from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from strategies import seeds
from torch import Tensor
from torch.testing import assert_close

from calrobust import PlattScaler
from calrobust.functional import fitting

DOUBLE = torch.float64


def pairs(n: int, seed: int, slope: float = 2.0, intercept: float = -1.0) -> tuple[Tensor, Tensor]:
    """Standard normal similarities and whether the pairs match, by chance."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, generator=generator, dtype=DOUBLE)
    return z, torch.rand(n, generator=generator) < (slope * z + intercept).sigmoid()


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.03, 0.3), (20.0, -100.0), (1e-4, 1.0)])
@pytest.mark.parametrize("intercept", [-4.0, 0.0, 2.0])
def test_is_scikit_learns_logistic_regression_without_penalty(scale: float, shift: float, intercept: float) -> None:
    """On cosines and on logits, with few or many matching pairs, to 1e-6 of both numbers."""
    z, matched = pairs(3000, 0, intercept=intercept)
    theirs = LogisticRegression(C=math.inf, tol=1e-12, max_iter=1000, solver="newton-cholesky")
    theirs.fit(z[:, None].numpy(), matched.numpy())
    ours = PlattScaler().fit(scale * z + shift, matched)
    slope = float(theirs.coef_[0, 0])
    assert float(ours.slope) * scale == pytest.approx(slope, rel=1e-6)
    assert float(ours.intercept) == pytest.approx(float(theirs.intercept_[0]) - slope * shift / scale, rel=1e-6)


@given(seeds(), st.integers(20, 300), st.sampled_from([0.1, 1.0, 10.0]))
def test_no_other_line_is_more_likely(seed: int, n: int, slope: float) -> None:
    """Small changes of either number raise the loss, and a > 0, unless the data do not determine them."""
    z, matched = pairs(n, seed, slope)
    with warnings.catch_warnings(record=True) as causes:
        warnings.simplefilter("always")
        scaler = PlattScaler().fit(z, matched)
    assert scaler.slope > 0

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(a * z + b, matched.double())

    if not causes:
        best = loss(scaler.slope, scaler.intercept)
        for step in (1e-3, -1e-3):
            assert loss(scaler.slope * (1 + step), scaler.intercept) > best
            assert loss(scaler.slope, scaler.intercept + step) > best


@pytest.mark.parametrize("shape", [(600,), (20, 30), (2, 3, 100)])
def test_pairs_of_any_shape_and_block_are_pairs(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix of all images and texts as well as a list; whatever fits into a block."""
    z, matched = pairs(600, 0)
    expected = PlattScaler().fit(z, matched)
    monkeypatch.setattr(fitting, "BLOCK", 77)
    found = PlattScaler().fit(z.view(shape), matched.view(shape))
    assert_close(found.slope, expected.slope, rtol=1e-9, atol=0)
    assert found(z.view(shape)).shape == shape


@pytest.mark.parametrize(
    ("z", "matched", "slope", "odds_at", "odds", "cause"),
    [
        ([1.0, 2.0, 4.0, 5.0], [1, 1, 1, 1], 0.01 / math.sqrt(2.5), 3.0, 5 / 1, "all pairs match"),
        ([1.0, 2.0, 4.0, 5.0], [0, 0, 0, 0], 0.01 / math.sqrt(2.5), 3.0, 1 / 5, "no pairs match"),
        ([1.0, 2.0, 4.0, 5.0], [1, 1, 0, 0], 0.01 / math.sqrt(2.5), 3.0, 1.0, "are not more similar than others"),
        ([7.0, 7.0, 7.0], [1, 1, 0], 1.0, 7.0, 3 / 2, "are not more similar than others"),
        ([3.0], [1], 1.0, 3.0, 2 / 1, "all pairs match"),
        ([0.0, 1.0], [0, 1], 2 * math.log(2), 0.5, 1.0, "a threshold separates them"),  # 1/3 at 0 and 2/3 at 1
    ],
)
def test_degenerate_data_give_documented_numbers_and_say_so(
    z: list[float], matched: list[int], slope: float, odds_at: float, odds: float, cause: str
) -> None:
    """The slope is finite and positive, and the odds at a point are those of the counts."""
    with pytest.warns(UserWarning, match=f"do not determine a and b: .*{cause}; a = "):
        scaler = PlattScaler().fit(torch.tensor(z), torch.tensor(matched).bool())
    assert float(scaler.slope) == pytest.approx(slope, rel=1e-6)
    assert float(scaler(torch.tensor(odds_at, dtype=DOUBLE)).exp()) == pytest.approx(odds, rel=1e-6)


def test_a_threshold_with_a_tie_separates_too() -> None:
    """A pair of each kind at the threshold: the slope still has no bound without Platt's targets."""
    with pytest.warns(UserWarning, match="a threshold separates them"):
        scaler = PlattScaler().fit(torch.tensor([0.0, 1.0, 1.0, 2.0]), torch.tensor([False, False, True, True]))
    assert 0 < scaler.slope < 10


def test_a_cap_that_is_reached_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step is not enough."""
    monkeypatch.setattr(fitting, "MAX_STEPS", 1)
    with pytest.warns(UserWarning, match="did not converge in 1 steps"):
        PlattScaler().fit(*pairs(100, 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, DOUBLE])
def test_forward_keeps_dtype_and_graph(dtype: torch.dtype) -> None:
    """The gradient of a z + b is a."""
    scaler = PlattScaler().fit(*pairs(500, 0))
    z = torch.tensor([0.5, -0.5], dtype=dtype, requires_grad=True)
    logits = scaler(z)
    logits.sum().backward()
    assert logits.dtype == dtype
    assert_close(z.grad, scaler.slope.to(dtype).expand(2))


@pytest.mark.parametrize(("dtype", "slope"), [(torch.bfloat16, 1e3), (torch.float16, 1e6)])
def test_low_precision_is_rounded_once(dtype: torch.dtype, slope: float) -> None:
    """Rounded before b is added, a z + b would be 0, or NaN in float16."""
    scaler, state = PlattScaler(), {"slope": slope, "intercept": -0.3 * slope, "is_fitted": True}
    scaler.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    z = torch.tensor([0.3, 0.30078125], dtype=dtype)
    expected = scaler.slope * z.double() + scaler.intercept
    assert_close(scaler(z), expected.to(dtype), rtol=2e-2, atol=0)


def test_probabilities_are_calibrated_on_fresh_pairs() -> None:
    """About 1 of 20 pairs at most can be off by 2 standard errors: the mean probability is the share that matches."""
    scaler = PlattScaler().fit(*pairs(20_000, 0))
    z, matched = pairs(20_000, 1)
    for part in z.sort().indices.chunk(5):
        probability = scaler(z[part]).sigmoid().mean()
        assert float(probability) == pytest.approx(float(matched[part].double().mean()), abs=0.015)


def test_state_round_trips_and_stays_float64() -> None:
    """With ``is_fitted``; casts of a module leave both numbers as they are."""
    scaler, other = PlattScaler().fit(*pairs(500, 0)), PlattScaler()
    assert repr(other) == "PlattScaler(not fitted)"
    with pytest.raises(RuntimeError, match="PlattScaler is not fitted"):
        other(torch.zeros(1))
    other.load_state_dict(scaler.state_dict())
    other.half()
    assert other.is_fitted
    assert torch.equal(other.slope, scaler.slope)
    assert torch.equal(other.intercept, scaler.intercept)
    assert other.slope.dtype == DOUBLE
    assert repr(other).startswith("PlattScaler(slope=")
