from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from finetune import RunError
from finetune.models import load_clip, local_weights
from finetune.pictures import Batch, Domain, Pictures, order, read_data
from finetune.training import METHODS
from leaving import torchrun
from PIL import Image
from tiny_folders import CLASSES, CONFIG, SCRIPT, Main, draw, options, parse_options, refusal
from torch.testing import assert_close
from torchvision.transforms import Compose, RandomResizedCrop, ToTensor
from transformers import CLIPModel, SiglipModel

# An untrained model may well be wrong on the few pictures held out, and then no temperature is better than the others.
pytestmark = pytest.mark.filterwarnings("ignore:the data do not determine a temperature")


def logged(out: Path, method: str = "carot") -> list[dict[str, float]]:
    """The CSV log, a row for each step."""
    with (out / method / "log.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def checkpoint(out: Path, method: str = "carot") -> dict[str, Any]:
    """What the last step left."""
    content: dict[str, Any] = torch.load(out / method / "checkpoint.pt", weights_only=True)
    return content


def figures(out: Path) -> dict[tuple[str, str], dict[str, str]]:
    """The report's rows, by method and domain."""
    with (out / "report.csv").open() as file:
        return {(row["method"], row["domain"]): row for row in csv.DictReader(file)}


def sets(made: Path) -> list[str]:
    """Two shifts: of some of the classes, and with folders of its own."""
    renamed = f"renamed={made / 'renamed'}", "--map", f"renamed={made / 'renamed.txt'}"
    return ["--ood", f"subset={made / 'subset'}", "--ood", *renamed]


@pytest.fixture(scope="module")
def table(made: Path, main: Main, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All nine methods in two runs: the second goes into the folder of the first."""
    out = tmp_path_factory.mktemp("table")
    first, *others = METHODS
    main(options(made, out, *sets(made), method=first))
    main(options(made, out, *sets(made), "--method", *others))
    return out


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_two_steps_and_has_its_row(method: str, table: Path) -> None:
    """Each logs its own terms, and separate runs share a report, in the table's order."""
    row = METHODS[method]
    report = figures(table)
    assert list(dict.fromkeys(name for name, _ in report)) == [other.name for other in METHODS.values()]
    assert {domain for name, domain in report if name == row.name} == {"ID", "subset", "renamed"}
    assert f"| {row.name} " in (table / "report.md").read_text()
    weights = torch.load(table / method / "weights.pt", weights_only=True)
    assert weights["classes"] == ["blue ish thing", "green thing", "red thing"]
    assert weights["head"].shape == (3, 8)
    if method == "zs":
        assert not (table / "zs" / "log.csv").exists()
        return
    log = logged(table, method)
    assert [line["step"] for line in log] == [1, 2]
    assert set(log[0]) - {"step", "learning_rate", "logit_scale", "loss"} == {
        "contrastive" if row.contrast else "cross_entropy",
        *(["distillation"] if row.distillation_weight else []),
        *(["orthogonality"] if row.orthogonality else []),
    }


def test_pictures_are_drawn(table: Path) -> None:
    """Of reliability, and of the shift."""
    for name in ("reliability.png", "shift.png"):
        with Image.open(table / name) as picture:
            assert min(picture.size) > 100


def test_terms_add_up_and_the_teacher_moves(table: Path) -> None:
    """The distillation term is zero at first, when student and teacher are one, and not afterwards."""
    log = logged(table, "carot-neurips")
    assert log[0]["distillation"] == pytest.approx(0, abs=1e-5)
    assert log[1]["distillation"] > 1e-4
    for line in log:
        assert line["loss"] == pytest.approx(line["contrastive"] + line["distillation"] + line["orthogonality"])
    saved = checkpoint(table, "carot-neurips")
    assert int(saved["teacher"]["updates"]) == 2
    assert not torch.equal(saved["teacher"]["module.visual.proj"], saved["network"]["visual.proj"])


def test_only_matrices_decay(table: Path) -> None:
    """Logit scale, biases and norms are in the group without weight decay (trap 8)."""
    saved = checkpoint(table, "flyp")
    decays, stays = saved["optimizer"]["param_groups"]
    assert (decays["weight_decay"], stays["weight_decay"]) == (0.1, 0.0)
    moments = saved["optimizer"]["state"]
    assert all(moments[index]["exp_avg"].ndim >= 2 for index in decays["params"])
    assert all(moments[index]["exp_avg"].ndim < 2 for index in stays["params"])


def test_fine_tuning_leaves_the_text_tower_and_contrast_moves_both(table: Path) -> None:
    """What a loss does not depend on is not decayed either."""
    zero_shot, classified, contrasted = (
        torch.load(table / method / "weights.pt", weights_only=True)["state_dict"] for method in ("zs", "ft", "flyp")
    )
    for name, value in zero_shot.items():
        text = name.startswith(
            ("transformer", "token_embedding", "ln_final", "text_projection", "positional_embedding")
        )
        if text or name == "logit_scale":
            assert torch.equal(classified[name], value)
    for method, text in (("ft", False), ("flyp", True)):  # the optimiser of ft has no weights of the text tower
        state = checkpoint(table, method)["optimizer"]["state"]
        assert (sum(moment["exp_avg"].shape == (49408, 8) for moment in state.values()) == 1) == text
        assert len(state) == sum(
            len(group["params"]) for group in checkpoint(table, method)["optimizer"]["param_groups"]
        )
    for name in ("visual.proj", "visual.conv1.weight"):
        assert not torch.equal(classified[name], zero_shot[name])
    for name in ("visual.proj", "text_projection", "logit_scale"):
        assert not torch.equal(contrasted[name], zero_shot[name])


def test_the_head_of_every_row_is_scaled_text(table: Path) -> None:
    """What is judged is what the weights say."""
    saved = torch.load(table / "flyp" / "weights.pt", weights_only=True)
    assert_close(saved["head"].norm(dim=1), saved["state_dict"]["logit_scale"].exp().expand(3))


def test_the_logit_scale_stops_at_a_hundred(made: Path, tmp_path: Path, main: Main) -> None:
    """Also if it was above before (trap 8). The weights that a run writes are those that open_clip loads."""
    main(options(made, tmp_path, method="flyp"))
    shutil.copytree(made / "tiny-clip", tmp_path / "steep")
    model = open_clip.CLIP(**CONFIG)
    open_clip.load_checkpoint(model, str(tmp_path / "flyp" / "weights.pt"))
    torch.save(model.state_dict() | {"logit_scale": torch.tensor(5.0)}, tmp_path / "steep/open_clip_pytorch_model.bin")
    main(options(made, tmp_path / "second", "--model", f"local-dir:{tmp_path / 'steep'}", method="flyp"))
    scales = [line["logit_scale"] for line in logged(tmp_path / "second", "flyp")]
    assert scales[0] == pytest.approx(100)
    assert max(scales) < 100.001


def test_the_ood_mean_is_over_the_shifted_sets_alone(table: Path) -> None:
    """Each counts once, whatever its size, and neither the ID set nor any other column is among them (trap 34)."""
    report = figures(table)
    row = (table / "report.md").read_text().splitlines()[2].split("|")
    accuracy = {domain: float(report["ZS", domain]["accuracy"]) for domain in ("ID", "subset", "renamed")}
    assert float(row[2].split()[0]) == pytest.approx(100 * accuracy["ID"], abs=0.06)
    assert float(row[3].split()[0]) == pytest.approx(50 * (accuracy["subset"] + accuracy["renamed"]), abs=0.06)


def test_rows_of_other_pictures_are_not_in_the_report(
    made: Path, tmp_path: Path, main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are named, and what is there stays."""
    main(options(made, tmp_path, method="zs"))
    main(options(made, tmp_path, "--test", str(made / "val"), method="ft"))
    assert f"{tmp_path / 'zs' / 'logits.pt'} is of another model or other pictures" in capsys.readouterr().out
    assert {name for name, _ in figures(tmp_path)} == {"FT"}
    main(options(made, tmp_path, "--test", str(made / "val"), method="zs"))
    assert {name for name, _ in figures(tmp_path)} == {"ZS", "FT"}


@pytest.mark.parametrize("what", ["shift", "model", "class names", "training set"])
def test_rows_of_another_model_or_shift_of_equal_shape_are_not_in_the_report(
    what: str, made: Path, tmp_path: Path, main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    """Severities of a corruption have the same folders, numbers of pictures and targets."""
    for name, root in (("blur", "subset"), ("train", "train")):
        shutil.copytree(made / root, tmp_path / name)
    (tmp_path / "names.txt").write_text("blue-ish thing\tsky\ngreen_thing\tgrass\nred thing\tpoppy\n")
    first, second = {
        "shift": (("--ood", f"blur={made / 'subset'}"), ("--ood", f"blur={tmp_path / 'blur'}")),
        "model": ((), ("--model", f"hf:{made / 'tiny-hf'}")),
        "class names": ((), ("--classes", str(tmp_path / "names.txt"))),
        "training set": (
            ("--val", str(made / "val")),
            ("--val", str(made / "val"), "--train", str(tmp_path / "train")),
        ),
    }[what]
    out = tmp_path / "out"
    main(options(made, out, *first, method="zs"))
    main(options(made, out, *second, method="ft"))
    assert f"{out / 'zs' / 'logits.pt'} is of another model or other pictures" in capsys.readouterr().out
    assert {name for name, _ in figures(out)} == {"FT"}
    main(options(made, out, *first, method="flyp"))
    assert {name for name, _ in figures(out)} == {"ZS", "FLYP"}


@pytest.mark.parametrize(
    ("kind", "folder", "file"),
    [("local-dir", "tiny-clip", "open_clip_pytorch_model.bin"), ("hf", "tiny-hf", "model.safetensors")],
)
def test_other_weights_in_the_same_place_are_another_model(
    kind: str, folder: str, file: str, made: Path, tmp_path: Path, main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the report nor a checkpoint takes them for the old ones. A copy of the old ones is no other model."""
    model, out = shutil.copytree(made / folder, tmp_path / "model"), tmp_path / "out"
    command = options(made, out, "--model", f"{kind}:{model}")
    main([*command, "--method", "zs", "carot"])
    (model / file).write_bytes((made / folder / file).read_bytes())
    main([*command, "--method", "carot"])
    assert {name for name, _ in figures(out)} == {"ZS", "CaRot"}
    weights = bytearray((model / file).read_bytes())
    weights[len(weights) // 2] ^= 1
    (model / file).write_bytes(weights)
    main([*command, "--method", "ft"])
    assert f"{out / 'zs' / 'logits.pt'} is of another model or other pictures" in capsys.readouterr().out
    assert {name for name, _ in figures(out)} == {"FT"}
    assert f"{out / 'carot' / 'checkpoint.pt'} was made with weights=" in refusal(main, [*command, "--method", "carot"])


def test_a_file_of_weights_is_known_by_its_content(made: Path, tmp_path: Path) -> None:
    """Tags of open_clip and names on the hub have none here."""
    file = tmp_path / "weights.pt"
    digests = []
    for content in b"old", b"new", b"old":
        file.write_bytes(content)
        digests.append(
            local_weights(parse_options(options(made, tmp_path, "--model", "RN50", "--pretrained", str(file))))
        )
    assert digests[0] == digests[2] != digests[1]
    for more in (("RN50", "--pretrained", "openai"), ("RN50",), ("hf-hub:laion/no-such",), ("hf:openai/no-such",)):
        assert local_weights(parse_options(options(made, tmp_path, "--model", *more))) == {}


@pytest.mark.parametrize("method", ["wise-ft", "carot-neurips"])
def test_models_of_transformers_are_trained_alike(method: str, made: Path, tmp_path: Path, main: Main) -> None:
    """With their own tokenizer and image processor; recomputing activations changes no step."""
    for name, more in {"kept": (), "recomputed": ("--recompute",)}.items():
        main(options(made, tmp_path / name, "--model", f"hf:{made / 'tiny-hf'}", *more, method=method))
    assert_close(logged(tmp_path / "recomputed", method), logged(tmp_path / "kept", method))
    assert METHODS[method].name in (tmp_path / "kept" / "report.md").read_text()
    before = CLIPModel.from_pretrained(made / "tiny-hf")
    after = torch.load(tmp_path / "kept" / method / "weights.pt", weights_only=True)["state_dict"]
    moved = {name for name, value in before.state_dict().items() if not torch.equal(value, after[name])}
    assert "vision_model.embeddings.patch_embedding.weight" in moved
    assert ("text_model.encoder.layers.0.mlp.fc1.weight" in moved) == METHODS[method].contrast


def test_the_bias_of_a_sigmoid_model_stays(made: Path, tmp_path: Path, main: Main) -> None:
    """Softmax losses do not see it; a model without a linear projection is told that carot-neurips wants one."""
    siglip = ("--model", f"hf:{made / 'tiny-siglip'}")
    main(options(made, tmp_path, *siglip))
    before = SiglipModel.from_pretrained(made / "tiny-siglip")
    after = torch.load(tmp_path / "carot" / "weights.pt", weights_only=True)["state_dict"]
    assert torch.equal(after["logit_bias"], before.logit_bias)
    assert not torch.equal(after["text_model.head.weight"], before.text_model.head.weight)
    assert "no linear visual projection" in refusal(main, options(made, tmp_path, *siglip, method="carot-neurips"))


@pytest.mark.parametrize("method", ["ft", "flyp"])
def test_recomputing_changes_no_step_of_open_clip(method: str, made: Path, tmp_path: Path, main: Main) -> None:
    """And freezes no parameter that would be trained."""
    for name, more in {"kept": (), "recomputed": ("--recompute",)}.items():
        main(options(made, tmp_path / name, *more, method=method))
    assert_close(
        checkpoint(tmp_path / "recomputed", method)["network"], checkpoint(tmp_path / "kept", method)["network"]
    )


def test_bf16_changes_the_features_alone(made: Path, tmp_path: Path, main: Main) -> None:
    """The loss is near that of float32, and not equal."""
    for precision in ("bf16", "fp32"):
        main(options(made, tmp_path / precision, "--precision", precision))
    low, full = (logged(tmp_path / precision) for precision in ("bf16", "fp32"))
    assert low[0]["contrastive"] != full[0]["contrastive"]
    assert low[0]["contrastive"] == pytest.approx(full[0]["contrastive"], rel=0.02)


def test_float16_is_not_offered(made: Path, tmp_path: Path, main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing here scales a loss, so that no gradient is clipped while it is scaled (trap 10)."""
    refusal(main, options(made, tmp_path, "--precision", "fp16"))
    assert "invalid choice: 'fp16'" in capsys.readouterr().err


def test_workers_read_the_same_pictures(made: Path, tmp_path: Path, main: Main) -> None:
    """In other processes, with other generators."""
    for name, more in {"a": (), "b": ("--workers", "1")}.items():
        main(options(made, tmp_path / name, *more, method="ft"))
    assert logged(tmp_path / "a", "ft") == logged(tmp_path / "b", "ft")


def test_a_picture_is_cropped_by_seed_epoch_and_place_alone(made: Path) -> None:
    """Whatever was drawn before; a template is drawn with it."""
    samples = [(str(made / "train" / "red thing" / f"{index}.png"), 0) for index in range(2)]
    crop = Compose([RandomResizedCrop(16), ToTensor()])

    def draws(seed: int, *keys: tuple[int, int]) -> list[tuple[list[float], int]]:
        pictures = Pictures(samples, crop, templates=80, seed=seed)
        return [(pictures[key].images.flatten().tolist(), int(pictures[key].template)) for key in keys]

    first = draws(0, (0, 0), (1, 0), (0, 1))
    torch.rand(3)
    before = torch.get_rng_state()
    assert draws(0, (0, 0), (1, 0), (0, 1)) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert draws(1, (0, 0), (1, 0)) != first[:2]
    assert len({tuple(image) for image, _ in first}) == len({template for _, template in first}) == 3


def test_ranks_share_a_batch() -> None:
    """Together they see each picture of an epoch once, whatever their number, and a later start skips what was seen."""

    def keys(start: int, world_size: int) -> list[set[tuple[int, int]]]:
        shares = [
            list(order(13, start=start, steps=6, batch_size=4, rank=rank, world_size=world_size, seed=5))
            for rank in range(world_size)
        ]
        assert {len(batch) for share in shares for batch in share} == {4 // world_size}
        return [{key for share in shares for key in share[step]} for step in range(6 - start)]

    whole = keys(0, 1)
    assert keys(0, 2) == whole
    assert keys(4, 2) == whole[4:]
    assert [len(set().union(*whole[epoch * 3 :][:3])) for epoch in (0, 1)] == [12, 12]
    assert {index for _, index in whole[0]} != {index for _, index in whole[3]}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["local-dir:{made}/tiny-clip", "hf:{made}/tiny-siglip"], ids=["open_clip", "siglip"])
def test_two_processes_train_as_one(model: str, made: Path, tmp_path: Path, main: Main) -> None:
    """The batches that torchrun's processes share give the losses and the report of one process."""
    torchrun(SCRIPT, *options(made, tmp_path / "two", "--model", model.format(made=made)))
    main(options(made, tmp_path / "one", "--model", model.format(made=made)))
    one, two = logged(tmp_path / "one")[1], logged(tmp_path / "two")[1]
    for name in ("contrastive", "loss", "logit_scale"):
        assert two[name] == pytest.approx(one[name], rel=1e-3)
    paths = (tmp_path / name / "carot" / "logits.pt" for name in ("one", "two"))
    first, second = (torch.load(path, weights_only=True)["sets"] for path in paths)
    for name in first:
        assert torch.equal(first[name][1], second[name][1])  # in the order of the set
    assert (tmp_path / "two" / "report.md").exists()


class TestBadImages:
    """An unreadable picture is named, and the run goes on."""

    @pytest.fixture
    def damaged(self, made: Path, tmp_path: Path) -> Path:
        """The data, with half a picture in train and no picture at all in test."""
        root = tmp_path / "damaged"
        shutil.copytree(made, root)
        for path, content in {"train/green_thing/3.png": None, "test/red thing/0.png": b"no picture"}.items():
            (root / path).write_bytes(content or (root / path).read_bytes()[:200])
        return root

    def test_is_reported_once_and_counted(
        self, damaged: Path, tmp_path: Path, main: Main, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """With its path, however many epochs meet it; the batch stays full, the test set shrinks."""
        more = ("--val", str(damaged / "val"), "--epochs", "3")
        main(options(damaged, tmp_path / "out", *more))
        printed = capsys.readouterr()
        for path in ("train/green_thing/3.png", "test/red thing/0.png"):
            assert printed.err.count(f"skipped {damaged / path}, which cannot be read: ") == 1
        assert "Pictures that could not be read: 2." in printed.out
        assert figures(tmp_path / "out")["CaRot", "ID"]["n"] == "8"

    @pytest.mark.parametrize(
        ("folder", "said"),
        [
            ("test", "none of 9 pictures can be read for ID, "),
            ("val", "none of 6 pictures can be read for validation, "),
            ("subset", "none of 4 pictures can be read for sketch, "),
            ("train", "none of the 21 training pictures can be read"),
        ],
    )
    def test_nothing_but_unreadable_pictures_stops_the_run_before_training(
        self, folder: str, said: str, made: Path, tmp_path: Path, main: Main
    ) -> None:
        """In training, and in each set to judge on."""
        root = Path(shutil.copytree(made, tmp_path / "data"))
        for path in (root / folder).glob("*/*.png"):
            path.write_bytes(b"no picture")
        sets = ("--val", str(root / "val"), "--ood", f"sketch={root / 'subset'}")
        assert said in refusal(main, options(root, tmp_path / "out", *sets))
        assert not (tmp_path / "out").exists()


COUNTS = ("--epochs", "--batch-size", "--checkpoint-every")


class TestGreyPictures:
    """Black is 0 and white is the greatest value of the file's kind; Pillow would make 16 bits white."""

    GREY = np.linspace(0, 1, 64).reshape(8, 8)

    def read(self, path: Path) -> Batch:
        """As a batch of one."""
        return Pictures([(str(path), 0)], ToTensor())[0, 0]

    @pytest.mark.parametrize("name", ["grey.png", "grey.tif", "grey.pgm"])
    @pytest.mark.parametrize("kind", [np.uint8, np.uint16])
    def test_are_read_over_their_whole_range(self, name: str, kind: type, tmp_path: Path) -> None:
        """A ramp from black to white stays one."""
        Image.fromarray((self.GREY * np.iinfo(kind).max).astype(kind)).save(tmp_path / name)
        expected = torch.tensor(self.GREY, dtype=torch.float32).expand(1, 3, 8, 8)
        assert_close(self.read(tmp_path / name).images, expected, atol=1 / 255, rtol=0)

    @pytest.mark.parametrize("order", ["<", ">"])
    def test_are_read_in_either_byte_order(self, order: str, tmp_path: Path) -> None:
        """Pillow has a mode for each."""
        values = (self.GREY * 65535).astype(f"{order}u2")
        picture = Image.frombytes("I;16" if order == "<" else "I;16B", (8, 8), values.tobytes())
        picture.save(tmp_path / "grey.tif")
        assert self.read(tmp_path / "grey.tif").images.mean().item() == pytest.approx(0.5, abs=0.01)

    @pytest.mark.parametrize(("kind", "mode"), [("int32", "I"), ("float32", "F")])
    def test_without_a_white_are_not_read(self, kind: str, mode: str, tmp_path: Path) -> None:
        """A float may end at 1 or at 255."""
        Image.fromarray((self.GREY * 255).astype(kind)).save(tmp_path / "grey.tif")
        found = self.read(tmp_path / "grey.tif")
        reason = f"ValueError: nothing says which value of Pillow's mode '{mode}' is white; save it in 8 bits"
        assert (len(found.target), found.bad) == (0, [(str(tmp_path / "grey.tif"), reason)])


class TestFolders:
    """What is wrong is said before training starts; other names of classes are translated."""

    def test_parts_are_split_off_by_class(self, made: Path) -> None:
        """For validation and test, where no folder is given: no picture twice, and none lost."""
        data = read_data(parse_options([*options(made, made), "--share", "0.3"]))
        parts = [data.train, data.domains["validation"].samples]
        assert [[sum(target == k for _, target in part) for k in range(3)] for part in parts] == [[5] * 3, [2] * 3]
        without = [option for option in options(made, made) if option not in ("--test", str(made / "test"))]
        data = read_data(parse_options([*without, "--seed", "7"]))
        parts = [data.train, *(domain.samples for domain in data.domains.values())]
        assert list(data.domains) == ["validation", "ID"]
        assert [[sum(target == k for _, target in part) for k in range(3)] for part in parts] == [
            [5] * 3,
            [1] * 3,
            [1] * 3,
        ]
        assert sorted(path for part in parts for path, _ in part) == sorted(map(str, (made / "train").glob("*/*.png")))
        again = read_data(parse_options(without))
        assert (again.train, again.domains) == (data.train, data.domains)

    @pytest.mark.parametrize(
        ("lines", "expected"),
        [
            (None, ["blue ish thing", "green thing", "red thing"]),
            ("blue-ish thing\tsea, sky\ngreen_thing\tgrass\nred thing\tpoppy\n", ["sea, sky", "grass", "poppy"]),
            ("red thing poppy, rose\ngreen_thing grass\nred fish\nblue-ish thing sky\n", ["sky", "grass", "poppy"]),
            ("red thing\ngreen_thing\nblue-ish thing the sky\n", ["the sky", "green thing", "red thing"]),
        ],
        ids=["folders", "tabs", "spaces", "some"],
    )
    def test_names_come_from_folders_or_a_file(
        self, lines: str | None, expected: list[str], made: Path, tmp_path: Path
    ) -> None:
        """With spaces in either; a line for another folder is no fault."""
        (tmp_path / "names.txt").write_text(lines or "")
        more = ("--classes", str(tmp_path / "names.txt")) if lines else ()
        assert read_data(parse_options([*options(made, tmp_path), *more])).names == expected

    def test_imagenet_is_known(self, made: Path, tmp_path: Path) -> None:
        """A thousand synsets have open_clip's names, and ImageNetV2 numbers them."""
        picture = (made / "test" / "red thing" / "0.png").read_bytes()
        synsets = [f"n{index:08d}" for index in range(1000)]
        for root, folders in (("train", synsets), ("v2", ["999", "10", "2"])):
            for folder in folders:
                (tmp_path / root / folder).mkdir(parents=True)
                for name in ("a.png", "b.png", "c.png"):
                    (tmp_path / root / folder / name).write_bytes(picture)
        without = [option for option in options(tmp_path, tmp_path) if option not in ("--test", str(tmp_path / "test"))]
        data = read_data(parse_options([*without, "--ood", f"v2={tmp_path / 'v2'}"]))
        assert data.names[0] == "tench"
        assert data.domains["v2"].columns == [[2], [10], [999]]
        assert {(Path(path).parent.name, target) for path, target in data.domains["v2"].samples} == {
            ("2", 0), ("10", 1), ("999", 2)
        }  # fmt: skip
        shutil.rmtree(tmp_path / "train" / synsets[0])
        with pytest.raises(RunError, match="n00000001 tells a text tower nothing"):
            read_data(parse_options(without))

    def test_several_folders_are_one_class(self, made: Path) -> None:
        """The highest of their logits counts, and a set of some classes has no other logits."""
        data = read_data(parse_options([*options(made, made), *sets(made)]))
        renamed, subset = data.domains["renamed"], data.domains["subset"]
        assert (renamed.columns, subset.columns) == ([[0, 1], [2]], [[0], [2]])
        scores = torch.tensor([[1.0, 2.0, 5.0], [4.0, 3.0, -1.0]])
        assert_close(renamed.logits(scores), torch.tensor([[2.0, 5.0], [4.0, -1.0]]))
        assert_close(subset.logits(scores), torch.tensor([[1.0, 5.0], [4.0, -1.0]]))
        assert Domain([], [[1], [0], [2]]).logits(scores).tolist() == [[2.0, 1.0, 5.0], [3.0, 4.0, -1.0]]
        assert {(Path(path).parent.name, target) for path, target in renamed.samples} == {("cold", 0), ("warm", 1)}

    @pytest.mark.parametrize("several", [False, True], ids=["one class", "two classes"])
    def test_folders_that_stand_for_the_same_classes_are_one(self, several: bool, made: Path, tmp_path: Path) -> None:
        """Finer folders of a shift; a perfect model is right about all of them."""
        draw(tmp_path / "fine", {"crimson": 0, "scarlet": 0, "blue": 2}, 2)
        red = ("red thing\tgreen_thing", "green_thing\tred thing\tred thing") if several else ("red thing",) * 2
        (tmp_path / "map.txt").write_text(f"crimson\t{red[0]}\nscarlet\t{red[1]}\nblue\tblue-ish thing\n")
        more = ("--ood", f"fine={tmp_path / 'fine'}", "--map", f"fine={tmp_path / 'map.txt'}")
        fine = read_data(parse_options([*options(made, tmp_path), *more])).domains["fine"]
        assert fine.columns == [[0], [1, 2] if several else [2]]
        logits = fine.logits(torch.eye(3)[[0 if Path(path).parent.name == "blue" else 2 for path, _ in fine.samples]])
        assert logits.argmax(1).tolist() == [target for _, target in fine.samples]
        assert logits.shape == (6, 2)

    @pytest.mark.parametrize(
        ("lines", "said"),
        [
            ("warm\tred thing\ncold\tred thing\tgreen_thing\n", "--map: the classes of two folders must be the same, "
             "or have none in common; 'red thing' is in 2 lists of "),
            ("warm\tred thing\ncold\tred thing\n", "its folders must stand for two or more classes, and are all one"),
            ("warm\tred thing\n", "its folders must stand for two or more classes, and are all one"),
            ("warm\tred thing\ncold\tgreen_thing\nwarm\tblue-ish thing\n", "must list 'warm' on one line"),
        ],
    )  # fmt: skip
    def test_lists_that_give_no_classes_are_refused(self, lines: str, said: str, made: Path, tmp_path: Path) -> None:
        """A folder has one line; classes that share some of the model's would be right and wrong at once."""
        (tmp_path / "map.txt").write_text(lines)
        more = ("--ood", f"r={made / 'renamed'}", "--map", f"r={tmp_path / 'map.txt'}")
        with pytest.raises(RunError, match=re.escape(said)):
            read_data(parse_options([*options(made, tmp_path), *more]))

    @pytest.mark.parametrize(
        ("folder", "lines", "said"),
        [
            ("red-thing", "", "the folders 'red thing' and 'red-thing' have one class name, 'red thing'; write two to"),
            ("___", "", "the folder '___' gives no class name; write one to --classes FILE"),
            ("cat", "cat\tpoppy\nred thing\tPoppy\n", "'cat' and 'red thing' have one class name, 'Poppy'"),
            ("cat", "cat\tpoppy\nred thing\tred\ncat\ttulip\n", "must list 'cat' on one line, and lists it on two"),
        ],
    )
    def test_classes_without_a_name_of_their_own_are_refused(
        self, folder: str, lines: str, said: str, tmp_path: Path
    ) -> None:
        """CLIP reads no capitals; equal captions would be positives and negatives at once."""
        draw(tmp_path / "train", {folder: 0, "red thing": 0}, 5)
        (tmp_path / "names.txt").write_text(lines)
        more = ["--train", str(tmp_path / "train"), *(("--classes", str(tmp_path / "names.txt")) if lines else ())]
        chosen = ("--model", "x", "--out", str(tmp_path), "--batch-size", "2")
        with pytest.raises(RunError, match=re.escape(said)):
            read_data(parse_options([*chosen, *more]))

    @pytest.mark.parametrize(
        ("count", "more", "said"),
        [
            (2, (), "no class has a picture to spare for ID; pass --val and --test"),
            (1, (), "no class has a picture to spare for validation; pass --val and --test"),
            (1, ("--test", "{made}/test"), "no class has a picture to spare for validation; pass --val and --test"),
            (1, ("--val", "{made}/val"), "no class has a picture to spare for ID; pass --val and --test"),
        ],
    )
    def test_no_picture_to_spare_is_said_before_training(
        self, count: int, more: tuple[str, ...], said: str, made: Path, tmp_path: Path, main: Main
    ) -> None:
        """Not when the set is scored."""
        draw(tmp_path / "train", CLASSES, count)
        chosen = [option for option in options(made, tmp_path / "out") if option not in ("--test", str(made / "test"))]
        chosen += ["--train", str(tmp_path / "train"), "--batch-size", "1", *(one.format(made=made) for one in more)]
        assert refusal(main, chosen) == f"finetune.py: error: {tmp_path / 'train'}: {said}"
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (("--train", "{made}/nowhere"), "No such file or directory: '{made}/nowhere'"),
            (("--test", "{made}/train/red thing"), "{made}/train/red thing must hold a folder of pictures for each"),
            (("--test", "{made}/subset"), "{made}/subset: 1 of the 3 classes in {made}/train have no folder"),
            (("--ood", "r={made}/renamed"), "{made}/renamed: 'cold', for 'cold', is no folder of --train; --map"),
            (("--ood", "r={made}/subset", "--map", "r={made}/renamed.txt"), "{made}/subset has no folder 'cold'"),
            (("--val", "{made}/test"), "validation and ID must have no picture in common, and have {made}/test/"),
            (
                ("--val", "{made}/val", "--ood", "r={made}/../{made.name}/val"),
                "validation and r must have no picture in",
            ),
            (("--ood", "r={made}/train"), "; pass --val"),
            (("--classes", "{made}/none.txt"), "No such file or directory: '{made}/none.txt'"),
            (("--classes", "{made}/renamed.txt"), "renamed.txt does not list 'blue-ish thing', a folder of --train"),
            (("--batch-size", "64"), "18 pictures to train on are no batch; pass a smaller --batch-size"),
            (("--model", "no-such-model"), "--model no-such-model, --pretrained None: Model config for"),
            (("--model", "hf:{made}/none"), "--model hf:{made}/none, --pretrained None: "),
            (("--pretrained", "openai"), "tiny-clip brings its own weights; leave out --pretrained"),
        ],
    )
    def test_wrong_options_are_named(
        self, more: tuple[str, ...], said: str, made: Path, tmp_path: Path, main: Main
    ) -> None:
        """The folder or the option, and the rule."""
        arguments = options(made, tmp_path / "out", *(option.format(made=made) for option in more))
        assert said.format(made=made) in refusal(main, arguments)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (("--ood", "ID=x"), "--ood takes NAME=PATH, each name once, and neither ID nor validation"),
            (("--ood", "a=x", "--ood", "a=y"), "--ood takes NAME=PATH, each name once"),
            (("--ood", "subset"), "--ood takes NAME=PATH"),
            (("--map", "r=x"), "--map r=...: no --ood has this name"),
            (("--template", "a photo"), "--template must hold {} where the class name goes, got 'a photo'"),
            *(((name, "0"), f"argument {name}: must be at least 1, got 0") for name in COUNTS),
            *(
                (("--share", share), f"argument --share: must be greater than 0 and less than 1, got {share}")
                for share in ("0", "-1", "1", "1.5", "nan")
            ),
            *(
                ((name, value), f"argument {name}: must be at least 0 and finite, got {value}")
                for name in ("--learning-rate", "--distillation-weight")
                for value in ("-1", "nan", "inf")
            ),
            *(
                (("--label-smoothing", value), f"must be at least 0 and less than 1, got {value}")
                for value in ("-0.1", "1", "1.5", "nan")
            ),
            (("--workers", "-1"), "argument --workers: must be at least 0, got -1"),
            (
                ("--seed", str(2**63)),
                "argument --seed: must be at least 0 and less than 2**63, got 9223372036854775808",
            ),
            (("--share", "half"), "argument --share: invalid float value: 'half'"),
        ],
    )
    def test_options_that_cannot_be_meant_are_refused(
        self, more: tuple[str, ...], said: str, made: Path, main: Main, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Before anything is read."""
        refusal(main, options(made, made / "out", *more))
        assert said in capsys.readouterr().err

    def test_a_device_that_is_not_there_is_refused(
        self, made: Path, main: Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Before anything is read."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        refusal(main, options(made, made / "out", "--device", "cuda"))
        assert "--device cuda: torch finds no GPU here" in capsys.readouterr().err

    def test_training_that_diverges_is_told(self, made: Path, tmp_path: Path, main: Main) -> None:
        """As its logits are judged; the checkpoint has the weights, so another folder is needed."""
        said = refusal(main, options(made, tmp_path / "out", "--learning-rate", "1e30"))
        assert said.endswith(
            "the logits are NaN, so training went wrong; pass a smaller --learning-rate, and another --out"
        )

    def test_an_empty_class_folder_is_named(self, made: Path, tmp_path: Path, main: Main) -> None:
        """Before training."""
        draw(tmp_path / "test", CLASSES, 1)
        (tmp_path / "test" / "red thing" / "0.png").unlink()
        said = refusal(main, options(made, tmp_path / "out", "--test", str(tmp_path / "test")))
        assert "Found no valid file for the classes red thing" in said


class TestActivation:
    """Weights that were trained with QuickGELU want a model that has it; nothing is downloaded to find out."""

    @pytest.mark.parametrize("model", ["ViT-B-32", "ViT-B-16", "ViT-L-14", "RN50"])
    def test_a_mismatch_is_refused(self, model: str, made: Path, tmp_path: Path, main: Main) -> None:
        """With the name of the right model."""
        said = refusal(main, options(made, tmp_path, "--model", model, "--pretrained", "openai"))
        assert f"--model {model} has GELU, but openai are weights of a model with QuickGELU" in said
        assert said.endswith(f"pass --model {model}-quickgelu")

    def test_the_right_model_goes_on_to_its_weights(
        self, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What is refused is refused for its activation alone."""
        asked = []

        def create(name: str, pretrained: str, **_: object) -> None:
            asked.append((name, pretrained))
            raise RuntimeError("no network here")

        monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
        pairs = ("ViT-B-16-quickgelu", "openai"), ("ViT-B-16", "laion2b_s34b_b88k"), ("ViT-B-16", "file.pt")
        for name, pretrained in pairs:
            arguments = parse_options(options(made, tmp_path, "--model", name, "--pretrained", pretrained))
            with pytest.raises(RunError, match="no network here"):
                load_clip(arguments, torch.device("cpu"))
        assert tuple(asked) == pairs
