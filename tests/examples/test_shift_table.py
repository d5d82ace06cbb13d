from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import shift_table_tuning as tuning
import torch
from atomic import write_atomically
from shift_table import data, pictures, results
from shift_table.cache import load_or_build
from shift_table.data import ID, SCANS, SHIFTS, WebData
from shift_table.model import Optimizer, new_clip, pretrained, zero_shot
from shift_table.rows import AVERAGED, FURTHER_ROWS, RECIPES, ROWS, WAYS, FineTuning, Recipe
from tiny_shift_table import TINY, few, tiny_script
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from tqdm import tqdm

import calrobust as cr

SILENT = tqdm(disable=True)


class TestData:
    """Pictures, labels and captions are what their names say."""

    def test_no_digit_serves_two_parts(self) -> None:
        """The four parts of MNIST are disjoint and hold every digit; what is tested on was never drawn in a trial."""
        parts = data.parts()
        assert torch.cat([*parts.values()]).sort().values.tolist() == list(range(5000))
        trials = torch.randperm(5000, generator=torch.Generator().manual_seed(123))[:3500]  # what earlier ones drew
        assert not {*parts["test"].tolist()} & {*trials.tolist()}

    def test_domains_are_the_digits_and_five_shifts(self) -> None:
        """ID comes first; every synthetic shift shows the ID set's digits, and no style of theirs is tuned on."""
        test = data.test_splits()
        assert list(test) == [ID, *SHIFTS, SCANS]
        digits = pictures.mnist()[1][data.parts()["test"]]
        for name in (ID, *SHIFTS):
            assert_close(test[name].target, digits)
        assert len(test[SCANS].target) == 1797
        assert "blurred" not in test
        assert (len(data.train_split().target), len(data.validation_split().target)) == (500, 2500)

    def test_target_is_the_digit_that_is_shown(self) -> None:
        """A one has ink in its middle, a zero has none: in fonts, in MNIST and in the scans."""
        for masks, target in (
            (pictures.glyphs(("DejaVuSans", "cmr10"), "01"), torch.tensor([0, 1, 0, 1])),
            pictures.mnist(),
            pictures.scans(),
        ):
            ink = torch.from_numpy(masks[:, 28:36, 28:36].copy()).float().mean((1, 2)) / 255
            assert ink[target == 1].mean() > 0.4 > 0.2 > ink[target == 0].mean()

    @pytest.mark.parametrize("style", pictures.STYLES)
    def test_pictures_are_in_range_and_half_are_inverted(self, style: str) -> None:
        """Every style gives pictures in [0, 1] with contrast, dark on light as often as light on dark."""
        masks = np.repeat(pictures.glyphs(("DejaVuSans",), "0123456789"), 30, 0)
        drawn = pictures.render(masks, style, np.random.default_rng(0))
        assert drawn.shape == (300, 3, 32, 32)
        assert 0 <= drawn.min() < 0.2
        assert 0.8 < drawn.max() <= 1
        edge, middle = drawn[:, :, :2].mean((1, 2, 3)), drawn[:, :, 12:20, 10:22].mean((1, 2, 3))
        assert 0.35 < (edge > middle).float().mean() < 0.65

    def test_caption_names_what_is_drawn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A pre-training caption holds the name of its own character, and of a style only its own."""
        captions: list[str] = []
        names: list[int] = []
        draw = WebData._characters

        def remembered(web: WebData, n: int) -> Any:
            masks, drawn_names = draw(web, n)
            names.extend(drawn_names)
            return masks, drawn_names

        monkeypatch.setattr(WebData, "_characters", remembered)
        monkeypatch.setattr(data, "tokenize", captions.extend)
        WebData(0).batch(6)
        styles = [word for word in pictures.STYLES.values() for _ in range(6)]
        assert len(captions) == len(names) == len(styles)
        for caption, name, word in zip(captions, names, styles, strict=True):
            assert caption in [
                form.format(data.NAMES[name]) for form in (*data.TEMPLATES, f"a {word} photo of the {{}}")
            ]

    def test_tokens_are_words_between_marks(self) -> None:
        """Each word has its own token; open_clip's tower looks for the end of the text at the highest one."""
        one, other = data.tokenize(["the digit nine", "the letter K"])
        assert one[:2].tolist() == other[:2].tolist()
        assert len({*one.tolist(), *other.tolist()}) == 8  # two marks, padding and five words
        for tokens in (one, other, *data.random_texts(np.random.default_rng(0))):
            assert tokens[0] == data.START
            assert tokens.max() == data.END
            assert (tokens[tokens.argmax() + 1 :] == 0).all()
        first, second = (data.random_texts(rng) for rng in [np.random.default_rng(0)] * 2)
        assert (first != second).any(1).all()

    @pytest.mark.slow
    def test_pictures_and_first_weights_do_not_depend_on_the_cpu(self) -> None:
        """Without its newer instructions, the same pictures and weights are drawn."""
        program = (
            "import hashlib, numpy as np, torch; from shift_table import data, model, pictures\n"
            "x, _ = data.WebData(0).batch(20); y = data.validation_split('blurred').images[:200]\n"
            "made = [x, y, *model.new_clip(0).parameters()]\n"
            "print(hashlib.sha256(b''.join(t.detach().contiguous().numpy().tobytes() for t in made)).hexdigest())\n"
        )
        paths = os.pathsep.join(sys.path)
        features = np._core._multiarray_umath.__cpu_dispatch__  # type: ignore[attr-defined]
        older = {"ATEN_CPU_CAPABILITY": "default", "NPY_DISABLE_CPU_FEATURES": " ".join(features)}
        runs = [
            subprocess.run(
                [sys.executable, "-W", "ignore", "-c", program],
                env={**os.environ, "PYTHONPATH": paths, **more},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for more in ({}, older)
        ]
        assert runs[0] == runs[1]


def was_built(path: Path, *, steps: int) -> bool:
    """Asks for weights and says whether they had to be built; either way they are the right ones."""
    expected = {"weight": torch.arange(6.0).view(2, 3), "count": torch.tensor(3)}
    builds: list[int] = []

    def build() -> dict[str, Tensor]:
        builds.append(steps)
        return expected

    assert_close(load_or_build(path, {"steps": steps}, build), expected, rtol=0, atol=0)
    return bool(builds)


class TestCache:
    """The cache answers for what it holds, and says when it cannot."""

    def test_second_run_loads_what_the_first_kept(self, tmp_path: Path) -> None:
        """Built once; afterwards the file answers, bit for bit, in silence."""
        path = tmp_path / "new folder" / "model.clip"
        assert was_built(path, steps=1)
        assert not was_built(path, steps=1)
        assert [file.name for file in path.parent.iterdir()] == ["model.clip"]

    @pytest.mark.parametrize(
        "damage", [0, 5, 100, -200, -1, "half", b"", b"\n\n", b"PK\x03\x04 another file", b"{}\na\nb"]
    )
    def test_damage_and_foreign_files_are_reported_and_rebuilt(
        self, damage: int | str | bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A bit flipped anywhere, a file cut in half, or one that this example did not write is never unpickled."""
        path = tmp_path / "model.clip"
        was_built(path, steps=1)
        content = bytearray(path.read_bytes())
        if isinstance(damage, int):
            content[damage] ^= 1
        path.write_bytes(damage if isinstance(damage, bytes) else content[: -300 if damage == "half" else None])
        assert was_built(path, steps=1)
        assert f"{path} is damaged, or no file of this example; building it anew." in capsys.readouterr().out
        assert not was_built(path, steps=1)

    @pytest.mark.parametrize("what", ["recipe", "code of calrobust", "code of the example", "CPU"])
    def test_another_recipe_code_or_cpu_is_reported_and_rebuilt(
        self, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A sound file of other surroundings does not answer for these."""
        from shift_table import cache

        path = tmp_path / "model.clip"
        was_built(path, steps=1)
        cache.surroundings.cache_clear()
        if what == "CPU":
            monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
        elif what == "code of calrobust":
            (tmp_path / "other.py").write_text("changed = True\n")
            monkeypatch.setattr(cr, "__file__", str(tmp_path / "__init__.py"))
        elif what == "code of the example":
            read = Path.read_bytes
            monkeypatch.setattr(
                Path, "read_bytes", lambda own: read(own) + b"#" * (own.parts[-2:] == ("examples", "shift_table.py"))
            )
        assert was_built(path, steps=2 if what == "recipe" else 1)
        assert f"{path} was made by another recipe" in capsys.readouterr().out
        cache.surroundings.cache_clear()

    def test_interrupted_write_leaves_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A run that dies while it writes has neither damaged the old file nor left a new one behind."""
        path = tmp_path / "table.md"
        write_atomically(path, b"old")

        def die(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, b"new")
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]

    def test_pretraining_is_reproducible_and_cached(self, tmp_path: Path) -> None:
        """One seed, one model, bit for bit: made anew or loaded; another seed or a nudge gives another."""
        made = pretrained(TINY, 0, tmp_path / "a", SILENT).state_dict()
        torch.manual_seed(5)
        again = pretrained(TINY, 0, tmp_path / "b", SILENT).state_dict()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Optimizer, "step", None)  # a load trains nothing
            loaded = pretrained(TINY, 0, tmp_path / "a", SILENT).state_dict()
        assert_close(again, made, rtol=0, atol=0)
        assert_close(loaded, made, rtol=0, atol=0)
        for other in (
            pretrained(TINY, 1, tmp_path, SILENT),
            pretrained(replace(TINY, nudged=True), 0, tmp_path, SILENT),
        ):
            assert not torch.equal(other.state_dict()["visual.conv1.weight"], made["visual.conv1.weight"])


@pytest.fixture(scope="module")
def fresh() -> FineTuning:
    """An untrained model, and pictures for two steps."""
    return FineTuning(new_clip(0).eval(), few(data.train_split()), 1, 0, SILENT)


class TestRows:
    """Every row is fine-tuned from the same weights, on the same batches, into its own classifier."""

    def test_every_row_differs_and_leaves_the_pretrained_model_alone(self, fresh: FineTuning) -> None:
        """Two steps make nine classifiers, no two of which agree, with the statistics of the pre-trained BatchNorm."""
        before = {name: weight.clone() for name, weight in fresh.clip.state_dict().items()}
        logits: list[Tensor] = []
        for row, way in WAYS.items():
            model = way(fresh, RECIPES[row])
            for name, buffer in fresh.zero_shot.named_buffers():
                assert_close(model.get_buffer(name), buffer, rtol=0, atol=0)
            with torch.no_grad():
                logits.append(model(fresh.train.images[:16]))
            assert logits[-1].shape == (16, 10)
        assert_close(fresh.clip.state_dict(), before, rtol=0, atol=0)
        assert all((one - other).abs().max() > 1e-9 for i, one in enumerate(logits) for other in logits[:i])
        assert {*WAYS, *AVERAGED.values(), "ZS"} == {*ROWS, *FURTHER_ROWS}

    def test_ft_is_cross_entropy_on_the_head(self, fresh: FineTuning, monkeypatch: pytest.MonkeyPatch) -> None:
        """Our loss against the class weights gives the weights that torch's gives."""
        recipe = Recipe(label_smoothing=0.1)
        ours = fresh.ft(recipe).weight

        class Reference:
            def __init__(self, label_smoothing: float, direction: str) -> None:
                self.label_smoothing = label_smoothing

            def __call__(self, x: Tensor, weight: Tensor, scale: float, labels: tuple[Tensor, Tensor]) -> Tensor:
                return F.cross_entropy(scale * x @ weight.T, labels[0], label_smoothing=self.label_smoothing)

        monkeypatch.setattr(cr, "MultimodalContrastiveLoss", Reference)
        assert_close(ours, fresh.ft(recipe).weight)
        assert (ours - fresh.zero_shot.weight).abs().max() > 1e-4

    @pytest.mark.parametrize("row", ["CAR-FT", "Lipsum-FT"])
    def test_ft_is_held_by_its_formula(self, row: str, fresh: FineTuning, monkeypatch: pytest.MonkeyPatch) -> None:
        """A divergence of softmaxes over contexts, and half the mean square of what logits of random texts move."""
        given: list[Any] = []
        monkeypatch.setattr(fresh, "ft", lambda recipe, penalty: given.append(penalty))
        WAYS[row](fresh, Recipe())
        tokens = data.tokenize(data.CONTEXTS) if row == "CAR-FT" else data.random_texts(np.random.default_rng(0))
        with torch.no_grad():
            texts = fresh.clip.encode_text(tokens, normalize=True)
        x, pretrained = (
            F.normalize(torch.from_numpy(np.random.default_rng(k).normal(size=(5, 64))), dim=1) for k in (0, 1)
        )
        z, z0 = (fresh.clip.logit_scale.exp().item() * features @ texts.T for features in (x, pretrained))
        divergence = F.kl_div(z.log_softmax(1), z0.log_softmax(1), reduction="batchmean", log_target=True)
        expected = divergence if row == "CAR-FT" else 0.1 * F.mse_loss(z, z0) / 2
        assert_close(given[0](x, pretrained), expected)

    def test_tracer_descends_its_formula(self, fresh: FineTuning, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its gradient at the first step, with a teacher that is another model, is that of the terms written out."""

        class Other:
            def __init__(self, student: nn.Module, decay: object) -> None:
                self.clip = new_clip(1).eval()

            @torch.no_grad()
            def __call__(self, *inputs: Tensor) -> Any:
                return self.clip(*inputs)

        class FirstStepError(Exception):
            pass

        def stop(optimizer: Optimizer, loss: Tensor) -> None:
            loss.backward()
            found.update({name: p.grad for name, p in optimizer.model.named_parameters() if p.grad is not None})
            raise FirstStepError

        found: dict[str, Tensor] = {}
        monkeypatch.setattr(cr, "EMATeacher", Other)
        monkeypatch.setattr(Optimizer, "step", stop)
        with pytest.raises(FirstStepError):
            fresh.tracer(Recipe())
        clip = new_clip(0).eval()
        images, captions, _ = next(fresh._batches())
        (x, y, s), (x0, y0, s0) = clip(images, captions), Other(clip, 0)(images, captions)
        own = torch.arange(len(x))

        def contrasted(a: Tensor, b: Tensor) -> Tensor:
            return F.cross_entropy(s * a @ b.T, own)

        def diverged(a: Tensor, b: Tensor, a0: Tensor, b0: Tensor) -> Tensor:
            student, teacher = (s * a @ b.T).log_softmax(1), (s0 * a0 @ b0.T).log_softmax(1)
            return F.kl_div(student, teacher, reduction="batchmean", log_target=True)

        held = diverged(x, y, x0, y0) + diverged(y, x, y0, x0) + contrasted(x, y0) + contrasted(y, x0)
        held = held + diverged(x, y0, x0, y0) + diverged(y, x0, y0, x0)
        held = held / 2 + 2000 * (F.mse_loss(x, x0) + F.mse_loss(y, y0))
        ((contrasted(x, y) + contrasted(y, x)) / 2 + 0.9 * held).backward()
        expected = {name: p.grad for name, p in clip.named_parameters() if p.grad is not None}
        scale = max(float(gradient.abs().max()) for gradient in expected.values())
        assert_close(found, expected, rtol=1e-3, atol=1e-4 * scale)

    def test_same_seed_gives_the_same_row(self, fresh: FineTuning) -> None:
        """A row depends on the seed alone, not on the rows made before it."""

        def carot(seed: int) -> Tensor:
            return FineTuning(fresh.clip, fresh.train, 1, seed, SILENT).carot(RECIPES["CaRot"]).weight.detach()

        first = carot(0)
        torch.manual_seed(9)
        assert_close(carot(0), first, rtol=0, atol=0)
        assert (carot(1) != first).any()

    def test_carot_without_distillation_is_flyp_and_its_teacher_follows(self, fresh: FineTuning) -> None:
        """The teacher enters by the distillation alone, and is no longer the pre-trained model after one step."""
        flyp, undistilled, following, fixed = (
            model.weight.detach()
            for model in (
                fresh.flyp(Recipe(label_smoothing=0.1)),
                fresh.carot(Recipe(label_smoothing=0.1)),
                fresh.carot(Recipe(label_smoothing=0.1, distillation_weight=1.0, teacher_decay=0.1)),
                fresh.carot(Recipe(label_smoothing=0.1, distillation_weight=1.0)),
            )
        )
        assert_close(undistilled, flyp)
        assert (following - fixed).abs().max() > 1e-9
        assert (fixed - flyp).abs().max() > 1e-9

    def test_wise_ft_lies_between(self, fresh: FineTuning) -> None:
        """Every weight of the averaged classifier is a quarter of the way to the fine-tuned one."""
        tuned = fresh.ft(Recipe())
        between = dict(fresh.wise_ft(tuned, 0.25).named_parameters())
        for (name, start), end in zip(fresh.zero_shot.named_parameters(), tuned.parameters(), strict=True):
            assert_close(between[name], 0.75 * start + 0.25 * end)

    def test_zero_shot_head_has_the_logit_scale_for_norm(self) -> None:
        """A class weight is a unit-norm caption mean times the logit scale, so its logits are CLIP's (trap 33)."""
        clip = new_clip(0).eval()
        assert_close(zero_shot(clip).weight.norm(dim=1), clip.logit_scale.exp().expand(10))


def test_the_logit_scale_neither_decays_nor_leaves_its_bounds() -> None:
    """Without a gradient it stays while matrices shrink; a step too far ends at 100 (trap 8)."""
    clip = new_clip(0)
    optimizer = Optimizer(clip, steps=10, learning_rate=0.1, weight_decay=0.5, warm_up=0.1)
    before = {name: parameter.detach().clone() for name, parameter in clip.named_parameters()}
    optimizer.step(sum((0 * parameter).sum() for parameter in clip.parameters()))
    assert torch.equal(clip.logit_scale, before["logit_scale"])
    assert clip.text_projection.norm() < before["text_projection"].norm()
    with torch.no_grad():
        clip.logit_scale.fill_(4.6)
    optimizer.step(-1e9 * clip.logit_scale)
    assert clip.logit_scale.exp().item() == pytest.approx(100)


class TestTuning:
    """Candidates are chosen by one rule for every row."""

    @pytest.mark.parametrize("optimum", [(3,), (-4, 2), (2, -1, -2, 1)])
    def test_search_ends_inside_its_grid_at_the_best(self, optimum: tuple[int, ...]) -> None:
        """It starts at the start, never repeats itself and finds the minimum of a bowl, wherever that lies."""
        tried: dict[tuple[int, ...], float] = {}
        while not tried or not tuning.is_inside(min(tried, key=lambda point: tried[point]), tried):
            point = tuning.next_point(tried, len(optimum))
            assert point not in tried
            tried[point] = sum((k - best) ** 2 for k, best in zip(point, optimum, strict=True))
        assert next(iter(tried)) == (0,) * len(optimum)
        assert min(tried, key=lambda point: tried[point]) == optimum
        assert len(tried) < 32

    def test_an_edge_is_seen(self) -> None:
        """One neighbour that was not tried is an edge."""
        tried: dict[tuple[int, ...], float] = {(0, 0): 1.0, (1, 0): 2.0, (-1, 0): 2.0, (0, 1): 2.0}
        assert not tuning.is_inside((0, 0), tried)
        assert tuning.is_inside((0, 0), {**tried, (0, -1): 2.0})

    def test_recipes_are_steps_from_the_start(self) -> None:
        """Two steps of the learning rate are a factor of 2; the decay moves by what it forgets."""
        assert tuning.recipe_at((2,)).learning_rate == pytest.approx(2e-3)
        recipe = tuning.recipe_at((0, -1, 1, 1))
        assert (recipe.label_smoothing, recipe.distillation_weight) == (0.025, 3.0)
        assert recipe.teacher_decay == pytest.approx(1 - 6 / 140)

    def test_the_table_uses_the_choice(self) -> None:
        """Each row of the table has the recipe with the lowest NLL of its candidates, as many for every row."""
        with tuning.TABLE.open() as file:
            lines = list(csv.DictReader(file))
        for row in tuning.SIZES:
            own = [line for line in lines if line["row"] == row]
            assert len(own) == len(lines) / len(tuning.SIZES) >= 24
            best = min(own, key=lambda line: float(line["nll"]))
            chosen = vars(RECIPES[row])
            assert {name: pytest.approx(float(best[name]), rel=2e-3) for name in chosen} == chosen


def reports(*seeds: dict[str, float]) -> dict[int, cr.ShiftReport]:
    """A report for each seed, with given shares of right predictions out of 200 under one shift, all 80 % sure."""
    made = {}
    for seed, rows in enumerate(seeds):
        made[seed] = report = cr.ShiftReport(id_domain=ID)
        for row, accuracy in rows.items():
            sure = torch.where(torch.arange(200) < round(200 * accuracy), math.log(4.0), -math.log(4.0))
            logits = torch.stack([sure, torch.zeros(200)], 1)
            report.fit_temperature(row, logits[:5] + 1, torch.tensor([0, 0, 0, 0, 1]))
            for domain in (ID, "outline"):
                report.add(row, domain, logits, torch.zeros(200).long())
    return made


class TestResults:
    """What is said about a table follows from its numbers."""

    TWO = reports({"FT": 0.5, "FLYP": 0.8, "CaRot": 0.7}, {"FT": 0.52, "FLYP": 0.78, "CaRot": 0.71})

    def test_differences_are_paired_and_have_students_interval(self) -> None:
        """Of gains of 20 and 19 points: the mean 19.5 and t(0.975, 1) = 12.706 times 0.5."""
        gaps = results.differences(self.TWO)
        assert gaps["ood_accuracy"]["FT"] == pytest.approx((0.195, 12.706 * 0.005), rel=1e-4)
        assert list(gaps["ood_ece"]) == ["FT", "FLYP"]
        assert not results.differences(reports({"FT": 0.5, "CaRot": 0.7}))
        assert not results.differences(reports({"FT": 0.5}, {"FT": 0.7}))

    def test_a_win_a_loss_and_neither_are_called_so(self) -> None:
        """Only an interval without zero is a difference, and a lower error is better."""
        gaps = {
            "ood_accuracy": {"ZS": (-0.1, 0.05), "FT": (0.1, 0.05), "FLYP": (0.1, 0.2)},
            "ood_ece": {"ZS": (-0.1, 0.05), "FT": (0.1, 0.05), "FLYP": (-0.1, 0.2)},
            "ood_nll": {"ZS": (-0.1, 0.05), "FT": (-0.1, 0.05), "FLYP": (-0.3, 0.2)},
        }
        assert results.sentences(gaps) == (
            "OOD accuracy: CaRot is better than FT; worse than ZS; not shown to differ from FLYP. "
            "OOD ECE: CaRot is better than ZS; worse than FT; not shown to differ from FLYP. "
            "OOD NLL: CaRot is better than ZS, FT, FLYP."
        )


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script, with little to do."""
    return tiny_script()


@pytest.fixture
def run(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Runs it and gives the folder of its results."""

    def run(*options: str, folder: str = "out") -> Path:
        cache, out = tmp_path / folder / "cache", tmp_path / folder / "results"
        monkeypatch.setattr(
            sys, "argv", ["shift_table.py", "--fast", *options, "--cache", str(cache), "--out", str(out)]
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # two steps may leave nothing for a temperature to scale
            script.main()
        return out

    return run


class TestScript:
    """One run from the options to the files."""

    def test_writes_every_file_for_every_seed(self, run: Callable[..., Path]) -> None:
        """A miniature over two seeds: a mean and deviation in every cell, every figure of every seed in the CSV."""
        rows = ["ZS", "FT", "WiSE-FT", "FLYP", "CaRot"]
        out = run("--seeds", "3", "4", "--rows", *rows)
        names = ["differences.png", "domains.png", "reliability.png", "results.csv", "shift.png", "table.md"]
        assert sorted(file.name for file in out.iterdir()) == names
        table = (out / "table.md").read_text()
        cells = [line.split("|")[2:-1] for line in table.splitlines() if line.startswith("| ") and " ± " in line]
        assert len(cells) == 2 * len(rows) + len(rows) - 1  # two tables, and that of the differences
        assert all(" ± " in cell for row in cells for cell in row)
        assert "the numbers mean nothing" in table
        with (out / "results.csv").open() as file:
            figures = list(csv.DictReader(file))
        assert len(figures) == 2 * len(rows) * (2 + len(SHIFTS))
        assert {line["seed"] for line in figures} == {"3", "4"}
        assert len({line["nll"] for line in figures}) == len(figures)  # no row has another's predictions
        assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in names if name.endswith(".png"))

    def test_same_command_gives_the_same_digits(self, run: Callable[..., Path]) -> None:
        """Bit for bit, whatever number of threads and whatever global seed is set around it."""
        first = run("--rows", "ZS", "WiSE-FT", "CaRot", folder="a")
        torch.set_num_threads(2)
        torch.manual_seed(7)
        second = run("--rows", "ZS", "WiSE-FT", "CaRot", folder="b")
        assert torch.get_num_threads() == 1
        assert (first / "results.csv").read_bytes() == (second / "results.csv").read_bytes()

    def test_rows_are_chosen_and_train_no_others(self, run: Callable[..., Path], tmp_path: Path) -> None:
        """The table has these rows alone, in this order; WiSE-FT trains the row that it averages."""
        table = (run("--rows", "CAR-FT", "WiSE-FT") / "table.md").read_text()
        names = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
        assert names[2:4] == names[6:8] == ["CAR-FT", "WiSE-FT"]
        assert len(names) == 8
        kept = sorted(path.name for path in (tmp_path / "out" / "cache").iterdir())
        assert kept == ["shift_table_2_0.clip", "shift_table_2_0_CAR-FT.logits", "shift_table_2_0_FT.logits"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--rows", "ZS", "FT", "ZS"], "--rows must differ from each other, got ZS FT ZS"),
            (["--rows", "FLIP"], "invalid choice: 'FLIP'"),
            (["--seeds", "1", "1"], "--seeds must differ from each other, got 1 1"),
        ],
    )
    def test_wrong_options_are_named_before_any_work(
        self, options: list[str], message: str, run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        """What cannot work is said at once, with what to do."""
        with pytest.raises(SystemExit):
            run(*options)
        assert message in capsys.readouterr().err
