from __future__ import annotations

import oracles
import pytest
import torch
from hypothesis import given
from strategies import Predictions, classifier, predictions
from torch.nn import functional as F
from torch.testing import assert_close

from calrobust.functional.scoring import (
    brier_score,
    log_losses,
    negative_log_likelihood,
    probability_blocks,
    squared_errors,
)


def tolerance(p: Predictions) -> float:
    """Returns the rounding error of one row's arithmetic."""
    return 1e-6 if p.logits.dtype == torch.float32 else 1e-13


@given(predictions())
def test_likelihood_is_torchs_cross_entropy(p: Predictions) -> None:
    """The value is in nats, for batches of all sizes and sharpnesses."""
    value = negative_log_likelihood(*p)
    assert value.dtype == torch.float64
    assert_close(value, oracles.negative_log_likelihood(*p), rtol=tolerance(p), atol=tolerance(p))


@given(predictions())
def test_brier_score_is_the_squared_distance_to_the_indicator(p: Predictions) -> None:
    """It is summed over classes and averaged over samples, and lies in [0, 2]."""
    probs = p.logits.double().softmax(1)
    expected = (probs - F.one_hot(p.target, probs.shape[1])).square().sum(1).mean()
    value = brier_score(*p)
    # A rounded probability p is off by eps, its square (1 - p)² by 2 (1 - p) eps.
    assert (value - expected).abs() <= tolerance(p) * (expected.sqrt() + tolerance(p))
    assert 0 <= value <= 2


def test_a_confident_row_keeps_its_digits() -> None:
    """P = 1 - 1e-4 scores 2e-8, which a difference of squares would lose in float32."""
    p = 1e-4
    logits = torch.stack([torch.tensor(1 - p).log(), torch.tensor(p).log()])[None]
    value = brier_score(logits, torch.tensor([0]))
    assert value.item() == pytest.approx(2 * p**2, rel=2e-3)


@pytest.mark.parametrize("from_logits", [True, False])
def test_a_square_is_not_rounded_twice(from_logits: bool) -> None:
    """Probabilities of one half score exactly 1/2, and certainty of a wrong class scores exactly 2."""
    preds = torch.tensor([[0.0, 0.0], [200.0, 0.0]] if from_logits else [[0.5, 0.5], [1.0, 0.0]])
    assert brier_score(preds[:1], torch.tensor([1]), from_logits=from_logits) == 0.5
    assert brier_score(preds[1:], torch.tensor([1]), from_logits=from_logits) == 2


def test_the_squares_of_a_thousand_classes_keep_float32s_digits() -> None:
    """Each row is within three units in the last place of the float64 score of its probabilities."""
    logits, target = classifier(200, 1000, 0)
    (block,) = probability_blocks(logits, target, True, None)
    exact = (block.probs.double() - F.one_hot(target, 1000)).square().sum(1)
    assert_close(squared_errors(block).double(), exact, rtol=3 * 2**-23, atol=0)


@pytest.mark.parametrize("from_logits", [True, False])
def test_a_block_may_be_read_in_any_order(from_logits: bool) -> None:
    """Scores do not change the block's probabilities, which may be the caller's own tensor."""
    logits, target = classifier(20, 5, 0)
    preds = logits if from_logits else logits.softmax(1)
    before = preds.clone()
    (block,) = probability_blocks(preds, target, from_logits, None)
    first, second = (squared_errors(block), log_losses(block)), (log_losses(block), squared_errors(block))
    assert_close(first, second[::-1], rtol=0, atol=0)
    assert torch.equal(preds, before)


def test_likelihood_from_logits_does_not_underflow() -> None:
    """From logits it is finite, even 1e4 nats below the top. From probabilities it is inf (trap 25)."""
    logits, target = classifier(100, 50, 0, sharpness=0.0, spread=8 * 4.0)
    assert negative_log_likelihood(logits.softmax(1), target, from_logits=False) == torch.inf
    assert_close(
        negative_log_likelihood(logits, target), oracles.negative_log_likelihood(logits, target), rtol=1e-6, atol=0
    )
    assert negative_log_likelihood(torch.tensor([[1e4, 0.0]]), torch.tensor([1])) == 1e4


def test_a_label_on_a_masked_class_is_infinitely_unlikely() -> None:
    """The likelihood is 0 there, while the Brier score stays finite."""
    logits, target = torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([2])
    assert negative_log_likelihood(logits, target) == torch.inf
    assert brier_score(logits, target).item() == pytest.approx(1.5)


@given(predictions())
def test_probabilities_and_their_logits_agree(p: Predictions) -> None:
    """They differ by the rounding of the probabilities alone."""
    logits, target = p.logits.double().clamp(-20, 20), p.target
    for function in (brier_score, negative_log_likelihood):
        assert_close(function(logits.softmax(1), target, from_logits=False), function(logits, target))


@given(predictions())
def test_ignored_samples_are_as_good_as_absent(p: Predictions) -> None:
    """Their rows may hold anything, NaN included."""
    logits = torch.cat([torch.full((1, p.logits.shape[1]), torch.nan, dtype=p.logits.dtype), p.logits])
    target = torch.cat([torch.tensor([-1]), p.target])
    for function in (brier_score, negative_log_likelihood):
        assert_close(function(logits, target, ignore_index=-1), function(*p), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_get_float32_arithmetic(dtype: torch.dtype) -> None:
    """The only loss is the rounding of the logits themselves."""
    logits, target = classifier(200, 30, 0, dtype=dtype)
    for function in (brier_score, negative_log_likelihood):
        assert_close(function(logits, target), function(logits.float(), target), rtol=0, atol=0)


def test_no_samples_and_nan_rows_give_nan() -> None:
    """The value is never 0 then (trap 21)."""
    for function in (brier_score, negative_log_likelihood):
        assert function(torch.empty(0, 3), torch.empty(0, dtype=torch.int64)).isnan()
        for from_logits in (True, False):
            preds = torch.tensor([[0.5, torch.nan], [0.0, 1.0]])
            assert function(preds, torch.tensor([0, 0]), from_logits=from_logits).isnan()


def test_captures_as_one_graph() -> None:
    """No value is read back on the way."""
    logits, target = classifier(40, 5, 0)
    for function in (brier_score, negative_log_likelihood):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert_close(compiled(logits, target), function(logits, target))
