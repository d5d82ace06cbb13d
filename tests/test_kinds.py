"""One rule tells logits from probabilities, for the metrics, their functions, the temperature and the report."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import classifier, seeds
from torch import Tensor
from torch.testing import assert_close

from calrobust import ShiftReport, TemperatureScaler, metrics
from calrobust import functional as F
from calrobust._checks import check_kind


def printed(decimals: int) -> Callable[[Tensor], Tensor]:
    """Probabilities as they are written to text and read again."""
    return lambda z: torch.tensor([[float(f"{p:.{decimals}f}") for p in row] for row in z.softmax(1).tolist()])


def in_bfloat16_throughout(z: Tensor) -> Tensor:
    """A softmax whose every step rounds to bfloat16."""
    e = (z.bfloat16() - z.bfloat16().amax(1, keepdim=True)).exp()
    return (e / e.sum(1, keepdim=True)).float()


ROUNDED: dict[str, Callable[[Tensor], Tensor]] = {
    "float64": lambda z: z.double().softmax(1),
    "float32": lambda z: z.softmax(1),
    "bfloat16": lambda z: z.bfloat16().softmax(1),
    "float16": lambda z: z.half().softmax(1),
    "bfloat16, cast": lambda z: z.bfloat16().softmax(1).float(),
    "float16, cast": lambda z: z.half().softmax(1).float(),
    "bfloat16, throughout": in_bfloat16_throughout,
    "exp of log": lambda z: z.bfloat16().log_softmax(1).exp().double(),
    "two decimals": printed(2),
    "three decimals": printed(3),
    "four decimals": printed(4),
}


def taken(scores: Tensor, *, from_logits: bool) -> bool:
    """Whether the rule lets the rows pass."""
    try:
        check_kind(from_logits=from_logits, preds=scores)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("rounded", ROUNDED.values(), ids=ROUNDED)
@pytest.mark.parametrize("n", [12, 200])
def test_probabilities_of_any_precision_are_probabilities_and_no_logits(
    rounded: Callable[[Tensor], Tensor], n: int
) -> None:
    """What counts is the precision of the numbers, not the dtype that holds them (trap 35)."""
    for n_classes, spread in (
        (2, 0.3),
        (2, 4.0),
        (3, 0.3),
        (3, 4.0),
        (5, 1.0),
        (10, 0.3),
        (10, 4.0),
        (100, 4.0),
        (1000, 3.0),
        (1000, 4.0),
    ):
        probs = rounded(classifier(n, n_classes, 0, spread=spread).logits)
        assert taken(probs, from_logits=False), (n_classes, spread)
        assert not taken(probs, from_logits=True), (n_classes, spread)


@pytest.mark.parametrize("rounded", ["float64", "float32"])
@pytest.mark.parametrize("n_classes", [2, 3, 10, 1000])
def test_a_single_row_of_exact_probabilities_is_no_row_of_logits(rounded: str, n_classes: int) -> None:
    """Its sum is enough to tell."""
    for seed in range(100):
        assert not taken(ROUNDED[rounded](classifier(1, n_classes, seed).logits), from_logits=True)


LOGITS: dict[str, Callable[[int, int], Tensor]] = {
    "normal": lambda n, c: torch.randn(n, c),
    "uniform": lambda n, c: torch.rand(n, c),
    "cosines": lambda n, c: torch.rand(n, c) * 0.3 + max(0.0, 1 / c - 0.15),  # whose sums are about 1
    "constant rows": lambda n, c: torch.rand(1, c).expand(n, c),
    "zeros": lambda n, c: torch.zeros(n, c),
}


@pytest.mark.parametrize("logits", LOGITS.values(), ids=LOGITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("held_in", [None, torch.float32])
def test_no_batch_of_logits_is_refused_by_chance(
    logits: Callable[[int, int], Tensor], dtype: torch.dtype, held_in: torch.dtype | None
) -> None:
    """Many batches of one row and of a few, with two classes and a few more, are all taken."""
    for n in (1, 2, 6):
        for n_classes in (2, 3, 4, 10):
            for _ in range(80):
                assert taken(logits(n, n_classes).to(dtype).to(held_in or dtype), from_logits=True)


@given(seeds(), st.integers(1, 40), st.integers(2, 6), st.sampled_from(sorted(ROUNDED)))
def test_what_is_refused_as_logits_is_taken_as_probabilities(seed: int, n: int, n_classes: int, kind: str) -> None:
    """The advice in the message leads to the right value."""
    probs = ROUNDED[kind](classifier(n, n_classes, seed).logits)
    assert taken(probs, from_logits=True) or taken(probs, from_logits=False)
    assert taken(probs + 1, from_logits=True)
    assert taken(probs.log(), from_logits=True)


@pytest.mark.parametrize(("over", "are_probabilities"), [(9e-7, True), (1.1e-6, False)])
def test_what_may_be_a_probability_is_one_range_for_every_check(over: float, are_probabilities: bool) -> None:
    """That of a confidence, of a row that should be probabilities, and of one that should be logits."""
    rows, flags = (1 + over) * torch.eye(3, dtype=torch.float64), torch.ones(3, dtype=torch.bool)
    assert taken(rows, from_logits=False) is are_probabilities
    assert taken(rows, from_logits=True) is not are_probabilities
    assert bool(F.bin_confidences(rows.diag(), flags).confidence_sums.isfinite().all()) is are_probabilities


def test_a_probability_that_rounds_below_zero_is_one() -> None:
    """A last column that is one minus the others may be -6e-8. A label there has no finite likelihood."""
    probs = torch.tensor([[0.7, 0.3, 0.0], [0.2, 0.8, 0.0]]).repeat(50, 1)
    target = torch.tensor([0, 1] * 50)
    expected = F.calibration_error(probs, target, from_logits=False)
    for below, taken_for in ((-1e-8, False), (-9e-7, False), (-1.1e-6, True)):
        probs[0, 2] = below
        assert taken(probs, from_logits=True) is taken_for
        assert taken(probs, from_logits=False) is not taken_for
    probs[0, 2] = -1e-8
    assert_close(F.calibration_error(probs, target, from_logits=False), expected)
    assert F.negative_log_likelihood(probs, target, from_logits=False).isfinite()
    target[0] = 2
    assert F.negative_log_likelihood(probs, target, from_logits=False) == torch.inf


def test_numbers_that_are_neither_are_no_probabilities() -> None:
    """A row may sum to 3/4, lie outside [0, 1], or hold percentages."""
    for row in ([0.25, 0.25, 0.25], [-0.25, 0.25, 1.0], [0.0, 0.5, 1.5], [30.0, 70.0, 0.0], [0.31, 0.42, 0.40]):
        assert not taken(torch.tensor([row]), from_logits=False)


def test_the_example_of_the_report_is_refused_everywhere() -> None:
    """A softmax in bfloat16 has an ECE of .0135; taken for logits it would read .556 (trap 35)."""
    torch.manual_seed(0)
    z = 4 * torch.randn(4096, 10)
    y = torch.multinomial(z.softmax(1), 1)[:, 0]
    probs = z.bfloat16().softmax(1).float()
    calls: list[Callable[[], object]] = [
        lambda: metrics.CalibrationError().update(probs, y),
        lambda: F.calibration_error(probs, y),
        lambda: F.brier_score(probs, y),
        lambda: F.top_label(probs, y),
        lambda: F.fit_temperature(probs, y),
        lambda: TemperatureScaler().fit(probs, y),
        lambda: ShiftReport(id_domain="photo").fit_temperature("FT", probs, y),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"(preds|logits) must be logits, got rows in \[0, 1\] that sum to 1"):
            call()
    right = F.calibration_error(z, y)
    assert right.item() == pytest.approx(0.0135, abs=5e-4)
    assert F.calibration_error(probs, y, from_logits=False).item() == pytest.approx(right.item(), abs=2**-8)
    assert F.calibration_error(probs.log(), y).item() == pytest.approx(right.item(), abs=2**-8)


@pytest.mark.parametrize("from_logits", [True, False])
def test_a_single_class_is_refused_with_the_way_out(from_logits: bool) -> None:
    """The head of a binary classifier has one column; what the message says gives two (trap 36)."""
    z, y = torch.randn(50, 1), torch.randint(0, 2, (50,))
    probs = z.sigmoid()
    both = torch.cat((torch.zeros_like(z), z), 1) if from_logits else torch.cat((1 - probs, probs), 1)
    message = r"must have a column for each of two classes or more, got shape \[50, 1\]"
    functions: list[Callable[..., object]] = [F.top_label, F.calibration_error, F.classwise_calibration_error]
    for function in (*functions, F.adaptive_calibration_error, F.brier_score, F.negative_log_likelihood):
        with pytest.raises(ValueError, match=message):
            function(z if from_logits else probs, y, from_logits=from_logits)
    calls: list[Callable[[Tensor], object]] = [
        lambda logits: metrics.CalibrationError(from_logits=from_logits).update(logits, y),
        lambda logits: ShiftReport(id_domain="photo").add("FT", "photo", logits, y),
        lambda logits: F.fit_temperature(logits, y),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call(z if from_logits else probs)
    with pytest.raises(ValueError, match="num_classes must be >= 2, got 1"):
        metrics.ClasswiseCalibrationError(num_classes=1)
    assert F.brier_score(both, y, from_logits=from_logits).item() == pytest.approx(
        2 * (probs[:, 0] - y).square().mean().item(), rel=1e-5
    )
