"""The page of recipes: its own code, against each formula in dense float64."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import class_labels, seeds, unit_rows
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

import calrobust as cr

PAGE = (Path(__file__).parent.parent / "docs" / "guides" / "recipes.md").read_text(encoding="utf-8")
RECIPES: dict[str, Any] = {}
exec("\n".join(re.findall(r"^```{testcode}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)), RECIPES)


def recipe(name: str) -> Any:
    """A function of the page."""
    return RECIPES[name]


def softmax(a: Tensor, b: Tensor, scale: Any) -> Tensor:
    """Of each row of a over all rows of b."""
    logits: Tensor = scale * a @ b.T
    return logits.exp() / logits.exp().sum(1, keepdim=True)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL of each row, averaged."""
    return (p * (p / q).log()).sum(1).mean()


def hold(ours: Tensor, theirs: Any, *inputs: Tensor) -> None:
    """Value and gradients agree to 1e-12 of the largest entry."""
    gradients = (torch.autograd.grad(value, inputs, retain_graph=True) for value in (ours, theirs))
    for a, b in ((ours, theirs), *zip(*gradients, strict=True)):
        assert_close(a, b, rtol=1e-12, atol=1e-12 * max(1.0, float(b.detach().abs().max())))


class Models:
    """Pairs seen by a student that is trained and by a teacher, and a bank of texts that has no pairs."""

    def __init__(self, n: int, m: int, seed: int) -> None:
        self.x, self.y = (unit_rows(n, 6, seed + i).requires_grad_() for i in (0, 1))
        self.s = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
        self.x0, self.y0, self.s0 = unit_rows(n, 6, seed + 2), unit_rows(n, 6, seed + 3), 7.0
        self.bank, self.bank0 = unit_rows(m, 6, seed + 4).requires_grad_(), unit_rows(m, 6, seed + 5)
        self.student, self.teacher = (self.x, self.y, self.s), (self.x0, self.y0, self.s0)


models = st.builds(Models, st.integers(1, 20), st.integers(1, 20), seeds())


@given(of=models, smoothing=st.sampled_from([0.0, 0.1]))
def test_fine_tuning(of: Models, smoothing: float) -> None:
    """FT and LP-FT: torch's smoothed cross-entropy against the bank."""
    target = torch.arange(len(of.x)) % len(of.bank)
    expected = F.cross_entropy(of.s * of.x @ of.bank.T, target, label_smoothing=smoothing)
    hold(recipe("fine_tuning")(of.x, of.bank, of.s, target, smoothing), expected, of.x, of.bank, of.s)


@given(of=models)
def test_flyp_and_carot(of: Models) -> None:
    """Cross-entropies in both directions; smoothed, with both divergences and the orthogonality of a projection."""
    own = torch.arange(len(of.x))
    logits = of.s * of.x @ of.y.T
    contrasted, smoothed = (
        sum(F.cross_entropy(z, own, label_smoothing=e) for z in (logits, logits.T)) / 2 for e in (0.0, 0.05)
    )
    hold(recipe("flyp")(of.student), contrasted, *of.student)
    w = (torch.eye(6, 4, dtype=torch.float64) + 0.1).requires_grad_()
    distilled = divergence(softmax(of.x0, of.y0, of.s0), softmax(of.x, of.y, of.s))
    distilled = distilled + divergence(softmax(of.y0, of.x0, of.s0), softmax(of.y, of.x, of.s))
    orthogonality = ((w.T @ w - torch.eye(4)) ** 2).sum()
    expected = smoothed + 1.5 * distilled + 0.2 * orthogonality
    hold(recipe("carot")(of.student, of.teacher, w), expected, *of.student, w)


@given(of=models)
def test_tracer(of: Models) -> None:
    """Every term of its authors' formula."""
    (x, y, s), (x0, y0, s0) = of.student, of.teacher
    own = torch.arange(len(x))
    p, q = softmax(x0, y0, s0), softmax(y0, x0, s0)
    contrastive = (F.cross_entropy(s * x @ y.T, own) + F.cross_entropy(s * y @ x.T, own)) / 2
    kept = (divergence(p, softmax(x, y, s)) + divergence(q, softmax(y, x, s))) / 2
    features = F.mse_loss(x, x0) + F.mse_loss(y, y0)
    across = (F.cross_entropy(s * x @ y0.T, own) + F.cross_entropy(s * y @ x0.T, own)) / 2
    kept_across = (divergence(p, softmax(x, y0, s)) + divergence(q, softmax(y, x0, s))) / 2
    expected = contrastive + 0.9 * (kept + 2000 * features + across + kept_across)
    hold(recipe("tracer")(of.student, of.teacher), expected, *of.student)


@given(of=models)
def test_car_ft(of: Models) -> None:
    """The divergence of two softmaxes over contexts."""
    expected = divergence(softmax(of.x0, of.bank0, of.s0), softmax(of.x, of.bank, of.s))
    hold(recipe("car_ft")(of.x, of.bank, of.s, of.x0, of.bank0, of.s0), expected, of.x, of.bank, of.s)


@given(of=models, seed=seeds())
def test_star_ft(of: Models, seed: int) -> None:
    """The same with minus infinity at the captions of an image's own class."""
    target = class_labels(len(of.x), seed)
    bank_target = torch.cat([class_labels(len(of.bank), seed + 1), torch.tensor([-1])])  # one is of no image
    bank, bank0 = (torch.cat([b, unit_rows(1, 6, seed + k)]) for k, b in enumerate((of.bank, of.bank0)))
    own = target[:, None] == bank_target
    z, z0 = ((s * x @ b.T).masked_fill(own, -math.inf) for s, x, b in ((of.s, of.x, bank), (of.s0, of.x0, bank0)))
    terms = F.kl_div(z.log_softmax(1), z0.log_softmax(1), reduction="none", log_target=True)
    expected = terms.masked_fill(own, 0).sum() / len(of.x)
    hold(recipe("star_ft")(of.x, bank, of.s, of.x0, bank0, of.s0, target, bank_target), expected, of.x, of.s)


@given(of=models)
def test_lit(of: Models) -> None:
    """Of both directions or one; the locked tower gets no gradient."""
    own, logits = torch.arange(len(of.x)), of.s * of.x @ of.y.detach().T
    rows, columns = (F.cross_entropy(z, own) for z in (logits, logits.T))
    hold(recipe("lit")(of.x, of.y, of.s), (rows + columns) / 2, of.x, of.s)
    value = recipe("lit")(of.x, of.y, of.s, "image_to_text")
    assert torch.autograd.grad(value, of.y, retain_graph=True, allow_unused=True)[0] is None
    hold(value, F.cross_entropy(logits, own), of.x, of.s)


@given(of=models, k=st.integers(1, 4))
def test_captions(of: Models, k: int) -> None:
    """The target of an image is shared by its captions, and each caption has one image."""
    n = len(of.x)
    texts = unit_rows(n * k, 6, 9).requires_grad_()
    logits = of.s * of.x @ texts.T
    owner = torch.arange(n * k) // k
    shared = (owner == torch.arange(n)[:, None]).double() / k
    expected = (F.cross_entropy(logits, shared) + F.cross_entropy(logits.T, owner)) / 2
    hold(recipe("captions")(of.x, texts, of.s), expected, of.x, texts, of.s)


@given(of=models)
def test_hard_negatives(of: Models) -> None:
    """All texts are candidates of the images, and those of pairs alone look for an image."""
    own, texts = torch.arange(len(of.x)), torch.cat([of.y, of.bank])
    expected = (F.cross_entropy(of.s * of.x @ texts.T, own) + F.cross_entropy(of.s * of.y @ of.x.T, own)) / 2
    hold(recipe("hard_negatives")(of.x, of.y, of.s, of.bank), expected, *of.student, of.bank)


@given(of=models)
def test_siglip(of: Models) -> None:
    """Softplus of every pair, and the divergence of two answers."""
    b = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    n = len(of.x)
    z, z0 = of.s * of.x @ of.y.T + b, of.s0 * of.x0 @ of.y0.T - 2.0
    m = 2 * torch.eye(n, dtype=torch.float64) - 1
    contrasted = (1 + (-m * z).exp()).log().sum() / n
    hold(recipe("siglip")(*of.student, b), contrasted, *of.student, b)
    p, p0 = z.sigmoid(), z0.sigmoid()
    distilled = (p0 * (p0 / p).log() + (1 - p0) * ((1 - p0) / (1 - p)).log()).sum() / n
    ours = recipe("distilled_siglip")((*of.student, b), (*of.teacher, -2.0), 0.5)
    hold(ours, contrasted + 0.5 * distilled, *of.student, b)


@given(of=models)
def test_anchors(of: Models) -> None:
    """KgCoOp's squared distance of texts, and Lipsum-FT's half of the square of what a logit has moved."""
    expected = sum((y - y0) @ (y - y0) for y, y0 in zip(of.y, of.y0, strict=True)) / len(of.y)
    hold(recipe("text_anchor")(of.student, of.teacher), expected, of.y)
    moved = [
        (of.s * x @ r - of.s0 * x0 @ r0) ** 2 / 2
        for x, x0 in zip(of.x, of.x0, strict=True)
        for r, r0 in zip(of.bank, of.bank0, strict=True)
    ]
    ours = recipe("lipsum_ft")(of.x, of.bank, of.s, of.x0, of.bank0, of.s0)
    hold(ours, torch.stack(moved).mean(), of.x, of.bank, of.s)


def test_lines() -> None:
    """Layer by layer of each tower of open_clip's names: embeddings are in the first one, projections in the last."""
    layers = {
        "visual.class_embedding": 1,
        "visual.conv1.weight": 1,
        "visual.ln_pre.bias": 1,
        "token_embedding.weight": 1,
        "visual.transformer.resblocks.0.ln_1.weight": 1,
        "visual.transformer.resblocks.11.mlp.c_proj.weight": 12,
        "visual.transformer.resblocks.23.attn.out_proj.weight": 24,
        "transformer.resblocks.4.attn.in_proj_weight": 5,
        "transformer.resblocks.11.mlp.c_fc.weight": 12,
        "visual.ln_post.weight": 24,
        "visual.proj": 24,
        "ln_final.weight": 12,
        "text_projection": 12,
        "logit_scale": 12,
    }
    start, end = ({name: unit_rows(2, 3, 2 * k + i) for k, name in enumerate(layers)} for i in (0, 1))
    found = recipe("lines")(start, end, 0.3, 0.9, 24, 12)
    for name, layer in layers.items():
        last = 23 if "visual" in name else 11
        expected = start[name] + (0.3 + 0.9 * (layer - 1) / last) * (end[name] - start[name])
        assert_close(found[name], expected, rtol=1e-12, atol=1e-12)
    other = {"vision_model.encoder.layers.0.self_attn.q_proj.weight": torch.eye(2)}
    with pytest.raises(ValueError, match=r"^in which layer is vision_model"):
        recipe("lines")(other, other, 0.3, 0.9, 24, 12)


def classifiers(n: int, n_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Logits of two models."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(k * torch.randn(n, n_classes, generator=generator, dtype=torch.float64) for k in (4, 2))  # type: ignore[return-value]


@given(n=st.integers(1, 20), n_classes=st.integers(2, 8), seed=seeds())
def test_two_models_logits(n: int, n_classes: int, seed: int) -> None:
    """DaWin's share, the ensemble and SaLS, sample by sample."""
    logits, logits0 = classifiers(n, n_classes, seed)
    share, mean, scaled = (recipe(name)(logits, logits0) for name in ("dawin", "ensemble", "sals"))
    for i, (z, z0) in enumerate(zip(logits, logits0, strict=True)):
        p, p0 = (each.exp() / each.exp().sum() for each in (z, z0))
        expertise, expertise0 = ((prob * prob.log()).sum().exp() for prob in (p, p0))  # of minus the entropy
        assert_close(share[i], expertise / (expertise0 + expertise), rtol=1e-12, atol=1e-12)
        assert_close(mean[i], (p + p0) / 2, rtol=1e-12, atol=1e-12)
        onto = (z - z.min()) / (z.max() - z.min()) * (z0.max() - z0.min()) + z0.min()  # as its authors write it
        assert_close(scaled[i].softmax(0), onto.softmax(0), rtol=1e-12, atol=1e-12)
    masked, masked0 = (F.pad(z, (0, 1), value=-torch.inf) for z in (logits, logits0))
    assert_close(recipe("sals")(masked, masked0), F.pad(scaled, (0, 1), value=-torch.inf), rtol=0, atol=0)


@given(seed=seeds(), k=st.integers(1, 6))
def test_dac(seed: int, k: int) -> None:
    """Class by class, with distances sorted by hand; a class that was trained keeps its logits."""
    texts, texts0, base, base0 = (unit_rows(rows, 5, seed + i) for i, rows in enumerate((7, 7, 6, 6)))
    texts[2] = base[3]
    logits, _ = classifiers(12, 7, seed)
    found = recipe("dac")(logits, texts, base, texts0, base0, k)
    for z, scaled in zip(logits, found, strict=True):
        c = int(z.argmax())
        distances, distances0 = (
            sorted(float((t[c] - b).norm()) for b in bs)[:k] for t, bs in ((texts, base), (texts0, base0))
        )
        ratio = math.exp(-sum(distances) / k) / math.exp(-sum(distances0) / k)
        assert_close(scaled, z * (1.0 if distances[0] < 0.05 else ratio), rtol=1e-12, atol=1e-12)


@given(seed=seeds(), n_models=st.integers(2, 4))
def test_weights(seed: int, n_models: int) -> None:
    """Halfway, the mean, and the mean drawn to the start by the angle between the models; DaWin's share is an alpha."""
    zero_shot, *tuned = ({"w": unit_rows(3, 4, seed + k)} for k in range(1 + n_models))
    start, ends = zero_shot["w"], torch.stack([model["w"] for model in tuned])
    assert_close(recipe("wise_ft")(zero_shot, tuned[0])["w"], (start + ends[0]) / 2, rtol=1e-12, atol=1e-12)
    assert_close(recipe("soup")(tuned)["w"], ends.mean(0), rtol=1e-12, atol=1e-12)
    moves = F.normalize((ends - start).flatten(1), dim=1)
    cosine = ((moves @ moves.T).sum() - n_models) / (n_models * (n_models - 1))  # of two, on average
    cosine = cosine.clamp(min=0)
    ratio = n_models * cosine / (1 + (n_models - 1) * cosine)
    expected = ratio * ends.mean(0) + (1 - ratio) * start
    assert_close(recipe("model_stock")(zero_shot, tuned)["w"], expected, rtol=1e-12, atol=1e-12)
    share = recipe("dawin")(*classifiers(5, 3, seed))[:3].mean().item()
    assert_close(cr.interpolate(zero_shot, tuned[0], share)["w"], start.lerp(ends[0], share), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, value in RECIPES.items() if callable(value)])
def test_every_recipe_is_tested(name: str) -> None:
    """By name, in this file."""
    assert f'"{name}"' in Path(__file__).read_text(encoding="utf-8")
