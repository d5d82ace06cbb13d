"""How every figure is taken: candidates in turn, medians, memory in a process of its own, peers named when missing."""

from __future__ import annotations

import ctypes
import gc
import importlib
import math
import multiprocessing
import operator
import os
import platform
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from typing import Any

import torch

PEERS = {  # module: what to install for it
    "open_clip.loss": "open_clip_torch",
    "timm.utils": "timm",
    "netcal.metrics": "netcal",
    "netcal.scaling": "netcal",
    "sklearn.calibration": "scikit-learn",
    "torch_uncertainty.metrics.classification": "torch-uncertainty[cpu]",
    "torch_uncertainty.post_processing": "torch-uncertainty[cpu]",
    "inf_cl": "inf_cl",
    "memeff": "memeff",
    "siglip_kernel": "siglip-kernel",
}
SLOW = 10.0  # seconds; what takes longer runs once, and its first run counts
MIB = 2**20

Call = Callable[[], object]
Clock = Callable[[], float]
Build = Callable[..., Call]  # makes the inputs and returns what is to be measured


@dataclass(frozen=True)
class Row:
    """One figure, and the target that it is held to."""

    what: str
    ours: str
    peer: str
    figure: float | None  # None: there is none, and `note` says why
    relation: str = ""  # "≤" or "≥", "" for a figure without a target
    limit: float | None = None
    note: str = ""

    def cells(self) -> list[str]:
        """As the table prints it."""
        if self.figure is None:
            return [self.what, self.ours, self.peer, "-", self._target(), self.note]
        met = {"≤": operator.le, "≥": operator.ge}.get(self.relation)
        verdict = ""
        if met is not None and self.limit is not None:
            verdict = "met" if met(self.figure, self.limit) else "**missed**"
        return [self.what, self.ours, self.peer, f"{self.figure:.3g}", self._target(), verdict]

    def _target(self) -> str:
        return f"{self.relation} {self.limit:g}" if self.limit is not None else ""


@dataclass
class Table:
    """Figures of one kind, and the curves that are drawn beside them."""

    title: str
    conditions: str
    rows: list[Row] = field(default_factory=list)
    curves: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)  # axis label: candidate: {B: value}
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """The table as it stands in the documentation."""
        head = ["what", "calrobust", "peer", "figure", "target", ""]
        lines = [head, ["---"] * len(head), *(row.cells() for row in self.rows)]
        table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
        return "\n\n".join([f"## {self.title}", self.conditions, table, *self.notes])

    def text(self) -> str:
        """The table as a terminal shows it, columns aligned."""
        head = ["what", "calrobust", "peer", "figure", "target", ""]
        lines = [head, *(row.cells() for row in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join([self.title, self.conditions, *(row.rstrip() for row in rows), *self.notes])


def share(what: str, ours: float, peer: float | None, limit: float | None, unit: str = "s", note: str = "") -> Row:
    """``ours / peer``, at most ``limit``; ``note`` is for a peer that is None."""
    return _ratio(what, ours, peer, "≤", limit, unit, note)


def faster(what: str, ours: float, peer: float | None, limit: float | None, unit: str = "s", note: str = "") -> Row:
    """``peer / ours``, at least ``limit``; ``note`` is for a peer that is None."""
    return _ratio(what, ours, peer, "≥", limit, unit, note)


def _ratio(what: str, ours: float, peer: float | None, relation: str, limit: float | None, unit: str, note: str) -> Row:
    if peer is None:
        return Row(what, quantity(ours, unit), "-", None, relation, limit, note)
    top, bottom = (ours, peer) if relation == "≤" else (peer, ours)
    figure = top / bottom if bottom else math.nan
    return Row(what, quantity(ours, unit), quantity(peer, unit), figure, relation, limit)


def value(what: str, ours: float, limit: float | None, *, peer: str = "-", unit: str = "") -> Row:
    """A figure of our own, at most ``limit``."""
    return Row(what, quantity(ours, unit), peer, ours, "≤", limit)


def quantity(number: float, unit: str) -> str:
    """Three digits and the unit."""
    return f"{number:.3g} {unit}".strip() if abs(number) < 1000 else f"{number:,.0f} {unit}".strip()


@cache
def peer(module: str) -> Any:
    """The module, or None if it or something that it needs is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the peer's own dependencies
            return importlib.import_module(module)
    except ImportError:
        return None


def missing(module: str) -> str:
    """What to say in place of a figure."""
    return f"not installed: pip install '{PEERS[module]}'"


def in_turn(candidates: Mapping[str, Call], repeats: int, clock: Clock = time.perf_counter) -> dict[str, float]:
    """Median seconds of each candidate: an untimed round first, then ``repeats`` rounds of one call each."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    gc.collect()
    gc.disable()  # as timeit does
    try:
        slow = {name: first for name, call in candidates.items() if (first := _timed(call, clock)) > SLOW}
        for _ in range(repeats):
            for name, call in candidates.items():
                if name not in slow:
                    times[name].append(_timed(call, clock))
    finally:
        gc.enable()
    return {name: slow[name] if name in slow else statistics.median(times[name]) for name in candidates}


def _timed(call: Call, clock: Clock) -> float:
    start = clock()
    call()
    return clock() - start


def peak_memory(build: Build, *args: Any, warm_up: Sequence[Any]) -> float:
    """MiB that ``build(*args)()`` takes at its peak above what stands before it, in a process of its own.

    ``build(*warm_up)()``, something small, runs first, so that what is loaded once is not counted.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak, build, args, tuple(warm_up), torch.get_num_threads()).result()


def _peak(build: Build, args: tuple[Any, ...], warm_up: tuple[Any, ...], threads: int) -> float:
    torch.set_num_threads(threads)
    _return_what_is_freed()
    build(*warm_up)()
    call = build(*args)
    gc.collect()
    before = _reset_peak()
    call()
    return (_high_water_mark() - before) / MIB


def _return_what_is_freed() -> None:
    """Maps blocks from 1 MiB on one by one, as glibc does until it learns to keep freed ones, of up to 32 MiB."""
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        mmap_threshold = -3
        libc.mallopt(mmap_threshold, MIB)


def _reset_peak() -> float:
    """Bytes that stand now; the high-water mark starts from there where the system lets it."""
    try:
        with open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")
    except OSError:
        pass  # then only what rises above every earlier peak shows
    return _high_water_mark()


def _high_water_mark() -> float:
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return usage * (1 if platform.system() == "Darwin" else 1024)


def slope(curve: Mapping[int, float]) -> float:
    """Of the least-squares line through log value over log B."""
    x, y = [math.log(size) for size in curve], [math.log(max(number, 1e-9)) for number in curve.values()]
    return statistics.linear_regression(x, y).slope if len(x) > 1 else math.nan


def header() -> str:
    """The machine and all versions that had a part in the figures."""
    names = [
        "calrobust",
        "torch",
        "torchmetrics",
        "numpy",
        *dict.fromkeys(name.split("[")[0] for name in PEERS.values()),
    ]
    return "\n".join(
        [
            f"{_processor()}, {os.cpu_count()} cores; {platform.system()}, Python {platform.python_version()}",
            ", ".join(f"{name} {_version(name)}" for name in names),
        ]
    )


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
