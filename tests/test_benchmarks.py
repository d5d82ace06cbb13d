"""The benchmarks run at tiny sizes. Nothing here is about speed."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import compiler, coverage, cuda, ema, losses, measure, metrics, page, temperature, weight
from benchmarks.measure import MIB, Row, Table

TINY: dict[Any, dict[str, Any]] = {
    losses: {"SIZES": (8, 12), "LARGEST": 20, "LINEAR_SIZE": 16, "IMAGES": 9, "BANKS": (5,), "WIDTH": 4, "REPEATS": 1},
    cuda: {
        "SETTINGS": {(768, torch.bfloat16): (8, 12), (4, torch.float32): (8,)},
        "JUDGED": 12,
        "MILLISECONDS": {("MCL", 12): 66.0},
        "ROWS": 60,
        "CLASSES": 5,
        "SQUARE": 4,
        "REPEATS": 1,
    },
    compiler: {"CAPABILITIES": (90,), "WIDTHS": (32, 64)},
    ema: {"VOCABULARY": 8, "DEPTH": 1, "REPEATS": 1},
    metrics: {
        "ROWS": 60,
        "CLASSES": 5,
        "BATCH": 20,
        "REPEATS": 1,
        "DRIFT_SAMPLES": 50,
        "DRIFT_CHUNK": 30,
    },
    coverage: {"SIZES": (300,), "DATA_SETS": 20, "SCORED": 20, "SCORED_SIZES": (300,)},
    temperature: {"ROWS": 200, "CLASSES": 5, "REPEATS": 1},
    weight: {
        "REPEATS": 1,
        "IMPORT_REPEATS": 1,
        "IMPORTS": ("math", "json"),
        "BATCH": 3,
        "TOKENS": 2,
        "WIDTH": 12,
        "LAYERS": 1,
    },
}
GROUPS = list(TINY)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for module, constants in TINY.items():
        for name, number in constants.items():
            monkeypatch.setattr(module, name, number)
    monkeypatch.setattr(weight, "PROJECT", tmp_path)  # nothing to build: a wheel would take a network
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory in this process: a process for each candidate would load torch each time."""

    def peak(build: Callable[..., Any], *args: Any, warm_up: Any) -> float:
        return measure._peak(build, args, tuple(warm_up), torch.get_num_threads())

    for module in (losses, ema, metrics, temperature):
        monkeypatch.setattr(module, "peak_memory", peak)


@pytest.mark.slow
@pytest.mark.usefixtures("_here")
@pytest.mark.filterwarnings("ignore")  # of the peers, on import and on data this small
@pytest.mark.parametrize("module", GROUPS, ids=lambda module: module.__name__.split(".")[-1])
def test_every_table_has_a_figure_or_a_reason_in_every_row(module: Any) -> None:
    """And says what it was measured on."""
    for table in module.tables():
        assert table.rows
        assert any(word in table.conditions for word in ("thread", "float64", "CUDA"))
        for row in table.rows:
            assert row.figure is not None or row.note
            assert len(row.cells()) == 6


@pytest.mark.slow
@pytest.mark.usefixtures("_here")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", [losses, ema, metrics, temperature], ids=["losses", "ema", "metrics", "temperature"])
def test_a_missing_peer_is_named(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command that installs it; never left out."""
    monkeypatch.setattr(module, "peer", lambda name: None)
    text = "\n".join(table.text() for table in module.tables())
    peers = {
        losses: ["open_clip_torch"],
        ema: ["timm"],
        metrics: ["netcal", "torch-uncertainty[cpu]"],
        temperature: ["scikit-learn", "netcal", "torch-uncertainty[cpu]"],
    }
    for name in peers[module]:
        assert f"not installed: pip install '{name}'" in text


@pytest.mark.filterwarnings("ignore")
def test_the_tables_of_a_cuda_device_are_filled_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU in its place: every candidate runs, and each row has a figure or names the peer that is missing."""

    def measured(candidates: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
        return measure.in_turn(candidates, 1), dict.fromkeys(candidates, 1.0)

    monkeypatch.setattr(cuda, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(cuda, "KERNELS", "tiled")
    monkeypatch.setattr(cuda, "measured", measured)
    monkeypatch.setattr(cuda, "_blocks", lambda features: [])
    monkeypatch.setattr(torch, "compile", lambda module: module)
    tables = [cuda._losses("here", *each) for each in cuda.SETTINGS] + [cuda._kernels("here"), cuda._library("here")]
    for row in (row for table in tables for row in table.rows):
        assert row.figure is not None or row.note.startswith(("not installed: pip install", "torch 2"))
    assert sum("Inf-CL" in row.what for row in tables[0].rows) == 4
    assert [row.limit for row in tables[0].rows if "DistillClipLoss" in row.what][4:6] == [0.5, 0.05]
    assert [row.limit for row in tables[0].rows if row.what.endswith(", MCL: time")] == [None, 66.0]


def test_a_peer_that_is_not_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that cannot be imported, for whatever reason, does not end the run."""
    monkeypatch.setitem(sys.modules, "timm.utils", None)
    measure.peer.cache_clear()
    assert measure.peer("timm.utils") is None
    measure.peer.cache_clear()


def _hold(size: int) -> Callable[[], object]:
    return lambda: torch.ones(size * MIB // 4)


@pytest.mark.slow
def test_peak_memory_is_what_a_call_takes_beyond_its_inputs() -> None:
    """64 MiB of ones are 64 MiB."""
    assert measure.peak_memory(_hold, 64, warm_up=(1,)) == pytest.approx(64, abs=1)


def test_candidates_take_turns_after_an_untimed_round() -> None:
    """So that a change of the machine's load meets all of them."""
    calls: list[str] = []
    clock = iter(range(100))
    seconds = measure.in_turn({name: lambda name=name: calls.append(name) for name in "ab"}, 2, lambda: next(clock))  # type: ignore[misc]  # a default binds the name
    assert calls == list("ababab")
    assert seconds == {"a": 1, "b": 1}


def test_a_slow_candidate_runs_once() -> None:
    """Its first run counts."""
    calls: list[str] = []
    times = iter([0.0, 11.0])
    assert measure.in_turn({"slow": lambda: calls.append("slow")}, 3, lambda: next(times)) == {"slow": 11.0}
    assert calls == ["slow"]


def test_a_figure_beyond_its_target_is_called_missed() -> None:
    """As is one that is not a number."""
    assert Row("", "", "", 1.0, "≤", 1.0).cells()[-1] == Row("", "", "", 5.0, "≥", 5.0).cells()[-1] == "met"
    for figure, relation in ((1.1, "≤"), (0.9, "≥"), (float("nan"), "≤")):
        assert "missed" in Row("", "", "", figure, relation, 1.0).cells()[-1]


def test_slope_is_the_exponent() -> None:
    """Of a power of B."""
    assert measure.slope({size: 3.0 * size**2 for size in (10, 20, 80)}) == pytest.approx(2.0)


def test_passes_count_reads_not_views() -> None:
    """Two reads of one block in a row are one, of the whole matrix two."""
    logits = torch.ones(6, 2)
    with temperature.Passes(logits) as passes:
        for block in logits.split(2):
            block.amax(1)
            block.sum(1)
        logits[:3].exp()
        logits.new_zeros(6, 2)
    assert passes.count() == 1.5


def test_the_page_holds_the_last_tables_of_each_group_and_their_plot(tmp_path: Path) -> None:
    """Between their marks, and nothing else changes; the plot has the same bytes for the same figures."""
    old, new = (Table(title, "one thread", [Row("a / b", "1 s", "2 s", 0.5, "≤", 0.6)]) for title in ("Old", "New"))
    new.curves = {"CPU seconds": {"tiled": {1024: 1.0, 2048: 2.0}, "ClipLoss": {1024: 1.0, 2048: 4.0}}}
    markdown = tmp_path / "benchmarks.md"
    markdown.write_text(
        "Before\n\n<!-- losses -->\n<!-- end losses -->\n\nBetween\n\n<!-- ema -->\n<!-- end ema -->\n\nAfter\n"
    )
    page.write("losses", [old], tmp_path)
    page.write("ema", [Table("Teacher", "one thread")], tmp_path)
    page.write("losses", [new], tmp_path)
    first = [path.read_bytes() for path in sorted(tmp_path.rglob("*.*"))]
    page.write("losses", [new], tmp_path)
    assert [path.read_bytes() for path in sorted(tmp_path.rglob("*.*"))] == first
    text = markdown.read_text(encoding="utf-8")
    assert "## Old" not in text
    assert text.count("| a / b | 1 s | 2 s | 0.5 | ≤ 0.6 | met |") == text.count("(benchmarks/losses.svg)") == 1
    places = [text.index(part) for part in ("Before", "## New", "Between", "## Teacher", "After")]
    assert places == sorted(places)


def test_the_page_has_a_place_for_every_group() -> None:
    """In the order of the command line."""
    text = (page.DOCS / "benchmarks.md").read_text(encoding="utf-8")
    assert [group for _, group, _ in page.PART.findall(text)] == list(page.MODULES)


def test_the_script_runs_from_anywhere(tmp_path: Path) -> None:
    """It finds its modules, and says which tables there are."""
    script = Path(measure.__file__).with_name("run.py")
    result = subprocess.run(
        [sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert all(name in result.stdout for name in page.MODULES)
    assert all(importlib.import_module(f"benchmarks.{name}") in TINY for name in page.MODULES.values())
