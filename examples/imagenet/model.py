"""The model, from open_clip, and the classifier that its text tower makes."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import partial

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagenet.data import Classes
from imagenet.errors import RunError
from imagenet.options import Options
from imagenet.pictures import Tokenizer, Transform


class Classifier(nn.Module):
    """An image tower and a linear head on its unit-norm features: the form in which every row is tested."""

    def __init__(self, visual: nn.Module, weight: Tensor) -> None:
        super().__init__()
        self.visual = visual
        self.weight = nn.Parameter(weight)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, C]``, in float32."""
        features = F.normalize(self.visual(images).float(), dim=-1)
        with torch.autocast(images.device.type, enabled=False):
            return features @ self.weight.T


@dataclass(frozen=True)
class Model:
    """What open_clip gave."""

    clip: nn.Module
    tokenizer: Tokenizer
    classes: Classes
    augment: Transform
    preprocess: Transform

    def classifier(self, clip: nn.Module) -> Classifier:
        """Each class is the mean of its captions in all templates, times the logit scale; towers are copied."""
        was_training, device = clip.training, next(clip.parameters()).device
        clip.eval()
        weight = open_clip.build_zero_shot_classifier(
            clip, self.tokenizer, self.classes.names, open_clip.OPENAI_IMAGENET_TEMPLATES, device=device
        ).T
        clip.train(was_training)
        scale = clip.logit_scale.detach().exp()
        return Classifier(copy.deepcopy(clip.visual), (scale * weight).detach().clone()).eval()


def build_model(options: Options, classes: Classes, device: torch.device) -> Model:
    """Asks open_clip for the model, its transforms and its tokenizer."""
    if options.model_config is not None:
        _check_config(options)
        open_clip.add_model_config(options.model_config)
    try:
        clip, augment, preprocess = open_clip.create_model_and_transforms(
            options.model, pretrained=options.pretrained, device=device, output_dict=False
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise RunError(f"open_clip does not give {options.model}, pretrained {options.pretrained}: {error}") from error
    if not all(hasattr(clip, name) for name in ("visual", "encode_text", "logit_scale")):
        raise RunError(f"--model {options.model} is no CLIP: it lacks visual, encode_text or logit_scale")
    if isinstance(bias := getattr(clip, "logit_bias", None), nn.Parameter):
        bias.requires_grad_(False)  # of SigLIP's loss; softmax losses do not see it
    return Model(clip, partial(_tokens, open_clip.get_tokenizer(options.model)), classes, augment, preprocess)


def projection(clip: nn.Module) -> Tensor | nn.Linear:
    """The visual projection, which orthogonality is asked of."""
    for path in ("visual.proj", "visual.attnpool.c_proj", "visual.head.proj"):
        found: object = clip
        for name in path.split("."):
            found = getattr(found, name, None)
        if isinstance(found, (Tensor, nn.Linear)):
            return found
    raise RunError("this model has no linear visual projection that --orthogonality could act on; pass 0")


def _check_config(options: Options) -> None:
    try:
        json.loads(options.model_config.read_text()) if options.model_config else None
    except (OSError, ValueError) as error:
        raise RunError(f"--model-config: {options.model_config} cannot be read: {error}") from None


def _tokens(tokenizer: Tokenizer, captions: list[str]) -> Tensor:
    return tokenizer(captions)
