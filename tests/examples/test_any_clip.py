"""``examples/finetune.py`` takes models of other kinds as they are, or says which kind it does not take."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from finetune.models import load_clip
from finetune.pictures import Pictures, read_data
from finetune.training import Training
from PIL import Image
from tiny_folders import CLASSES, Main, options, parse_options, refusal
from torch.nn.functional import normalize
from torch.testing import assert_close
from transformers import (
    AlignConfig,
    AlignModel,
    BertConfig,
    BertModel,
    CLIPModel,
    FlavaConfig,
    FlavaModel,
    PreTrainedModel,
    Siglip2Config,
    Siglip2Model,
)

pytestmark = pytest.mark.filterwarnings("ignore:the data do not determine a temperature")

TINY: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
}
TEXT = {**TINY, "vocab_size": 9, "bos_token_id": 7, "eos_token_id": 8, "max_position_embeddings": 12}
EFFICIENT: dict[str, Any] = {
    "image_size": 16,
    "hidden_dim": 8,
    "in_channels": [8],
    "out_channels": [8],
    "kernel_sizes": [3],
    "strides": [1],
    "expand_ratios": [1],
    "num_block_repeats": [1],
    "depthwise_padding": [],
}


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny, with statistics as of training."""
    folder = tmp_path_factory.mktemp("resnet")
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "patch_size": None}
    text = {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    model = open_clip.CLIP(**config).train()
    for _ in range(30):
        model.encode_image(torch.randn(8, 3, 64, 64))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


class TestRunningStatistics:
    """A ResNet of open_clip comes in train mode, and no picture but the user's may enter its statistics."""

    @pytest.mark.parametrize("method", ["zs", "wise-ft", "carot"])
    def test_stay_as_they_were(self, method: str, resnet: Path, made: Path, tmp_path: Path, main: Main) -> None:
        """In every row, so that averages of weights fit them."""
        main(options(made, tmp_path, "--model", f"local-dir:{resnet}", method=method))
        before = torch.load(resnet / "open_clip_pytorch_model.bin", weights_only=True)
        after = torch.load(tmp_path / method / "weights.pt", weights_only=True)["state_dict"]
        names = [name for name in before if "running" in name or "num_batches" in name]
        assert len(names) > 20
        for name in names:
            assert torch.equal(after[name], before[name]), name

    def test_zero_shot_logits_are_those_of_the_model_in_eval_mode(
        self, resnet: Path, made: Path, tmp_path: Path, main: Main
    ) -> None:
        """From open_clip alone."""
        main(options(made, tmp_path, "--model", f"local-dir:{resnet}", method="zs"))
        logits, _ = torch.load(tmp_path / "zs" / "logits.pt", weights_only=True)["sets"]["ID"]
        model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{resnet}")
        tokens = open_clip.get_tokenizer(f"local-dir:{resnet}")(
            [f"a photo of a {name}." for name in ("blue ish thing", "green thing", "red thing")]
        )
        paths = [path for folder in sorted(CLASSES) for path in sorted((made / "test" / folder).iterdir())]
        with torch.no_grad():
            texts = normalize(model.eval().encode_text(tokens), dim=1)
            images = normalize(model.encode_image(torch.stack([preprocess(Image.open(path)) for path in paths])), dim=1)
        assert_close(logits, model.logit_scale.exp() * images @ texts.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("template", ["a {{}}.", '{"class": "{}"}', "{} in {}", "{} {"])
def test_a_class_name_replaces_each_pair_of_braces_and_no_other(template: str, made: Path, tmp_path: Path) -> None:
    """In the captions of training, as in those of the classifier."""
    read = parse_options(options(made, tmp_path, "--template", template))
    run = Training(read, "flyp", load_clip(read, torch.device("cpu")), read_data(read), 0, 1)
    expected = [name.join(template.split("{}")) for name in ("blue ish thing", "green thing", "red thing")]
    assert torch.equal(run.tokens["text"], run.clip.tokenizer(expected))


@pytest.mark.parametrize("model", ["hf:{made}/tiny-hf", "hf:{made}/tiny-siglip", "local-dir:{made}/tiny-clip"])
def test_transforms_go_to_processes_that_are_spawned(model: str, made: Path, tmp_path: Path) -> None:
    """As on macOS and Windows: all that reads pictures can be pickled."""
    clip = load_clip(parse_options(options(made, tmp_path, "--model", model.format(made=made))), torch.device("cpu"))
    samples = [(str(made / "train" / "red thing" / "0.png"), 2)]
    for transform in (clip.preprocess, clip.augment):
        pictures = Pictures(samples, transform, templates=3)
        assert_close(pickle.loads(pickle.dumps(pictures))[0, 0], pictures[0, 0])


@pytest.mark.parametrize("method", ["zs", "carot"])
def test_weights_that_were_saved_in_half_precision_are_trained_in_float32(
    method: str, made: Path, tmp_path: Path, main: Main
) -> None:
    """Transformers loads a model in the dtype of its file."""
    shutil.copytree(made / "tiny-hf", tmp_path / "half")
    CLIPModel.from_pretrained(made / "tiny-hf", dtype=torch.float16).save_pretrained(tmp_path / "half")
    main(options(made, tmp_path, "--model", f"hf:{tmp_path / 'half'}", method=method))
    weights = torch.load(tmp_path / method / "weights.pt", weights_only=True)["state_dict"]
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize(
    ("model", "missing"),
    [
        (Siglip2Model(Siglip2Config(text_config=TEXT, vision_config={**TINY, "num_patches": 4, "patch_size": 8})),
         "Siglip2Model has no config.vision_config.image_size"),
        (AlignModel(AlignConfig(text_config=TEXT, vision_config=EFFICIENT, projection_dim=8)),
         "AlignModel has no logit_scale"),
        (BertModel(BertConfig(**TEXT)), "BertModel has no get_image_features"),
        (FlavaModel(FlavaConfig(text_config=TINY, image_config=TINY, multimodal_config=TINY)),
         "FlavaModel has no config.vision_config.image_size"),
    ],
    ids=["NaFlex", "ALIGN", "BERT", "FLAVA"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["zs", "carot"])
def test_models_of_other_kinds_are_refused_by_name(
    model: PreTrainedModel, missing: str, method: str, made: Path, tmp_path: Path, main: Main
) -> None:
    """Of no fixed size, with a divisor for a scale, or with one tower."""
    shutil.copytree(made / "tiny-hf", tmp_path / "other")
    model.save_pretrained(tmp_path / "other")
    name = f"hf:{tmp_path / 'other'}"
    said = refusal(main, options(made, tmp_path / "out", "--model", name, method=method))
    assert f"--model {name}: {missing}; choose a CLIP, a SigLIP, or another model with two towers" in said
