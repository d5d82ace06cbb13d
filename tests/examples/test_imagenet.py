from __future__ import annotations

import csv
import runpy
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from imagenet.options import METHODS
from imagenet.pictures import Order
from leaving import torchrun
from tiny_imagenet import SCRIPT, options, refusal
from torch.testing import assert_close

# An untrained model may well be wrong on the few pictures held out, and then no temperature is better than the others.
pytestmark = pytest.mark.filterwarnings("ignore:the data do not determine a temperature")


def logged(out: Path) -> dict[tuple[int, str], float]:
    """The CSV log; no value is logged twice."""
    with (out / "log.csv").open() as file:
        rows = [(int(row["step"]), row["name"], float(row["value"])) for row in csv.DictReader(file)]
    values = {(step, name): value for step, name, value in rows}
    assert len(values) == len(rows)
    return values


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_two_steps_and_reports(
    method: str, made: Path, tmp_path: Path, main: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each logs its own terms, writes its files, and is judged on every domain."""
    main(options(made, tmp_path, "--ood", f"subset={made / 'subset'}", method=method))
    values = logged(tmp_path)
    preset = METHODS[method]
    terms = {name.removeprefix("loss/") for _, name in values if name.startswith("loss/")} - {"total"}
    assert terms == {
        *(["cross_entropy"] if preset.trains == "classifier" else []),
        *(["contrastive"] if preset.trains == "both towers" else []),
        *(["distillation"] if preset.distillation_weight else []),
        *(["orthogonality"] if preset.orthogonality else []),
    }
    last = 0 if method == "zs" else 2
    assert {step for step, _ in values} == set(range(min(1, last), last + 1))
    assert {"ece/ID", "ece/subset", "temperature"} <= {name for step, name in values if step == last}
    assert ((last, "alpha") in values) == preset.interpolates
    assert ((last, "logit_scale") in values) == (preset.trains == "both towers")
    assert f"| {preset.row} " in (tmp_path / "report.md").read_text()
    assert f"| {preset.row} " in capsys.readouterr().out
    assert (tmp_path / "classifier.pt").exists()


def test_terms_add_up_and_the_teacher_moves(made: Path, tmp_path: Path, main: Callable[[list[str]], None]) -> None:
    """The distillation term is zero at first, when student and teacher are one, and not afterwards."""
    main(options(made, tmp_path, method="carot-neurips"))
    values = logged(tmp_path)
    assert values[1, "loss/distillation"] == pytest.approx(0, abs=1e-5)
    assert values[2, "loss/distillation"] > 1e-4
    for step in (1, 2):
        terms = [values[step, f"loss/{name}"] for name in ("contrastive", "distillation", "orthogonality")]
        assert values[step, "loss/total"] == pytest.approx(sum(terms))
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert int(saved["teacher"]["updates"]) == 2
    assert not torch.equal(saved["teacher"]["module.visual.proj"], saved["network"]["visual.proj"])


def test_only_matrices_decay(made: Path, tmp_path: Path, main: Callable[[list[str]], None]) -> None:
    """Logit scale, biases and norms are in the group without weight decay (trap 8)."""
    main(options(made, tmp_path, method="flyp"))
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    decays, stays = saved["optimizer"]["param_groups"]
    assert (decays["weight_decay"], stays["weight_decay"]) == (0.1, 0.0)
    moments = saved["optimizer"]["state"]
    assert all(moments[index]["exp_avg"].ndim >= 2 for index in decays["params"])
    assert all(moments[index]["exp_avg"].ndim < 2 for index in stays["params"])


def test_the_logit_scale_stops_at_a_hundred(made: Path, tmp_path: Path, main: Callable[[list[str]], None]) -> None:
    """Also if it was above before (trap 8)."""
    main(options(made, tmp_path / "first", method="flyp"))
    weights = torch.load(tmp_path / "first" / "model.pt", weights_only=True)
    torch.save(weights | {"logit_scale": torch.tensor(5.0)}, tmp_path / "steep.pt")
    main(options(made, tmp_path / "second", "--pretrained", str(tmp_path / "steep.pt"), method="flyp"))
    scales = [value for (_, name), value in logged(tmp_path / "second").items() if name == "logit_scale"]
    assert scales[0] == pytest.approx(100)
    assert max(scales) < 100.001


def test_the_ood_mean_is_over_the_shifted_sets_alone(
    made: Path, tmp_path: Path, main: Callable[[list[str]], None]
) -> None:
    """Each counts once, whatever its size, and neither the ID set nor any other column is among them (trap 34)."""
    shifts = ("subset", "numbered", "renamed")
    sets = [option for name in shifts for option in ("--ood", f"{name}={made / name}")]
    main(options(made, tmp_path, *sets, "--map", f"renamed={made / 'renamed.txt'}", method="zs"))
    with (tmp_path / "report.csv").open() as file:
        accuracy = {row["domain"]: float(row["accuracy"]) for row in csv.DictReader(file)}
    row = (tmp_path / "report.md").read_text().splitlines()[2].split("|")
    assert float(row[2].split()[0]) == pytest.approx(100 * accuracy["ID"], abs=0.06)
    assert float(row[3].split()[0]) == pytest.approx(100 * sum(accuracy[name] for name in shifts) / 3, abs=0.06)


def test_float16_is_not_offered(
    made: Path, tmp_path: Path, main: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing here scales a loss, so that no gradient is clipped while it is scaled (trap 10)."""
    refusal(main, options(made, tmp_path, "--precision", "fp16"))
    assert "invalid choice: 'fp16'" in capsys.readouterr().err


# Dies where its second checkpoint would appear: written beside the first, not yet renamed.
KILLED = """
import os, runpy, signal, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, os.path.dirname(sys.argv[1]))
renames, rename = [], os.replace
def killing(source, target):
    if str(target).endswith("checkpoint.pt"):
        renames.append(target)
        if len(renames) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.replace = killing
runpy.run_path(sys.argv[1])["main"](sys.argv[2:])
"""


@pytest.mark.parametrize("method", ["carot", "wise-ft"])
def test_a_killed_run_goes_on_bit_for_bit(
    method: str, made: Path, tmp_path: Path, main: Callable[[list[str]], None]
) -> None:
    """SIGKILL in a checkpoint's write: weights, teacher, optimiser and log are those of one run (trap 16)."""
    more = ("--epochs", "3", "--batch-size", "4", "--checkpoint-every", "3", "--accumulate", "2")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(SCRIPT), *options(made, cut, *more, method=method)],
                            capture_output=True, text=True, check=False)  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert torch.load(cut / "checkpoint.pt", weights_only=True)["step"] == 3  # an epoch has four
    assert "holds a checkpoint" in refusal(main, options(made, cut, *more, method=method))
    main(options(made, cut, *more, "--resume", method=method))
    main(options(made, whole, *more, "--resume", method=method))  # nothing there yet: from the start
    expected, resumed = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (whole, cut))
    assert expected["step"] == 12
    assert resumed.pop("recipe") == expected.pop("recipe")
    if method == "wise-ft":
        assert resumed.pop("teacher") is expected.pop("teacher") is None
    assert_close(resumed, expected, rtol=0, atol=0)
    assert logged(cut) == logged(whole)
    assert (cut / "report.csv").read_bytes() == (whole / "report.csv").read_bytes()
    assert not list(cut.glob(".*"))


def test_resuming_with_other_options_is_refused(made: Path, tmp_path: Path, main: Callable[[list[str]], None]) -> None:
    """A checkpoint answers for its own recipe, and a damaged one for none."""
    main(options(made, tmp_path))
    assert "label_smoothing=0.05" in refusal(main, options(made, tmp_path, "--resume", "--label-smoothing", "0.3"))
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-2000])
    assert "is damaged" in refusal(main, options(made, tmp_path, "--resume"))


def test_workers_and_accumulation_read_the_same_pictures(made: Path, tmp_path: Path, main: Any) -> None:
    """Cross-entropy is the same in one part or in two, read by this process or by another."""
    for name, more in {"a": (), "b": ("--workers", "1", "--accumulate", "2")}.items():
        main(options(made, tmp_path / name, *more, method="ft"))
    one, other = logged(tmp_path / "a"), logged(tmp_path / "b")
    assert one[2, "loss/total"] == pytest.approx(other[2, "loss/total"], rel=1e-5)


def test_ranks_and_parts_share_a_batch() -> None:
    """Together they see each picture of an epoch once, whatever their number, and a later start skips what was seen."""

    def keys(start: int, parts: int, world_size: int) -> list[set[tuple[int, int]]]:
        shares = [
            list(Order(13, start=start, steps=6, batch_size=4, parts=parts, rank=rank, world_size=world_size, seed=5))
            for rank in range(world_size)
        ]
        steps = range(6 - start)
        return [{key for share in shares for part in share[s * parts :][:parts] for key in part} for s in steps]

    whole = keys(0, 1, 1)
    assert keys(0, 2, 2) == whole
    assert keys(4, 1, 2) == whole[4:]
    assert [len(set().union(*whole[epoch * 3 :][:3])) for epoch in (0, 1)] == [12, 12]
    assert {index for _, index in whole[0]} != {index for _, index in whole[3]}


class TestBadImages:
    """An unreadable picture is named, and the run goes on or stops."""

    @pytest.fixture
    def damaged(self, made: Path, tmp_path: Path) -> Path:
        """The data, with half a picture in train and no picture at all in val."""
        root = tmp_path / "damaged"
        shutil.copytree(made, root)
        for path, content in {"train/n02/3.png": None, "val/n01/0.png": b"no picture"}.items():
            (root / path).write_bytes(content or (root / path).read_bytes()[:200])
        return root

    def test_is_reported_once_and_counted(
        self, damaged: Path, tmp_path: Path, main: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str]
    ) -> None:
        """With its path, however many epochs meet it; the batch stays full, the test set shrinks."""
        main(options(damaged, tmp_path / "out", "--epochs", "3", "--evaluate-every", "1"))
        printed = capsys.readouterr()
        for path in ("train/n02/3.png", "val/n01/0.png"):
            assert printed.err.count(f"skipped {damaged / path}, which cannot be read: ") == 1
        assert "Unreadable pictures seen by this process: 2." in printed.out
        with (tmp_path / "out" / "report.csv").open() as file:
            assert next(csv.DictReader(file))["n"] == "8"

    def test_stops_the_run_if_asked(self, damaged: Path, tmp_path: Path, main: Callable[[list[str]], None]) -> None:
        """With its path and what to do."""
        said = refusal(main, options(damaged, tmp_path / "out", "--on-bad-image", "stop"))
        assert ".png cannot be read: " in said
        assert "--on-bad-image skip" in said


class TestFolders:
    """What is wrong is said before training starts; other names of classes are translated."""

    def test_names_are_matched_by_synset_number_or_map(
        self, made: Path, tmp_path: Path, main: Callable[[list[str]], None]
    ) -> None:
        """A subset is judged among its own classes, and what a map leaves out is left out."""
        sets = [f"{name}={made / name}" for name in ("subset", "numbered", "renamed")]
        mapped = ("--map", f"renamed={made / 'renamed.txt'}")
        main(options(made, tmp_path, *(o for s in sets for o in ("--ood", s)), *mapped, method="zs"))
        with (tmp_path / "report.csv").open() as file:
            counts = {row["domain"]: int(row["n"]) for row in csv.DictReader(file)}
        assert counts == {"ID": 9, "subset": 4, "numbered": 6, "renamed": 4}

    def test_several_synsets_are_one_class(self, made: Path) -> None:
        """The highest of their logits counts, and classes come in the order of the model's."""
        data = runpy.run_path(str(SCRIPT))
        arguments = [*options(made, made), "--ood", f"r={made / 'renamed'}", "--map", f"r={made / 'renamed.txt'}"]
        with data["Processes"].started("cpu") as processes:
            domain = data["read_data"](data["parse"](arguments), processes).domains["r"]
        assert domain.columns == [[0], [1, 2]]
        assert_close(domain.logits(torch.tensor([[1.0, 2.0, 5.0]])), torch.tensor([[1.0, 5.0]]))
        assert {(Path(path).parent.name, target) for path, target in domain.samples} == {("warm", 0), ("cold", 1)}

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (("--train", "{made}/nowhere"), "--train: {made}/nowhere is no folder"),
            (("--val", "{made}/train/n01"), "--val: {made}/train/n01 holds no class folders"),
            (("--val", "{made}/subset"), "--val: 1 of 3 classes have no folder"),
            (("--ood", "r={made}/renamed"), "--ood r: 3 of the 3 folders in {made}/renamed are no class"),
            (("--ood", "r={made}/subset", "--map", "r={made}/renamed.txt"), "has no folder cold"),
            (("--ood", "r={made}/renamed", "--map", "r={made}/classes.txt"), "gives n01 red thing, other name no"),
            (("--classes", "{made}/none.txt"), "--classes: {made}/none.txt cannot be read"),
            (("--batch-size", "64"), "17 pictures to train on are no batch of 64"),
            (("--accumulate", "3"), "must be divisible"),
            (("--model", "no-such-model"), "open_clip does not give no-such-model"),
            (("--model-config", "{made}/classes.txt"), "classes.txt cannot be read"),
        ],
    )
    def test_wrong_options_are_named(
        self, more: tuple[str, ...], said: str, made: Path, tmp_path: Path, main: Callable[[list[str]], None]
    ) -> None:
        """The option, what it holds, and the rule."""
        arguments = options(made, tmp_path, *(option.format(made=made) for option in more))
        assert said.format(made=made) in refusal(main, arguments)
        assert not (tmp_path / "log.csv").exists()

    def test_classes_of_imagenet_are_a_thousand(
        self, made: Path, tmp_path: Path, main: Callable[[list[str]], None]
    ) -> None:
        """Without a file of classes, other numbers of folders are refused."""
        arguments = options(made, tmp_path)
        position = arguments.index("--classes")
        assert "has 3 class folders, ImageNet has 1000" in refusal(
            main, arguments[:position] + arguments[position + 2 :]
        )

    def test_too_little_disk_is_told_before_training(
        self, made: Path, tmp_path: Path, main: Callable[[list[str]], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A checkpoint that would not fit is not begun."""
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 0, 10**6))
        assert "GB free, checkpoints need" in refusal(main, options(made, tmp_path))
        assert not (tmp_path / "log.csv").exists()


def test_bf16_and_tensorboard(made: Path, tmp_path: Path, main: Callable[[list[str]], None]) -> None:
    """Autocast changes the features alone; TensorBoard gets what CSV gets."""
    for precision in ("bf16", "fp32"):
        logs = ("--log", "csv", "tensorboard") if precision == "bf16" else ()
        main(options(made, tmp_path / precision, "--precision", precision, *logs))
    low, full = (logged(tmp_path / precision) for precision in ("bf16", "fp32"))
    assert low[1, "loss/contrastive"] != full[1, "loss/contrastive"]
    assert low[1, "loss/contrastive"] == pytest.approx(full[1, "loss/contrastive"], rel=0.02)
    assert list((tmp_path / "bf16" / "tensorboard").glob("events.*"))


def test_two_processes_train_as_one(made: Path, tmp_path: Path, main: Callable[[list[str]], None]) -> None:
    """The batches that torchrun's processes share give the losses and the report of one process."""
    torchrun(SCRIPT, *options(made, tmp_path / "two"))
    main(options(made, tmp_path / "one"))
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    for name in ("loss/contrastive", "loss/total", "logit_scale", "ece/ID"):
        assert two[2, name] == pytest.approx(one[2, name], rel=1e-3)
