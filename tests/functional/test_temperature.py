from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Predictions, classifier, predictions, seeds
from torch import Tensor
from torch.testing import assert_close

from calrobust import TemperatureScaler, _checks
from calrobust.functional import (
    Bins,
    bin_confidences,
    brier_decomposition,
    calibration_interval,
    fit_temperature,
    risk_coverage_curve,
)
from calrobust.functional import fitting as module


def quietly(logits: Tensor, target: Tensor) -> float:
    """Returns T, with or without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fit_temperature(logits, target).item()


ORDINARY = [  # samples, classes, sharpness, spread
    (40, 3, 0.5, 2.0),
    (300, 10, 0.3, 3.0),
    (1000, 100, 0.5, 5.0),
    (500, 1000, 0.6, 3.0),
    (5000, 2, 0.1, 10.0),
    (200, 10, 2.0, 1.0),
    (20000, 20, 0.4, 3.0),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "n_classes", "sharpness", "spread"), ORDINARY)
def test_is_the_optimum_to_one_part_in_a_million(
    n: int, n_classes: int, sharpness: float, spread: float, dtype: torch.dtype
) -> None:
    """Bisection of the float64 derivative on the same logits gives the same T."""
    logits, target = classifier(n, n_classes, 0, sharpness=sharpness, spread=spread, dtype=dtype)
    temperature = fit_temperature(logits, target)
    assert temperature.dtype == torch.float64
    assert temperature.shape == ()
    assert temperature.item() == pytest.approx(oracles.best_temperature(logits, target), rel=1e-6)


def test_few_samples_that_say_little_are_fitted_as_exactly() -> None:
    """Probabilities near 1 / C make the likelihood flat, and float32 arithmetic was off by up to 9e-6 there."""
    for seed in range(20):
        logits, target = classifier(20, 5, seed, spread=0.1)
        assert quietly(logits, target) == pytest.approx(quietly(logits.double(), target), rel=1e-7)


@pytest.mark.parametrize("scale", [1e-3, 1e-2, 1e2, 1e3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_finds_the_optimum_at_every_scale_of_the_logits(scale: float, dtype: torch.dtype) -> None:
    """It neither stops early nor diverges, and T scales with the logits (trap 28)."""
    logits, target = classifier(1000, 20, 0, sharpness=0.5, spread=3.0, dtype=dtype)
    temperature = fit_temperature(scale * logits, target).item()
    assert temperature == pytest.approx(scale * fit_temperature(logits, target).item(), rel=1e-6)
    assert temperature == pytest.approx(oracles.best_temperature(scale * logits, target), rel=1e-6)


@given(predictions(min_classes=2), st.integers(-3, 3))
def test_scales_with_the_logits(p: Predictions, exponent: int) -> None:
    """T(k z) = k T(z) for data that have an optimum."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        temperature = fit_temperature(*p).item()
        scaled = fit_temperature(p.logits * 8.0**exponent, p.target).item()
    if not caught:
        assert scaled == pytest.approx(8.0**exponent * temperature, rel=1e-6)


@given(seeds())
def test_a_shift_of_a_row_changes_nothing(seed: int) -> None:
    """T(z + c) = T(z) for any c of each row."""
    logits, target = classifier(200, 5, seed, sharpness=0.5, dtype=torch.float64)
    shift = 100 * torch.randn(200, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert fit_temperature(logits + shift, target).item() == pytest.approx(quietly(logits, target), rel=1e-8)


@given(predictions(min_samples=2, min_classes=2), seeds())
def test_order_of_samples_and_of_classes_does_not_matter(p: Predictions, seed: int) -> None:
    """This holds for data that have an optimum."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(size, generator=generator) for size in p.logits.shape)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        temperature = fit_temperature(*p).item()
        permuted = fit_temperature(p.logits[rows][:, columns], columns.argsort()[p.target[rows]]).item()
    if not caught:
        assert permuted == pytest.approx(temperature, rel=1e-6)


@given(predictions())
def test_is_positive_finite_and_never_worse_than_one(p: Predictions) -> None:
    """This holds for all data, also degenerate ones (trap 29)."""
    temperature = quietly(*p)
    assert 0 < temperature < float("inf")
    best, plain = (oracles.negative_log_likelihood(*p, temperature=t) for t in (temperature, 1.0))
    assert best <= plain + 1e-12 * (1 + plain)


def test_a_step_too_far_does_not_make_it_go_round_in_circles() -> None:
    """With one class against 999 equal ones, Newton's method alone would jump between two flat sides for ever."""
    logits = torch.zeros(10, 1000, dtype=torch.float64)
    logits[:, 1:] = -1
    target = torch.tensor([0] * 5 + [1] * 5)  # the top class is right half of the time: exp(1 / T) = 999
    assert fit_temperature(logits, target).item() == pytest.approx(1 / math.log(999), rel=1e-8)


def test_a_start_where_all_is_flat_finds_its_way_back() -> None:
    """Uninformative rows make the spread small, so 1/T starts so high that no probability changes with it."""
    logits = torch.zeros(10_004, 2, dtype=torch.float64)
    logits[:4, 1] = -1
    target = torch.arange(10_004) % 2
    target[:4] = torch.tensor([0, 0, 0, 1])  # who does know is right three times of four: exp(1 / T) = 3
    assert fit_temperature(logits, target).item() == pytest.approx(1 / math.log(3), rel=1e-8)


def test_a_fitted_temperature_is_fitted_again_as_one() -> None:
    """Scaled logits need no more scaling."""
    logits, target = classifier(500, 10, 0, sharpness=0.3, dtype=torch.float64)
    assert fit_temperature(logits / fit_temperature(logits, target), target).item() == pytest.approx(1, rel=1e-7)


@pytest.mark.parametrize("masked", [0, 3])
def test_few_passes_over_many_rows(masked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a start on a subset at most three passes follow, also where classes are masked."""
    passes = []
    derivatives = module._derivatives

    def counted(data: module._Data, beta: float) -> Tensor:
        passes.append(len(data.logits))
        return derivatives(data, beta)

    monkeypatch.setattr(module, "_derivatives", counted)
    for seed in range(5):
        passes.clear()
        logits, target = classifier(20000, 20, seed, sharpness=0.4, spread=3.0)
        fit_temperature(torch.cat([logits, torch.full((20000, masked), -torch.inf)], 1), target)
        assert 1 <= passes.count(20000) <= 3


def test_overconfident_logits_give_a_temperature_above_one() -> None:
    """T divides the logits, so it is not its inverse, and float32 logits change as well (trap 27)."""
    logits, target = classifier(5000, 10, 0, sharpness=0.5)
    assert fit_temperature(logits, target).item() == pytest.approx(2, rel=0.05)


def separable() -> Predictions:
    """Returns data in which every label has the highest logit."""
    logits, _ = classifier(50, 4, 0)
    return Predictions(logits, logits.argmax(1))


def test_separable_data_give_a_small_temperature_and_say_so() -> None:
    """T is a hundredth of the logits' spread, and at most 1."""
    logits, target = separable()
    spread = (logits.amax(1, keepdim=True) - logits).mean().item()
    with pytest.warns(UserWarning, match="they are separable, every label has the highest logit; T = "):
        assert fit_temperature(logits, target).item() == pytest.approx(spread / 100, rel=1e-6)
    with pytest.warns(UserWarning, match="separable"):
        assert fit_temperature(1000 * logits, target).item() == 1


def test_a_near_tie_does_not_make_masks_of_all_other_logits() -> None:
    """Masks are far beyond the usual distances, not beyond the smallest one."""
    logits, target = separable()
    top, second = logits[7].topk(2).indices
    logits[7, second] = logits[7, top] - 1e-5
    spread = (logits.amax(1, keepdim=True) - logits).mean().item()
    with pytest.warns(UserWarning, match="separable"):
        assert fit_temperature(logits, target).item() == pytest.approx(spread / 100, rel=1e-6)


def test_one_wrong_label_among_separable_data_has_an_optimum() -> None:
    """Nearly degenerate data are fitted without a warning."""
    logits, target = separable()
    target[7] = logits[7].argsort(descending=True)[1]
    assert fit_temperature(logits, target).item() == pytest.approx(oracles.best_temperature(logits, target), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_anti_correlated_labels_give_a_large_positive_temperature_and_say_so(scale: float) -> None:
    """It is a hundred times the logits' spread and at least 1, never negative (trap 29)."""
    logits, _ = classifier(50, 4, 0)
    logits, target = scale * logits, logits.argmin(1)
    spread = (logits.amax(1, keepdim=True) - logits).mean().item()
    with pytest.warns(UserWarning, match="temperature: logits and labels are uncorrelated or .* correlated; T = "):
        assert fit_temperature(logits, target).item() == pytest.approx(max(1, 100 * spread), rel=1e-6)


def test_labels_that_logits_say_nothing_of_give_a_large_temperature() -> None:
    """They are right as often as wrong, so the likelihood is highest at T = ∞. T is 100 times the spread of 1/2."""
    with pytest.warns(UserWarning, match="uncorrelated or negatively correlated"):
        assert fit_temperature(torch.tensor([[1.0, 0.0]]).expand(2, 2), torch.tensor([0, 1])) == 50


def test_random_labels_give_a_positive_temperature() -> None:
    """This holds whether or not there is an optimum at a positive T (trap 29)."""
    for seed in range(20):
        logits, target = classifier(200, 4, seed, sharpness=0.0)
        temperature = quietly(logits, target)
        uniform = oracles.negative_log_likelihood(torch.zeros_like(logits), target)
        assert temperature > 3
        furthest = (logits.amax(1) - logits.amin(1)).max() / temperature  # from uniform, in nats
        assert oracles.negative_log_likelihood(logits, target, temperature) < uniform + furthest


@pytest.mark.parametrize("logits", [torch.full((9, 3), 5.0), torch.arange(9.0)[:, None].expand(9, 3)])
def test_constant_logits_leave_the_temperature_at_one_and_say_so(logits: Tensor) -> None:
    """T changes nothing."""
    cause = "temperature: the logits of each sample are all equal, so that T changes nothing; T = 1 "
    with pytest.warns(UserWarning, match=cause):
        assert fit_temperature(logits, torch.arange(9) % 3) == 1


def test_labels_of_one_class_are_fitted_with_a_warning() -> None:
    """The optimum exists, but it says little."""
    logits, _ = classifier(50, 3, 0)
    target = torch.full((50,), 2)
    logits[:, 2] += 1
    with pytest.warns(UserWarning, match="all labels are of class 2"):
        assert fit_temperature(logits, target).item() == pytest.approx(
            oracles.best_temperature(logits, target), rel=1e-6
        )


@pytest.mark.parametrize(
    ("row", "expected"), [([0.0, 2.0, -9.0], None), ([3.0, 1.0, 0.0], 5 / 3 / 100), ([0.0, 1.0, 5.0], 300)]
)
def test_a_single_sample_is_fitted_with_a_warning(row: list[float], expected: float | None) -> None:
    """The three rows have an optimum, a right label and a wrong label."""
    logits, target = torch.tensor([row]), torch.tensor([0])
    with pytest.warns(UserWarning, match="there is a single sample"):
        temperature = fit_temperature(logits, target).item()
    assert temperature == pytest.approx(oracles.best_temperature(logits, target) if expected is None else expected)


def test_masked_classes_are_as_good_as_absent() -> None:
    """Logits of -inf may differ from row to row."""
    logits, target = classifier(300, 6, 0, sharpness=0.5, dtype=torch.float64)
    padded = torch.cat([logits, torch.full((300, 2), -torch.inf, dtype=torch.float64)], dim=1)
    assert fit_temperature(padded, target).item() == pytest.approx(fit_temperature(logits, target).item(), rel=1e-8)
    ragged = logits.masked_fill((torch.arange(6) - target[:, None]) % 6 == 2, -torch.inf)
    assert fit_temperature(ragged, target).item() == pytest.approx(
        oracles.best_temperature(ragged.clamp(min=-1e9), target), rel=1e-6
    )


def test_masked_classes_do_not_change_what_degenerate_data_give() -> None:
    """The documented T of anti-correlated and of separable data is that of the classes that are left."""
    logits = classifier(200, 5, 0).logits
    masked = torch.cat([logits, torch.full((200, 3), -torch.inf)], 1)
    for target, cause in ((logits.argmin(1), "negatively correlated"), (logits.argmax(1), "separable")):
        with pytest.warns(UserWarning, match=cause):
            expected = fit_temperature(logits, target)
        with pytest.warns(UserWarning, match=cause):
            assert_close(fit_temperature(masked, target), expected, rtol=1e-6, atol=0)


def test_no_graph_and_no_change_of_the_inputs() -> None:
    """Logits that need a gradient are only read."""
    logits, target = classifier(30, 3, 0, sharpness=0.5)
    before = logits.clone()
    assert not fit_temperature(logits.requires_grad_(), target).requires_grad
    assert_close(logits.detach(), before, rtol=0, atol=0)


HIDDEN: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "classes": lambda z, y, value: torch.cat([z, torch.full((len(z), 7), value, dtype=z.dtype)], 1),
    "classes of each sample": lambda z, y, value: z.masked_fill(
        (torch.arange(z.shape[1]) - y[:, None]) % z.shape[1] > z.shape[1] // 2, value
    ),
    "classes of one sample": lambda z, y, value: z.masked_fill(
        (torch.arange(len(z)) == 5)[:, None] & (torch.arange(z.shape[1]) != y[:, None]), value
    ),
    "all classes but one of most samples": lambda z, y, value: z.masked_fill(
        (torch.arange(len(z)) % 4 > 0)[:, None] & (torch.arange(z.shape[1]) != y[:, None]), value
    ),
    "classes, by addition": lambda z, y, value: torch.cat([z, z[:, :3].roll(1, 0) + value / 2], 1),
}


@pytest.mark.parametrize("hide", HIDDEN.values(), ids=HIDDEN)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "n_classes"), [(60, 3), (300, 20), (20_000, 20)])
def test_a_finite_mask_gives_the_temperature_of_minus_infinity(
    hide: Callable[[Tensor, Tensor, float], Tensor], dtype: torch.dtype, n: int, n_classes: int
) -> None:
    """This holds for every value down to the least number of the dtype, and there is no warning (trap 41)."""
    logits, target = classifier(n, n_classes, 0, sharpness=0.5, spread=3.0, dtype=dtype)
    expected = fit_temperature(hide(logits, target, -math.inf), target).item()
    least = torch.finfo(dtype).min
    for value in (-100.0, -1e3, -1e4, -1e6, -1e9, -1e20, -1e30, least / 2, least):
        if value >= least:
            assert fit_temperature(hide(logits, target, value), target).item() == pytest.approx(expected, rel=1e-6), (
                value
            )


@pytest.mark.parametrize("value", [-1e4, -1e9, -1e30, torch.finfo(torch.float32).min])
def test_a_finite_mask_does_not_change_what_degenerate_data_give(value: float) -> None:
    """The documented T of degenerate data is that of the classes that are left, as with ``-inf``."""
    logits = classifier(200, 5, 0).logits
    for target, cause in ((logits.argmin(1), "negatively correlated"), (logits.argmax(1), "separable")):
        with pytest.warns(UserWarning, match=cause):
            expected = fit_temperature(logits, target)
        with pytest.warns(UserWarning, match=cause):
            assert_close(fit_temperature(HIDDEN["classes"](logits, target, value), target), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [-math.inf, -1e4, -1e9, -3e38])
def test_a_mask_of_all_classes_but_one_is_no_distance(value: float) -> None:
    """One sample has a single class left, and the other a wrong label: T is 100 times the mean distance."""
    with pytest.warns(UserWarning, match="negatively correlated"):
        found = fit_temperature(torch.tensor([[1.0, 0.0, value], [2.0, value, value]]), torch.tensor([1, 0]))
    assert found == 25


def test_a_far_logit_is_no_mask_where_its_probability_counts() -> None:
    """Ten rows know little and are wrong, and one knows 500 times as much. The optimum weighs both."""
    logits = torch.tensor([[0.01, 0.0]] * 10 + [[5.0, 0.0]], dtype=torch.float64)
    target = torch.tensor([1] * 10 + [0])
    assert fit_temperature(logits, target).item() == pytest.approx(oracles.best_temperature(logits, target), rel=1e-6)


def test_a_label_far_below_all_others_counts_as_it_is() -> None:
    """A finite label has a likelihood. A label on the least number of the dtype makes data look anti-correlated."""
    logits, target = classifier(3000, 4, 0, sharpness=0.5, dtype=torch.float64)
    logits[3, target[3]] = -1e3
    assert fit_temperature(logits, target).item() == pytest.approx(oracles.best_temperature(logits, target), rel=1e-6)
    logits[3, target[3]] = torch.finfo(torch.float64).min
    with pytest.warns(UserWarning, match="uncorrelated or negatively correlated"):
        assert fit_temperature(logits, target) < 1000


def test_a_cap_that_is_reached_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A T on which Newton's method has not settled comes with a warning."""
    monkeypatch.setattr(module, "MAX_STEPS", 1)
    with pytest.warns(UserWarning, match="Newton's method did not converge in 1 steps; T = "):
        fit_temperature(*classifier(300, 10, 0, sharpness=0.3))


def test_further_dimensions_are_samples() -> None:
    """``fit_temperature`` takes ``[N, C, ...]`` with ``[N, ...]``, as torch's cross-entropy does."""
    logits, target = classifier(300, 5, 0, sharpness=0.5)
    image = logits.view(10, 6, 5, 5).movedim(-1, 1)
    assert_close(fit_temperature(image, target.view(10, 6, 5)), fit_temperature(logits, target), rtol=1e-7, atol=0)


def test_a_device_without_float64_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums need float64 (`meta` plays the device)."""
    monkeypatch.setattr(_checks, "WITHOUT_FLOAT64", {"meta"})
    logits, target = classifier(30, 3, 0)
    with pytest.raises(ValueError, match=r"^logits must be on a device that has float64.* got meta; .*\.cpu\(\)$"):
        fit_temperature(logits.to("meta"), target.to("meta"))
    with pytest.raises(ValueError, match=r"^scaler must be on a device that has float64"):
        TemperatureScaler().to("meta")
    confidences, correct = torch.rand(9, device="meta"), torch.ones(9, device="meta", dtype=torch.bool)
    for judge in (lambda: bin_confidences(confidences, correct), lambda: risk_coverage_curve(confidences, correct)):
        with pytest.raises(ValueError, match=r"^confidences must be on a device that has float64"):
            judge()
    with pytest.raises(ValueError, match=r"^confidences must be on a device that has float64"):
        calibration_interval(confidences, correct)
    with pytest.raises(ValueError, match=r"^bins\[0\] must be on a device that has float64"):
        brier_decomposition(Bins(confidences, confidences, confidences))


def test_ignored_samples_are_as_good_as_absent() -> None:
    """As in ``F.cross_entropy``, also of shape ``[N, C, ...]``."""
    logits, target = classifier(400, 5, 0, sharpness=0.5)
    target = target.where(torch.arange(400) % 3 > 0, -100)
    kept = target >= 0
    expected = fit_temperature(logits[kept], target[kept])
    assert_close(fit_temperature(logits, target, ignore_index=-100), expected, rtol=1e-6, atol=0)
    maps = logits.view(20, 20, 5).movedim(-1, 1), target.view(20, 20)
    assert_close(fit_temperature(*maps, ignore_index=-100), expected, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="at least one sample, got none"):
        fit_temperature(logits, torch.full_like(target, 3), ignore_index=3)


@pytest.mark.parametrize(("n", "dtype"), [(400, torch.float64), (40_000, torch.float32)])
def test_weights_are_cross_entropys(n: int, dtype: torch.dtype) -> None:
    """Torch's weighted loss has no slope at the T that is found; integers are repeated samples, 0 leaves out."""
    logits, target = classifier(n, 5, 0, sharpness=0.5, dtype=dtype)
    logits[:, 1] += 2 * (target == 1)  # one class is easier, so that weights matter
    weight = torch.tensor([0.0, 1.0, 3.0, 0.5, 2.0], dtype=dtype)
    found = fit_temperature(logits, target, weight=weight)
    beta = (1 / found).requires_grad_()
    loss = torch.nn.functional.cross_entropy(logits.double() * beta, target, weight=weight.double())
    assert abs(float(torch.autograd.grad(loss, beta)[0])) < 1e-6
    assert abs(float(found / fit_temperature(logits, target)) - 1) > 0.01
    times = torch.tensor([0, 1, 3, 1, 2])
    repeated = torch.arange(n).repeat_interleave(times[target])
    assert_close(
        fit_temperature(logits, target, weight=times.to(dtype)),
        fit_temperature(logits[repeated], target[repeated]),
        rtol=1e-6,
        atol=0,
    )
    for low in (torch.bfloat16, torch.float16):  # integers are exact there, their ratios are not
        assert fit_temperature(logits, target, weight=times.to(low)) == fit_temperature(
            logits, target, weight=times.float()
        )
    assert float(TemperatureScaler().fit(logits, target, weight=weight, ignore_index=7).temperature) == float(found)
    for unit in (1e-300, 1e300):  # which float32 does not hold
        assert_close(fit_temperature(logits, target, weight=unit * weight.double()), found, rtol=1e-6, atol=0)
