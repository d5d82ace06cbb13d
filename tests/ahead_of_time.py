"""The Triton kernels compiled to machine code for a card that need not be there."""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

KERNELS = {"softmax": ("_forward_kernel", "_columns_kernel", "_backward_kernel"), "sigmoid": ("_sums_kernel",)}
PROGRAMS = 528  # four for each multiprocessor of an H100


class Resources(NamedTuple):
    """What machine code takes."""

    registers: int  # of a thread
    stack: int  # bytes of a thread: what did not fit into its registers, if any
    shared: int  # bytes of memory of a program
    instructions: int


@contextmanager
def compiled(capability: int) -> Iterator[dict[str, Any]]:
    """Within, kernels that are launched are compiled instead; the last of each, by its name."""
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as cache:
        patch.setenv("TRITON_CACHE_DIR", cache)
        for room, names in KERNELS.items():
            module = importlib.import_module(f"calrobust.kernels.triton.{room}")
            for name in names:
                patch.setattr(module, name, _Compiled(name, getattr(module, name), found))
        patch.setattr("calrobust.kernels.triton.softmax._programs", lambda device: PROGRAMS)
        target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", capability, 32)
        device = SimpleNamespace(
            get_current_device=lambda: capability, get_current_stream=lambda _: 0, get_current_target=lambda: target
        )
        patch.setattr(importlib.import_module("triton.runtime.jit"), "driver", SimpleNamespace(active=device))
        yield found


class _Compiled:
    def __init__(self, name: str, kernel: Any, found: dict[str, Any]) -> None:
        self.name, self.kernel, self.found = name, kernel, found

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.found[self.name] = self.kernel.warmup(*args, grid=grid, **options)

        return launch


def resources(kernel: Any) -> Resources:
    """Read off machine code with the tools that Triton brings."""
    folder = Path(importlib.import_module("triton").__file__ or "").parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([folder / tool, option, file.name], capture_output=True, text=True, check=True)
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers, stack = (re.search(rf"{name}:(\d+)", usage.stdout + usage.stderr) for name in ("REG", "STACK"))
    assert registers is not None
    assert stack is not None
    instructions = len(re.findall(r"/\*[0-9a-f]{4,}\*/", code.stdout))
    return Resources(int(registers[1]), int(stack[1]), kernel.metadata.shared, instructions)
