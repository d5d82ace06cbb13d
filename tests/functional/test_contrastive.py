"""MCL against its formula, torch's cross-entropy and closed forms."""

from __future__ import annotations

import math
from typing import Any

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Pairs, class_labels, fractions, paired_features, seeds, unit_rows
from torch.nn import functional as F
from torch.testing import assert_close

from calrobust.functional import multimodal_contrastive_loss

IMPLS = ("auto", "dense", "tiled")


@given(pairs=paired_features(), smoothing=fractions(), impl=st.sampled_from(IMPLS))
def test_is_torch_cross_entropy_on_the_whole_matrix(pairs: Pairs, smoothing: float, impl: Any) -> None:
    """Both directions of torch's own smoothed cross-entropy, averaged."""
    image, text, scale = pairs
    logits, own = scale * image @ text.T, torch.arange(len(image))
    expected = torch.stack([F.cross_entropy(s, own, label_smoothing=smoothing) for s in (logits, logits.T)]).mean()
    assert_close(
        multimodal_contrastive_loss(image, text, scale, label_smoothing=smoothing, impl=impl),
        expected,
        rtol=1e-10,
        atol=1e-10,
    )


@given(
    pairs=paired_features(), smoothing=fractions(), impl=st.sampled_from(IMPLS), labelled=st.booleans(), seed=seeds()
)
def test_value_and_gradients_are_those_of_the_formula(
    pairs: Pairs, smoothing: float, impl: Any, labelled: bool, seed: int
) -> None:
    """Per pair and with any upstream gradient: features, logit scale, labels, smoothing."""
    labels = class_labels(len(pairs.image), seed) if labelled else None
    image, text = pairs.image.requires_grad_(), pairs.text.requires_grad_()
    scale = torch.tensor(pairs.scale, dtype=torch.float64, requires_grad=True)
    weights = unit_rows(1, len(image), seed)[0]
    ours = multimodal_contrastive_loss(
        image, text, scale, labels=labels, label_smoothing=smoothing, reduction="none", impl=impl
    )
    theirs = oracles.contrastive(image, text, scale, labels=labels, smoothing=smoothing)
    assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    inputs = (image, text, scale)
    for a, b in zip(
        oracles.gradients(weights @ ours, *inputs), oracles.gradients(weights @ theirs, *inputs), strict=True
    ):
        assert_close(a, b, rtol=1e-10, atol=1e-10 * max(1.0, pairs.scale))


@given(pairs=paired_features(), smoothing=fractions(), seed=seeds())
def test_does_not_depend_on_the_order_of_pairs_nor_on_which_modality_comes_first(
    pairs: Pairs, smoothing: float, seed: int
) -> None:
    """A permutation of the pairs and a swap of images and texts leave the value."""
    image, text, scale = pairs
    order = torch.randperm(len(image), generator=torch.Generator().manual_seed(seed))
    value = multimodal_contrastive_loss(image, text, scale, label_smoothing=smoothing)
    assert_close(multimodal_contrastive_loss(image[order], text[order], scale, label_smoothing=smoothing), value)
    assert_close(multimodal_contrastive_loss(text, image, scale, label_smoothing=smoothing), value)


@given(
    n=st.integers(2, 12), own=st.integers(0, 11), rise=st.floats(0.01, 50), seed=seeds(), impl=st.sampled_from(IMPLS)
)
def test_falls_as_the_own_logit_rises(n: int, own: int, rise: float, seed: int, impl: Any) -> None:
    """Of that pair, strictly, while the other pairs do not see it: their own logits are others."""
    own %= n
    logits = 2 * torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    raised = logits.clone()
    raised[own, own] += rise
    # With the unit matrix for texts, the images are the pair matrix itself.
    before, after = (
        multimodal_contrastive_loss(matrix, torch.eye(n, dtype=torch.float64), 1.0, reduction="none", impl=impl)
        for matrix in (logits, raised)
    )
    others = torch.arange(n) != own
    assert after[own] < before[own]
    assert_close(after[others], before[others])


@given(n=st.integers(1, 40), smoothing=fractions(), impl=st.sampled_from(IMPLS))
def test_equal_features_give_log_of_the_batch(n: int, smoothing: float, impl: Any) -> None:
    """All logits alike: every candidate is as likely as any other."""
    features = torch.ones(n, 3, dtype=torch.float64) / math.sqrt(3)
    loss = multimodal_contrastive_loss(features, features, 100.0, label_smoothing=smoothing, impl=impl)
    assert_close(loss, torch.tensor(math.log(n), dtype=torch.float64), rtol=1e-12, atol=1e-12)


@given(pairs=paired_features(), smoothing=fractions())
def test_distinct_labels_are_no_labels_and_equal_labels_are_full_smoothing(pairs: Pairs, smoothing: float) -> None:
    """All distinct: nothing changes. All equal: every candidate is a positive, whatever the smoothing."""
    image, text, scale = pairs
    n = len(image)
    plain = multimodal_contrastive_loss(image, text, scale, label_smoothing=smoothing)
    distinct = multimodal_contrastive_loss(
        image, text, scale, label_smoothing=smoothing, labels=torch.arange(n).flip(0)
    )
    assert_close(distinct, plain)
    logits = scale * image @ text.T
    uniform = (logits.logsumexp(1).mean() + logits.logsumexp(0).mean()) / 2 - logits.mean()
    equal = multimodal_contrastive_loss(image, text, scale, label_smoothing=smoothing, labels=torch.full((n,), 3))
    assert_close(equal, uniform)


def test_labels_turn_false_negatives_into_positives() -> None:
    """Two captions of one class: an image is pushed from the other's without labels, and pulled with them (trap 6)."""
    image, text = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True), torch.eye(4, dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1])
    (without,) = oracles.gradients(multimodal_contrastive_loss(image, text, 1.0), image)  # [i, j] is that of s_ij
    (with_labels,) = oracles.gradients(multimodal_contrastive_loss(image, text, 1.0, labels=labels), image)
    assert without[0, 1] > 0 > with_labels[0, 1]
    assert with_labels[0, 2] > 0 > with_labels[0, 0]


@given(pairs=paired_features(), impl=st.sampled_from(IMPLS))
def test_reductions_are_torchs(pairs: Pairs, impl: Any) -> None:
    """The mean and the sum of the per-pair values."""
    image, text, scale = pairs
    values = multimodal_contrastive_loss(image, text, scale, reduction="none", impl=impl)
    assert values.shape == (len(image),)
    assert_close(multimodal_contrastive_loss(image, text, scale, reduction="mean", impl=impl), values.mean())
    assert_close(multimodal_contrastive_loss(image, text, scale, reduction="sum", impl=impl), values.sum())


@pytest.mark.parametrize("impl", IMPLS)
def test_is_finite_for_gaps_at_which_log_of_softmax_is_not(impl: Any) -> None:
    """A gap of 200 nats underflows exp in float32; logsumexp does not mind (trap 1)."""
    image, text = torch.tensor([[1.0], [-1.0]]).requires_grad_(), torch.tensor([[-1.0], [1.0]])
    assert (100.0 * image @ text.T).softmax(1).log().isinf().any()
    loss = multimodal_contrastive_loss(image, text, 100.0, impl=impl)
    assert_close(loss, torch.tensor(200.0))
    (gradient,) = oracles.gradients(loss, image)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_features_keep_float32_softmaxes(dtype: torch.dtype, impl: Any) -> None:
    """The gradient error against float64 on the same features stays below 2e-3, in autocast too (trap 5)."""
    image, text = (unit_rows(64, 32, seed, dtype).requires_grad_() for seed in (0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = multimodal_contrastive_loss(image, text, 100.0, impl=impl)
    assert loss.dtype == torch.float32
    ours = oracles.gradients(loss, image, text)
    assert [g.dtype for g in ours] == [dtype, dtype]
    exact = (image.detach().double().requires_grad_(), text.detach().double().requires_grad_())
    theirs = oracles.gradients(oracles.contrastive(*exact, 100.0).mean(), *exact)
    for a, b in zip(ours, theirs, strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < (2e-3 if dtype == torch.bfloat16 else 5e-4)


@pytest.mark.parametrize("impl", IMPLS)
def test_float32_agrees_with_float64(impl: Any) -> None:
    """Value and gradients within 5e-6 of float64 on the same features."""
    image, text = (unit_rows(200, 64, seed, torch.float32).requires_grad_() for seed in (0, 1))
    loss = multimodal_contrastive_loss(image, text, 100.0, label_smoothing=0.1, impl=impl)
    exact = (image.detach().double().requires_grad_(), text.detach().double().requires_grad_())
    expected = oracles.contrastive(*exact, 100.0, smoothing=0.1).mean()
    assert_close(loss.double(), expected, rtol=5e-6, atol=0)
    for a, b in zip(oracles.gradients(loss, image, text), oracles.gradients(expected, *exact), strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < 5e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_the_logit_scale_may_be_a_number_or_a_tensor_of_one_element(impl: Any) -> None:
    """open_clip's [1] parameter, a scalar tensor and a float give one value; a tensor receives its gradient."""
    image, text = unit_rows(5, 3, 0), unit_rows(5, 3, 1)
    scale = torch.tensor([7.0], requires_grad=True)
    loss = multimodal_contrastive_loss(image, text, scale, impl=impl)
    assert_close(loss, multimodal_contrastive_loss(image, text, 7.0, impl=impl))
    (gradient,) = oracles.gradients(loss, scale)
    assert gradient.shape == (1,)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("labelled", [False, True])
def test_compiles_without_a_graph_break(smoothing: float, labelled: bool) -> None:
    """torch.compile(fullgraph=True) gives the same value and gradient."""
    image, text = unit_rows(12, 4, 0).requires_grad_(), unit_rows(12, 4, 1)
    labels = class_labels(12, 0) if labelled else None

    def loss(x: torch.Tensor) -> torch.Tensor:
        return multimodal_contrastive_loss(x, text, 10.0, labels=labels, label_smoothing=smoothing)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(image)
    assert_close(compiled, loss(image))
    for a, b in zip(oracles.gradients(compiled, image), oracles.gradients(loss(image), image), strict=True):
        assert_close(a, b)
