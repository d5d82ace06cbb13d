"""Values by step, as CSV lines or in TensorBoard; a resumed run takes back what came after its checkpoint."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from typing import Any

from imagenet.checkpoint import write_atomically
from imagenet.errors import RunError
from imagenet.options import Options

HEAD = b"step,name,value\n"


class Logs:
    """Writes where ``--log`` says, on the first process alone."""

    def __init__(self, options: Options, step: int, logged: int, *, writes: bool) -> None:
        self.path = options.out / "log.csv"
        self.logged = logged
        self.csv = writes and "csv" in options.log
        self.tensorboard: Any = None
        if writes and "tensorboard" in options.log:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise RunError("--log tensorboard needs it: pip install tensorboard") from None
            self.tensorboard = SummaryWriter(options.out / "tensorboard", purge_step=step + 1)

    def __enter__(self) -> Logs:
        if self.csv:
            kept = self.path.read_bytes()[: self.logged] if self.path.exists() else b""
            write_atomically(self.path, kept[: kept.rfind(b"\n") + 1] or HEAD)
            self.file = self.path.open("a", newline="")
            self.writer = csv.writer(self.file, lineterminator="\n")
        return self

    def __exit__(self, *_: object) -> None:
        if self.csv:
            self.file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Notes the values of a step."""
        for name, value in values.items():
            if self.csv:
                self.writer.writerow([step, name, value])
            if self.tensorboard is not None:
                self.tensorboard.add_scalar(name, value, step)

    def flush(self) -> int:
        """Puts everything on disk, as a checkpoint is about to rely on it; gives the length of the CSV log."""
        if self.tensorboard is not None:
            self.tensorboard.flush()
        if not self.csv:
            return 0
        self.file.flush()
        return self.path.stat().st_size
