"""Sigmoid losses and features over several processes against one on the whole batch, with gloo and a file store."""

from __future__ import annotations

import itertools
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from leaving import leave_together
from strategies import class_labels, unit_rows
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.testing import assert_close

from calrobust import (
    FeatureDistillationLoss,
    MultimodalContrastiveLoss,
    SigmoidContrastiveLoss,
    SigmoidDistillationLoss,
)

IMAGES = {2: [5, 3], 3: [4, 1, 6]}
TEXTS = {2: [6, 9], 3: [5, 7, 6]}


def rows_of(sizes: list[int], rank: int) -> slice:
    """Those of a rank in the whole batch."""
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def whole(world: int) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Of all ranks: features of images and of texts, by the student and by the teacher; and labels of both."""
    n, m = sum(IMAGES[world]), sum(TEXTS[world])
    features = [[unit_rows(k, 4, seed + i) for i in (0, 2)] for k, seed in ((n, 0), (m, 1))]
    return features[0], features[1], class_labels(n, 0), class_labels(m, 1)


def criteria(**options: Any) -> list[Any]:
    """All kinds of terms, and sums of them."""
    contrastive, distillation = SigmoidContrastiveLoss(**options), SigmoidDistillationLoss(temperature=2.0, **options)
    modality: Any = "image" if options.get("reduction") == "none" else "both"
    return [
        contrastive,
        distillation,
        FeatureDistillationLoss(modality=modality, **options),
        contrastive + 1.5 * SigmoidDistillationLoss(**options),
        contrastive
        + 0.5 * distillation
        + 2 * MultimodalContrastiveLoss(direction="image_to_text", **options)
        + FeatureDistillationLoss(modality="image", **options),
    ]


def value_and_inputs(criterion: Any, world: int, rank: int | None, kind: str) -> tuple[Tensor, list[Tensor]]:
    """The loss of the rows of a rank, or of all, and its differentiable arguments."""
    images, texts, of_images, of_texts = whole(world)
    if kind == "labels":  # which each image must have for the softmax
        of_texts = torch.cat([of_images, of_texts])[: len(of_texts)]
    sizes = IMAGES[world], IMAGES[world] if kind == "pairs" else TEXTS[world]
    here, there = (slice(0, sum(each)) if rank is None else rows_of(each, rank) for each in sizes)
    image, text = images[0][here].clone().requires_grad_(), texts[0][there].clone().requires_grad_()
    scale, bias = (torch.tensor(number, dtype=torch.float64, requires_grad=True) for number in (8.0, -4.0))
    taught = (images[1][here], texts[1][there], 6.0, -3.0) if "Distillation" in repr(criterion) else ()
    labels = (of_images[here], of_texts[there]) if kind == "labels" and "Contrastive" in repr(criterion) else None
    return criterion(image, text, scale, bias, *taught, labels=labels), [image, text, scale, bias]


def check_losses(rank: int, world: int) -> None:
    """Value on every rank and averaged gradients, with pairs and with labels of both sides."""
    for impl, reduction, kind in itertools.product(("auto", "dense"), ("mean", "sum"), ("pairs", "labels")):
        options: Any = {"impl": impl, "reduction": reduction}
        for ours, theirs in zip(criteria(gather=True, **options), criteria(**options), strict=True):
            value, inputs = value_and_inputs(ours, world, rank, kind)
            expected, all_inputs = value_and_inputs(theirs, world, None, kind)
            assert_close(value, expected, rtol=1e-12, atol=1e-12)
            value.backward()
            expected.backward()
            places = rows_of(IMAGES[world], rank), rows_of((IMAGES if kind == "pairs" else TEXTS)[world], rank)
            for k, (mine, other) in enumerate(zip(inputs, all_inputs, strict=True)):
                assert mine.grad is not None
                assert other.grad is not None
                if k < 2:
                    assert_close(mine.grad / world, other.grad[places[k]], rtol=1e-12, atol=1e-12)
                else:
                    dist.all_reduce(mine.grad)
                    assert_close(mine.grad / world, other.grad, rtol=1e-12, atol=1e-12)


def check_values_of_images(rank: int, world: int) -> None:
    """``reduction="none"`` gives each rank those of its images."""
    for ours, theirs in zip(criteria(gather=True, reduction="none"), criteria(reduction="none"), strict=True):
        value, _ = value_and_inputs(ours, world, rank, "labels")
        expected, _ = value_and_inputs(theirs, world, None, "labels")
        assert_close(value, expected[rows_of(IMAGES[world], rank)], rtol=1e-12, atol=1e-12)


def check_refusals(rank: int, world: int) -> None:
    """What differs or is wrong on one rank is an error on every rank."""
    x, criterion = unit_rows(3, 2, 0), SigmoidContrastiveLoss(gather=True)
    with pytest.raises(ValueError, match=r"^logit_bias \(a number, or .*\) must be the same on every rank"):
        criterion(x, x, 1.0, float(rank))
    with pytest.raises((ValueError, TypeError), match="logit_bias must be" if rank == 0 else r"rank \[0\] did not"):
        criterion(x, x, 1.0, float("nan") if rank == 0 else 0.0)
    both = criterion + SigmoidDistillationLoss(gather=True)
    with pytest.raises(ValueError, match=r"^whether it is terms\(\) that is called must be the same on every rank"):
        (both.terms if rank == 0 else both)(x, x, 1.0, 0.0, x, x, 1.0, 0.0)
    mixed = both.losses[0] + MultimodalContrastiveLoss(gather=True)  # whose terms are apart in any case
    expected = mixed(x, x, 1.0, 0.0)
    assert_close(sum(mixed.terms(x, x, 1.0, 0.0).values()) if rank == 0 else mixed(x, x, 1.0, 0.0), expected)


def on_rank(rank: int, world: int, store: str) -> None:
    """Every check, in one process group."""
    torch.set_num_threads(1)
    limit = timedelta(minutes=5)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit)
    for check in (check_losses, check_values_of_images, check_refusals):
        check(rank, world)
        dist.barrier()
    leave_together()


@pytest.mark.parametrize("world", [2, 3])
def test_processes_give_what_one_process_gives(world: int, tmp_path: Path) -> None:
    """With uneven numbers of images and of texts: the checks above."""
    spawn(on_rank, (world, str(tmp_path / "store")), nprocs=world)
