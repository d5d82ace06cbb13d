"""Three classes of made-up pictures and models of a few weights: ``examples/finetune.py`` in a second."""

from __future__ import annotations

import argparse
import json
import random
import runpy
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

Main = Callable[[list[str]], None]

SCRIPT = Path(__file__).parents[1] / "examples" / "finetune.py"
CLASSES = {"blue-ish thing": 2, "green_thing": 1, "red thing": 0}
COLOURS = ((200, 40, 40), (40, 200, 40), (40, 40, 200))
CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}


def draw(root: Path, folders: dict[str, int], count: int) -> None:
    """Pictures of one colour and some noise, ``count`` of them in each folder."""
    noise = random.Random(root.name)
    for folder, colour in folders.items():
        (root / folder).mkdir(parents=True)
        for index in range(count):
            low = Image.new("RGB", (5, 4))
            low.putdata([tuple(c + noise.randrange(-40, 56) for c in COLOURS[colour]) for _ in range(20)])
            low.resize((20, 18)).save(root / folder / f"{index}.png")


def make_open_clip(folder: Path) -> None:
    """A tiny CLIP with random weights, as ``local-dir:`` takes it."""
    folder.mkdir()
    torch.manual_seed(0)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}))
    torch.save(open_clip.CLIP(**CONFIG).state_dict(), folder / "open_clip_pytorch_model.bin")


def make_transformers(clip: Path, siglip: Path) -> None:
    """Tiny models with random weights, their tokenizer and image processors, as ``from_pretrained`` takes them."""
    torch.manual_seed(0)
    vocabulary = {"<pad>": 0, "<unk>": 1, "a": 2, "photo": 3, "of": 4, "thing": 5, "red": 6, "blue": 7, "<end>": 8}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 8)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")  # type: ignore[no-untyped-call]
    for folder in (clip, siglip):
        fast.save_pretrained(folder)
    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {**tiny, "vocab_size": 9, "bos_token_id": 7, "eos_token_id": 8, "max_position_embeddings": 12}
    vision = {**tiny, "image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(clip)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(clip)
    SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(siglip)
    SiglipImageProcessor(size={"height": 16, "width": 16}).save_pretrained(siglip)


def make_folders(root: Path) -> None:
    """Three classes: train, test, validation, shifts of some classes or with names of their own, and the models."""
    draw(root / "train", CLASSES, 7)
    draw(root / "test", CLASSES, 3)
    draw(root / "val", CLASSES, 2)
    draw(root / "subset", {"red thing": 0, "blue-ish thing": 2}, 2)
    draw(root / "renamed", {"warm": 0, "cold": 2, "no class": 1}, 2)
    (root / "renamed.txt").write_text("cold\tblue-ish thing\tgreen_thing\nwarm\tred thing\n")
    make_open_clip(root / "tiny-clip")
    make_transformers(root / "tiny-hf", root / "tiny-siglip")


def options(made: Path, out: Path, *more: str, method: str = "carot") -> list[str]:
    """Two steps of eight pictures, on the CPU, in float32."""
    return [
        *("--method", method, "--model", f"local-dir:{made / 'tiny-clip'}"),
        *("--train", str(made / "train"), "--test", str(made / "test"), "--out", str(out)),
        *("--device", "cpu", "--precision", "fp32", "--workers", "0", "--epochs", "1", "--batch-size", "8"),
        *("--learning-rate", "0.01"),
        *more,
    ]


def main_of_the_script() -> Main:
    """What reads the command line."""
    found: Main = runpy.run_path(str(SCRIPT))["main"]
    return found


def parse_options(arguments: list[str]) -> argparse.Namespace:
    """The command line, read."""
    read: argparse.Namespace = runpy.run_path(str(SCRIPT))["parse"](arguments)
    return read


def refusal(main: Main, arguments: list[str]) -> str:
    """What it says when it stops."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return str(stopped.value)
