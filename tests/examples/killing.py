"""Kills an example at every kind of moment, resumes it, and looks at its files: ``python killing.py example folder``.

Apart from the tests, since processes are forked here: the example is imported once and every run is a fork.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES), str(Path(__file__).parents[1])]
ON_DISK = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate")  # audit events that come before a change


class Moment(NamedTuple):
    """When a run dies: before its n-th touch of the file, or some bytes into what it then writes; or after seconds."""

    file: str = ""
    touch: int = 0
    bytes_on: int = 0
    seconds: float = 0.0


def fork(run: Callable[[], None], folder: Path, moment: Moment) -> int:
    """Runs in a fork that dies of a signal, which no handler notices; gives the signal, 0 if it came to its end."""
    child = os.fork()
    if not child:
        touches = 0

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal touches
            path = str(arguments[0]) if event in ON_DISK else ""
            if str(folder) in path and moment.file in Path(path).name:
                touches += 1
                if touches == moment.touch and moment.bytes_on:  # the kernel kills who writes on
                    resource.setrlimit(resource.RLIMIT_FSIZE, (moment.bytes_on, moment.bytes_on))
                elif touches == moment.touch:
                    os.kill(os.getpid(), signal.SIGKILL)

        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.addaudithook(count)
        status = 1
        try:
            run()
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    if moment.seconds:
        time.sleep(moment.seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status > 0:
        raise RuntimeError("the example failed")
    return -status


def same(ours: Path, whole: Path) -> bool:
    """Whether two files hold the same; weights are compared as weights."""
    if ours.suffix != ".pt":
        return ours.read_bytes() == whole.read_bytes()
    return equal(*(torch.load(path, weights_only=True) for path in (ours, whole)))


def equal(one: Any, other: Any) -> bool:
    """To the bit, tensors in dicts and sequences included."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def files(folder: Path) -> set[str]:
    """What is in it, but for what a run that was killed left beside it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.name[0] != "."}


def survive(
    run: Callable[[Path], None],
    folder: Path,
    moments: list[Moment],
    results: Sequence[str],
    look: Callable[[Path], int],
) -> None:
    """A run that is killed time and again ends with the files of one that is not, and has none of them in part."""
    whole, cut = folder / "whole", folder / "cut"
    start = time.monotonic()
    assert not fork(lambda: run(whole), whole, Moment())
    moments = [*moments, Moment(seconds=random.Random(0).uniform(0.1, time.monotonic() - start)), Moment()]
    done, deaths = 0, 0
    for moment in moments:
        died = fork(lambda: run(cut), cut, moment)
        assert died in (0, signal.SIGKILL, signal.SIGXFSZ)
        deaths += died > 0
        for name in results:
            assert not (cut / name).exists() or same(cut / name, whole / name), f"{name} after {moment}"
        before, done = done, look(cut)
        assert done >= before, f"went back from step {before} to {done} after {moment}"
    assert not died
    assert deaths >= len(moments) - 2  # the clock's may come too late
    assert files(cut) == files(whole)
    assert all(same(cut / name, whole / name) for name in results)


def finetune(folder: Path) -> None:
    """Two rows of four steps, a checkpoint every second one."""
    from tiny_folders import main_of_the_script, make_folders, options

    made = folder / "made"
    make_folders(made)
    main = main_of_the_script()
    more = ("--method", "wise-ft", "carot", "--epochs", "2", "--checkpoint-every", "2")

    def steps(out: Path) -> int:
        paths = out.glob("*/checkpoint.pt")
        return sum(int(torch.load(path, weights_only=True)["step"]) for path in paths)

    rows = [f"{method}/{name}" for method in ("wise-ft", "carot") for name in ("weights.pt", "logits.pt")]
    moments = [
        Moment("", 1),  # before there is anything
        Moment("checkpoint.pt", 1, 1000),  # in the first write of a checkpoint
        Moment("checkpoint.pt", 4),  # before the rename of the second
        Moment("checkpoint.pt", 2),  # between the log and its checkpoint
        Moment("checkpoint.pt", 6),  # in the second row, the first one whole
        Moment("log.csv", 1, 50),  # in the log
        Moment("weights.pt", 2),  # before a rename, all trained
        Moment("weights.pt", 3, 50),  # what was left is removed, opened, renamed: a copy would die halfway
        Moment("logits.pt", 1, 50),
        Moment("report.md", 1, 50),
        Moment("report.csv", 2),
        Moment("reliability.png", 1, 50),
    ]
    survive(lambda out: main(options(made, out, *more)), folder, moments, [*rows, "report.md", "report.csv"], steps)
    for method in ("wise-ft", "carot"):
        for name in ("checkpoint.pt", "log.csv"):
            assert same(*(folder / out / method / name for out in ("cut", "whole"))), f"{method}/{name}"


def shift_table(folder: Path) -> None:
    """Two steps of pre-training and of each row, which the cache keeps."""
    from matplotlib.figure import Figure
    from shift_table import results
    from tiny_shift_table import tiny_script

    script = tiny_script()
    vars(results).update(contact_sheet=lambda _: Figure((1, 1)))  # what is drawn takes longer than the run
    files = ("table.md", "results.csv", "domains.png", "shift.png", "reliability.png")

    def run(out: Path) -> None:
        sys.argv = ["shift_table.py", "--fast", "--rows", "ZS", "FLYP", "CaRot"]
        sys.argv += ["--out", str(out), "--cache", str(out / "cache")]
        script.main()

    moments = [Moment("clip", 2, 1000), Moment("FLYP.logits", 2), Moment("table.md", 1, 50)]
    survive(run, folder, moments, files, lambda out: len([*(out / "cache").glob("shift_table*")]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # so few pictures may not determine a temperature
    {"finetune": finetune, "shift_table": shift_table}[sys.argv[1]](Path(sys.argv[2]))
