"""Shared by the programs in this folder: files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Writes bytes, or what a function writes, beside ``path`` and renames it: nobody ever sees half a file.

    Raises:
        OSError: it cannot be written; an older file of that name is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content) if isinstance(content, bytes) else content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter on a full disk
        raise OSError(f"{path} cannot be written, and is as it was before: {error}") from None
    finally:
        with suppress(OSError):  # where the folder is a file, for one
            temporary.unlink(missing_ok=True)
