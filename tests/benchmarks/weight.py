"""What the package weighs: import time, wheel, and a training step with everything in it."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from benchmarks.measure import Call, Row, Table, in_turn, value
from torch import Tensor, nn
from torch.nn import functional as F

import calrobust as cr

PROJECT = Path(__file__).parents[2]
REPEATS = 5
IMPORT_REPEATS = 7
BATCH, TOKENS, WIDTH, LAYERS = 64, 64, 384, 4  # of a small transformer for each modality
IMPORTS = "torch", "calrobust"
READ_CLOCK = "import time; start = time.process_time(); import {}; print(time.process_time() - start)"


def tables() -> Iterator[Table]:
    """Import, wheel and step."""
    torch.set_num_threads(1)
    table = Table(
        "Weight",
        f"Imports: CPU seconds in fresh processes, in turn, medians of {IMPORT_REPEATS}. Step: forward, loss, "
        f"backward, AdamW and teacher of two {LAYERS}-layer transformers of width {WIDTH}; {BATCH} pairs of "
        f"{TOKENS} tokens; "
        f"{torch.get_num_threads()} thread, CPU seconds, medians of {REPEATS}.",
    )
    torch_seconds, ours_seconds = _imports()
    table.rows.append(
        Row(
            "import calrobust - import torch, seconds",
            f"{ours_seconds:.2f} s",
            f"{torch_seconds:.2f} s",
            ours_seconds - torch_seconds,
            "≤",
            0.1,
        )
    )
    table.rows += [_wheel(), _step()]
    yield table


def _imports() -> tuple[float, float]:
    times: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in range(IMPORT_REPEATS):
        for name, seconds in times.items():
            command = [sys.executable, "-c", READ_CLOCK.format(name)]
            seconds.append(float(subprocess.run(command, capture_output=True, check=True, text=True).stdout))
    return statistics.median(times[IMPORTS[0]]), statistics.median(times[IMPORTS[1]])


def _wheel() -> Row:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, str(PROJECT)]
        built = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if not wheels:
            reason = built.stderr.strip().splitlines()[-1] if built.stderr.strip() else "pip gave no wheel"
            return Row("wheel, kB", "-", "-", None, "≤", 100, f"not built: {reason}")
        return value("wheel, kB", wheels[0].stat().st_size / 1000, 100)


class _Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 6, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.image = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.text = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.logit_scale = nn.Parameter(torch.tensor(3.9))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = (F.normalize(tower(x).mean(1), dim=1) for tower, x in ((self.image, images), (self.text, texts)))
        image, text = features
        return image, text, self.logit_scale.exp()


def _step() -> Row:
    """Of a CaRot fine-tune, against that of a plain one and the teacher's forward pass."""
    torch.manual_seed(0)
    batch = torch.randn(BATCH, TOKENS, WIDTH), torch.randn(BATCH, TOKENS, WIDTH)
    student = _Towers()
    teacher = cr.EMATeacher(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    plain = cr.MultimodalContrastiveLoss()
    carot = cr.CaRotLoss(label_smoothing=0.1, distillation_weight=1.5)

    def step(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def carot_step() -> None:
        step(carot(*student(*batch), *teacher(*batch)))
        teacher.update(student)

    calls: dict[str, Call] = {
        "plain": lambda: step(plain(*student(*batch))),
        "teacher": lambda: teacher(*batch),
        "CaRot": carot_step,
    }
    seconds = in_turn(calls, REPEATS, time.process_time)
    floor = seconds["plain"] + seconds["teacher"]
    ours, peer = f"{seconds['CaRot']:.3g} s", f"{seconds['plain']:.3g} s + {seconds['teacher']:.3g} s"
    return Row("step of CaRot / plain step + teacher's forward", ours, peer, seconds["CaRot"] / floor, "≤", 1.02)
