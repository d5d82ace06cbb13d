from __future__ import annotations

import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import datasets
import numpy as np
import open_clip
import pytest
import torch
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from strategies import seeds
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    BatchEncoding,
    BatchFeature,
    CLIPConfig,
    CLIPModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    default_data_collator,
)
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.clip.modeling_clip import CLIPOutput

from calrobust import collect_logits, zero_shot_classifier

Batch = tuple[Tensor, Tensor]


class Model(nn.Module):
    """Has layers that train mode would disturb, and notes under which conditions it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(3, 4)
        self.seen: list[tuple[bool, bool]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits ``[B, 4]``."""
        self.seen.append((any(m.training for m in self.modules()), torch.is_grad_enabled()))
        logits: Tensor = self.head(self.drop(self.norm(inputs)))
        return logits


def batches(*sizes: int) -> list[Batch]:
    """Inputs ``[B, 3]`` and labels."""
    return [(torch.randn(size, 3), torch.randint(0, 4, (size,))) for size in sizes]


def failing(loader: list[Batch]) -> Iterator[Batch]:
    """Fails as a data set with a broken file does."""
    yield from loader
    raise OSError("broken file")


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), seeds())
def test_the_logits_are_those_of_the_whole_set(sizes: list[int], seed: int) -> None:
    """They are in the loader's order, whatever the batches, on the CPU and without gradient."""
    torch.manual_seed(seed)
    model, loader = Model().double(), [(x.double(), y) for x, y in batches(*sizes)]
    logits, target = collect_logits(model, loader, progress=False)
    expected = model.eval()(torch.cat([inputs for inputs, _ in loader]))
    assert_close(logits, expected.detach(), rtol=1e-12, atol=1e-12)
    assert torch.equal(target, torch.cat([labels for _, labels in loader]))
    assert not logits.requires_grad
    assert logits.device.type == target.device.type == "cpu"


def test_a_data_loader_and_a_generator_serve() -> None:
    """The loader may be anything that can be iterated once."""
    model, (inputs, target) = Model(), batches(7)[0]
    from_loader = collect_logits(model, DataLoader(TensorDataset(inputs, target), batch_size=3), progress=False)
    from_generator = collect_logits(model, ((x[None], y[None]) for x, y in zip(inputs, target, strict=True)))
    assert_close(from_loader, from_generator)
    assert len(from_loader[0]) == 7


def test_a_loader_may_use_its_memory_again() -> None:
    """Batches of one buffer, through a model that returns it, do not end up as copies of the last one."""
    buffer, labels = torch.empty(2, 3), torch.empty(2, dtype=torch.int64)

    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        for k in range(3):
            yield buffer.fill_(k), labels.fill_(k)

    logits, target = collect_logits(nn.Identity(), loader(), progress=False)
    assert target.tolist() == logits[:, 0].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_in_train_mode_is_evaluated_and_left_as_it_was(fails: bool) -> None:
    """Statistics, modes of submodules and the gradient mode come back, also after an exception (trap 30)."""
    model = Model().train()
    model.drop.eval()  # one part frozen by hand
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if fails:
        with pytest.raises(OSError, match="broken file"):
            collect_logits(model, failing(batches(4, 4)), progress=False)
    else:
        collect_logits(model, batches(4, 4), progress=False)
    assert model.seen == [(False, False)] * 2
    assert [m.training for m in (model, model.norm, model.drop, model.head)] == [True, True, False, True]
    assert torch.is_grad_enabled()
    assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_forward_says_how_to_run_other_batches() -> None:
    """It is given the model in eval mode and the batch of the loader, and its result is taken."""
    model = Model()
    loader = [{"pixels": inputs, "class": target} for inputs, target in batches(2, 3)]

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> Batch:
        return 2 * model(batch["pixels"]), batch["class"]

    logits, target = collect_logits(model, loader, forward=forward, progress=False)
    expected = collect_logits(model, [(batch["pixels"], batch["class"]) for batch in loader], progress=False)
    assert_close((logits / 2, target), expected)


class Named(NamedTuple):
    """An output with names."""

    loss: Tensor | None
    logits: Tensor


@pytest.mark.parametrize(
    "output",
    [
        lambda logits: {"loss": torch.zeros(()), "logits": logits},
        lambda logits: {"features": logits, "logits_per_image": logits},
        lambda logits: ImageClassifierOutput(logits=logits),
        lambda logits: CLIPOutput(logits_per_image=logits, logits_per_text=logits.T),
        lambda logits: SimpleNamespace(logits=logits),
        lambda logits: Named(None, logits),
    ],
)
def test_the_logits_of_an_output_are_found_by_name(output: Callable[[Tensor], Any]) -> None:
    """It may be a dict, an output of Transformers, or any object with attributes."""

    class Wrapped(Model):
        def forward(self, inputs: Tensor) -> Any:
            return output(super().forward(inputs))

    model, loader = Wrapped(), batches(2, 3)
    expected = torch.cat([Model.forward(model.eval(), inputs) for inputs, _ in loader])
    assert_close(collect_logits(model, loader, progress=False)[0], expected.detach(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "output",
    [lambda logits: (logits, None), lambda logits: [logits], lambda logits: {"scores": logits}, lambda _: CLIPOutput()],
)
def test_a_model_that_returns_no_logits_is_told_of_forward(output: Callable[[Tensor], Any]) -> None:
    """We do not guess which value of a tuple, or under another name, the logits are."""

    class Wrapped(Model):
        def forward(self, inputs: Tensor) -> Any:
            return output(super().forward(inputs))

    with pytest.raises(TypeError, match=r"model must return a tensor of logits, got .*; pass forward=lambda model, ba"):
        collect_logits(Wrapped(), batches(2), progress=False)


@pytest.mark.parametrize("kind", [dict, BatchFeature, BatchEncoding, OrderedDict])
def test_a_dict_of_inputs_is_passed_by_name(kind: Callable[[Any], Any]) -> None:
    """Its ``labels``, or ``label``, are the target and no input; a dict may also stand beside the target."""
    model, loader = Model(), batches(2, 3)
    expected = collect_logits(model, loader, progress=False)
    for name in ("labels", "label"):
        named = [kind({"inputs": inputs, name: target}) for inputs, target in loader]
        assert_close(collect_logits(model, named, progress=False), expected, rtol=0, atol=0)
        assert all(name in batch for batch in named)  # the loader's batches stay
    for pair in (tuple, list):
        beside = [pair((kind({"inputs": inputs}), target)) for inputs, target in loader]
        assert_close(collect_logits(model, beside, device="cpu", progress=False), expected, rtol=0, atol=0)


TINY: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


class TestLoaders:
    """What other libraries' loaders yield goes in as it is, and as their users write it."""

    @pytest.fixture
    def model(self) -> ViTForImageClassification:
        """Three classes, pictures of 8 x 8."""
        torch.manual_seed(0)
        return ViTForImageClassification(
            ViTConfig(**TINY, image_size=8, patch_size=4, id2label={0: "a", 1: "b", 2: "c"})
        )

    @pytest.fixture
    def pictures(self) -> list[Image.Image]:
        """Seven of them."""
        return [Image.new("RGB", (8, 8), (30 * i, 0, 200 - i)) for i in range(7)]

    @pytest.fixture
    def processor(self) -> ViTImageProcessor:
        """That of the model."""
        return ViTImageProcessor(size={"height": 8, "width": 8})

    @pytest.fixture
    def expected(self, model: Any, pictures: list[Image.Image], processor: ViTImageProcessor) -> tuple[Tensor, Tensor]:
        """From the model itself."""
        with torch.no_grad():
            output = model.eval()(**processor(pictures, return_tensors="pt"))
        return output.logits, torch.arange(7) % 3

    def test_of_datasets(self, model: Any, pictures: Any, processor: Any, expected: Any) -> None:
        """A ``datasets.Dataset`` in a DataLoader, by its ``iter``, and with the Trainer's collation."""

        def transform(batch: dict[str, Any]) -> dict[str, Any]:
            return {**processor(batch["image"], return_tensors="pt"), "label": batch["label"]}

        rows = datasets.Dataset.from_dict({"image": pictures, "label": expected[1].tolist()})
        assert_close(collect_logits(model, DataLoader(rows.with_transform(transform), batch_size=3)), expected)
        collated = DataLoader(rows.with_transform(transform), batch_size=3, collate_fn=default_data_collator)
        assert_close(collect_logits(model, collated), expected)
        whole = rows.map(transform, batched=True, remove_columns="image").with_format("torch")
        assert_close(collect_logits(model, whole.iter(batch_size=3), progress=False), expected)

    @pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")  # its open file
    def test_of_webdataset(self, model: Any, pictures: Any, processor: Any, expected: Any, tmp_path: Path) -> None:
        """Its tuples; its samples have a key and an address in them, so the error says what they hold."""
        with webdataset.TarWriter(str(tmp_path / "0.tar")) as tar:
            for i, (picture, label) in enumerate(zip(pictures, expected[1].tolist(), strict=True)):
                tar.write({"__key__": str(i), "png": picture, "cls": label})

        def pixels(picture: Image.Image) -> Tensor:
            values: Tensor = processor(picture, return_tensors="pt")["pixel_values"][0]
            return values

        shards = webdataset.WebDataset(str(tmp_path / "0.tar"), shardshuffle=False).decode("pil")
        pairs = shards.to_tuple("png", "cls").map_tuple(pixels, int).batched(3)
        assert_close(collect_logits(model, webdataset.WebLoader(pairs, batch_size=None)), expected)
        with pytest.raises(TypeError, match=r"got dict with __key__, __url__, .*cls.*; pass forward=lambda"):
            collect_logits(model, shards, progress=False)

    def test_of_a_clip_and_its_class_names(self, pictures: list[Image.Image]) -> None:
        """A CLIP that is called with the captions of all classes gives their logits, in ``logits_per_image``."""
        text = {**TINY, "vocab_size": 9, "eos_token_id": 8, "max_position_embeddings": 4}
        vision = {**TINY, "image_size": 8, "patch_size": 4}
        model: Any = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=4))
        ids, pixels = torch.tensor([[1, word, 8] for word in (2, 3, 4)]), torch.rand(7, 3, 8, 8)
        labels = torch.tensor([0, 1, 2, 0, 0, 1, 2])
        parts = zip(pixels.split(4), labels.split(4), strict=True)
        loader = [{"input_ids": ids, "pixel_values": part, "labels": target} for part, target in parts]
        logits, target = collect_logits(model, loader, progress=False)
        with torch.no_grad():
            assert_close(logits, model.eval()(ids, pixels).logits_per_image)
        assert torch.equal(target, labels)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.uint16, np.uint32, np.uint64])
def test_labels_may_be_numpy_arrays(dtype: type) -> None:
    """They may have any integer dtype, and come back as int64 tensors."""
    loader: list[tuple[Tensor, Any]] = [(inputs, target.numpy().astype(dtype)) for inputs, target in batches(2, 3)]
    for _, labels in loader:
        labels.flags.writeable = False  # as those of a memory map
    _, target = collect_logits(Model(), loader, progress=False)
    assert target.dtype == torch.int64
    assert target.tolist() == [int(label) for _, labels in loader for label in labels]


def test_complex_and_boolean_labels_are_refused() -> None:
    """A cast would drop the imaginary part without an error, and take a mask for classes."""
    inputs, target = batches(5)[0]
    for dtype in (torch.complex64, torch.bool):
        with pytest.raises((TypeError, ValueError), match=r"^target must"):
            collect_logits(Model(), [(inputs, target.to(dtype))], progress=False)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_one_hot_labels_are_told_of_argmax(dtype: torch.dtype) -> None:
    """The advice for floating labels, ``.long()``, would not help here."""
    inputs, target = batches(5)[0]
    one_hot = nn.functional.one_hot(target, 4).to(dtype)
    for wrong in (one_hot, one_hot[:, :3]):
        with pytest.raises(
            ValueError, match=r"^target must have shape \[5\], .*; pass target.argmax\(1\) if it is one"
        ):
            collect_logits(Model(), [(inputs, wrong)], progress=False)
    _, labels = collect_logits(Model(), [(inputs, one_hot.argmax(1))], progress=False)
    assert torch.equal(labels, target)


def test_a_class_for_every_pixel_gives_a_row_for_every_pixel() -> None:
    """``F.cross_entropy`` takes logits ``[N, C, ...]`` with labels ``[N, ...]`` too; pictures may differ in size."""
    pictures = [
        (torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))),
        (torch.randn(1, 3, 6), torch.randint(3, (1, 6))),
    ]
    logits, target = collect_logits(nn.Identity(), pictures, progress=False)
    assert logits.shape == (46, 3)
    expected = sum(nn.functional.cross_entropy(*picture, reduction="sum") for picture in pictures)
    assert_close(nn.functional.cross_entropy(logits, target, reduction="sum"), expected)
    with pytest.raises(ValueError, match=r"target must have shape \[2, 4, 5\]"):
        collect_logits(nn.Identity(), [(pictures[0][0], pictures[0][1][:, 1:])], progress=False)


class Pair(NamedTuple):
    """A batch with names."""

    inputs: Any
    target: Tensor


@pytest.mark.parametrize(
    "nest",
    [
        lambda x: x,
        lambda x: [x, "caption"],
        lambda x: (x, 3),
        lambda x: {"image": x, "text": [x]},
        lambda x: Pair(x, x),
    ],
    ids=["tensor", "list", "tuple", "dict", "named tuple"],
)
def test_a_batch_is_moved_whole(nest: Callable[[Tensor], Any]) -> None:
    """Every tensor inside is moved, the batch keeps its type, and other values stay."""
    received: list[Any] = []

    def forward(_: nn.Module, batch: Any) -> Batch:
        received.append(batch)
        return torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)

    batch = nest(torch.zeros(1))
    collect_logits(nn.Identity(), [batch, batch], forward=forward, device="meta", progress=False)

    def devices(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.device.type
        if isinstance(value, dict):
            return {key: devices(inner) for key, inner in value.items()}
        return [devices(inner) for inner in value] if isinstance(value, (tuple, list)) else value

    assert type(received[0]) is type(batch)
    assert str(devices(received[0])) == str(devices(batch)).replace("cpu", "meta")


def test_progress_is_shown_on_stderr_or_not_at_all(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is a bar by default, and none with ``progress=False`` or without tqdm."""
    loader = batches(2, 2)
    expected = collect_logits(nn.Identity(), loader)
    shown = capsys.readouterr()
    assert "collecting logits" in shown.err
    assert shown.out == ""
    quiet = collect_logits(nn.Identity(), loader, progress=False)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    without = collect_logits(nn.Identity(), loader)
    assert capsys.readouterr() == ("", "")
    assert_close([quiet, without], [expected, expected])


NAMES = ["cat", "sea lion", "t shirt"]
TEMPLATES: list[str | Callable[[str], str]] = ["a photo of a {}.", "the {}", lambda name: f"{name}!"]


class TestZeroShotClassifier:
    """Each row is the mean of the unit-norm features of a class's captions."""

    def test_is_what_open_clip_builds(self) -> None:
        """It is the transpose of open_clip's, whatever mode the model is in."""
        tower = {"layers": 1, "width": 16, "heads": 2, "context_length": 8}
        vision = {"image_size": 8, "patch_size": 8, "layers": 1, "width": 16, "head_width": 8}
        model = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg={**tower, "vocab_size": 49408}).train()
        tokenizer = open_clip.SimpleTokenizer(context_length=8)
        functions = [t.format if isinstance(t, str) else t for t in TEMPLATES]
        expected = open_clip.build_zero_shot_classifier(model.eval(), tokenizer, NAMES, functions).T
        weight = zero_shot_classifier(model.train(), tokenizer, NAMES, TEMPLATES)
        assert_close(weight, expected)
        assert model.training
        assert not weight.requires_grad

    def test_takes_models_of_transformers(self) -> None:
        """Their tokenizer pads to its greatest length, and pads are masked."""
        text = {**TINY, "vocab_size": 300, "eos_token_id": 299, "max_position_embeddings": 24, "dropout": 0.5}
        vision = {**TINY, "image_size": 4, "patch_size": 2}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=4)).train()

        def tokens(texts: list[str], pad: bool = True) -> dict[str, Tensor]:
            rows = [[*text.encode(), 299] for text in texts]
            ids = torch.tensor([row + [299] * (24 - len(row) if pad else 0) for row in rows])
            return {"input_ids": ids, "attention_mask": (ids.cumsum(1) >= 0).long()}

        def tokenizer(texts: list[str], **options: Any) -> dict[str, Tensor]:
            assert options == {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
            return tokens(texts)

        weight = zero_shot_classifier(model, tokenizer, NAMES, TEMPLATES)
        processor: Any = SimpleNamespace(tokenizer=tokenizer)  # of text and pictures
        assert_close(zero_shot_classifier(model, processor, NAMES, TEMPLATES), weight, rtol=0, atol=0)
        assert model.training
        model.eval()
        for name, row in zip(NAMES, weight, strict=True):
            texts = [t.format(name) if isinstance(t, str) else t(name) for t in TEMPLATES]
            features = [model.get_text_features(**tokens([text], pad=False)).pooler_output for text in texts]
            mean = nn.functional.normalize(torch.cat(features), dim=1).mean(0)
            assert_close(row, nn.functional.normalize(mean, dim=0).detach())

    @pytest.mark.parametrize(
        ("tokens", "message"),
        [
            ([[1, 2]], "the tokenizer's output must be of type Mapping, got list; pass the model's own tokenizer"),
            ({"input_ids": [[1, 2]]}, "input_ids must be of type Tensor, got list; pass the model's own tokenizer"),
        ],
    )
    def test_a_tokenizer_that_returns_lists_is_refused(self, tokens: Any, message: str) -> None:
        """A model of Transformers takes a dict of tensors."""
        model = nn.Linear(1, 1)
        model.get_text_features = nn.Identity()
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            zero_shot_classifier(model, lambda texts, **_: tokens, ["ox"])

    @pytest.mark.parametrize("template", ["a {{}}.", '{"class": "{}"}', "{} in {}", "{} {", "{x} {}", "} {}", "{0} {}"])
    def test_a_name_replaces_each_pair_of_braces(self, template: str) -> None:
        """Other braces stay as they are, in the template and in the name."""
        seen: list[str] = []
        model = nn.Linear(1, 1)
        model.encode_text = nn.Identity()

        def tokenizer(texts: list[str]) -> Tensor:
            seen.extend(texts)
            return torch.ones(len(texts), 2)

        zero_shot_classifier(model, tokenizer, ["ox", "{gnat}"], template)
        assert seen == ["ox".join(template.split("{}")), "{gnat}".join(template.split("{}"))]

    def test_a_model_without_parameters_runs_where_its_buffers_are(self) -> None:
        """Quantised towers keep their weights elsewhere."""

        class Tower(nn.BatchNorm1d):
            def encode_text(self, tokens: Tensor) -> Tensor:
                return tokens.double()

        for model in (Tower(1, affine=False), Tower(1, affine=False, track_running_stats=False)):
            weight = zero_shot_classifier(model, lambda texts: torch.tensor([[3, 4]] * len(texts)), ["ox"])
            assert_close(weight, torch.tensor([[0.6, 0.8]], dtype=torch.float64))

    @pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
    def test_is_float32_or_better_and_one_text_is_one_template(self, dtype: torch.dtype, expected: torch.dtype) -> None:
        """Several forward passes give the same result as one."""

        class Lengths(nn.Linear):
            def encode_text(self, tokens: Tensor) -> Tensor:
                return tokens.to(dtype)

        def tokenizer(texts: list[str]) -> Tensor:
            return torch.tensor([[60.0, len(text)] for text in texts])

        names = ["x" * (index % 200) for index in range(300)]
        weight = zero_shot_classifier(Lengths(1, 1), tokenizer, names)
        assert weight.dtype == expected
        lengths = 14 + torch.arange(300, dtype=expected) % 200  # "a photo of a ." has 14
        assert_close(weight[:, 1] / weight[:, 0], lengths / 60, rtol=1e-6, atol=0)
