"""Losses: time and memory against open_clip and torch's chunked ``linear_cross_entropy``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from benchmarks.measure import Call, Row, Table, in_turn, missing, peak_memory, peer, share, slope, value
from torch import Tensor
from torch.nn import functional as F

from calrobust import SigmoidContrastiveLoss, SigmoidDistillationLoss
from calrobust.functional import carot_loss, multimodal_contrastive_loss, sigmoid_contrastive_loss

SIZES = (2048, 4096, 8192)
LARGEST = 16384  # for what does not need minutes there
LINEAR_SIZE = 4096  # where torch's linear_cross_entropy, smoothing and half precision are measured
WIDTH = 512
SCALE = 50.0
REPEATS = 3
KEEP = 2**40  # a memory_budget that everything fits into

IMAGES = 4096  # against banks
BANKS = (1000, 4096, 16384)
BANK_FORMS = ("cross_entropy", "kept", "tiled")
BANK_LIMIT = 0.75

PLAIN = ("ClipLoss", "kept", "tiled")
TAUGHT = ("DistillClipLoss", "kept + teacher", "tiled + teacher")
BEYOND = ("ClipLoss", "tiled")  # at LARGEST
TIME_LIMITS = {  # (ours, B): share of the peer's time
    ("kept", 4096): 0.48,
    ("kept", 8192): 0.48,
    ("tiled", 4096): 0.62,
    ("tiled", 8192): 0.60,
    ("tiled", 16384): 0.60,
    ("kept + teacher", 8192): 0.43,
    ("tiled + teacher", 8192): 0.60,
}
MEMORY_LIMITS = {
    ("tiled", 4096): 0.16,
    ("tiled", 8192): 0.085,
    ("tiled", 16384): 0.045,
    ("tiled + teacher", 8192): 0.040,
}


SIGMOID_LIMITS = {  # share of open_clip's time at LINEAR_SIZE, and of its memory there and at LARGEST
    "sigmoid": (0.62, 0.30, 0.08),
    "sigmoid + teacher": (0.85, None, None),
}


def tables() -> Iterator[Table]:
    """Time, memory and precision, one after the other."""
    torch.set_num_threads(1)
    yield _time()
    yield _memory()
    yield _bank()
    yield _variants()
    yield _sigmoid()


def build(candidate: str, size: int, dtype: torch.dtype = torch.float32) -> Call:
    """Forward and backward of a candidate on features made once."""
    inputs = _inputs(size, dtype)
    return lambda: _gradients(candidate, inputs)


def _inputs(size: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    common = 0.5 * torch.randn(1, WIDTH, generator=generator)  # features share a direction, as those of CLIP do
    rows = (torch.randn(size, WIDTH, generator=generator) + common for _ in range(4))
    image, text, teacher_image, teacher_text = (F.normalize(features, dim=1).to(dtype) for features in rows)
    return [image.requires_grad_(), text.requires_grad_(), teacher_image, teacher_text]


def _gradients(candidate: str, inputs: list[Tensor]) -> list[Tensor]:
    image, text, *teacher = inputs
    scale = torch.tensor(SCALE, dtype=torch.promote_types(image.dtype, torch.float32), requires_grad=True)
    return list(torch.autograd.grad(_loss(candidate, image, text, scale, teacher), (image, text, scale)))


def _loss(candidate: str, image: Tensor, text: Tensor, scale: Tensor, teacher: list[Tensor]) -> Tensor:
    own = torch.arange(len(image))
    options: dict[str, Any] = {"memory_budget": KEEP if "kept" in candidate else 0}
    teachers = (*teacher, scale.detach())
    match candidate:
        case "kept" | "tiled":
            return multimodal_contrastive_loss(image, text, scale, **options)
        case "kept, labels and smoothing" | "tiled, labels and smoothing":
            labels = own // 4
            return multimodal_contrastive_loss(image, text, scale, labels=labels, label_smoothing=0.1, **options)
        case "kept + teacher" | "tiled + teacher":
            return carot_loss(image, text, scale, *teachers, label_smoothing=0.0, distillation_weight=1.0, **options)
        case "ClipLoss":
            loss: Tensor = peer("open_clip.loss").ClipLoss()(image, text, scale)
            return loss
        case "DistillClipLoss":
            contrastive, distillation = peer("open_clip.loss").DistillClipLoss()(image, text, scale, *teachers)
            total: Tensor = (
                contrastive + 2 * distillation
            )  # its distillation is the mean of both directions, ours the sum
            return total
        case "sigmoid":
            return sigmoid_contrastive_loss(image, text, scale, -10.0)
        case "sigmoid + teacher":
            criterion = SigmoidContrastiveLoss() + SigmoidDistillationLoss()
            both: Tensor = criterion(image, text, scale, -10.0, *teachers, -10.0)
            return both
        case "SigLipLoss":
            sigmoid: Tensor = peer("open_clip.loss").SigLipLoss()(image, text, scale, torch.tensor(-10.0))
            return sigmoid
        case "ClipLoss, autocast" | "DistillClipLoss, autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return _loss(candidate.split(",")[0], image, text, scale, teacher)
        case "linear_cross_entropy":
            chunked = torch.nn.LinearCrossEntropyOptions()
            rows = F.linear_cross_entropy(scale * image, text, own, options=chunked)
            return (rows + F.linear_cross_entropy(scale * text, image, own, options=chunked)) / 2
    raise ValueError(f"no candidate {candidate!r}")


def _present(names: tuple[str, ...]) -> tuple[str, ...]:
    """Without the peers that are not installed."""
    return tuple(name for name in names if "Loss" not in name or peer("open_clip.loss") is not None)


def _against(name: str) -> str:
    return "DistillClipLoss" if "teacher" in name else "ClipLoss"


def _compared(curves: dict[str, dict[int, float]], limits: dict[tuple[str, int], float], unit: str) -> list[Row]:
    rows = []
    for name in ("kept", "tiled", "kept + teacher", "tiled + teacher"):
        for size, ours in curves[name].items():
            theirs = curves.get(_against(name), {}).get(size)
            label = f"B = {size}, {name} / {_against(name)}"
            rows.append(share(label, ours, theirs, limits.get((name, size)), unit, missing("open_clip.loss")))
    return rows


def _time() -> Table:
    table = Table(
        "Losses: time",
        f"D = {WIDTH}, float32, forward + backward; {torch.get_num_threads()} thread, CPU seconds, medians of "
        f'{REPEATS}. "kept": within `memory_budget`, "tiled": beyond it.',
    )
    curves: dict[str, dict[int, float]] = {name: {} for name in _present(PLAIN + TAUGHT)}
    for size in (*SIZES, LARGEST):
        names = _present(BEYOND if size == LARGEST else PLAIN + TAUGHT)
        for name, seconds in in_turn({name: build(name, size) for name in names}, REPEATS, time.process_time).items():
            curves[name][size] = seconds
    table.rows = _compared(curves, TIME_LIMITS, "s")
    table.rows += [value(f"log-log slope of time, {name}", slope(curves[name]), 2.1) for name in ("kept", "tiled")]
    table.rows += _linear()
    table.curves = {"CPU seconds": curves}
    return table


def _linear() -> list[Row]:
    """Against torch's own chunked loss, once a direction."""
    if not hasattr(F, "linear_cross_entropy"):
        note = f"torch {torch.__version__} has no linear_cross_entropy"
        return [Row("kept, tiled / linear_cross_entropy", "-", "-", None, note=note)]
    names = ("kept", "tiled", "linear_cross_entropy")
    seconds = in_turn({name: build(name, LINEAR_SIZE) for name in names}, REPEATS, time.process_time)
    return [
        share(f"B = {LINEAR_SIZE}, {name} / linear_cross_entropy, chunked", seconds[name], seconds[names[2]], limit)
        for name, limit in (("kept", 0.60), ("tiled", 0.75))
    ]


def _memory() -> Table:
    table = Table(
        "Losses: extra memory",
        f"D = {WIDTH}, float32, forward + backward; peak resident set above inputs and libraries, freed blocks "
        f"returned at once, each candidate in a process of its own, {torch.get_num_threads()} thread.",
    )
    curves: dict[str, dict[int, float]] = {name: {} for name in _present(PLAIN + TAUGHT)}
    for size in (*SIZES, LARGEST):
        for name in _present(BEYOND if size == LARGEST else PLAIN + TAUGHT):
            curves[name][size] = peak_memory(build, name, size, warm_up=(name, 64))
    table.rows = _compared(curves, MEMORY_LIMITS, "MiB")
    table.rows.append(value("log-log slope of extra memory, tiled", slope(curves["tiled"]), 1.1))
    table.curves = {"extra memory, MiB": curves}
    return table


def build_bank(candidate: str, classes: int) -> Call:
    """Forward and backward of images against a bank of classes, made once."""
    image, *_ = _inputs(IMAGES, torch.float32)
    bank = _inputs(classes, torch.float32)[1]
    labels = torch.arange(IMAGES) * 7 % classes, torch.arange(classes)
    scale = torch.tensor(SCALE, requires_grad=True)
    options: dict[str, Any] = {"direction": "image_to_text", "memory_budget": KEEP if candidate == "kept" else 0}

    def gradients() -> object:
        if candidate == "cross_entropy":
            loss = F.cross_entropy(scale * image @ bank.T, labels[0])
        else:
            loss = multimodal_contrastive_loss(image, bank, scale, labels=labels, **options)
        return torch.autograd.grad(loss, (image, bank, scale))

    return gradients


def _bank() -> Table:
    """One direction against a class bank, which torch's cross-entropy is of the whole matrix."""
    table = Table(
        "Losses: images against a bank of classes",
        f"N = {IMAGES}, D = {WIDTH}, float32, forward + backward of images, bank and scale; {torch.get_num_threads()} "
        f"thread, CPU seconds, medians of {REPEATS}, against `F.cross_entropy(s * x @ W.T, target)`.",
    )
    for classes in BANKS:
        candidates = {name: build_bank(name, classes) for name in BANK_FORMS}
        seconds = in_turn(candidates, REPEATS, time.process_time)
        memory = {name: peak_memory(build_bank, name, classes, warm_up=(name, 8)) for name in BANK_FORMS}
        for name in BANK_FORMS[1:]:
            label = f"C = {classes}, {name} / cross_entropy"
            table.rows.append(share(label, seconds[name], seconds["cross_entropy"], BANK_LIMIT))
            table.rows.append(share(f"{label}, extra memory", memory[name], memory["cross_entropy"], None, "MiB"))
    return table


def _variants() -> Table:
    """Labels and smoothing, and bfloat16 features."""
    table = Table(
        "Losses: labels, smoothing and bfloat16",
        f"B = {LINEAR_SIZE}, D = {WIDTH}; {torch.get_num_threads()} thread, CPU seconds, medians of {REPEATS}. "
        "Gradient error: relative, in the Frobenius norm, against float64 on the same bfloat16 features.",
    )
    names = ("kept", "kept, labels and smoothing", "tiled", "tiled, labels and smoothing")
    seconds = in_turn({name: build(name, LINEAR_SIZE) for name in names}, REPEATS, time.process_time)
    for name in ("kept", "tiled"):
        both = f"{name}, labels and smoothing"
        table.rows.append(share(f"{both} / {name}", seconds[both], seconds[name], 1.03))

    half = torch.bfloat16
    autocast = _present(("ClipLoss, autocast", "DistillClipLoss, autocast"))
    halves = {name: build(name, LINEAR_SIZE, half) for name in ("kept", "tiled", "kept + teacher", "tiled + teacher")}
    halves |= {name: build(name, LINEAR_SIZE, half) for name in autocast}
    halves |= {f"{name}, float32": build(name, LINEAR_SIZE) for name in _present(("ClipLoss", "DistillClipLoss"))}
    seconds = in_turn(halves, REPEATS, time.process_time)
    for name in ("kept", "tiled", "kept + teacher", "tiled + teacher"):
        limit = 0.58 if "teacher" in name else 0.65
        for other in ("autocast", "float32"):
            against = f"{_against(name)}, {other}"
            note = missing("open_clip.loss")
            table.rows.append(
                share(f"bfloat16, {name} / {against}", seconds[name], seconds.get(against), limit, note=note)
            )
    inputs = _inputs(LINEAR_SIZE, half)
    exact = [features.detach().double() for features in inputs]
    exact[:2] = [features.requires_grad_() for features in exact[:2]]
    for name in ("tiled", "tiled + teacher"):
        reference = _gradients(name, exact)
        error = _relative_error(_gradients(name, inputs), reference)
        other = f"{_against(name)}, autocast"
        theirs = missing("open_clip.loss")
        if other in autocast:
            theirs = f"{_relative_error(_gradients(other, inputs), reference):.2g}"
        table.rows.append(value(f"bfloat16, gradient error, {name} ({other})", error, 2e-3, peer=theirs))
    return table


def _sigmoid() -> Table:
    """The losses of sigmoid models."""
    table = Table(
        "Losses: sigmoids",
        f"D = {WIDTH}, float32, forward + backward, {torch.get_num_threads()} thread; CPU seconds, medians of "
        f"{REPEATS}; extra memory as above.",
    )
    names = _present(("SigLipLoss", *SIGMOID_LIMITS))
    note = missing("open_clip.loss")
    seconds = in_turn({name: build(name, LINEAR_SIZE) for name in names}, REPEATS, time.process_time)
    memory = {
        size: {name: peak_memory(build, name, size, warm_up=(name, 64)) for name in names}
        for size in (LINEAR_SIZE, LARGEST)
    }
    for name, (of_time, *of_memory) in SIGMOID_LIMITS.items():
        label = f"B = {LINEAR_SIZE}, {name} / SigLipLoss"
        table.rows.append(share(label, seconds[name], seconds.get("SigLipLoss"), of_time, note=note))
        for (size, found), limit in zip(memory.items(), of_memory, strict=True):
            label = f"B = {size}, extra memory, {name} / SigLipLoss"
            table.rows.append(share(label, found[name], found.get("SigLipLoss"), limit, "MiB", note))
    return table


def _relative_error(gradients: list[Tensor], reference: list[Tensor]) -> float:
    """Of the features' gradients."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(gradients[:2], reference[:2], strict=True))
