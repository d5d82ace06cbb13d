"""Metrics from the logits of a large classifier, against netcal, torchmetrics, torch-uncertainty and others."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from benchmarks.data import classifier
from benchmarks.measure import Call, Row, Table, faster, in_turn, missing, peak_memory, peer, share, value
from torch import Tensor
from torchmetrics.classification import MulticlassCalibrationError
from torchmetrics.functional.classification import multiclass_calibration_error

from calrobust import ShiftReport
from calrobust.functional import bin_confidences, binned_error, calibration_error, top_label
from calrobust.metrics import CalibrationError, CalibrationSummary, ClasswiseCalibrationError, SelectiveRisk

ROWS, CLASSES, N_BINS = 50_000, 1_000, 15
BATCH = 512
THREADS = 2
REPEATS = 5
DRIFT_SAMPLES, DRIFT_CHUNK = 20_000_000, 1_000_000
MOST_BINS = 50  # every edge k/B up to here


def tables() -> Iterator[Table]:
    """Speed, memory, exactness, one after the other."""
    torch.set_num_threads(THREADS)
    logits, target = classifier(ROWS, CLASSES)
    yield _speed(logits, target)
    yield _state(logits, target)
    yield _exactness()


def _speed(logits: Tensor, target: Tensor) -> Table:
    table = Table(
        "Metrics: time",
        f"{ROWS:,} x {CLASSES:,} float32 logits, {N_BINS} bins; {torch.get_num_threads()} threads, seconds, medians of "
        f"{REPEATS}; what takes longer than ten seconds runs once.",
    )
    calls: dict[str, Call] = {
        "CalibrationError": lambda: _fed(CalibrationError(n_bins=N_BINS), logits, target, ROWS),
        "CalibrationError in 512s": lambda: _fed(CalibrationError(n_bins=N_BINS), logits, target, BATCH),
        "CalibrationSummary": lambda: _fed(CalibrationSummary(n_bins=N_BINS), logits, target, ROWS),
        "ClasswiseCalibrationError": lambda: _fed(
            ClasswiseCalibrationError(num_classes=CLASSES, n_bins=N_BINS), logits, target, ROWS
        ),
        "SelectiveRisk": lambda: _fed(SelectiveRisk(), logits, target, BATCH),
        "SelectiveRisk, compute": _computing(SelectiveRisk, logits, target),
        "softmax and max in 1,024s": lambda: [block.softmax(1).max(1) for block in logits.split(1024)],
        "softmax and amax in 1,024s": lambda: [block.softmax(1).amax(1) for block in logits.split(1024)],
        "torchmetrics' functional": lambda: multiclass_calibration_error(logits, target, CLASSES, N_BINS),
        "torchmetrics' Metric in 512s": lambda: _fed(
            MulticlassCalibrationError(CLASSES, N_BINS), logits, target, BATCH
        ),
    }
    if (netcal := peer("netcal.metrics")) is not None:
        labels = target.numpy()
        calls["netcal"] = lambda: netcal.ECE(N_BINS).measure(logits.softmax(1).numpy(), labels)
    if (uncertainty := peer("torch_uncertainty.metrics.classification")) is not None:
        calls["torch-uncertainty's classwise"] = lambda: _fed(
            uncertainty.ClasswiseCalibrationError(CLASSES, N_BINS), logits.softmax(1), target, ROWS
        )
        calls["torch-uncertainty's AURC"] = lambda: _fed(uncertainty.AURC(), logits.softmax(1), target, BATCH)
        calls["torch-uncertainty's AURC, compute"] = _computing(uncertainty.AURC, logits.softmax(1), target)
    seconds = in_turn(calls, REPEATS)
    ours, batched = seconds["CalibrationError"], seconds["CalibrationError in 512s"]
    blocks = "softmax and max in 1,024s", "softmax and amax in 1,024s"
    table.rows = [
        share(f"CalibrationError / {blocks[0]}", ours, seconds[blocks[0]], 1.1),
        share(f"CalibrationError / {blocks[1]}, no predicted class", ours, seconds[blocks[1]], None),
        faster(
            "CalibrationError, times faster than netcal",
            ours,
            seconds.get("netcal"),
            2.5,
            note=missing("netcal.metrics"),
        ),
        faster(
            "CalibrationError, times faster than torchmetrics' functional",
            ours,
            seconds["torchmetrics' functional"],
            3.5,
        ),
        faster(
            f"CalibrationError in {BATCH}s, times faster than torchmetrics' Metric in {BATCH}s",
            batched,
            seconds["torchmetrics' Metric in 512s"],
            1.7,
        ),
        faster(
            "ClasswiseCalibrationError, times faster than torch-uncertainty's",
            seconds["ClasswiseCalibrationError"],
            seconds.get("torch-uncertainty's classwise"),
            100,
            note=missing("torch_uncertainty.metrics.classification"),
        ),
        *(
            share(
                f"SelectiveRisk{what} / torch-uncertainty's AURC{what}",
                seconds[f"SelectiveRisk{part}"],
                seconds.get(f"torch-uncertainty's AURC{part}"),
                1,
                note=missing("torch_uncertainty.metrics.classification"),
            )
            for what, part in ((f", updates in {BATCH}s and compute", ""), (", compute", ", compute"))
        ),
        share("CalibrationSummary / CalibrationError", seconds["CalibrationSummary"], ours, 1.3),
    ]
    table.rows += _report(logits, target)
    return table


def _fed(metric: Any, preds: Tensor, target: Tensor, rows: int) -> Any:
    for batch, labels in zip(preds.split(rows), target.split(rows), strict=True):
        metric.update(batch, labels)
    return metric.compute()


def _computing(metric: Callable[..., Any], preds: Tensor, target: Tensor) -> Call:
    """Computes again and again from the state after all samples."""
    fed = metric(compute_with_cache=False)
    fed.update(preds, target)
    return lambda: fed.compute()


def _report(logits: Tensor, target: Tensor) -> list[Row]:
    """In seconds of the processor, as the report writes into new memory, which a busy machine gives slowly."""
    held_out = classifier(ROWS // 10, CLASSES)

    def before() -> None:
        ShiftReport(id_domain="ID").add("FT", "ID", logits, target)

    reports = []
    for _ in range(REPEATS + 1):  # one for each call
        reports.append(ShiftReport(id_domain="ID"))
        reports[-1].fit_temperature("FT", held_out[0] + 1, held_out[1])  # other numbers, hence other data

    def after() -> None:
        reports.pop().add("FT", "ID", logits, target)

    calls: dict[str, Call] = {"before": before, "after": after, "top_label": lambda: top_label(logits, target)}
    seconds = in_turn(calls, REPEATS, time.process_time)
    return [
        share(f"ShiftReport.add / top_label, {when} a temperature is fitted", seconds[when], seconds["top_label"], 2.5)
        for when in ("before", "after")
    ]


def _state(logits: Tensor, target: Tensor) -> Table:
    table = Table(
        "Metrics: memory",
        "The same logits. Extra memory: peak resident set above logits and libraries, freed blocks returned at once, "
        "in a process of its own, "
        f"{torch.get_num_threads()} threads. State: bytes that a metric holds after all samples.",
    )
    theirs = peak_memory(build, "torchmetrics", ROWS, CLASSES, warm_up=("torchmetrics", 16, CLASSES))
    for name in ("update", "function"):
        ours = peak_memory(build, name, ROWS, CLASSES, warm_up=(name, 16, CLASSES))
        table.rows.append(
            value(f"CalibrationError, {name}: extra memory, MiB", ours, 16, peer=f"{theirs:.0f} (torchmetrics)")
        )
    metric, classwise = CalibrationError(n_bins=N_BINS), ClasswiseCalibrationError(num_classes=CLASSES, n_bins=N_BINS)
    torchmetrics_metric = MulticlassCalibrationError(CLASSES, N_BINS)
    for each in (metric, classwise, torchmetrics_metric):
        _fed(each, logits, target, BATCH)
    table.rows.append(
        value(
            "CalibrationError: state, bytes",
            _bytes(metric),
            400,
            peer=f"{_bytes(torchmetrics_metric):,} (torchmetrics)",
        )
    )
    note = missing("torch_uncertainty.metrics.classification")
    state = None
    if (uncertainty := peer("torch_uncertainty.metrics.classification")) is not None:
        # It keeps its inputs: so many bytes a row, seen on one batch.
        other = uncertainty.ClasswiseCalibrationError(CLASSES, N_BINS)
        other.update(logits[:BATCH].softmax(1), target[:BATCH])
        state = _bytes(other) / min(BATCH, ROWS) * ROWS
    table.rows.append(
        faster(
            "ClasswiseCalibrationError, times less state than torch-uncertainty's",
            _bytes(classwise),
            state,
            1000,
            "B",
            note,
        )
    )
    return table


def build(name: str, rows: int, classes: int) -> Call:
    """The ECE of all rows in one call, by class, by function and by torchmetrics."""
    logits, target = classifier(rows, classes)
    calls: dict[str, Callable[[], object]] = {
        "update": lambda: CalibrationError(n_bins=N_BINS).update(logits, target),
        "function": lambda: calibration_error(logits, target, n_bins=N_BINS),
        "torchmetrics": lambda: multiclass_calibration_error(logits, target, classes, N_BINS),
    }
    return calls[name]


def _bytes(metric: Any) -> int:
    states = (getattr(metric, name) for name in metric._defaults)
    tensors = (tensor for state in states for tensor in (state if isinstance(state, list) else [state]))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _exactness() -> Table:
    table = Table(
        "Metrics: exactness",
        f"Drift: {DRIFT_SAMPLES:,} samples of a calibrated, confident model (sigmoid of |2 N(0, 1) + 3|), relative to "
        "float64. Parity: absolute difference of ECEs of samples on every edge k/B and inside every bin.",
    )
    ours, theirs = _drift()
    table.rows.append(
        value("relative error of the ECE after the drift", ours, 1e-9, peer=f"{theirs:.2g} (torchmetrics)")
    )
    for dtype in (torch.float32, torch.float64):
        what = f"difference from netcal, B = 1 ... {MOST_BINS}, {str(dtype).removeprefix('torch.')}"
        if peer("netcal.metrics") is None:
            table.rows.append(Row(what, "-", "-", None, "≤", 2e-7, missing("netcal.metrics")))
        else:
            table.rows.append(value(what, max(_difference(n_bins, dtype) for n_bins in range(1, MOST_BINS + 1)), 2e-7))
    return table


def _drift() -> tuple[float, float]:
    generator = torch.Generator().manual_seed(0)
    ours = CalibrationError(n_bins=N_BINS, from_logits=False, validate_args=False)
    theirs = MulticlassCalibrationError(2, N_BINS, validate_args=False)
    sums = np.zeros((2, N_BINS))
    for start in range(0, DRIFT_SAMPLES, DRIFT_CHUNK):
        n = min(DRIFT_CHUNK, DRIFT_SAMPLES - start)
        confidences = (2 * torch.randn(n, generator=generator) + 3).abs().sigmoid()
        target = (torch.rand(n, generator=generator) >= confidences).long()
        probs = torch.stack([confidences, 1 - confidences], 1)
        ours.update(probs, target)
        theirs.update(probs, target)
        exact = confidences.double().numpy()
        index = np.minimum(np.searchsorted(np.arange(1, N_BINS) * (1 / N_BINS), exact, side="right"), N_BINS - 1)
        for total, weights in zip(sums, (exact, target.numpy() == 0), strict=True):
            total += np.bincount(index, weights, N_BINS)
    error = float(np.abs(sums[0] - sums[1]).sum() / DRIFT_SAMPLES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return abs(float(ours.compute()) / error - 1), abs(float(theirs.compute()) / error - 1)


def _difference(n_bins: int, dtype: torch.dtype) -> float:
    edges = torch.tensor([k / n_bins for k in range(n_bins + 1)], dtype=dtype)
    inside = torch.tensor([(k + 0.37) / n_bins for k in range(n_bins)], dtype=dtype)
    confidences = torch.cat([edges, inside])
    correct = torch.arange(len(confidences)) % 3 == 0
    # As the same numbers in float64: netcal counts with float64 edges and averages with others.
    theirs = peer("netcal.metrics").ECE(n_bins).measure(confidences.double().numpy(), correct.numpy().astype(np.int64))
    return abs(float(binned_error(bin_confidences(confidences, correct, n_bins=n_bins))) - float(theirs))
