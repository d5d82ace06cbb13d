"""Examples that are killed, have no room to write in, or find files that they cannot use."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from atomic import write_atomically
from shift_table.cache import load_or_build
from tiny_folders import Main, options, refusal

ROOT = Path(__file__).parents[2]
CHECKPOINT = "carot/checkpoint.pt"  # in --out

pytestmark = pytest.mark.filterwarnings("ignore:the data do not determine a temperature")


@pytest.mark.slow
@pytest.mark.parametrize("example", ["finetune", "shift_table"])
def test_a_run_that_is_killed_anywhere_ends_as_one_that_is_not(example: str, tmp_path: Path) -> None:
    """In training, halfway through a file, before a rename, by the clock: no step lost, no result in part (trap 16)."""
    command = [sys.executable, str(Path(__file__).with_name("killing.py")), example, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def whole(made: Path, main: Main, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two steps leave."""
    out = tmp_path_factory.mktemp("whole")
    main(options(made, out))
    return out


@pytest.fixture
def trained(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "trained"))


def content(folder: Path) -> dict[str, bytes]:
    """Every file in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class FullDisk:
    """Turns a file that a program is about to write into a link to ``/dev/full``, which has no room."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def during(self, main: Main) -> Main:
        """Runs it with the link in place from the moment the file's folder has been tidied."""

        def run(arguments: list[str]) -> None:
            replaced = Path.open

            def opened(path: Path, *more: Any, **options: Any) -> Any:
                if path == self.path:
                    path.symlink_to("/dev/full")
                return replaced(path, *more, **options)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Path, "open", opened)
                main(arguments)

        return run


class TestFullDisk:
    """``/dev/full``, where the file beside the old one would be written, has no room, as a full disk has none."""

    @pytest.mark.parametrize("name", ["carot/checkpoint.pt", "carot/log.csv", "carot/weights.pt", "report.md"])
    def test_finetune_says_so_and_leaves_the_old_file(self, name: str, made: Path, tmp_path: Path, main: Main) -> None:
        """In one line, with the path; with room again, it goes on."""
        main(options(made, tmp_path))
        before, path = content(tmp_path), tmp_path / name
        if path.parent.name == "carot":
            (tmp_path / "carot" / "checkpoint.pt").unlink()  # else all steps are done, and none is written
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        full = FullDisk(temporary)
        said = refusal(full.during(main), options(made, tmp_path))
        assert f"{path} cannot be written, and is as it was before: " in said
        assert "No space left on device" in said
        assert name == "carot/checkpoint.pt" or content(tmp_path)[name] == before[name]
        assert not list(tmp_path.rglob(".*"))
        main(options(made, tmp_path))
        assert {*content(tmp_path)} == {*before}

    def test_shift_table_goes_on_without_its_cache(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """It says how to keep the model, and an old one stays."""
        path = tmp_path / "model.clip"
        load_or_build(path, {"steps": 1}, lambda: {"weight": torch.zeros(9)})
        before = path.read_bytes()
        (tmp_path / f".model.clip.{os.getpid()}.tmp").symlink_to("/dev/full")
        built = load_or_build(path, {"steps": 2}, lambda: {"weight": torch.ones(9)})
        assert torch.equal(built["weight"], torch.ones(9))
        assert "No space left on device. Name a folder that can be written with --cache" in capsys.readouterr().out
        assert content(tmp_path) == {"model.clip": before}

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
        path = tmp_path / "model.clip"
        path.mkdir() if what == "a folder" else path.symlink_to(path)
        built = load_or_build(path, {"steps": 1}, lambda: {"weight": torch.ones(9)})
        assert torch.equal(built["weight"], torch.ones(9))
        assert f"{path} cannot be read (" in capsys.readouterr().out
        assert not list(tmp_path.glob(".*"))

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.9, 0.9999])
    def test_a_truncated_checkpoint_is_refused(self, share: float, trained: Path, made: Path, main: Main) -> None:
        """Wherever it ends."""
        path = trained / CHECKPOINT
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        before = content(trained)
        assert f"{path} is damaged, or of another model or program: " in refusal(main, options(made, trained))
        assert content(trained) == before

    def test_a_checkpoint_of_another_kind_or_recipe_is_refused(self, trained: Path, made: Path, main: Main) -> None:
        """By its own word, or because its weights have other names or shapes."""
        path = trained / CHECKPOINT
        saved = torch.load(path, weights_only=True)
        recipe, network = saved["recipe"], saved["network"]
        for changed, said in (
            (saved | {"recipe": recipe | {"version": "99"}}, "was made with version=99, not 1; repeat that"),
            (saved | {"recipe": recipe | {"model": "ViT-L-14"}}, "was made with model=ViT-L-14, not local-dir:"),
            (saved | {"recipe": {}}, "was made with model=None"),
            (saved | {"network": {**network, "visual.proj": torch.zeros(2, 2)}}, "is damaged, or of another model"),
            (saved | {"network": {"weight": torch.zeros(1)}}, "is damaged, or of another model"),
            (saved | {"teacher": {}}, "is damaged, or of another model"),
            (saved | {"optimizer": {}}, "is damaged, or of another model"),
            ({name: saved[name] for name in saved if name != "step"}, "is damaged, or of another model"),
            ([saved], "is damaged, or of another model"),
            (network, "is damaged, or of another model"),
        ):
            torch.save(changed, path)
            assert said in refusal(main, options(made, trained))

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (("--label-smoothing", "0.3"), "was made with label_smoothing=None, not 0.3; repeat that, or name another"),
            (("--share", "0.3"), "was made with share=0.1, not 0.3"),
            (("--seed", "1"), "was made with seed=0, not 1"),
        ],
    )
    def test_options_of_another_run_are_refused(
        self, more: tuple[str, ...], said: str, trained: Path, made: Path, main: Main
    ) -> None:
        """A checkpoint answers for its own recipe."""
        assert said in refusal(main, options(made, trained, *more))

    def test_other_pictures_to_train_on_are_refused(
        self, trained: Path, made: Path, tmp_path: Path, main: Main
    ) -> None:
        """One more is another order of all."""
        moved = tmp_path / "made"
        shutil.copytree(made, moved)
        arguments = options(moved, tmp_path / "out")
        main(arguments)
        shutil.copy(moved / "val/red thing/0.png", moved / "train/red thing/new.png")
        assert "was made with pictures=" in refusal(main, arguments)

    def test_a_checkpoint_runs_no_code(self, trained: Path, made: Path, tmp_path: Path, main: Main) -> None:
        """A pickle that would make a file is refused, and no file is made."""
        torch.save({"recipe": Harmful(tmp_path / "made")}, trained / CHECKPOINT)
        assert "is damaged, or of another model" in refusal(main, options(made, trained))
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
