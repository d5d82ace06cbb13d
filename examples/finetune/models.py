"""A CLIP of open_clip or of Transformers, and the classifier that its text tower makes."""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import Compose, RandomResizedCrop

import calrobust
from finetune import RunError

PROJECTIONS = {  # into the space of features
    "visual": ("visual.proj", "visual.attnpool.c_proj", "visual.head.proj", "visual_projection"),
    "text": ("text_projection", "text.text_projection", "text.proj"),
}
NEEDED = (  # of a model of Transformers
    "get_image_features",
    "get_text_features",
    "logit_scale",
    "config.text_config.max_position_embeddings",
    "config.vision_config.image_size",
)


class Clip(NamedTuple):
    """A network, its tokenizer, and its transforms of pictures for training and for tests."""

    network: Any
    tokenizer: Any
    augment: Callable[[Image.Image], Tensor]
    preprocess: Callable[[Image.Image], Tensor]

    def tokens(self, texts: list[str]) -> dict[str, Tensor]:
        """What the network takes beside pictures; Transformers' are all of one length, as SigLIP was trained."""
        if hasattr(self.network, "encode_text"):
            return {"text": self.tokenizer(texts)}
        return dict(self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt"))

    def features(self, network: nn.Module, images: Tensor, tokens: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """What a loss on pairs takes, from the network or a copy of it."""
        if hasattr(self.network, "encode_text"):
            output = network(images, **tokens)
            return output["image_features"], output["text_features"], output["logit_scale"].reshape(())
        from calrobust.integrations.transformers import clip_features

        image_features, text_features, scale = clip_features(network(pixel_values=images, **tokens), network)[:3]
        return image_features, text_features, scale

    def projection(self, tower: str = "visual") -> Tensor:
        """The matrix ``[in, out]`` that leads from a tower to the features."""
        for path in PROJECTIONS[tower]:
            found = _at(self.network, path)
            if isinstance(found, (Tensor, nn.Linear)):
                return found if isinstance(found, Tensor) else found.weight.T
        raise RunError(f"this model has no linear {tower} projection that carot-neurips could act on; choose carot")


class Classifier(nn.Module):
    """The image tower and a linear head on its unit-norm features: the form in which every row is judged."""

    def __init__(self, clip: Clip, names: list[str], templates: list[Any], *, bias: bool = False) -> None:
        super().__init__()
        self.network = clip.network
        weight = calrobust.zero_shot_classifier(clip.network, clip.tokenizer, names, templates)
        self.head = nn.Parameter(clip.network.logit_scale.detach().exp().float() * weight)
        self.bias = nn.Parameter(torch.zeros(len(names), device=self.head.device)) if bias else None

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, C]``, in float32."""
        network: Any = self.network
        if hasattr(network, "encode_image"):
            features = network.encode_image(images)
        else:
            features = network.get_image_features(pixel_values=images).pooler_output
        with torch.autocast(images.device.type, enabled=False):
            return F.linear(F.normalize(features.float(), dim=-1), self.head, self.bias)


def local_weights(options: argparse.Namespace) -> dict[str, str]:
    """A digest of the files that ``--model`` and ``--pretrained`` name, since other weights may come to their paths."""
    folder, digest = Path(options.model.partition(":")[2]), hashlib.sha256()
    files = sorted(folder.rglob("*")) if folder.name else [Path(options.pretrained or "")]
    files = [path for path in files if path.is_file()]
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return {"weights": digest.hexdigest()} if files else {}


def load_clip(options: argparse.Namespace, device: torch.device) -> Clip:
    """What ``--model`` and ``--pretrained`` name."""
    if options.pretrained and ":" in options.model:
        raise RunError(f"--model {options.model} brings its own weights; leave out --pretrained")
    try:
        if options.model.startswith("hf:"):
            clip = _from_transformers(options.model.removeprefix("hf:"))
        else:
            clip = _from_open_clip(options.model, options.pretrained)
    except (ImportError, RuntimeError, OSError, ValueError) as error:
        raise RunError(f"--model {options.model}, --pretrained {options.pretrained}: {error}") from error
    if options.recompute:  # open_clip's, Transformers' today, and as it was called before
        names = ("set_grad_checkpointing", "activation_checkpointing_enable", "gradient_checkpointing_enable")
        next(getattr(clip.network, name) for name in names if hasattr(clip.network, name))()
    clip.network.to(device, torch.float32)  # Transformers' come in the precision of their file
    clip.network.eval()  # open_clip's come in train mode, in which a picture changes the statistics of BatchNorm
    return clip


def _from_open_clip(name: str, pretrained: str | None) -> Clip:
    weights, model = open_clip.get_pretrained_cfg(name, pretrained or ""), open_clip.get_model_config(name)
    if weights and model and bool(weights.get("quick_gelu")) != bool(model.get("quick_gelu")):
        # open_clip itself only warns, and gives a model that answers, but worse.
        quick = f"{name}-quickgelu"
        hint = f"pass --model {quick}" if open_clip.get_model_config(quick) else "choose other weights"
        raise RunError(f"--model {name} has GELU, but {pretrained} are weights of a model with QuickGELU; {hint}")
    network, augment, preprocess = open_clip.create_model_and_transforms(name, pretrained, output_dict=True)
    return Clip(network, open_clip.get_tokenizer(name), augment, preprocess)


def _from_transformers(name: str) -> Clip:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or it warns of the processes that read pictures
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    network = AutoModel.from_pretrained(name)
    if missing := [path for path in NEEDED if _at(network, path) is None]:
        hint = "choose a CLIP, a SigLIP, or another model with two towers and pictures of one size"
        raise RunError(f"--model hf:{name}: {type(network).__name__} has no {missing[0]}; {hint}")
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.model_max_length = min(tokenizer.model_max_length, network.config.text_config.max_position_embeddings)
    processor: Any = AutoImageProcessor.from_pretrained(name)  # type: ignore[no-untyped-call]

    preprocess = partial(_pixels, processor)
    crop = RandomResizedCrop(network.config.vision_config.image_size, scale=(0.9, 1.0))  # as open_clip's
    return Clip(network, tokenizer, Compose([crop, preprocess]), preprocess)


def _pixels(processor: Any, picture: Image.Image) -> Tensor:
    image: Tensor = processor(picture, return_tensors="pt")["pixel_values"][0]
    return image


def _at(found: Any, path: str) -> Any:
    for name in path.split("."):
        found = getattr(found, name, None)
    return found
