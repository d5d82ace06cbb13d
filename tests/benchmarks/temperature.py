"""TemperatureScaler, against scikit-learn, L-BFGS, netcal and torch-uncertainty."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from benchmarks.data import classifier
from benchmarks.measure import Call, Table, faster, in_turn, missing, peak_memory, peer, value
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from calrobust import TemperatureScaler

ROWS, CLASSES = 50_000, 1_000
THREADS = 2
REPEATS = 5


def tables() -> Iterator[Table]:
    """Speed, passes, exactness and memory."""
    torch.set_num_threads(THREADS)
    logits, target = classifier(ROWS, CLASSES)
    table = Table(
        "TemperatureScaler",
        f"{ROWS:,} x {CLASSES:,} float32 logits; {torch.get_num_threads()} threads, seconds, medians of {REPEATS}; "
        "what takes longer than ten seconds runs once. T in brackets.",
    )
    with Passes(logits) as passes:
        temperature = float(TemperatureScaler().fit(logits, target).temperature)
    table.rows.append(value("passes over the logits", passes.count(), 6))
    reference = _reference(logits, target, temperature)
    table.rows.append(value(f"relative error of T ({temperature:.6f})", abs(temperature / reference - 1), 1e-6))

    fits = _fits(logits, target)
    fitted: dict[str, float] = {}

    def run(name: str) -> Call:
        def call() -> None:
            fitted[name] = fits[name]()

        return call

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the peers' optimisers
        seconds = in_turn({name: run(name) for name in fits}, REPEATS)
    for name, module, limit in (
        ("scikit-learn", "sklearn.calibration", 5),
        ("L-BFGS with line search", "", 8),
        ("netcal, float64", "netcal.scaling", 30),
        ("torch-uncertainty", "torch_uncertainty.post_processing", 30),
    ):
        found = f" ({fitted[name]:.6f})" if name in fitted else ""
        note = missing(module) if module else ""
        table.rows.append(
            faster(f"fit, times faster than {name}{found}", seconds["ours"], seconds.get(name), limit, note=note)
        )
    memory = peak_memory(build, ROWS, CLASSES, warm_up=(64, CLASSES))
    table.rows.append(value("extra memory of fit, MiB", memory, 16))
    yield table


def build(rows: int, classes: int) -> Call:
    """A fit."""
    logits, target = classifier(rows, classes)
    return lambda: TemperatureScaler().fit(logits, target)


class Passes(TorchDispatchMode):
    """Counts how often the elements of a tensor are read, reads of the same block in a row as one."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.storage, self.numel = tensor.untyped_storage().data_ptr(), tensor.numel()
        self.elements, self.last = 0, (-1, -1)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator and counts what it reads; a view or a factory reads nothing."""
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, (list, tuple)) else [result]
        if not (any(self._is_ours(tensor) for tensor in results) or func.name().startswith("aten::new_")):
            for tensor in filter(self._is_ours, args):
                block = tensor.storage_offset(), tensor.numel()
                if block != self.last or tensor.numel() == self.numel:
                    self.elements += tensor.numel()
                self.last = block
        return result

    def _is_ours(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() == self.storage

    def count(self) -> float:
        """Passes over the whole."""
        return self.elements / self.numel


def _reference(logits: Tensor, target: Tensor, start: float) -> float:
    """T in float64, by the secant method on the derivative in 1/T, from nearby."""

    def derivative(beta: float) -> float:
        total = 0.0
        for block, labels in zip(logits.split(1024), target.split(1024), strict=True):
            z = block.double()
            mean = ((beta * z).softmax(1) * z).sum(1)
            total += float((mean - z.gather(1, labels[:, None])[:, 0]).sum())
        return total / len(logits)

    before, beta = 1.001 / start, 1 / start
    slope_before, slope = derivative(before), derivative(beta)
    for _ in range(8):
        if slope == slope_before:
            break
        before, beta = beta, beta - slope * (beta - before) / (slope - slope_before)
        slope_before, slope = slope, derivative(beta)
    return 1 / beta


def _fits(logits: Tensor, target: Tensor) -> dict[str, Any]:
    """Functions that fit and return T."""
    fits: dict[str, Any] = {
        "ours": lambda: float(TemperatureScaler().fit(logits, target).temperature),
        "L-BFGS with line search": lambda: lbfgs(logits, target),
    }
    if peer("sklearn.calibration") is not None:
        fits["scikit-learn"] = lambda: _scikit_learn(logits.numpy(), target.numpy())
    if (netcal := peer("netcal.scaling")) is not None:
        probs, labels = logits.double().softmax(1).numpy(), target.numpy()
        fits["netcal, float64"] = lambda: 1 / float(netcal.TemperatureScaling().fit(probs, labels).temperature[0])
    if (uncertainty := peer("torch_uncertainty.post_processing")) is not None:

        def fit() -> float:
            scaler = uncertainty.TemperatureScaler()
            scaler.fit([(logits, target)], progress=False)
            return float(scaler.temperature[0])

        logging.getLogger().setLevel(logging.ERROR)  # it remarks on every fit that there is no model
        fits["torch-uncertainty"] = fit
    return fits


def lbfgs(logits: Tensor, target: Tensor) -> float:
    """T by torch's optimiser."""
    log_temperature = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits / log_temperature.exp(), target)
        loss.backward()
        return float(loss)

    optimizer.step(closure)
    return float(log_temperature.exp())


def _scikit_learn(logits: Any, target: Any) -> float:
    """By its public class, around a classifier whose scores are its inputs."""
    from sklearn.base import BaseEstimator, ClassifierMixin  # here, so that a missing scikit-learn is named
    from sklearn.frozen import FrozenEstimator

    class Given(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
        def fit(self, X: Any, y: Any) -> Any:
            self.classes_ = np.arange(X.shape[1])
            return self

        def predict(self, X: Any) -> Any:
            return X.argmax(1)

        def decision_function(self, X: Any) -> Any:
            return X

    frozen = FrozenEstimator(Given().fit(logits, target))
    calibrated = peer("sklearn.calibration").CalibratedClassifierCV(frozen, method="temperature").fit(logits, target)
    return 1 / float(calibrated.calibrated_classifiers_[0].calibrators[0].beta_)
