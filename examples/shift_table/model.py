"""The model: a CLIP small enough to train on a CPU in a minute, and its image tower with a ten-way head on top."""

from __future__ import annotations

import copy

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shift_table.data import CONTEXT_LENGTH, class_captions
from shift_table.drawing import PICTURE_SIZE


def new_clip(seed: int) -> open_clip.CLIP:
    """An untrained CLIP: a ResNet of 1.3 M parameters and a two-layer text tower around open_clip's vocabulary."""
    torch.manual_seed(seed)
    clip = open_clip.CLIP(
        embed_dim=64,
        vision_cfg={"layers": (1, 1, 1, 1), "width": 16, "head_width": 16, "image_size": PICTURE_SIZE},
        text_cfg={"context_length": CONTEXT_LENGTH, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
    )
    return clip.to(memory_format=torch.channels_last)  # a CPU's convolutions are a quarter faster in this layout


class DigitClassifier(nn.Module):
    """An image tower and a linear head on its unit-norm features: the form in which every row is tested."""

    def __init__(self, visual: nn.Module, weight: Tensor) -> None:
        super().__init__()
        self.visual = visual
        self.weight = nn.Parameter(weight)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, 10]`` of pictures ``[N, 3, 32, 32]``."""
        return self.features(images) @ self.weight.T

    def features(self, images: Tensor) -> Tensor:
        """Unit-norm features ``[N, 64]``."""
        return F.normalize(self.visual(images), dim=-1)


@torch.no_grad()
def zero_shot_classifier(clip: open_clip.CLIP) -> DigitClassifier:
    """The classifier that CLIP's text tower makes: a class is the mean of its four captions, times the logit scale."""
    captions = class_captions().to(clip.logit_scale.device)
    features = clip.encode_text(captions.flatten(0, 1), normalize=True).unflatten(0, captions.shape[:2])
    weight = clip.logit_scale.exp() * F.normalize(features.mean(dim=1), dim=-1)
    return DigitClassifier(copy.deepcopy(clip.visual), weight).eval()
