"""EMATeacher at the shapes of CLIP: a ViT-B/16 against one copy of all parameters, and a ViT-B/32 with LoRA."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator

import torch
from benchmarks.measure import MIB, Call, Table, in_turn, missing, peak_memory, peer, share, value
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from calrobust import EMATeacher

VOCABULARY = 49408
DEPTH = 12
REPEATS = 9
RANK = 18


class Parameters(nn.Module):
    """The tensors of open_clip's ViT-B-16: 302 of 150 million elements, or of its ViT-B-32."""

    def __init__(self, patch: int = 16) -> None:
        super().__init__()
        tokens = (224 // patch) ** 2 + 1
        patches = (768, 3, patch, patch)
        vision = [(768,), (tokens, 768), (768, 512), patches, (768,), (768,), *_blocks(768), (768,), (768,)]
        text = [(77, 512), (512, 512), (), (VOCABULARY, 512), *_blocks(512), (512,), (512,)]
        self.tensors = nn.ParameterList([torch.randn(shape) for shape in (*vision, *text)])


class Adapted(Parameters):
    """Frozen tensors of a ViT-B/32, and the two small factors of LoRA beside each matrix of its blocks."""

    def __init__(self) -> None:
        super().__init__(patch=32)
        self.tensors.requires_grad_(False)
        shapes = [shape for width in (768, 512) for shape in _blocks(width) if len(shape) == 2]
        self.factors = nn.ParameterList([torch.randn(size, RANK) for shape in shapes for size in shape])


def _blocks(width: int) -> list[tuple[int, ...]]:
    attention = [(3 * width, width), (3 * width,), (width, width), (width,)]
    feed_forward = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return DEPTH * [(width,), (width,), *attention, (width,), (width,), *feed_forward]


def tables() -> Iterator[Table]:
    """One update, and the memory of a teacher."""
    torch.set_num_threads(1)
    student = Parameters()
    count, size = len(student.tensors), sum(tensor.numel() for tensor in student.tensors)
    table = Table(
        "EMATeacher",
        f"{count} tensors, {size / 1e6:.0f} million float32 parameters (ViT-B/16); {torch.get_num_threads()} thread, "
        f"CPU seconds of one update, medians of {REPEATS}.",
    )
    calls = copies(student)
    calls["EMATeacher"] = build(student)
    seconds = in_turn(calls, REPEATS, time.process_time)
    for name, limit in (("copy_", 1.10), ("swa_utils.AveragedModel", None), ("timm ModelEmaV3", None)):
        note = missing("timm.utils")
        table.rows.append(share(f"update / {name}", seconds["EMATeacher"], seconds.get(name), limit, note=note))
    for name in ("swa_utils.AveragedModel", "timm ModelEmaV3"):
        if name in seconds:
            table.rows.append(share(f"for comparison: {name} / copy_", seconds[name], seconds["copy_"], None))
    student_size = 4 * size / MIB
    table.rows.append(
        share("memory of a teacher / student", peak_memory(build_teacher, warm_up=()), student_size, 1.0, "MiB")
    )
    table.rows.append(
        share("extra memory of an update / student", peak_memory(build, warm_up=()), student_size, 0.01, "MiB")
    )
    yield table
    yield _sharing()


def _sharing() -> Table:
    adapted = Adapted()
    trained = sum(factor.numel() for factor in adapted.factors)
    size = trained + sum(tensor.numel() for tensor in adapted.tensors)
    table = Table(
        "EMATeacher with share_frozen=True",
        f"{size / 1e6:.0f} million float32 parameters (ViT-B/32), of which {trained / 1e6:.1f} million train as LoRA; "
        f"{torch.get_num_threads()} thread, medians of {REPEATS}.",
    )
    seconds = in_turn({"whole": build(adapted), "shared": build(adapted, share_frozen=True)}, REPEATS)
    table.rows.append(value("update", 1000 * seconds["shared"], 5, peer=f"{1000 * seconds['whole']:.3g} ms", unit="ms"))
    memory = peak_memory(build_teacher, Adapted, True, warm_up=())
    table.rows.append(share("memory of a teacher and an update / what trains", memory, 4 * trained / MIB, 1.05, "MiB"))
    return table


def build(student: nn.Module | None = None, share_frozen: bool = False) -> Call:
    """One update; the teacher exists already."""
    student = student or Parameters()
    teacher = EMATeacher(student, decay=0.999, share_frozen=share_frozen)
    return lambda: teacher.update(student)


def build_teacher(kind: type[nn.Module] = Parameters, share_frozen: bool = False) -> Call:
    """Making a teacher and updating it."""
    student = kind()

    def make() -> EMATeacher:
        teacher = EMATeacher(student, decay=0.999, share_frozen=share_frozen)
        teacher.update(student)
        return teacher

    return make


def copies(student: Parameters) -> dict[str, Call]:
    """What the peers do: one copy of all parameters, and their updates."""
    plain = copy.deepcopy(student)
    averaged = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    calls: dict[str, Call] = {
        "copy_": lambda: _copy_all(plain, student),
        "swa_utils.AveragedModel": lambda: averaged.update_parameters(student),
    }
    if (timm := peer("timm.utils")) is not None:
        ema = timm.ModelEmaV3(student, decay=0.999)
        calls["timm ModelEmaV3"] = lambda: ema.update(student)
    return calls


@torch.no_grad()
def _copy_all(ours: Parameters, theirs: Parameters) -> None:
    for tensor, other in zip(ours.tensors, theirs.tensors, strict=True):
        tensor.copy_(other)
