"""The CUDA kernels as the compiler makes them for cards that need not be there, and what a step must take at least."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from ahead_of_time import Resources, compiled, resources
from benchmarks.measure import Row, Table
from torch import Tensor

from calrobust.kernels.dense import Factors
from calrobust.kernels.sigmoid import Classes, Model
from calrobust.kernels.tiled import Softmaxes

CAPABILITIES = (80, 89, 90, 100)
WIDTHS = (512, 768, 1024)
EVEN = 4096  # rows and columns
LIMITS = {("forward", 90): 4600}  # instructions; the same for every width
ROOF = 989e12, 3.35e12  # of an H100: operations a second with bfloat16 on tensor cores, bytes a second
SIZE, WIDTH = 65536, 768
UNITS = {"MCL": (4, 1), "MCL + MKD": (6, 2), "sigmoid": (3, 1), "sigmoid + MKD": (4, 2)}  # and the number of models


def tables() -> Iterator[Table]:
    """Registers, spills, shared memory and instructions of each kernel; then the least time of a step."""
    try:
        import triton
    except ImportError:
        yield Table("CUDA: what the compiler makes", "Triton is not installed.")
        return
    table = Table(
        "CUDA: what the compiler makes",
        "For CUDA devices that need not be there: bfloat16, an even number of rows and columns, Triton "
        f"{triton.__version__}. Spills are bytes of a thread's stack.",
    )
    for capability in CAPABILITIES:
        for teacher in (False, True):
            each = {width: kernels(capability, width, teacher=teacher) for width in WIDTHS}
            for name in each[WIDTHS[0]]:
                alike: dict[Resources, list[int]] = {}
                for width in WIDTHS:
                    alike.setdefault(each[width][name], []).append(width)
                table.rows += [_row(name, capability, widths, teacher, found) for found, widths in alike.items()]
    yield table
    yield roofline()


def kernels(capability: int, width: int, *, teacher: bool) -> dict[str, Resources]:
    """Of each kernel, by what it is for."""
    from calrobust.kernels.triton.sigmoid import sweep
    from calrobust.kernels.triton.softmax import backward, forward

    with torch.device("cpu"), compiled(capability) as found:
        features = torch.zeros(EVEN, width)
        models = [Factors(features, features, torch.tensor(50.0))] * (1 + teacher)
        partner, ones = torch.arange(EVEN), torch.ones(EVEN)
        forward(models, partner, torch.bfloat16, columns=True)
        softmaxes = [Softmaxes(ones, ones, ones, ones, ones[:0])] * len(models)
        backward(models, softmaxes, partner, torch.bfloat16, [True] * 3)
        biased = [Model(*model, torch.tensor(-10.0)) for model in models]
        weights: Tensor = torch.ones(len(models), EVEN)
        sweep(biased, Classes(partner, partner), weights, torch.bfloat16, [True] * 4)
        return {name.strip("_").removesuffix("_kernel"): resources(kernel) for name, kernel in found.items()}


def _row(name: str, capability: int, widths: list[int], teacher: bool, found: Resources) -> Row:
    shown = f"{found.registers} registers, {found.stack} B spilled, {found.shared / 1024:.0f} KiB shared"
    which = f"{name}{' with teacher' if teacher else ''}, D = {', '.join(map(str, widths))}"
    limit = LIMITS.get((name, capability)) if teacher else None
    return Row(f"sm_{capability}, {which}: instructions", shown, "-", found.instructions, "≤", limit)


def roofline() -> Table:
    """By counting: products at the rate of the tensor cores, and the gradient in S at that of the memory."""
    table = Table(
        "CUDA: the least time of a step",
        f"B = {SIZE:,}, D = {WIDTH}, bfloat16, CUDA, on an H100 at its peak rates: {ROOF[0] / 1e12:.0f} TFLOP/s and "
        f"{ROOF[1] / 1e12:.2f} TB/s. A unit is 2·B²·D operations. The gradient in S is written once and read twice, "
        "2 bytes an entry; features and their gradients are little beside it.",
    )
    unit, gradient = 2 * SIZE**2 * WIDTH / ROOF[0], 3 * 2 * SIZE**2 / ROOF[1]
    for name, (units, models) in UNITS.items():
        shown = f"{units} units, {6 * SIZE**2 / 1e9:.1f} GB, {models} exponentials or more an entry"
        table.rows.append(Row(f"{name}: ms", shown, "-", 1000 * (units * unit + gradient), "", None))
    table.notes.append(
        "Published: siglip-kernel 48.8 ms on an H100 for its sigmoid loss at this size (36.9 ms in our run above), "
        "memeff 201 ms on an A100 for MCL at D = 512."
    )
    return table
