"""``examples/finetune.py --recipe released``: each way in which the authors' scripts differ from ours."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune.models import load_clip
from finetune.pictures import Batch, read_data
from finetune.training import RECIPES, Training
from tiny_folders import Main, options, parse_options
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torchmetrics.functional.classification import multiclass_calibration_error

pytestmark = pytest.mark.filterwarnings("ignore:the data do not determine a temperature")


def training(made: Path, out: Path, method: str, *more: str, recipe: str = "released") -> Training:
    """Before its first step; float32 unless ``more`` says otherwise."""
    chosen = options(made, out, "--recipe", recipe, *more, method=method)
    read: argparse.Namespace = parse_options(chosen)
    torch.manual_seed(0)
    return Training(read, method, load_clip(read, torch.device("cpu")), read_data(read), 0, 1)


def batch() -> Batch:
    """Eight pictures of three classes."""
    torch.manual_seed(1)
    target = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    return Batch(torch.rand(8, 3, 16, 16), target, torch.zeros_like(target), [])


def terms(run: Training) -> dict[str, Tensor]:
    """Of that batch."""
    images, target, template = batch()[:3]
    return run.terms(run.network, images, target, template)


@pytest.fixture
def neurips(made: Path, tmp_path: Path) -> Training:
    """Their ``carot.sh``."""
    return training(made, tmp_path, "carot-neurips")


def test_every_choice_of_the_recipe_differs_from_ours() -> None:
    """And has a test below; the options of a user win over both."""
    ours, released = RECIPES["ours"], RECIPES["released"]
    assert all(a != b for a, b in zip(ours, released, strict=True))


def test_the_orthogonality_term_is_the_norm_and_the_towers_product_has_one(neurips: Training) -> None:
    """0.2 times the norm, where ours is 0.2 times its square, and 0.05 times that of the product."""
    visual, text = neurips.clip.network.visual.proj, neurips.clip.network.text_projection
    found = terms(neurips)
    norm = torch.linalg.norm(visual.T @ visual - torch.eye(8))
    assert_close(found["orthogonality"], 0.2 * norm)
    assert_close(found["cross_norm"], 0.05 * torch.linalg.norm(visual @ text.T))


def test_pairs_of_one_class_are_negatives_and_nothing_is_smoothed(made: Path, tmp_path: Path) -> None:
    """The contrastive term is CLIP's, with the batch's own order for labels; a smoothing that is asked for stays.

    Captions of one template would hide it: equal texts give equal logits, and the loss of both is the same.
    """
    run = training(made, tmp_path, "carot-neurips", "--template", "SIMPLE")
    images, target, _ = batch()[:3]
    template = torch.arange(8) % 7
    tokens = {name: value[7 * target + template] for name, value in run.tokens.items()}
    image, text, scale = run.clip.features(run.network, images, tokens)
    logits, own = scale * image @ text.T, torch.arange(8)
    expected = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
    assert_close(run.terms(run.network, images, target, template)["contrastive"], expected)
    smoothed = training(made, tmp_path, "carot-neurips", "--label-smoothing", "0.1")
    assert smoothed.row.label_smoothing == 0.1
    assert training(made, tmp_path, "flyp-ls").row.label_smoothing == 0.05  # it asks for it by its name


def test_everything_decays(neurips: Training, made: Path, tmp_path: Path) -> None:
    """Logit scale, biases and norms too."""
    decays, stays = neurips.optimizer.param_groups
    assert decays["weight_decay"] == 0.1
    assert not stays["params"]
    assert any(parameter is neurips.clip.network.logit_scale for parameter in decays["params"])
    (_, stays) = training(made, tmp_path, "carot-neurips", recipe="ours").optimizer.param_groups
    assert stays["params"]


def test_the_teacher_moves_after_the_first_step_and_every_500th(neurips: Training) -> None:
    """The decay follows the number of the step: 0.05 at step 0, and a line to 0.9 at a fifth of the run."""
    neurips.steps = 25020  # ten epochs of ImageNet
    neurips._set_loss()
    assert neurips.teacher is not None
    decay: Any = neurips.teacher.decay
    moves = {step: decay(step) for step in range(0, 6001) if decay(step) != 1.0}
    assert list(moves) == list(range(0, 6001, 500))
    for step, found in moves.items():
        assert found == pytest.approx(0.85 / (25020 * 0.2) * step + 0.05 if step < 25020 * 0.2 else 0.9)
    assert [round(moves[step], 3) for step in (0, 500, 1000)] == [0.05, 0.135, 0.22]
    assert neurips.teacher.update_every == 1
    student = neurips.network
    with torch.no_grad():
        student.get_parameter("visual.proj").fill_(1.0)
    before = neurips.teacher.module.get_parameter("visual.proj").clone()
    neurips.teacher.update(student)
    assert_close(neurips.teacher.module.get_parameter("visual.proj"), 0.05 * before + 0.95)


def test_the_rate_warms_up_over_500_steps(neurips: Training) -> None:
    """Then it falls as a cosine, as it does in ours after 2 % of the steps."""
    neurips.steps = 2000
    rates = [neurips.step(neurips.network, batch(), step)["learning_rate"] for step in (1, 250, 500, 501, 1250, 2000)]
    cosine = [0.5 * (1 + math.cos(math.pi * share)) for share in (0, 749 / 1500, 1499 / 1500)]
    assert rates == pytest.approx([0.01 / 500, 0.005, 0.01, *(0.01 * value for value in cosine)])


def test_the_logit_scale_has_no_bound(neurips: Training) -> None:
    """A scale above 100 stays there."""
    with torch.no_grad():
        neurips.clip.network.logit_scale.fill_(5.0)
    logged = neurips.step(neurips.network, batch(), 1)
    assert logged["logit_scale"] == pytest.approx(math.exp(5.0), rel=0.01)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The norms of the gradients that AdamW gets."""
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def noting(self: torch.optim.AdamW, *arguments: Any, **named: Any) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())
        return step(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    return norms


def test_fine_tuning_clips_and_its_head_has_a_bias(made: Path, tmp_path: Path, seen: list[float]) -> None:
    """At a norm of 1, which contrastive rows do not; the bias starts at 0."""
    run = training(made, tmp_path, "ft")
    bias: Any = run.network.get_parameter("bias")
    assert torch.equal(bias, torch.zeros(3))
    with torch.no_grad():
        run.network.get_parameter("head").mul_(100)  # so that there is something to clip
    run.step(run.network, batch(), 500)
    assert seen.pop() == pytest.approx(1.0, rel=1e-3)
    assert not torch.equal(bias, torch.zeros(3))
    assert "bias" not in dict(training(made, tmp_path, "ft", recipe="ours").network.named_parameters())
    contrast = training(made, tmp_path, "flyp")
    with torch.no_grad():
        contrast.clip.network.logit_scale.fill_(5.0)
    contrast.step(contrast.network, batch(), 500)
    assert seen.pop() > 1.01


def test_float16_scales_the_loss_and_clips_what_is_scaled(made: Path, tmp_path: Path, seen: list[float]) -> None:
    """As the scripts do, which do not unscale before they clip: the gradient's own norm is then 1 / 65536."""
    arguments = options(made, tmp_path, "--recipe", "released", method="ft")
    at = arguments.index("--precision")
    del arguments[at : at + 2]
    read = parse_options(arguments)
    assert read.precision == "fp16"
    run = Training(read, "ft", load_clip(read, torch.device("cpu")), read_data(read), 0, 1)
    assert run.scaler.get_scale() == 65536.0
    run.step(run.network, batch(), 500)
    assert seen == [pytest.approx(1.0, rel=1e-3)]  # a fused AdamW divides by the scale inside
    assert not training(made, tmp_path, "ft").scaler.is_enabled()  # --precision fp32


def test_a_run_is_resumed_and_reports_the_error_of_batches(
    made: Path, tmp_path: Path, main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    """The mean over batches of their ECE of ten bins, weighted by size, beside the report; WiSE-FT is halfway."""
    more = ("--recipe", "released", "--test", str(made / "train"), "--val", str(made / "val"))
    main(options(made, tmp_path, *more, method="wise-ft"))
    printed = capsys.readouterr().out
    assert "WiSE-FT: alpha is 0.5" in printed
    logits, target = torch.load(tmp_path / "wise-ft" / "logits.pt", weights_only=True)["sets"]["ID"]
    parts = list(zip(logits.softmax(1).split(8), target.split(8), strict=True))
    assert len(parts) > 1
    eces = [len(y) * multiclass_calibration_error(p, y, 3, n_bins=10) for p, y in parts]
    assert f"WiSE-FT on ID: mean ECE of batches, 10 bins: {100 * sum(eces) / len(target):.1f}" in printed
    main(options(made, tmp_path, *more, method="wise-ft"))
    assert capsys.readouterr().out.count("mean ECE of batches") == 2
    with pytest.raises(SystemExit, match="was made with recipe=released, not ours"):
        main(options(made, tmp_path, *more[2:], method="wise-ft"))
