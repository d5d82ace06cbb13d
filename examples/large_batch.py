"""The loss of 4,096 pairs in the memory of 256: ``python examples/large_batch.py`` (CPU, seconds, made-up data).

Encode chunk by chunk without gradient, evaluate the loss once on all features, and carry its gradient in each feature
back through a second pass over its chunk. The result is the gradient of the big batch, not an accumulation of small
ones. Works for every model whose rows do not see each other, so without BatchNorm.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import calrobust as cr

PAIRS, CHUNK = 4096, 256


def encode(model: nn.Module, pairs: tuple[Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor]:
    """Features of one chunk; the seed makes dropout fall alike in both passes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        image_features, text_features, _ = model(*pairs)
    return image_features, text_features


def backward_in_chunks(
    criterion: cr.losses.PairLoss, model: nn.Module, teacher: nn.Module, images: Tensor, texts: Tensor, chunk: int
) -> Tensor:
    """``criterion(*model(images, texts), *teacher(images, texts)).backward()``, with the memory of one chunk."""
    chunks = list(zip(images.split(chunk), texts.split(chunk), strict=True))
    seeds = torch.randint(2**62, (len(chunks),)).tolist()
    with torch.no_grad():
        features = [encode(model, pairs, seed) for pairs, seed in zip(chunks, seeds, strict=True)]
        distilled = [teacher(*pairs) for pairs in chunks]
    image_features, text_features = (torch.cat(side).requires_grad_() for side in zip(*features, strict=True))
    teacher_images, teacher_texts, teacher_scales = zip(*distilled, strict=True)

    logit_scale = model.log_scale.exp()
    frozen = (torch.cat(teacher_images), torch.cat(teacher_texts), teacher_scales[0])
    loss = criterion(image_features, text_features, logit_scale, *frozen)
    loss.backward()  # reaches the features and the logit scale

    gradients = zip(image_features.grad.split(chunk), text_features.grad.split(chunk), strict=True)
    for pairs, seed, gradient in zip(chunks, seeds, gradients, strict=True):
        torch.autograd.backward(encode(model, pairs, seed), gradient)
    return loss.detach()


class TwoTowers(nn.Module):
    """Stands in for CLIP; deep enough that what it keeps for backward is what memory goes to."""

    def __init__(self) -> None:
        """Two perceptrons with dropout."""
        super().__init__()
        self.visual, self.textual = (
            nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.1)) for _ in range(24)])
            for _ in range(2)
        )
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit-norm features and logit scale of a batch of pairs."""
        return normalize(self.visual(images), dim=1), normalize(self.textual(texts), dim=1), self.log_scale.exp()


class HeldForBackward(torch.autograd.graph.saved_tensors_hooks):
    """Measures the most bytes that autograd held for backward at any one time."""

    def __init__(self) -> None:
        """Counts a storage once, from when it is saved to when the graph lets go of it."""
        self.peak = self.now = 0
        self.holders: dict[int, int] = {}
        super().__init__(self.pack, lambda packed: packed[0])

    def pack(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """Called for each tensor saved."""
        key, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        self.now += 0 if self.holders.get(key) else size
        self.holders[key] = self.holders.get(key, 0) + 1
        self.peak = max(self.peak, self.now)
        token = HeldForBackward.Token()
        weakref.finalize(token, self.release, key, size)
        return tensor, token

    def release(self, key: int, size: int) -> None:
        """Called when the graph drops it."""
        self.holders[key] -= 1
        self.now -= 0 if self.holders[key] else size

    class Token:
        """Dies with the graph."""


def main() -> None:
    """One step of 4,096 pairs, whole and in chunks, beside one of 256."""
    torch.manual_seed(0)
    model, images, texts = TwoTowers(), torch.randn(PAIRS, 64), torch.randn(PAIRS, 64)
    teacher = cr.EMATeacher(model)
    criterion = cr.CaRotLoss(label_smoothing=0.1, distillation_weight=1.5, impl="tiled")
    for name, pairs, chunk in (("one batch", 256, 256), ("one batch", PAIRS, PAIRS), ("in chunks", PAIRS, CHUNK)):
        with HeldForBackward() as held:
            loss = backward_in_chunks(criterion, model, teacher, images[:pairs], texts[:pairs], chunk)
        print(f"{pairs:5} pairs {name}: loss {loss:.4f}, {held.peak / 2**20:6.1f} MiB held for backward")


if __name__ == "__main__":
    main()
