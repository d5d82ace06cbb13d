"""Losses over several processes against one process on the whole batch, with gloo and a file store."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from leaving import leave_together
from strategies import class_labels, unit_rows
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from calrobust import CaRotLoss, EMATeacher, MultimodalContrastiveLoss, MultimodalDistillationLoss, functional

SIZES = {2: [5, 3], 3: [4, 1, 6]}  # uneven, one of them a single pair
TEXTS = {2: [2, 9], 3: [1, 8, 3]}  # where texts are no partners: fewer than images, or more
DIRECTIONS: tuple[Any, ...] = ("both", "image_to_text", "text_to_image")


class TwoTowers(nn.Module):
    """Two linear maps into one space, and a trained logit scale."""

    def __init__(self, seed: int) -> None:
        """Weights that are the same on every rank."""
        super().__init__()
        self.image = nn.Linear(6, 4, bias=False, dtype=torch.float64)
        self.text = nn.Linear(5, 4, bias=False, dtype=torch.float64)
        self.log_scale = nn.Parameter(torch.tensor(2.0 + seed / 10, dtype=torch.float64))
        generator = torch.Generator().manual_seed(seed)
        for weight in (self.image.weight, self.text.weight):
            nn.init.normal_(weight, generator=generator)

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit-norm features and the exponentiated scale."""
        image, text = (nn.functional.normalize(f, dim=1) for f in (self.image(images), self.text(texts)))
        return image, text, self.log_scale.exp()


def batch(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, texts and labels of which some repeat, within and across ranks."""
    return unit_rows(n, 6, 0), unit_rows(n, 5, 1), class_labels(n, 2) % 3


def own_rows(world: int, rank: int, sizes: dict[int, list[int]] = SIZES) -> slice:
    """Those of this rank in the whole batch."""
    start = sum(sizes[world][:rank])
    return slice(start, start + sizes[world][rank])


def gradients(model: nn.Module) -> list[Tensor]:
    """Of all parameters; zeros where there is none."""
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def averaged(model: nn.Module) -> list[Tensor]:
    """As DDP and FSDP average them."""
    found = gradients(model)
    for gradient in found:
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return found


def criteria(**options: Any) -> list[tuple[Any, bool]]:
    """Losses, and whether they take labels."""
    contrastive = MultimodalContrastiveLoss(label_smoothing=0.1, **options)
    distillation = MultimodalDistillationLoss(**options)
    return [
        (MultimodalContrastiveLoss(**options), False),
        (contrastive, True),
        (distillation, False),
        (contrastive + 1.5 * distillation, True),
        (contrastive + 0.5 * MultimodalDistillationLoss(temperature=2.0, **options), False),
        (CaRotLoss(label_smoothing=0.2, distillation_weight=0.7, **options), True),
    ]


def arguments(criterion: Any, model: nn.Module, rows: slice, n: int) -> tuple[Any, ...]:
    """What the criterion is called with."""
    images, texts, _ = batch(n)
    student = model(images[rows], texts[rows])
    if isinstance(criterion, MultimodalContrastiveLoss):
        return tuple(student)
    with torch.no_grad():
        return (*student, *TwoTowers(seed=1)(images[rows], texts[rows]))


def check_losses(rank: int, world: int) -> None:
    """Value on every rank and averaged gradients, for every loss, implementation and reduction."""
    rows, n = own_rows(world, rank), sum(SIZES[world])
    for impl, reduction in itertools.product(("auto", "dense", "tiled"), ("mean", "sum")):
        together = criteria(impl=impl, reduction=reduction, gather=True)
        alone = criteria(impl=impl, reduction=reduction)
        for (ours, labelled), (theirs, _) in zip(together, alone, strict=True):
            labels = batch(n)[2]
            model, whole = TwoTowers(seed=0), TwoTowers(seed=0)
            loss = ours(*arguments(ours, model, rows, n), **({"labels": labels[rows]} if labelled else {}))
            expected = theirs(*arguments(theirs, whole, slice(None), n), **({"labels": labels} if labelled else {}))
            assert_close(loss, expected, rtol=1e-10, atol=1e-12)
            (3 * loss).backward()
            (3 * expected).backward()
            for a, b in zip(averaged(model), gradients(whole), strict=True):
                assert_close(a, b, rtol=1e-10, atol=1e-12)


def check_values_of_pairs(rank: int, world: int) -> None:
    """reduction="none": each rank its own pairs; the mean of what each rank makes of them is differentiated exactly."""
    rows, n = own_rows(world, rank), sum(SIZES[world])
    weights = unit_rows(1, n, 3)[0]
    for (ours, _), (theirs, _) in zip(criteria(reduction="none", gather=True), criteria(reduction="none"), strict=True):
        model, whole = TwoTowers(seed=0), TwoTowers(seed=0)
        values = ours(*arguments(ours, model, rows, n))
        expected = theirs(*arguments(theirs, whole, slice(None), n))
        assert_close(values, expected[rows], rtol=1e-10, atol=1e-12)
        (weights[rows] @ values).backward()
        (weights @ expected / world).backward()
        for a, b in zip(averaged(model), gradients(whole), strict=True):
            assert_close(a, b, rtol=1e-10, atol=1e-12)


def check_candidates(rank: int, world: int) -> None:
    """Images and texts of other numbers on each rank: labels of both sides, one or two directions, and a teacher."""
    n, m = sum(SIZES[world]), sum(TEXTS[world])
    rows, texts = own_rows(world, rank), own_rows(world, rank, TEXTS)
    images, others = unit_rows(n, 4, 0), unit_rows(m, 4, 1)
    of_texts = class_labels(m, 2) % 5
    of_images = of_texts[torch.arange(n) * 5 % m]
    teacher = unit_rows(n, 3, 2), unit_rows(m, 3, 3)
    for impl, first, second in itertools.product(("auto", "dense"), DIRECTIONS, DIRECTIONS):
        found = []
        for whole in (False, True):
            mine, theirs = (slice(None), slice(None)) if whole else (rows, texts)
            options: Any = {"impl": impl, "gather": not whole}
            contrastive = MultimodalContrastiveLoss(label_smoothing=0.1, direction=first, **options)
            criterion = contrastive + 0.7 * MultimodalDistillationLoss(direction=second, **options)
            features = images[mine].clone().requires_grad_(), others[theirs].clone().requires_grad_()
            labels = of_images[mine], of_texts[theirs]
            loss = criterion(*features, 5.0, teacher[0][mine], teacher[1][theirs], 4.0, labels=labels)
            found.append((loss, *torch.autograd.grad(loss, features)))
        (loss, *ours), (expected, *exact) = found
        assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        for a, b, part in zip(ours, exact, (rows, texts), strict=True):
            assert_close(a, world * b[part], rtol=1e-12, atol=1e-12)


def check_lonely_images(rank: int, world: int) -> None:
    """Its text may be on another rank; if it is on none, all ranks say so. Further texts need no image."""
    image, text = unit_rows(2, 4, rank), unit_rows(3, 4, 10 + rank)
    criterion: Any = MultimodalContrastiveLoss(gather=True)
    elsewhere = (rank + 1) % world
    of_texts = 3 * rank + torch.arange(3)
    assert criterion(image, text, 5.0, labels=(3 * elsewhere + torch.arange(2), of_texts)).isfinite()
    assert criterion(image, text, 5.0).isfinite()
    with pytest.raises(ValueError, match=rf"got none for 1 of {2 * world} images"):
        criterion(image, text, 5.0, labels=(3 * elsewhere + torch.tensor([0, 99 if rank == 0 else 1]), of_texts))
    with pytest.raises(ValueError, match="text_features must hold a text for each image" if rank == 0 else "its own"):
        criterion(image, text[: 1 if rank == 0 else 3], 5.0)


def check_ddp(rank: int, world: int) -> None:
    """The real wrapper, with two optimiser steps: weights and logit scale stay those of one process."""
    rows, n = own_rows(world, rank), sum(SIZES[world])
    model, whole = TwoTowers(seed=0), TwoTowers(seed=0)
    wrapped = DistributedDataParallel(model)
    criterion = MultimodalContrastiveLoss(gather=True) + 1.5 * MultimodalDistillationLoss(gather=True)
    reference = MultimodalContrastiveLoss() + 1.5 * MultimodalDistillationLoss()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, whole)]
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        criterion(*arguments(criterion, wrapped, rows, n)).backward()
        reference(*arguments(reference, whole, slice(None), n)).backward()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        assert_close(a, b, rtol=1e-10, atol=1e-12)


def check_fsdp(rank: int, world: int) -> None:
    """Sharded weights, uneven batches: the gathered gradients are those of one process."""
    rows, n = own_rows(world, rank), sum(SIZES[world])
    model, whole = TwoTowers(seed=0), TwoTowers(seed=0)
    model.log_scale = nn.Parameter(model.log_scale.detach()[None])  # FSDP2 shards no scalar
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    for reduction in ("mean", "sum"):
        model.zero_grad()
        whole.zero_grad()
        ours, _ = criteria(reduction=reduction, gather=True)[3]
        theirs, _ = criteria(reduction=reduction)[3]
        ours(*arguments(ours, model, rows, n)).backward()
        theirs(*arguments(theirs, whole, slice(None), n)).backward()
        for a, b in zip(model.parameters(), whole.parameters(), strict=True):
            assert isinstance(a.grad, DTensor)
            assert b.grad is not None
            assert_close(a.grad.full_tensor(), b.grad.view(a.grad.shape), rtol=1e-10, atol=1e-12)


def sharded(seed: int, world: int, dtype: torch.dtype) -> tuple[TwoTowers, EMATeacher]:
    """A student and its teacher, each rank with its shards of both."""
    student = TwoTowers(seed)
    student.log_scale = nn.Parameter(student.log_scale.detach()[None])  # FSDP2 shards no scalar
    teacher = EMATeacher(student.to(dtype), 0.75)
    mesh = init_device_mesh("cpu", (world,))
    for module in (student, teacher.module, teacher.masters):
        if module is not None:
            fully_shard(module, mesh=mesh)
    return student, teacher


def check_teacher(rank: int, world: int) -> None:
    """Sharded, it averages as in one process; torch.distributed.checkpoint brings all of it back, bit for bit."""

    def step(student: nn.Module, teacher: EMATeacher, move: float) -> None:
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(move)
        teacher.update(student)

    def full(teacher: EMATeacher) -> list[Tensor]:
        held = (p for p in teacher.state_dict().values() if isinstance(p, Tensor))
        return [p.full_tensor() if isinstance(p, DTensor) else p for p in held]

    for dtype in (torch.float64, torch.bfloat16):  # the second has masters
        student, teacher = sharded(0, world, dtype)
        whole = TwoTowers(seed=0)
        whole.log_scale = nn.Parameter(whole.log_scale.detach()[None])
        reference = EMATeacher(whole.to(dtype), 0.75)
        for move in (1.0, -3.0):
            step(student, teacher, move)
            step(whole, reference, move)
        assert_close(full(teacher), full(reference), rtol=0, atol=0)

        where: list[Any] = [tempfile.mkdtemp() if rank == 0 else None]
        dist.broadcast_object_list(where)
        save(teacher.state_dict(), checkpoint_id=where[0])
        _, resumed = sharded(1, world, dtype)
        state = resumed.state_dict()
        load(state, checkpoint_id=where[0])
        resumed.load_state_dict(state)
        for one in (teacher, resumed):
            step(student, one, 0.5)
            step(student, one, -0.5)
        assert_close(full(resumed), full(teacher), rtol=0, atol=0)
        assert resumed.step == 4


def check_low_precision(rank: int, world: int) -> None:
    """bfloat16 features cross as they are, and their gradients are summed in float32 (trap 7's exactness, at 2e-3)."""
    rows, n = own_rows(world, rank), sum(SIZES[world])
    image, text = (unit_rows(n, 8, seed, torch.bfloat16) for seed in (0, 1))
    mine = [f[rows].clone().requires_grad_() for f in (image, text)]
    whole = [f.double().requires_grad_() for f in (image, text)]
    MultimodalContrastiveLoss(gather=True)(*mine, 20.0).backward()
    MultimodalContrastiveLoss()(*whole, 20.0).backward()
    for a, b in zip(mine, whole, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        expected = world * b.grad[rows]
        assert (a.grad.double() - expected).norm() <= 4e-3 * expected.norm()


def check_subgroup(rank: int, world: int) -> None:
    """A group of some ranks contrasts among themselves; a group of one rank is no group, nor is any without gather."""
    groups: list[Any] = [dist.new_group([0, 1]), dist.new_group([2])]
    group, members = (groups[0], [0, 1]) if rank < 2 else (groups[1], [2])
    images, texts, _ = batch(sum(SIZES[world]))
    own = torch.arange(len(images))[own_rows(world, rank)]
    all_members = torch.cat([torch.arange(len(images))[own_rows(world, member)] for member in members])
    carot = partial(functional.carot_loss, label_smoothing=0.1, distillation_weight=0.7)
    losses: list[tuple[Callable[..., Tensor], int]] = [
        (functional.multimodal_contrastive_loss, 1),
        (functional.multimodal_distillation_loss, 2),
        (carot, 2),
    ]
    for loss, models in losses:

        def value(rows: Tensor, loss: Callable[..., Tensor] = loss, models: int = models, **options: Any) -> Tensor:
            return loss(*(f for seed in range(models) for f in TwoTowers(seed)(images[rows], texts[rows])), **options)

        together = value(own, gather=True, group=group)
        assert_close(together, value(all_members, gather=False), rtol=1e-10, atol=1e-12)
        assert_close(value(own), value(own, gather=False), rtol=0, atol=0)
    if rank < 2:  # what is wrong is told within the group
        brought = own if rank == 0 else own[:0]
        with pytest.raises(ValueError, match=r"rank \[1\] did not" if rank == 0 else "at least one row"):
            MultimodalContrastiveLoss(gather=True, group=group)(*TwoTowers(0)(images[brought], texts[brought]))


def check_bytes(rank: int, world: int) -> None:
    """Texts cross once, their gradients come back once, all else is vectors: half of gathering both modalities."""
    n, width = 64, 256
    image, text = (unit_rows(n, width, 10 * rank + seed).requires_grad_() for seed in (0, 1))
    sent: dict[str, int] = {}

    def counting(name: str, argument: Callable[..., Any]) -> Callable[..., Any]:
        original = getattr(dist, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            tensors = argument(*args)
            sent[name] = sent.get(name, 0) + sum(t.numel() * t.element_size() for t in tensors)
            return original(*args, **kwargs)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather", counting("all_gather", lambda received, *_: received))
        patch.setattr(dist, "reduce_scatter", counting("reduce_scatter", lambda _, parts: parts))
        patch.setattr(dist, "all_reduce", counting("all_reduce", lambda tensor, *_: [tensor]))
        MultimodalContrastiveLoss(label_smoothing=0.1, gather=True)(image, text, 10.0).backward()
    features = 8 * world * n * width
    vectors = 8 * world * n
    assert features <= sent["all_gather"] <= features + 4 * vectors
    assert features <= sent["reduce_scatter"] <= features + 4 * vectors
    assert sent["all_reduce"] <= 3 * vectors


def check_refusals(rank: int, world: int) -> None:
    """What is wrong on one rank, or differs from the others, is an error on every rank; then all is fine."""
    good = (unit_rows(3, 4, 0), unit_rows(3, 4, 1), 5.0)
    narrow = (unit_rows(3, 2, 0), unit_rows(3, 2, 1), 5.0)
    single = (good[0].float(), good[1].float(), 5.0)
    trained = (good[0].clone().requires_grad_(), good[1], 5.0)
    last = world - 1
    contrastive: Any = MultimodalContrastiveLoss(gather=True)
    distillation: Any = MultimodalDistillationLoss(gather=True)
    both: Any = contrastive + distillation
    function: Any = partial(functional.multimodal_contrastive_loss, gather=True)
    refused = rf"rank \[{last}\] did not; its own error"
    broken: Any = contrastive + distillation
    broken.weights[1] = float("nan")

    def differs(fact: str) -> tuple[str, str]:
        of_output = r" \(a number, or width, dtype and requires_grad\)" if "features" in fact or "logit" in fact else ""
        return (f"^{fact}{of_output} must be the same on every rank, got",) * 2

    def labelled(*features: Any) -> Any:
        return contrastive(*features, labels=torch.arange(3))

    def without_gradient(*features: Any) -> Any:
        with torch.no_grad():
            return contrastive(*features)

    wrong: list[tuple[Any, Any, tuple[str, str]]] = [
        # what the last rank calls, what the others call, their errors
        (lambda: contrastive(good[0][:0], good[1][:0], 5.0), lambda: contrastive(*good), ("at least one row", refused)),
        (lambda: contrastive(*good[:2], -1.0), lambda: contrastive(*good), ("logit_scale must be > 0", refused)),
        (lambda: both(*good), lambda: both(*good, *good), ("needs teacher_image_features", refused)),
        (lambda: contrastive(*good, *good), lambda: contrastive(*good), ("no distillation term", refused)),
        (lambda: both(*good, *good, 1.0, 2.0), lambda: both(*good, *good), ("got 8 arguments", refused)),
        (
            lambda: distillation(*good, *good, labels=torch.arange(3)),
            lambda: distillation(*good, *good),
            ("none", refused),
        ),
        (lambda: function(*good, label_smoothing=2.0), lambda: function(*good), ("label_smoothing must be", refused)),
        (lambda: broken(*good, *good), lambda: both(*good, *good), ("weight must be finite", refused)),
        (lambda: function(*good, reduction="avg"), lambda: function(*good), ("reduction must be one of", refused)),
        (lambda: contrastive(*narrow), lambda: contrastive(*good), differs("image_features")),
        (lambda: contrastive(*single), lambda: contrastive(*good), differs("image_features")),
        (lambda: contrastive(*good[:2], 6.0), lambda: contrastive(*good), differs("logit_scale")),
        (lambda: labelled(*good), lambda: contrastive(*good), differs("the type of labels")),
        (
            lambda: contrastive(*good, labels=(torch.arange(3), torch.arange(3))),
            lambda: labelled(*good),
            differs("the type of labels"),
        ),
        (lambda: function(*good, direction="image_to_text"), lambda: function(*good), differs("the loss")),
        (lambda: contrastive(*trained), lambda: contrastive(*good), differs("image_features")),
        (
            lambda: without_gradient(*trained),
            lambda: contrastive(*trained),
            differs("image_features"),
        ),
        (
            lambda: distillation(*good, *narrow),
            lambda: distillation(*good, *good),
            differs("teacher_image_features"),
        ),
        (lambda: both(*good, *good), lambda: contrastive(*good), differs("the loss")),
        (lambda: (2 * both)(*good, *good), lambda: both(*good, *good), differs("the loss")),
        (lambda: function(*good, label_smoothing=0.1), lambda: function(*good), differs("the loss")),
        (lambda: function(*good, reduction="sum"), lambda: function(*good), differs("reduction")),
    ]
    for ours, theirs, (own, others) in wrong:
        with pytest.raises((ValueError, TypeError), match=own if rank == last else others):
            (ours if rank == last else theirs)()
        assert contrastive(*good).isfinite()
        assert both(*good, *good).isfinite()


def check_second_derivatives(rank: int, world: int) -> None:
    """Of the dense form: a penalty on gradients, summed over ranks, has the gradient of one process."""
    rows, n = own_rows(world, rank), sum(SIZES[world])
    for together, alone in zip(criteria(gather=True, impl="dense"), criteria(impl="dense"), strict=True):
        found = []
        for (criterion, _), part, factor in ((together, rows, world), (alone, slice(None), 1)):
            student = [unit_rows(n, 4, seed)[part].clone().requires_grad_() for seed in (0, 1)]
            teacher = [unit_rows(n, 4, seed)[part] for seed in (2, 3)]
            others = () if isinstance(criterion, MultimodalContrastiveLoss) else (*teacher, 4.0)
            first = torch.autograd.grad(criterion(*student, 5.0, *others), student, create_graph=True)
            penalty = torch.stack([(gradient / factor).square().sum() for gradient in first]).sum()
            found.append(torch.autograd.grad(penalty, student))
        for ours, theirs in zip(*found, strict=True):
            assert_close(ours, theirs[rows], rtol=1e-10, atol=1e-12)


def check_transforms(rank: int, world: int) -> None:
    """`torch.func` across ranks: the gradient of any form, and the derivative along tangents of the dense form."""
    rows, n = own_rows(world, rank), sum(SIZES[world])
    features, tangents = ([unit_rows(n, 4, seed) for seed in seeds] for seeds in ((0, 1, 2, 3), (4, 5)))
    others = *features[2:], 4.0
    for impl in ("dense", "tiled"):
        weights: dict[str, Any] = {"label_smoothing": 0.1, "distillation_weight": 1.5}
        ours, theirs = (CaRotLoss(**weights, gather=gather, impl=impl) for gather in (True, False))

        def of(loss: Any, part: slice) -> Callable[[Tensor, Tensor], Any]:
            frozen = [o[part] if isinstance(o, Tensor) else o for o in others]
            return lambda x, y: loss(x, y, 5.0, *frozen)

        here = [f[rows] for f in features[:2]]
        found = torch.func.grad(of(ours, rows), argnums=(0, 1))(*here)
        expected = torch.func.grad(of(theirs, slice(None)), argnums=(0, 1))(*features[:2])
        for gradient, whole in zip(found, expected, strict=True):
            assert_close(gradient, world * whole[rows], rtol=1e-10, atol=1e-12)
        if impl == "dense":
            along: Any = torch.func.jvp(of(ours, rows), tuple(here), tuple(t[rows] for t in tangents))
            assert_close(along, torch.func.jvp(of(theirs, slice(None)), (*features[:2],), (*tangents,)))


def check_near_zero(rank: int, world: int) -> None:
    """float32 losses of a millionth keep their digits over ranks too, and are never negative."""
    rows, n = own_rows(world, rank), sum(SIZES[world])
    images, noise = unit_rows(n, 32, 0), unit_rows(n, 32, 1)
    whole = [f.float() for f in (images, nn.functional.normalize(images + noise, dim=1))]
    teacher = [nn.functional.normalize(f + 0.1 * unit_rows(n, 32, 7), dim=1) for f in whole]
    exact, exact_teacher = ([f.double() for f in features] for features in (whole, teacher))
    for scale in (15.0, 20.0):
        mine = MultimodalContrastiveLoss(gather=True)(*(f[rows] for f in whole), scale)
        assert mine > 0
        assert_close(mine.double(), MultimodalContrastiveLoss()(*exact, scale), rtol=2e-5, atol=0)
        student, others = [f[rows] for f in whole], [f.float()[rows] for f in teacher]
        mine = MultimodalDistillationLoss(gather=True)(*student, scale, *others, scale)
        assert mine > 0
        theirs = MultimodalDistillationLoss()(*exact, scale, *(f.float().double() for f in exact_teacher), scale)
        assert_close(mine.double(), theirs, rtol=2e-5, atol=0)


def check_compiled(rank: int, world: int) -> None:
    """A gathered loss breaks the graph and is right; with fullgraph it is refused with the reason."""
    rows, n = own_rows(world, rank), sum(SIZES[world])
    image, text = unit_rows(n, 4, 0), unit_rows(n, 4, 1)
    criterion = MultimodalContrastiveLoss(gather=True)
    of_all = MultimodalContrastiveLoss(gather=True, group=dist.group.WORLD)
    for gathering in (criterion, of_all, of_all + 0 * of_all, of_all.terms):
        compiled: Any = torch.compile(gathering, backend="eager")
        value = compiled(image[rows], text[rows], 5.0)
        value = value["contrastive"] if isinstance(value, dict) else value
        assert_close(value, MultimodalContrastiveLoss()(image, text, 5.0))
        torch.compiler.reset()
    whole: Any = torch.compile(criterion, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="which no graph can hold"):
        whole(image[rows], text[rows], 5.0)


CHECKS = {
    2: [
        check_losses,
        check_values_of_pairs,
        check_candidates,
        check_lonely_images,
        check_ddp,
        check_fsdp,
        check_teacher,
        check_low_precision,
        check_bytes,
        check_refusals,
        check_second_derivatives,
        check_transforms,
        check_near_zero,
        check_compiled,
    ],
    3: [
        check_losses,
        check_values_of_pairs,
        check_candidates,
        check_lonely_images,
        check_ddp,
        check_subgroup,
        check_refusals,
        check_second_derivatives,
        check_transforms,
        check_near_zero,
    ],
}


def on_rank(rank: int, world: int, store: str) -> None:
    """Every check of this world size, in one process group: starting processes takes longer than checking."""
    torch.set_num_threads(1)
    limit = timedelta(minutes=5)  # a rank that waits in vain for another fails after that, not after half an hour
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit)
    for check in CHECKS[world]:
        try:
            check(rank, world)
        except BaseException as error:
            raise AssertionError(f"{check.__name__} on rank {rank}: {error}") from error
        dist.barrier()
    leave_together()


@pytest.mark.parametrize("world", [2, 3])
def test_processes_give_what_one_process_gives(world: int, tmp_path: Path) -> None:
    """Losses, gradients under averaging, sub-groups, bytes and errors: the checks above (traps 7 and 45)."""
    spawn(on_rank, (world, str(tmp_path / "store")), nprocs=world)


def test_outside_a_process_group_gathering_is_the_identity() -> None:
    """A script runs unchanged in one process."""
    student = unit_rows(5, 4, 0), unit_rows(5, 4, 1), 9.0
    labels = class_labels(5, 0)
    for reduction in ("mean", "sum", "none"):
        options: Any = {"reduction": reduction, "label_smoothing": 0.1}
        assert_close(
            MultimodalContrastiveLoss(gather=True, **options)(*student, labels=labels),
            MultimodalContrastiveLoss(**options)(*student, labels=labels),
        )
