from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from strategies import Predictions, confidences_and_correct, predictions, seeds
from torch import Tensor
from torch.testing import assert_close

from calrobust import ShiftReport
from calrobust.functional import risk_coverage_curve, selective_risk, top_label
from calrobust.functional.scoring import risk_contributions
from calrobust.metrics import SelectiveRisk
from calrobust.plotting import risk_coverage

assert_equal = partial(assert_close, rtol=0, atol=1e-12)


def over_all_orders(confidences: Tensor, correct: Tensor) -> Tensor:
    """The mean of the curves of all orders in which no confidence is above the one before it."""
    curves = []
    for order in map(list, itertools.permutations(range(len(confidences)))):
        if all(a >= b for a, b in itertools.pairwise(confidences[order].tolist())):
            curves.append((~correct[order]).double().cumsum(0) / torch.arange(1, len(order) + 1))
    return torch.stack(curves).mean(0)


@pytest.mark.parametrize("seed", range(40))
def test_is_the_mean_over_all_orders_of_ties(seed: int) -> None:
    """One, two or three different confidences among up to seven samples: brute force gives the same curve."""
    generator = torch.Generator().manual_seed(seed)
    n = 1 + seed % 7
    confidences = torch.randint(0, 1 + seed % 3, (n,), generator=generator) / 3
    correct = torch.rand(n, generator=generator) < 0.5
    assert_equal(risk_coverage_curve(confidences, correct), over_all_orders(confidences, correct))


@given(confidences_and_correct(), seeds())
def test_order_of_samples_does_not_matter(data: tuple[Tensor, Tensor], seed: int) -> None:
    """Many ties included."""
    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(seed))
    curves = (risk_coverage_curve(*(each[rows] for each in data)) for rows in (order, slice(None)))
    assert_equal(*curves)


@given(predictions())
def test_the_areas_are_means_of_the_curve(p: Predictions) -> None:
    """AURC over the coverages k/N, AUGRC weighted with them, in [0, 1]; the whole set has the error rate."""
    p = Predictions(3 * p.logits / p.logits.abs().max().clamp(min=3), p.target)  # no confidence rounds to 1
    confidences, correct = top_label(*p)
    curve = risk_coverage_curve(confidences, correct)
    coverages = torch.arange(1, len(curve) + 1) / len(curve)
    assert_equal(selective_risk(*p), curve.mean())
    assert_close(selective_risk(*p, generalized=True), (coverages.double() * curve).mean(), rtol=1e-6, atol=1e-7)
    assert_equal(curve[-1], 1 - correct.double().mean())
    assert 0 <= selective_risk(*p, generalized=True) <= selective_risk(*p) <= 1


def confident(scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of two classes, labels, and the AURC, which no scale changes."""
    generator = torch.Generator().manual_seed(0)
    margins = 10 * torch.rand(4000, generator=generator, dtype=torch.float64)
    correct = torch.rand(4000, generator=generator) < (0.3 * margins).sigmoid()
    area = risk_coverage_curve(margins, correct).mean()
    return (scale * torch.stack((margins, 0 * margins), 1)).float(), (~correct).long(), area


@pytest.mark.parametrize("scale", [1, 2, 5, 20, 1000])
@pytest.mark.parametrize("compiled", [False, True])
def test_confidences_that_round_to_1_keep_their_order(scale: float, compiled: bool) -> None:
    """At a scale of 5 two of three are 1 in float32; as ties they would make 0.144 of 0.112 (trap 50)."""
    logits, target, expected = confident(scale)
    function: Any = torch.compile(selective_risk, backend="eager", fullgraph=True) if compiled else selective_risk
    assert_close(function(logits, target), expected, rtol=1e-4, atol=0)
    metric = SelectiveRisk()
    for batch in zip(logits.split(700), target.split(700), strict=True):
        metric.update(*batch)
    assert_equal(metric.compute(), selective_risk(logits, target))
    report = ShiftReport(id_domain="photo")
    report.add("sure", "photo", logits, target)
    report.add("FT", "photo", logits / scale, target)
    assert report.summary()[0]["id_aurc"] == pytest.approx(float(expected), rel=1e-4)
    assert abs(report.compare("sure", "FT")["id_aurc"]) < 1e-4 * expected
    line = [*cast(Any, risk_coverage(report).lines[0].get_ydata())]
    assert line[-1] == pytest.approx(100 * float((target == 1).float().mean()))
    assert sum(line) / len(line) == pytest.approx(100 * float(expected), rel=1e-4)


def test_given_probabilities_tie_as_they_are_given() -> None:
    """Nobody knows what was rounded to 1."""
    probs, target = torch.tensor([[1.0, 0.0], [1.0, 1e-9]]), torch.tensor([1, 0])
    assert selective_risk(probs, target, from_logits=False) == 0.5
    assert selective_risk(torch.tensor([[40.0, 0.0], [20.0, 0.0]]), torch.tensor([0, 1])) == 0.25


def test_by_hand() -> None:
    """Errors at ranks 1 and 3 of 4: risks 1, 1/2, 2/3 and 1/2."""
    curve = risk_coverage_curve(torch.tensor([0.1, 0.4, 0.2, 0.3]), torch.tensor([True, False, False, True]))
    assert_equal(curve, torch.tensor([1, 1 / 2, 2 / 3, 1 / 2], dtype=torch.float64))


@given(confidences_and_correct())
def test_contributions_average_to_the_area(data: tuple[Tensor, Tensor]) -> None:
    """In the order of the samples, equal for equal samples."""
    contributions = risk_contributions(*data)
    assert_equal(contributions.mean(), risk_coverage_curve(*data).mean())
    for confidence, right in set(zip(*(each.tolist() for each in data), strict=True)):
        same = contributions[(data[0] == confidence) & (data[1] == right)]
        assert_equal(same, same[:1].expand_as(same))


@pytest.mark.parametrize("ties", [False, True])
def test_contributions_are_what_a_sample_changes(ties: bool) -> None:
    """N AURC - (N - 1) AURC without the sample (its pseudo-value), within 0.01; they range over more than 1."""
    generator = torch.Generator().manual_seed(0)
    n = 2000
    confidences = torch.rand(n, generator=generator, dtype=torch.float64)
    correct = torch.rand(n, generator=generator) < confidences
    confidences = (10 * confidences).round() if ties else confidences
    whole, contributions = risk_coverage_curve(confidences, correct).mean(), risk_contributions(confidences, correct)
    assert contributions.max() - contributions.min() > 1
    for i in range(0, n, 50):
        others = torch.arange(n) != i
        without = risk_coverage_curve(confidences[others], correct[others]).mean()
        assert_close(contributions[i], n * whole - (n - 1) * without, rtol=0, atol=0.01)


def test_any_score_may_order() -> None:
    """Only the order counts, so that logits or margins do as well."""
    scores, correct = torch.randn(50, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 3 > 0
    assert torch.equal(risk_coverage_curve(scores, correct), risk_coverage_curve(scores.sigmoid().double(), correct))


def test_nothing_and_nan_give_nan() -> None:
    """No sample has no risk, and a NaN has no place in the order."""
    assert selective_risk(torch.empty(0, 2), torch.empty(0, dtype=torch.int64)).isnan()
    assert risk_coverage_curve(torch.tensor([0.5, math.nan]), torch.tensor([True, True])).mean().isnan()
    assert selective_risk(torch.tensor([[math.nan, 0.0]]), torch.tensor([0])).isnan()
