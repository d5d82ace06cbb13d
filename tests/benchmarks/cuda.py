"""A CUDA device: losses against other kernels, open_clip and torch; metrics, temperature and teacher against theirs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from benchmarks import ema, temperature
from benchmarks.data import classifier
from benchmarks.measure import MIB, Call, Row, Table, in_turn, missing, peer, share, value
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassCalibrationError

from calrobust import SigmoidContrastiveLoss, SigmoidDistillationLoss, TemperatureScaler
from calrobust.functional import carot_loss, multimodal_contrastive_loss, sigmoid_contrastive_loss
from calrobust.kernels import Impl
from calrobust.metrics import CalibrationError, NegativeLogLikelihood

SETTINGS = {  # (width, dtype): sizes of batches
    (512, torch.bfloat16): (4096, 32768, 65536),
    (768, torch.bfloat16): (4096, 32768, 65536),
    (512, torch.float32): (4096, 32768),
}
JUDGED = 32768  # batches from this size on have limits in bfloat16, and the kernels are looked at in one of this size
SCALE, BIAS = 50.0, -10.0
REPEATS = 5
ROWS, CLASSES, N_BINS = 50_000, 1_000, 15
SQUARE = 8192  # of the matrices that the rate of matrix products is measured on
KERNELS: Impl = "triton"
DEVICE = torch.device("cuda")

UNITS = {"MCL": 4, "MCL + MKD": 6, "sigmoid": 3, "sigmoid + MKD": 4, "MCL, one direction": 4}
PEERS_OF = {  # ours: what it is compared with
    "MCL": ("tiled MCL", "dense MCL", "ClipLoss", "ClipLoss, compiled", "memeff", "two Inf-CL"),
    "MCL + MKD": ("tiled MCL + MKD", "dense MCL + MKD", "DistillClipLoss", "DistillClipLoss, compiled"),
    "sigmoid": ("tiled sigmoid", "SigLipLoss", "siglip-kernel"),
}
SHARES = {  # (ours, theirs): share of the time, share of the memory
    ("MCL", "two Inf-CL"): (0.5, None),
    ("MCL", "memeff"): (0.8, None),
    ("MCL + MKD", "DistillClipLoss"): (0.5, 0.05),
    ("sigmoid", "siglip-kernel"): (1.0, None),
}
MILLISECONDS = {  # (ours, B) at D = 768 in bfloat16, on an H100
    ("MCL", 65536): 66.0,
    ("MCL + MKD", 65536): 99.0,
    ("MCL", 32768): 16.5,
    ("MCL + MKD", 32768): 24.75,
}
MEMORY = 1.4e9 / MIB  # of each at B = 65,536
try:
    from triton import OutOfResources
except ImportError:  # then no kernel runs
    OutOfResources = torch.cuda.OutOfMemoryError

MODULES = {  # part of a candidate's name: where it comes from
    "Loss": "open_clip.loss",
    "Inf-CL": "inf_cl",
    "memeff": "memeff",
    "siglip-kernel": "siglip_kernel",
}
PRECISION = {torch.bfloat16: 2e-3, torch.float32: 5e-6}
LIBRARY = (
    ("CalibrationError", "torchmetrics' Metric"),
    ("NegativeLogLikelihood", "F.cross_entropy in 1,024s"),
    ("TemperatureScaler.fit", "L-BFGS with line search"),
    ("EMATeacher.update", "copy_"),
    ("EMATeacher.update", "timm ModelEmaV3"),
)


def tables() -> Iterator[Table]:
    """A table for each width and dtype, then precision and blocks of the kernels, and the rest of the library."""
    if not torch.cuda.is_available():
        yield _absent()
        return
    where = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    for width, dtype in SETTINGS:
        yield _losses(where, width, dtype)
    yield _kernels(where)
    yield _library(where)


def _absent() -> Table:
    """What there is to measure."""
    table = Table("CUDA", "Not yet measured: there was no CUDA device. What there is to measure:")
    for ours, peers in PEERS_OF.items():
        table.rows.append(_unmeasured(f"{ours} / {'; '.join(peers)}"))
    for ours in UNITS:
        table.rows.append(_unmeasured(f"{ours}: share of the rate of a matrix product"))
    for dtype, limit in PRECISION.items():
        table.rows.append(_unmeasured(f"gradient error, {_name(dtype)}, against float64", limit))
    table.rows += [_unmeasured(f"{ours} / {theirs}") for ours, theirs in LIBRARY]
    return table


def _unmeasured(what: str, limit: float | None = None) -> Row:
    return Row(what, "-", "-", None, "≤", limit, "not yet measured")


class Events:
    """A clock of CUDA events: seconds on the device since it was made."""

    def __init__(self) -> None:
        self.start = torch.cuda.Event(enable_timing=True)
        self.start.record()

    def __call__(self) -> float:
        """Waits for the device."""
        now = torch.cuda.Event(enable_timing=True)
        now.record()
        now.synchronize()
        return float(self.start.elapsed_time(now)) / 1000


def measured(candidates: Mapping[str, Call]) -> tuple[dict[str, float], dict[str, float]]:
    """Median milliseconds by CUDA events, and peak MiB above what stands; of what fits into the device's memory."""
    megabytes = {}
    for name, call in candidates.items():
        try:
            call()  # compiles
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            megabytes[name] = (torch.cuda.max_memory_allocated() - before) / MIB
        except (torch.cuda.OutOfMemoryError, OutOfResources):  # of the device, or of what a block may take
            continue
    seconds = in_turn({name: candidates[name] for name in megabytes}, REPEATS, Events())
    return {name: 1000 * each for name, each in seconds.items()}, megabytes


def inputs(size: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Unit-norm features of student and teacher that share a direction, as those of CLIP do; the first two learn."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    common = 0.5 * torch.randn(1, width, generator=generator, device=DEVICE)
    rows = (torch.randn(size, width, generator=generator, device=DEVICE) + common for _ in range(4))
    image, text, *teacher = (F.normalize(features, dim=1).to(dtype) for features in rows)
    return [image.requires_grad_(), text.requires_grad_(), *teacher]


def steps(features: list[Tensor]) -> dict[str, Call]:
    """Forward and backward of every candidate that is installed."""
    image, text, teacher_image, teacher_text = features
    scale, bias = (torch.tensor(number, device=DEVICE, requires_grad=True) for number in (SCALE, BIAS))
    typed, typed_bias = (number.detach().to(image.dtype).requires_grad_() for number in (scale, bias))  # as theirs are
    teacher = teacher_image, teacher_text, scale.detach()

    def taught(impl: Impl) -> Tensor:
        return carot_loss(image, text, scale, *teacher, label_smoothing=0.0, distillation_weight=1.0, impl=impl)

    def distilled(loss: Any) -> Tensor:
        contrastive, distillation = loss(image, text, typed, teacher_image, teacher_text, typed.detach())
        total: Tensor = contrastive + 2 * distillation  # its distillation is the mean of both directions, ours the sum
        return total

    def infinite(loss: Any) -> Tensor:
        both: Tensor = (loss(image, text, scale=scale) + loss(text, image, scale=scale)) / 2
        return both

    losses: dict[str, Callable[[], Tensor]] = {}
    for name, impl in (("", KERNELS), ("tiled ", "tiled"), ("dense ", "dense")):
        losses[f"{name}MCL"] = partial(multimodal_contrastive_loss, image, text, scale, impl=impl)
        losses[f"{name}MCL + MKD"] = partial(taught, impl)
        losses[f"{name}sigmoid"] = partial(sigmoid_contrastive_loss, image, text, scale, bias, impl=impl)
    del losses["dense sigmoid"]
    one = partial(multimodal_contrastive_loss, image, text, scale, direction="image_to_text", impl=KERNELS)
    losses["MCL, one direction"] = one
    student = SigmoidContrastiveLoss(impl=KERNELS) + SigmoidDistillationLoss(impl=KERNELS)
    losses["sigmoid + MKD"] = partial(student, image, text, scale, bias, *teacher, bias.detach())
    if (open_clip := peer("open_clip.loss")) is not None:
        clip, distill = open_clip.ClipLoss(), open_clip.DistillClipLoss()
        losses["ClipLoss"], losses["DistillClipLoss"] = partial(clip, image, text, typed), partial(distilled, distill)
        losses["ClipLoss, compiled"] = partial(torch.compile(clip), image, text, typed)
        losses["DistillClipLoss, compiled"] = partial(distilled, torch.compile(distill))
        losses["SigLipLoss"] = partial(open_clip.SigLipLoss(), image, text, typed, typed_bias)
    if (inf_cl := peer("inf_cl")) is not None:
        losses["two Inf-CL"] = partial(infinite, inf_cl.cal_inf_loss)
    if (memeff := peer("memeff")) is not None:
        loss = memeff.MemoryEfficientCLIPLoss(temperature=1 / SCALE, normalized_inputs=True, stable=False)
        losses["memeff"] = partial(loss, image, text)
    if (siglip_kernel := peer("siglip_kernel")) is not None:
        log_scale = scale.detach().log().requires_grad_()
        losses["siglip-kernel"] = partial(siglip_kernel.fused_siglip_loss, image, text, log_scale, bias)
    return {name: partial(_gradients, loss, features) for name, loss in losses.items()}


def _gradients(loss: Callable[[], Tensor], features: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(), features[:2])


def _losses(where: str, width: int, dtype: torch.dtype) -> Table:
    table = Table(
        f"CUDA: losses, D = {width}, {_name(dtype)}",
        f"{where}; forward + backward, by CUDA events, medians of {REPEATS}; memory: peak above the inputs.",
    )
    a, b = (torch.randn(SQUARE, SQUARE, device=DEVICE).to(dtype) for _ in range(2))
    rate = 2 * SQUARE**3 / measured({"mm": lambda: torch.mm(a, b)})[0]["mm"] * 1000
    for size in SETTINGS[width, dtype]:
        milliseconds, megabytes = measured(steps(inputs(size, width, dtype)))
        for ours, peers in PEERS_OF.items():
            for theirs in peers:
                judged = size >= JUDGED and dtype == torch.bfloat16
                limits = SHARES.get((ours, theirs), (None, None)) if judged else (None, None)
                label = f"{ours} / {theirs}"
                table.rows += [
                    _ratio(f"B = {size}, time: {label}", milliseconds, limits[0], "ms"),
                    _ratio(f"B = {size}, memory: {label}", megabytes, limits[1], "MiB"),
                ]
        for ours, units in UNITS.items():
            achieved = units * 2 * size**2 * width / milliseconds[ours] * 1000
            rates = f"{achieved / 1e12:.3g} TFLOP/s", f"{rate / 1e12:.3g} TFLOP/s"
            table.rows.append(Row(f"B = {size}, {ours}: share of the rate of a product", *rates, achieved / rate))
            if (width, dtype) == (768, torch.bfloat16):
                limit = MILLISECONDS.get((ours, size))
                table.rows.append(value(f"B = {size}, {ours}: time", milliseconds[ours], limit, unit="ms"))
                limit = MEMORY if (ours, size) in MILLISECONDS and size == 65536 else None
                table.rows.append(value(f"B = {size}, {ours}: memory", megabytes[ours], limit, unit="MiB"))
    return table


def _ratio(label: str, figures: dict[str, float], limit: float | None, unit: str) -> Row:
    ours, theirs = label.split(": ")[1].split(" / ")
    module = next((module for part, module in MODULES.items() if part in theirs), None)
    note = missing(module) if module is not None and peer(module) is None else "theirs: out of memory"
    return share(label, figures[ours], figures.get(theirs), limit, unit, note)


def _kernels(where: str) -> Table:
    """What only a device can tell about the kernels: their precision, and whether their blocks are the best."""
    size, width = JUDGED, 512
    table = Table("CUDA: the kernels", f"{where}; B = {size}, D = {width}; relative, in the Frobenius norm.")
    for dtype, limit in PRECISION.items():
        features = inputs(size, width, dtype)
        exact = [rows.detach().double() for rows in features]
        exact[:2] = [rows.requires_grad_() for rows in exact[:2]]
        ours, reference = _taught_gradients(features, KERNELS), _taught_gradients(exact, "tiled")
        error = max(float((a - b).norm() / b.norm()) for a, b in zip(ours, reference, strict=True))
        table.rows.append(value(f"gradient error, {_name(dtype)}, against float64", error, limit))
    table.rows += _blocks(inputs(size, width, torch.bfloat16))
    return table


def _taught_gradients(features: list[Tensor], impl: Impl) -> tuple[Tensor, ...]:
    image, text, *teacher = features
    loss = carot_loss(
        image, text, SCALE, teacher[0], teacher[1], SCALE, label_smoothing=0.1, distillation_weight=1.5, impl=impl
    )
    return torch.autograd.grad(loss, (image, text))


def _blocks(features: list[Tensor]) -> list[Row]:
    """The blocks of the kernels against others: what to write into their table."""
    from calrobust.kernels.triton import BLOCKS, Blocks

    calls, rows = steps(features), []
    shapes = ((128, 128, 64, 4, 3), (128, 128, 64, 8, 3), (128, 128, 64, 8, 3, 128), (128, 64, 64, 4, 3))
    for name, kernel, models in (
        ("MCL", "forward", 1),
        ("MCL", "backward", 1),
        ("MCL + MKD", "forward", 2),
        ("MCL + MKD", "backward", 2),
        ("sigmoid", "sigmoid", 1),
        ("sigmoid + MKD", "sigmoid", 2),
    ):
        key = kernel, features[0].dtype.itemsize, models
        default, milliseconds = BLOCKS[key], {}
        try:
            for blocks in dict.fromkeys((default, *(Blocks(*shape) for shape in shapes))):
                BLOCKS[key] = blocks
                milliseconds[blocks] = measured({"step": calls[name]})[0].get("step", math.inf)
        finally:
            BLOCKS[key] = default
        best = min(milliseconds, key=milliseconds.__getitem__)
        label = f"{name}, {kernel}: time at the blocks of the table / at the best blocks, {tuple(best)}"
        rows.append(share(label, milliseconds[default], milliseconds[best], None, "ms"))
    return rows


def _library(where: str) -> Table:
    """Metrics, temperature and teacher."""
    table = Table(
        "CUDA: metrics, temperature, teacher",
        f"{where}; {ROWS:,} x {CLASSES:,} float32 logits and the tensors of a ViT-B/16; by CUDA events, medians of "
        f"{REPEATS}.",
    )
    logits, target = (tensor.to(DEVICE) for tensor in classifier(ROWS, CLASSES))
    student = ema.Parameters().to(DEVICE)
    calls: dict[str, Call] = {
        "CalibrationError": lambda: CalibrationError(n_bins=N_BINS).to(DEVICE)(logits, target),
        "torchmetrics' Metric": lambda: MulticlassCalibrationError(CLASSES, N_BINS).to(DEVICE)(logits, target),
        "NegativeLogLikelihood": lambda: NegativeLogLikelihood().to(DEVICE)(logits, target),
        "F.cross_entropy in 1,024s": lambda: [
            F.cross_entropy(block, labels, reduction="sum")
            for block, labels in zip(logits.split(1024), target.split(1024), strict=True)
        ],
        "TemperatureScaler.fit": lambda: TemperatureScaler().fit(logits, target),
        "L-BFGS with line search": lambda: temperature.lbfgs(logits, target),
        "EMATeacher.update": ema.build(student),
        **ema.copies(student),
    }
    milliseconds, _ = measured(calls)
    for ours, theirs in LIBRARY:
        note = missing("timm.utils")
        table.rows.append(share(f"{ours} / {theirs}", milliseconds[ours], milliseconds.get(theirs), None, "ms", note))
    return table


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
