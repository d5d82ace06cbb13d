from __future__ import annotations

import csv
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from atomic import write_atomically
from shift_table import data, drawing, results, rows
from shift_table.checkpoint import load_or_build
from shift_table.data import CLASSES, HELD_OUT_FONTS, OOD_STYLES, Data, Split, WebData, handwriting_indices
from shift_table.findings import COLUMNS, Figures, findings
from shift_table.model import DigitClassifier, new_clip, zero_shot_classifier
from shift_table.pretraining import pretrained_clip
from shift_table.rows import FURTHER_ROWS, ROWS, Trainer, fine_tuned_rows
from shift_table.sheet import contact_sheet
from shift_table.training import optimizer_for, optimizer_step
from tiny_shift_table import TINY, TWO_STEPS, fewer
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from tqdm import tqdm

import calrobust

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def drawn() -> Data:
    """The example's data sets."""
    return data.make_data()


@pytest.fixture
def sixteen(drawn: Data) -> Split:
    """Enough training pictures for two steps."""
    return Split(drawn.train.images[:16], drawn.train.target[:16])


class TestData:
    """Pictures, labels and captions are what their names say."""

    def test_no_scan_serves_two_splits(self) -> None:
        """The four divisions of the handwriting are disjoint and hold every scan."""
        everything = torch.cat(handwriting_indices())
        assert everything.sort().values.tolist() == list(range(1797))

    def test_held_out_fonts_are_not_pretrained_on(self) -> None:
        """No glyph of an OOD font is among the pre-training glyphs, by name or by picture."""
        assert not set(HELD_OUT_FONTS) & set(data.FONTS)
        held_out, _ = drawing.glyph_masks(HELD_OUT_FONTS, data.DIGITS)
        seen, _ = drawing.glyph_masks(data.FONTS, data.CHARACTERS)
        assert torch.cdist(held_out.flatten(1), seen.flatten(1)).min() > 1

    def test_target_is_the_digit_that_was_scanned(self, drawn: Data) -> None:
        """The first half of every test set is labelled with its scans' digits, in order."""
        _, digits = drawing.handwriting_masks()
        expected = digits[handwriting_indices().test]
        for split in drawn.test.values():
            assert_close(split.target[: len(expected)], expected)
            assert len(split.images) == len(split.target)

    def test_target_is_the_digit_that_was_drawn(self) -> None:
        """The label of a glyph is its character's position, font after font."""
        masks, names = drawing.glyph_masks(("DejaVuSans", "cmr10"), "01")
        assert names.tolist() == [0, 1, 0, 1]
        ink = masks[:, 0, 28:36, 28:36].mean((1, 2))
        assert ink[1] > 0.5 > ink[0]  # a one has ink in its middle, a zero has none
        assert ink[3] > 0.5 > ink[2]

    def test_caption_names_what_is_drawn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A pre-training caption holds the name of its own character, and of a style only its own."""
        captions: list[str] = []
        names: list[int] = []
        draw = WebData._characters

        def remembered(web: WebData, n: int) -> tuple[Tensor, Tensor]:
            masks, drawn_names = draw(web, n)
            names.extend(drawn_names.tolist())
            return masks, drawn_names

        monkeypatch.setattr(WebData, "_characters", remembered)
        monkeypatch.setattr(data, "tokenize", captions.extend)
        WebData(Generator().manual_seed(0)).batch(6)
        own_words = [words for style in drawing.STYLES for words in [data.STYLE_WORDS[style]] * 6]
        assert len(captions) == len(names) == 6 * len(drawing.STYLES)
        for caption, name, words in zip(captions, names, own_words, strict=True):
            starts = [f"a {word} of the" for word in words] + [template.split(" {}")[0] for template in data.TEMPLATES]
            assert caption in [f"{start} {data.NAMES[name]}." for start in starts]

    def test_same_seed_draws_the_same_pictures(self, drawn: Data) -> None:
        """Data sets do not depend on the global generator, and pre-training batches follow their own."""
        torch.manual_seed(1)
        again = data.make_data()
        for name, split in drawn.test.items():
            assert_close(again.test[name].images, split.images, rtol=0, atol=0)
        first, second = (WebData(Generator().manual_seed(3)).batch(2) for _ in range(2))
        assert_close(first, second, rtol=0, atol=0)

    @pytest.mark.parametrize("style", drawing.STYLES)
    def test_pictures_are_in_range(self, style: str) -> None:
        """Every style gives pictures in [0, 1] that show some contrast."""
        masks, _ = drawing.glyph_masks(("DejaVuSans",), data.DIGITS)
        pictures = drawing.render(masks, style, Generator().manual_seed(0))
        assert pictures.shape == (10, 3, 32, 32)
        assert 0 <= pictures.min() < 0.4
        assert 0.6 < pictures.max() <= 1

    def test_domains_are_the_digits_and_five_shifts(self, drawn: Data) -> None:
        """ID comes first, five OOD sets of the same size follow, and no style of theirs is trained on."""
        assert list(drawn.test) == [data.ID_DOMAIN, *OOD_STYLES]
        assert {len(drawn.test[style].target) for style in OOD_STYLES} == {2 * 897}
        assert (len(drawn.train.target), len(drawn.validation.target)) == (300, 400)


def was_built(path: Path, *, steps: int) -> bool:
    """Asks for weights and says whether they had to be built; either way they are the right ones."""
    expected = {"weight": torch.arange(6.0).view(2, 3), "count": torch.tensor(3)}
    builds: list[int] = []

    def build() -> dict[str, Tensor]:
        builds.append(steps)
        return expected

    assert_close(load_or_build(path, {"steps": steps}, build), expected, rtol=0, atol=0)
    return bool(builds)


class TestCheckpoint:
    """The cache answers for what it holds, and says when it cannot."""

    def test_second_run_loads_what_the_first_kept(self, tmp_path: Path) -> None:
        """Built once; afterwards the file answers, bit for bit, in silence."""
        path = tmp_path / "new folder" / "model.ckpt"
        assert was_built(path, steps=1)
        assert not was_built(path, steps=1)
        assert [file.name for file in path.parent.iterdir()] == ["model.ckpt"]

    @pytest.mark.parametrize("position", [0, 5, 100, -200, -1])
    def test_one_flipped_bit_is_reported_and_rebuilt(
        self, tmp_path: Path, position: int, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Damage anywhere, in the head, the sum or the weights, is named, and mended for the next run."""
        path = tmp_path / "model.ckpt"
        was_built(path, steps=1)
        content = bytearray(path.read_bytes())
        content[position] ^= 1
        path.write_bytes(content)
        assert was_built(path, steps=1)
        assert f"{path} is damaged" in capsys.readouterr().out
        assert not was_built(path, steps=1)

    @pytest.mark.parametrize("content", [b"", b"\n\n", b"PK\x03\x04 something else", b"{}\nabc\n"])
    def test_foreign_file_is_reported_and_rebuilt(
        self, tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A file that this example did not write is never unpickled."""
        path = tmp_path / "model.ckpt"
        path.write_bytes(content)
        assert was_built(path, steps=1)
        assert "no checkpoint of this example" in capsys.readouterr().out

    def test_truncated_file_is_reported_and_rebuilt(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Half a file is a damaged file."""
        path = tmp_path / "model.ckpt"
        was_built(path, steps=1)
        path.write_bytes(path.read_bytes()[:-300])
        assert was_built(path, steps=1)
        assert "is damaged" in capsys.readouterr().out

    def test_another_recipe_is_reported_and_rebuilt(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A sound file of another recipe does not answer for this one."""
        path = tmp_path / "model.ckpt"
        was_built(path, steps=1)
        assert was_built(path, steps=2)
        assert f"{path} was made by another recipe" in capsys.readouterr().out

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

    def test_unwritable_cache_costs_no_result(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Where the model cannot be kept the run goes on and says how to keep it."""
        (tmp_path / "file").touch()
        assert was_built(tmp_path / "file" / "model.ckpt", steps=1)
        assert "--cache" in capsys.readouterr().out

    def test_pretraining_is_reproducible_and_cached(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """One seed, one model, bit for bit: made anew or loaded; another seed gives another."""
        made = pretrained_clip(TINY, 0, CPU, tmp_path / "a").state_dict()
        torch.manual_seed(5)
        again = pretrained_clip(TINY, 0, CPU, tmp_path / "b").state_dict()
        loaded = pretrained_clip(TINY, 0, CPU, tmp_path / "a").state_dict()
        other = pretrained_clip(TINY, 1, CPU, tmp_path / "a").state_dict()
        assert capsys.readouterr().err.count("\n") == 3  # progress bars: the load had none
        for name, weight in made.items():
            assert_close(again[name], weight, rtol=0, atol=0)
            assert_close(loaded[name], weight, rtol=0, atol=0)
        assert (other["token_embedding.weight"] != made["token_embedding.weight"]).any()


class TestRows:
    """Every row is fine-tuned from the same weights, on the same batches, into its own classifier."""

    def test_every_row_runs_and_differs(self, sixteen: Split) -> None:
        """Two steps make twelve classifiers, in the order of the table, no two of which agree."""
        clip = new_clip(0).eval()
        made = dict(fine_tuned_rows(clip, sixteen, TWO_STEPS, 0, (*ROWS, *FURTHER_ROWS)))
        assert tuple(made) == (*ROWS, *FURTHER_ROWS)
        with torch.no_grad():
            logits = [classifier(sixteen.images) for classifier in made.values()]
        assert all(row.shape == (16, len(CLASSES)) for row in logits)
        for i, one in enumerate(logits):
            assert all((one - other).abs().max() > 1e-6 for other in logits[:i])

    def test_rows_that_are_asked_for_train_no_others(self, sixteen: Split, monkeypatch: pytest.MonkeyPatch) -> None:
        """In the order in which they are asked for; WiSE-FT trains the row that it averages, which is trained once."""
        trained: list[str] = []

        def noted(way: str, of: Callable[..., DigitClassifier]) -> Callable[..., DigitClassifier]:
            def note(trainer: Trainer, **how: Any) -> DigitClassifier:
                trained.append(way)
                return of(trainer, **how)

            return note

        for way in ("ft", "flyp", "carot", "tracer"):
            monkeypatch.setattr(Trainer, way, noted(way, getattr(Trainer, way)))
        clip = new_clip(0).eval()
        asked = ("WiSE-FT", "TRACER", "FT", "ZS")
        assert tuple(row for row, _ in fine_tuned_rows(clip, sixteen, TWO_STEPS, 0, asked)) == asked
        assert trained == ["ft", "tracer"]
        assert tuple(row for row, _ in fine_tuned_rows(clip, sixteen, TWO_STEPS, 0)) == ROWS

    @pytest.mark.parametrize("way", ["car_ft", "lipsum_ft"])
    def test_ft_is_held_by_its_formula(self, sixteen: Split, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A divergence of softmaxes over contexts, and half the mean square of what logits of random texts move."""
        trainer = Trainer(new_clip(0).eval(), sixteen, TWO_STEPS, 0, tqdm(disable=True))
        given: dict[str, rows.Penalty] = {}
        monkeypatch.setattr(trainer, "ft", lambda **arguments: given.update(arguments))
        getattr(trainer, way)()
        contexts = data.tokenize([f"a {word} of the" for words in data.STYLE_WORDS.values() for word in words])
        tokens = contexts if way == "car_ft" else data.random_texts(Generator().manual_seed(0))
        with torch.no_grad():
            texts = trainer.clip.encode_text(tokens, normalize=True)
        x, pretrained = (F.normalize(torch.randn(5, 64, generator=Generator().manual_seed(k)), dim=1) for k in (0, 1))
        z, z0 = (
            trainer.clip.logit_scale.exp().item() * features.double() @ texts.double().T for features in (x, pretrained)
        )
        divergence = F.kl_div(z.log_softmax(1), z0.log_softmax(1), reduction="batchmean", log_target=True)
        expected = (
            TWO_STEPS.contexts * divergence if way == "car_ft" else TWO_STEPS.random_texts * F.mse_loss(z, z0) / 2
        )
        assert_close(given["penalty"](x, pretrained).double(), expected, rtol=1e-5, atol=0)

    def test_random_texts_are_new_each_time_and_well_formed(self) -> None:
        """Eight words between the marks of start and end, which open_clip's tower looks for, then nothing."""
        generator = Generator().manual_seed(0)
        first, second = (data.random_texts(generator) for _ in range(2))
        assert first.shape == (80, data.CONTEXT_LENGTH)
        assert (first != second).any(1).all()
        marks = data.tokenize(["a"])[0]
        assert (first[:, 0] == marks[0]).all()
        assert (first[:, 9] == marks.max()).all()
        assert (first.argmax(1) == 9).all()
        assert (first[:, 10:] == 0).all()

    def test_tracer_descends_its_formula(self, sixteen: Split, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its gradient at the first step, with a teacher that is another model, is that of the terms written out."""

        class Other:
            def __init__(self, student: nn.Module, decay: object) -> None:
                self.clip = new_clip(1).eval()

            @torch.no_grad()
            def __call__(self, *inputs: Tensor) -> Any:
                return self.clip(*inputs)

        class FirstStepError(Exception):
            pass

        def stop(model: nn.Module, *_: object) -> None:
            found.update({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
            raise FirstStepError

        found: dict[str, Tensor] = {}
        clip = new_clip(0).eval()
        trainer = Trainer(clip, sixteen, TWO_STEPS, 0, tqdm(disable=True))
        monkeypatch.setattr(calrobust, "EMATeacher", Other)
        monkeypatch.setattr(rows, "optimizer_step", stop)
        with pytest.raises(FirstStepError):
            trainer.tracer()
        images, captions, _ = next(trainer._batches())
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

    def test_fine_tuning_leaves_the_pretrained_model_alone(self, sixteen: Split) -> None:
        """Every row starts from the same weights: none of them moves those it started from."""
        clip = new_clip(0).eval()
        before = {name: weight.clone() for name, weight in clip.state_dict().items()}
        for _ in fine_tuned_rows(clip, sixteen, TWO_STEPS, seed=0):
            assert_close(clip.state_dict(), before, rtol=0, atol=0)

    @pytest.mark.parametrize("row", ["ft", "flyp", "carot", "tracer", "car_ft", "lipsum_ft"])
    def test_batchnorm_statistics_stay_pretrained(self, sixteen: Split, row: str) -> None:
        """Fine-tuning runs in eval mode, so weights can be averaged without touching buffers."""
        trainer = Trainer(new_clip(0).eval(), sixteen, TWO_STEPS, 0, tqdm(disable=True))
        fine_tuned: DigitClassifier = getattr(trainer, row)()
        for name, buffer in trainer.zero_shot.named_buffers():
            assert_close(fine_tuned.get_buffer(name), buffer, rtol=0, atol=0)

    def test_same_seed_gives_the_same_row(self, sixteen: Split) -> None:
        """A row depends on the seed alone, not on the rows made before it."""

        def carot(seed: int) -> Tensor:
            trainer = Trainer(new_clip(0).eval(), sixteen, TWO_STEPS, seed, tqdm(disable=True))
            return trainer.carot().weight.detach()

        first = carot(0)
        torch.manual_seed(9)
        assert_close(carot(0), first, rtol=0, atol=0)
        assert (carot(1) != first).any()

    def test_carot_without_distillation_is_flyp_with_smoothing(self, sixteen: Split) -> None:
        """The teacher enters by the distillation term alone."""
        undistilled = replace(TWO_STEPS, distillation_weight=0.0)
        carot, distilled = (
            Trainer(new_clip(0).eval(), sixteen, recipe, 0, tqdm(disable=True)).carot().weight.detach()
            for recipe in (undistilled, TWO_STEPS)
        )
        flyp = Trainer(new_clip(0).eval(), sixteen, TWO_STEPS, 0, tqdm(disable=True))
        assert_close(carot, flyp.flyp(label_smoothing=TWO_STEPS.label_smoothing).weight.detach())
        assert (distilled - carot).abs().max() > 1e-6

    def test_teacher_follows_the_student(self, sixteen: Split) -> None:
        """After one step the teacher is no longer the pre-trained model, so the second step differs."""
        following, fixed = (
            Trainer(new_clip(0).eval(), sixteen, replace(TWO_STEPS, teacher_decay=decay), 0, tqdm(disable=True))
            .carot()
            .weight.detach()
            for decay in (0.1, 1.0)
        )
        assert (following - fixed).abs().max() > 1e-6

    def test_wise_ft_is_halfway(self, sixteen: Split) -> None:
        """Every weight of the averaged classifier is the mean of the two it lies between."""
        trainer = Trainer(new_clip(0).eval(), sixteen, TWO_STEPS, 0, tqdm(disable=True))
        fine_tuned = trainer.ft()
        middle = dict(trainer.wise_ft(fine_tuned).named_parameters())
        for (name, start), end in zip(trainer.zero_shot.named_parameters(), fine_tuned.parameters(), strict=True):
            assert_close(middle[name], (start + end) / 2)

    def test_zero_shot_head_has_the_logit_scale_for_norm(self) -> None:
        """A class weight is a unit-norm caption mean times the logit scale, so its logits are CLIP's (trap 33)."""
        clip = new_clip(0).eval()
        norms = zero_shot_classifier(clip).weight.norm(dim=1)
        assert_close(norms, clip.logit_scale.exp().expand(10))


def test_the_logit_scale_neither_decays_nor_leaves_its_bounds() -> None:
    """Without a gradient it stays while matrices shrink; a step too far ends at 100 (trap 8)."""
    clip = new_clip(0)
    optimizer, schedule = optimizer_for(
        clip, steps=10, learning_rate=0.1, weight_decay=0.5, betas=(0.9, 0.999), warm_up=0.1
    )
    before = {name: parameter.detach().clone() for name, parameter in clip.named_parameters()}
    for parameter in clip.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer_step(clip, optimizer, schedule)
    assert torch.equal(clip.logit_scale, before["logit_scale"])
    assert clip.text_projection.norm() < before["text_projection"].norm()
    clip.logit_scale.grad = torch.tensor(-1e9)
    with torch.no_grad():
        clip.logit_scale.fill_(4.6)
    optimizer_step(clip, optimizer, schedule)
    assert clip.logit_scale.exp().item() == pytest.approx(100)


def figures(**rows: tuple[float, ...]) -> Figures:
    """A table in percent, its columns in the order of ``COLUMNS``; ``_`` in a name stands for a blank."""
    return {row.replace("_", " "): dict(zip(COLUMNS.values(), values, strict=True)) for row, values in rows.items()}


class TestFindings:
    """What is said about a table follows from its numbers."""

    WON = figures(
        ZS=(75, 74, 5, 9, 5, 9),
        FT=(94, 57, 3, 26, 2, 20),
        FLYP=(94.5, 54, 3, 32, 2, 24),
        CaRot=(96, 80, 5, 4, 1, 8.5),
    )
    LOST = figures(
        ZS=(75, 74, 5, 4, 5, 4),
        FT=(94, 57, 3, 26, 2, 20),
        FLYP=(94.5, 54, 3, 32, 2, 24),
        CaRot=(93, 50, 5, 33, 3, 25),
    )

    def test_a_win_is_called_a_win(self) -> None:
        """Where CaRot is best, the comparison and the verdict say so, with the paired difference."""
        text = "\n".join(findings([self.WON]))
        assert "CaRot, OOD accuracy: better than ZS (+6.0), FT (+23.0), FLYP (+26.0)." in text
        assert "CaRot, OOD ECE: better than ZS (-5.0), FT (-22.0), FLYP (-28.0)." in text
        assert "Best of all rows: ID accuracy CaRot (96.0)" in text
        assert "CaRot is first in 5 of 6 (ID accuracy, OOD accuracy, OOD ECE, ID ECE + TS, OOD ECE + TS)." in text

    def test_a_loss_is_called_a_loss(self) -> None:
        """Where CaRot is not best, the text names who is; nothing is claimed for it."""
        text = "\n".join(findings([self.LOST]))
        assert "CaRot, OOD accuracy: worse than ZS (-24.0), FT (-7.0), FLYP (-4.0)." in text
        assert "Best of all rows: ID accuracy FLYP (94.5), OOD accuracy ZS (74.0)" in text
        assert text.count("CaRot is first in 0 of 6.") == 2  # of all rows, and of the fine-tuned ones

    def test_less_than_a_point_is_level(self) -> None:
        """A difference that the test sets cannot resolve is no win."""
        text = "\n".join(findings([self.WON]))
        assert "CaRot, OOD ECE + TS: better than FT (-11.5), FLYP (-15.5); level with ZS (-0.5)." in text

    def test_seeds_are_compared_pairwise_and_averaged(self) -> None:
        """Over seeds a difference is the mean of the differences within a seed; if they disagree, it is no win."""
        better = figures(
            ZS=(75, 74, 5, 9, 5, 9),
            FT=(94, 57, 3, 26, 2, 20),
            FLYP=(94.5, 54, 3, 32, 2, 24),
            CaRot=(96, 67, 5, 4, 1, 8.5),
        )
        text = "\n".join(findings([self.WON, better]))
        assert "means of 2 seeds" in text
        expected = (
            "CaRot, OOD accuracy: better than FT (+16.5, +10.0 to +23.0), FLYP (+19.5, +13.0 to +26.0); level with ZS"
        )
        assert expected in text
        disagreeing = "\n".join(findings([self.WON, self.LOST]))
        assert "CaRot, OOD accuracy: level with ZS (-9.0, -24.0 to +6.0), FT (+8.0, -7.0 to +23.0)" in disagreeing

    def test_only_what_is_there_is_compared(self) -> None:
        """Without CaRot, FT or ZS nothing is said of them, and one row alone has nothing to be compared with."""
        others = {row: self.WON[row] for row in ("FLYP", "FT")}
        text = "\n".join(findings([others]))
        assert "Best of all rows: ID accuracy FLYP (94.5)" in text
        assert "takes FT's ID ECE from 3.0" in text
        assert "CaRot" not in text
        assert "ZS" not in text
        assert len(findings([{"ZS": self.WON["ZS"]}])) == 2
        assert "CaRot, " not in "\n".join(findings([{"CaRot": self.WON["CaRot"]}]))

    def test_scaling_is_reported_as_it_went(self) -> None:
        """What temperature scaling does to each ECE is told in numbers, better or worse."""
        text = "\n".join(findings([self.WON]))
        assert "takes CaRot's ID ECE from 5.0 to 1.0 and its OOD ECE from 4.0 to 8.5." in text


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script itself; its name is also its package's, so it is loaded from its file."""
    path = Path(__file__).parents[2] / "examples" / "shift_table.py"
    spec = importlib.util.spec_from_file_location("shift_table_script", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestScript:
    """One run from the options to the files."""

    def test_writes_every_file_for_every_seed(
        self, script: ModuleType, drawn: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A miniature over two seeds: a mean and deviation in every cell, every figure of every seed in the CSV."""
        monkeypatch.setattr(script, "make_data", lambda: fewer(drawn))
        monkeypatch.setattr(script, "FAST", (TINY, TWO_STEPS))
        monkeypatch.setattr(results, "contact_sheet", lambda _: contact_sheet(drawn))
        options = ["--fast", "--seeds", "3", "4", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["shift_table.py", *options])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # two steps may leave nothing for a temperature to scale
            script.main()
        assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(results.FILES)
        table = (tmp_path / "out" / "table.md").read_text()
        cells = [line.split("|")[2:-1] for line in table.splitlines() if line.startswith("| ")][2:]
        assert len(cells) == len(ROWS)
        assert all(" ± " in cell for row in cells for cell in row)
        assert "the numbers mean nothing" in table
        with (tmp_path / "out" / "results.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 2 * len(ROWS) * (1 + len(OOD_STYLES))
        assert {row["seed"] for row in rows} == {"3", "4"}
        assert all((tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG") for name in results.FILES[2:])

    def test_rows_are_chosen(
        self, script: ModuleType, drawn: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The table has these rows alone, in this order."""
        monkeypatch.setattr(script, "make_data", lambda: fewer(drawn))
        monkeypatch.setattr(script, "FAST", (TINY, TWO_STEPS))
        monkeypatch.setattr(results, "contact_sheet", lambda _: contact_sheet(drawn))
        folders = ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["shift_table.py", "--fast", "--rows", "CAR-FT", "ZS", *folders])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            script.main()
        table = (tmp_path / "out" / "table.md").read_text()
        names = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
        assert names[-2:] == ["CAR-FT", "ZS"]
        assert len(names) == 4

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--rows", "ZS", "FT", "ZS"], "--rows must differ from each other, got ZS, FT, ZS"),
            (["--rows", "FLIP"], "invalid choice: 'FLIP'"),
            (["--seeds", "1", "1"], "--seeds must differ from each other, got [1, 1]"),
            (["--device", "cuda"], "--device cuda needs a CUDA GPU"),
        ],
    )
    def test_wrong_options_are_named_before_any_work(
        self,
        script: ModuleType,
        options: list[str],
        message: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """What cannot work is said at once, with what to do."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(sys, "argv", ["shift_table.py", *options])
        with pytest.raises(SystemExit):
            script.main()
        assert message in capsys.readouterr().err
