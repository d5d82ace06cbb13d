"""Examples that are killed, have no room to write in, or find files that they cannot use."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from shift_table.checkpoint import load_or_build, write_atomically
from tiny_imagenet import CHECKPOINT, Main, options, refusal

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.filterwarnings("ignore:the data do not determine a temperature")


@pytest.mark.parametrize("example", ["imagenet", "shift_table"])
def test_a_run_that_is_killed_anywhere_ends_as_one_that_is_not(example: str, tmp_path: Path) -> None:
    """In training, halfway through a file, before a rename, by the clock: no step lost, no result in part (trap 16)."""
    command = [sys.executable, str(Path(__file__).with_name("killing.py")), example, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def content(folder: Path) -> dict[str, bytes]:
    """Every file in it."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


class TestFullDisk:
    """``/dev/full``, where the file beside the old one would be written, has no room, as a full disk has none."""

    @pytest.mark.parametrize("name", [CHECKPOINT, "report.md", "classifier.pt", "log.csv"])
    def test_imagenet_says_so_and_leaves_the_old_file(self, name: str, made: Path, tmp_path: Path, main: Main) -> None:
        """In one line, with the path; with room again, it goes on."""
        main(options(made, tmp_path))
        before = content(tmp_path)
        (tmp_path / f".{name}.tmp").symlink_to("/dev/full")
        if name == CHECKPOINT:
            (tmp_path / CHECKPOINT).unlink()  # else all steps are done, and none is written
        said = refusal(main, options(made, tmp_path, "--resume"))
        assert f"{tmp_path / name} cannot be written, and is as it was before: " in said
        after = content(tmp_path)
        assert name == CHECKPOINT or after[name] == before[name]
        assert not list(tmp_path.glob(".*"))
        main(options(made, tmp_path, "--resume"))
        assert {*content(tmp_path)} == {*before}

    def test_shift_table_goes_on_without_its_cache(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """It says how to keep the model, and an old one stays."""
        path = tmp_path / "model.ckpt"
        load_or_build(path, {"steps": 1}, lambda: {"weight": torch.zeros(9)})
        before = path.read_bytes()
        (tmp_path / f".model.ckpt.{os.getpid()}.tmp").symlink_to("/dev/full")
        built = load_or_build(path, {"steps": 2}, lambda: {"weight": torch.ones(9)})
        assert torch.equal(built["weight"], torch.ones(9))
        assert "No space left on device. Name a folder that can be written with --cache" in capsys.readouterr().out
        assert content(tmp_path) == {"model.ckpt": before}

    def test_shift_table_leaves_the_old_results(self, tmp_path: Path) -> None:
        """What writes them raises, and leaves nothing behind."""
        (tmp_path / "table.md").write_bytes(b"old")
        (tmp_path / f".table.md.{os.getpid()}.tmp").symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left on device"):
            write_atomically(tmp_path / "table.md", b"new")
        assert content(tmp_path) == {"table.md": b"old"}
        assert not list(tmp_path.glob(".*"))


class TestUnusableFiles:
    """Nothing is taken from a file that is not what it should be, and the reason is said."""

    @pytest.mark.parametrize("what", ["a folder", "a link to itself"])
    def test_an_unreadable_cache_is_reported_and_costs_no_result(
        self, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The model is built anew."""
        path = tmp_path / "model.ckpt"
        path.mkdir() if what == "a folder" else path.symlink_to(path)
        built = load_or_build(path, {"steps": 1}, lambda: {"weight": torch.ones(9)})
        assert torch.equal(built["weight"], torch.ones(9))
        assert f"{path} cannot be read (" in capsys.readouterr().out
        assert not list(tmp_path.glob(".*"))

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.9, 0.9999])
    def test_a_truncated_checkpoint_is_refused(self, share: float, made: Path, tmp_path: Path, main: Main) -> None:
        """Wherever it ends."""
        main(options(made, tmp_path))
        path = tmp_path / CHECKPOINT
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        before = content(tmp_path)
        assert f"{path} is damaged, or no checkpoint of this example: " in refusal(
            main, options(made, tmp_path, "--resume")
        )
        assert content(tmp_path) == before

    def test_a_checkpoint_of_another_version_or_model_is_refused(self, made: Path, tmp_path: Path, main: Main) -> None:
        """By its own word, or because its weights have other names or shapes."""
        main(options(made, tmp_path))
        path = tmp_path / CHECKPOINT
        saved = torch.load(path, weights_only=True)
        network = saved["network"]
        for changed, said in (
            (saved | {"version": 99}, "is of version 99, this example reads 2"),
            ({key: saved[key] for key in saved if key != "version"}, "is of version 1, this example reads 2"),
            (saved | {"network": {**network, "visual.proj": torch.zeros(2, 2)}}, "is of another model: "),
            (saved | {"network": {"weight": torch.zeros(1)}}, "is of another model: "),
            (saved | {"teacher": {}}, "is of another model: "),
            (saved | {"optimizer": {}}, "is of another model: "),
            (saved | {"recipe": saved["recipe"] | {"model": "ViT-L-14"}}, "was made with model='ViT-L-14'"),
            ([saved], "is damaged, or no checkpoint of this example: "),
            (network, "is damaged, or no checkpoint of this example: "),
        ):
            torch.save(changed, path)
            assert said in refusal(main, options(made, tmp_path, "--resume"))

    def test_a_checkpoint_runs_no_code(self, made: Path, tmp_path: Path, main: Main) -> None:
        """A pickle that would make a file is refused, and no file is made."""
        main(options(made, tmp_path))
        torch.save({"version": 2, "recipe": Harmful(tmp_path / "made")}, tmp_path / CHECKPOINT)
        assert "no checkpoint of this example" in refusal(main, options(made, tmp_path, "--resume"))
        assert not (tmp_path / "made").exists()


class Harmful:
    """Unpickled without care, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("folder", ["src", "examples"])
def test_files_are_loaded_as_weights_only(folder: str) -> None:
    """Every torch.load says so, whatever torch's default is."""
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in map(ast.unparse, node.keywords), f"{path}:{node.lineno}"
