"""The symmetric contrastive losses of other libraries, which are all MCL."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from hypothesis import given
from strategies import Pairs, class_labels, paired_features, seeds, unit_rows
from torch import Tensor, nn
from torch.testing import assert_close

from calrobust import MultimodalContrastiveLoss
from calrobust.functional import multimodal_contrastive_loss
from calrobust.integrations.transformers import clip_features

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the peers depend on
    from info_nce import info_nce
    from pytorch_metric_learning.losses import SupConLoss
    from sentence_transformers.sentence_transformer.losses import (
        MultipleNegativesRankingLoss,
        MultipleNegativesSymmetricRankingLoss,
    )
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss


def info_nce_both_ways(image: Tensor, text: Tensor, scale: float) -> Tensor:
    """Its loss has one direction."""
    one, other = (info_nce(a, b, temperature=1 / scale) for a, b in ((image, text), (text, image)))
    return torch.add(one, other) / 2


def sentence_transformers_symmetric(image: Tensor, text: Tensor, scale: float) -> Tensor:
    """Under its old name and its new one, which agree."""
    model: Any = nn.Identity()  # the loss takes features as well
    both: Any = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the old name
        losses = MultipleNegativesRankingLoss(model, scale, **both), MultipleNegativesSymmetricRankingLoss(model, scale)
    new, old = (loss.compute_loss_from_embeddings([image, text], torch.empty(0)) for loss in losses)
    assert_close(new, old)
    return new


def transformers_clip_loss(image: Tensor, text: Tensor, scale: float) -> Tensor:
    """What ``return_loss=True`` gives."""
    return image_text_contrastive_loss(scale * text @ image.T)


def along_the_sphere(gradient: Tensor, features: Tensor) -> Tensor:
    """Without the part along the features, which losses that normalise for themselves do not have."""
    return gradient - (gradient * features.detach()).sum(1, keepdim=True) * features.detach()


@pytest.mark.parametrize(
    "theirs", [info_nce_both_ways, sentence_transformers_symmetric, transformers_clip_loss], ids=lambda f: f.__name__
)
@given(pairs=paired_features())
def test_symmetric_losses_are_ours(theirs: Callable[[Tensor, Tensor, float], Tensor], pairs: Pairs) -> None:
    """In value and in the gradients of both features, along the unit sphere."""
    inputs = pairs.image.requires_grad_(), pairs.text.requires_grad_()
    ours, other = multimodal_contrastive_loss(*inputs, pairs.scale), theirs(*inputs, pairs.scale)
    assert_close(ours, other, rtol=1e-9, atol=1e-9)
    gradients = (oracles.gradients(value, *inputs) for value in (ours, other))
    for features, a, b in zip(inputs, *gradients, strict=True):
        atol = 1e-9 * max(1.0, pairs.scale)
        assert_close(along_the_sphere(a, features), along_the_sphere(b, features), rtol=1e-8, atol=atol)


def test_the_loss_of_a_transformers_model_is_ours_of_its_output() -> None:
    """``clip_features`` takes the arguments."""
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text, vision = (
        {"vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 49},
        {"image_size": 8, "patch_size": 4},
    )
    model = CLIPModel(CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=8))
    output = model(torch.randint(0, 49, (4, 8)), torch.randn(4, 3, 8, 8), return_loss=True)
    assert_close(MultimodalContrastiveLoss()(*clip_features(output, model)), output.loss)


@given(seed=seeds())
def test_supervised_contrast_of_both_directions_is_ours_with_labels(seed: int) -> None:
    """With the labels of the references as a tensor of their own."""
    image, text, labels = unit_rows(12, 8, seed), unit_rows(12, 8, seed + 1), class_labels(12, seed)
    loss = SupConLoss(temperature=0.1)
    theirs = [loss(a, labels, ref_emb=b, ref_labels=labels.clone()) for a, b in ((image, text), (text, image))]
    ours = multimodal_contrastive_loss(image, text, 10.0, labels=labels)
    assert_close(ours, sum(theirs, torch.zeros(())) / 2, rtol=1e-6, atol=0)


def test_supervised_contrast_leaves_a_pair_out_where_both_labels_are_one_tensor() -> None:
    """It takes ``ref_labels is labels`` for a batch that is compared with itself."""
    image, text, labels = unit_rows(12, 8, 0), unit_rows(12, 8, 1), class_labels(12, 0)
    loss = SupConLoss(temperature=0.1)
    one, two = (loss(image, labels, ref_emb=text, ref_labels=given) for given in (labels, labels.clone()))
    assert abs(one - two) > 0.1


def test_supervised_contrast_is_zero_for_one_class_where_ours_is_not() -> None:
    """Without a negative pair it skips the batch; ours compares with a uniform target, and its least value is log N."""
    features, labels = unit_rows(4, 8, 0), torch.zeros(4, dtype=torch.int64)
    assert SupConLoss(temperature=0.1)(features, labels, ref_emb=features, ref_labels=labels.clone()) == 0
    assert multimodal_contrastive_loss(features, features, 10.0, labels=labels) > math.log(4)
    alike = features[:1].expand(4, -1)
    assert multimodal_contrastive_loss(alike, alike, 10.0, labels=labels).item() == pytest.approx(math.log(4))
