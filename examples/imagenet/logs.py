"""Values by step, as CSV lines or in TensorBoard; a resumed run takes back what came after its checkpoint."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from typing import Any

from imagenet.errors import RunError
from imagenet.options import Options

HEAD = ["step", "name", "value"]


class Logs:
    """Writes where ``--log`` says, on the first process alone."""

    def __init__(self, options: Options, step: int, *, writes: bool) -> None:
        self.path = options.out / "log.csv"
        self.step = step
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
            kept = [HEAD]
            if self.step and self.path.exists():
                with self.path.open(newline="") as file:
                    rows = list(csv.reader(file))[1:]
                kept += [row for row in rows if len(row) == 3 and int(row[0]) <= self.step]
            temporary = self.path.with_suffix(".tmp")
            with temporary.open("w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(kept)
            os.replace(temporary, self.path)
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

    def flush(self) -> None:
        """Puts everything on disk, as a checkpoint is about to rely on it."""
        if self.csv:
            self.file.flush()
        if self.tensorboard is not None:
            self.tensorboard.flush()
