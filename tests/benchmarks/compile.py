"""What the compiler makes of the CUDA kernels, without a device: registers, spills, shared memory and instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from benchmarks.measure import Row, Table

CAPABILITIES = (80, 89, 90, 100)
WIDTHS = (512, 768, 1024)
EVEN, DTYPE = 4096, torch.bfloat16
LIMIT = 4600  # instructions of the forward kernel on sm_90


class Compiled:
    """A kernel that is compiled for another machine where it would be launched."""

    def __init__(self, kernel: Any, found: list[Any]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        """Its launcher."""
        return lambda *args, **options: self.found.append(self.kernel.warmup(*args, grid=grid, **options))


def resources(cubin: bytes) -> dict[str, int]:
    """Of machine code: registers of a thread, bytes of local memory, and instructions."""
    tools = Path(__import__("triton").__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True)
        code = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage.stdout + usage.stderr)[1]) for name in ("REG", "STACK"))
    return {"registers": registers, "stack": stack, "instructions": len(re.findall(r"/\*[0-9a-f]{4,}\*/", code))}
