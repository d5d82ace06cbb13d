"""How a rank of a test ends: not by an ordinary exit, and with all others.

torch keeps references to a process group beyond its destruction (default arguments of ``torch.distributed.nn`` and a
cache of DTensor's, in 2.14), so threads of gloo outlive it. One of them may still hold a tensor of Python's when the
interpreter is gone, and then aborts the process: once in some hundred. As a script, ``leaving.py example.py options``
runs another script this way, on ranks that torchrun starts.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist


def leave() -> NoReturn:
    """Ends the process without the interpreter's teardown; all is well."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def leave_together() -> NoReturn:
    """Ends the process of a rank whose checks have passed, once those of all ranks have.

    A rank that left first would close the connections of the others.
    """
    dist.barrier()
    dist.destroy_process_group()
    leave()


def torchrun(script: Path, *options: str) -> str:
    """What a script prints that two processes run; an error of any of them fails the test."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    result = subprocess.run([*command, str(script), *options], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


if __name__ == "__main__":
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
    leave()
