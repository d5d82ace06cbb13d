"""Three classes of made-up pictures and a model of a few thousand weights: ``examples/imagenet.py`` in a second."""

from __future__ import annotations

import json
import random
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

Main = Callable[[list[str]], None]

SCRIPT = Path(__file__).parents[1] / "examples" / "imagenet.py"
CHECKPOINT = "checkpoint.pt"  # in --out
SYNSETS = {"n01": "red thing", "n02": "green thing", "n03": "blue thing"}
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
            picture = Image.new("RGB", (20, 18))
            shift = noise.randrange(-40, 40)
            picture.putdata([tuple(c + shift + noise.randrange(16) for c in COLOURS[colour]) for _ in range(20 * 18)])
            picture.save(root / folder / f"{index}.png")


def make_pictures(root: Path) -> None:
    """Three classes: train, val, shifts whose folders are synsets, indices or names of their own, and a tiny model."""
    own = {synset: index for index, synset in enumerate(SYNSETS)}
    draw(root / "train", own, 7)
    draw(root / "val", own, 3)
    draw(root / "subset", {"n03": 2, "n01": 0}, 2)
    draw(root / "numbered", {"0": 0, "1": 1, "2": 2}, 2)
    draw(root / "renamed", {"warm": 0, "cold": 2, "no class": 1}, 2)
    (root / "renamed.txt").write_text("cold\tn02\tn03\nwarm\tn01\n")
    (root / "classes.txt").write_text("".join(f"{synset} {name}, other name\n" for synset, name in SYNSETS.items()))
    (root / "tiny-clip.json").write_text(json.dumps(CONFIG))


def options(made: Path, out: Path, *more: str, method: str = "carot") -> list[str]:
    """Two steps of eight pictures, on the CPU, in float32."""
    return [
        *("--method", method, "--model", "tiny-clip", "--model-config", str(made / "tiny-clip.json")),
        *("--train", str(made / "train"), "--val", str(made / "val"), "--classes", str(made / "classes.txt")),
        *("--out", str(out), "--device", "cpu", "--precision", "fp32", "--workers", "0", "--held-out", "0.2"),
        *("--epochs", "1", "--batch-size", "8", "--warm-up", "1", "--log-every", "1", "--teacher-every", "1"),
        *("--learning-rate", "0.01"),
        *more,
    ]


def main_of_the_script() -> Main:
    """What reads the command line."""
    found: Main = runpy.run_path(str(SCRIPT))["main"]
    return found


def refusal(main: Callable[[list[str]], None], arguments: list[str]) -> str:
    """What it says when it stops."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return str(stopped.value)
