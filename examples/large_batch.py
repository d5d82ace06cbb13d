"""The loss of 4,096 pairs in the memory of 256: ``python examples/large_batch.py`` (CPU, seconds, made-up data).

Encode chunk by chunk without gradient, evaluate the loss once on all features, and carry its gradient in each feature
back through a second pass over its chunk. The result is the gradient of the big batch, not an accumulation of small
ones. Works for every model whose rows do not see each other, so without BatchNorm; and under DistributedDataParallel,
where losses with ``gather=True`` see the features of all ranks.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

import calrobust as cr

PAIRS, CHUNK = 4096, 256


class TwoTowers(nn.Module):
    """Stands in for CLIP; deep enough that most memory goes to what it keeps for backward."""

    def __init__(self, dropout: float = 0.0) -> None:
        """Two perceptrons."""
        super().__init__()
        self.visual, self.textual = (
            nn.Sequential(
                nn.Linear(64, 128),
                *[nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.Dropout(dropout)) for _ in range(12)],
                nn.Linear(128, 32),
            )
            for _ in range(2)
        )
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit-norm features and logit scale of a batch of pairs."""
        return normalize(self.visual(images), dim=1), normalize(self.textual(texts), dim=1), self.log_scale.exp()


def encode(model: nn.Module, pairs: tuple[Tensor, Tensor], seed: int) -> tuple[Any, ...]:
    """What the model returns for one chunk; with the same seed, dropout is the same in both passes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return tuple(model(*pairs))


def joined(chunks: list[tuple[Any, ...]]) -> list[Any]:
    """Features of all chunks, and the logit scale (and bias, if any), which all chunks share."""
    image_features, text_features, *shared = zip(*chunks, strict=True)
    return [torch.cat(image_features), torch.cat(text_features), *(values[0] for values in shared)]


def backward_in_chunks(
    criterion: cr.losses.PairLoss, model: nn.Module, teacher: cr.EMATeacher, images: Tensor, texts: Tensor, chunk: int
) -> Tensor:
    """``criterion(*model(images, texts), *teacher(images, texts)).backward()``, with the memory of one chunk."""
    chunks = list(zip(images.split(chunk), texts.split(chunk), strict=True))
    wrapped: Any = getattr(model, "_orig_mod", model)  # of a compiled one
    across_ranks = isinstance(wrapped, DistributedDataParallel)
    if across_ranks and wrapped.static_graph and len(chunks) > 1:
        raise ValueError(
            "model's DistributedDataParallel must have static_graph=False, to skip its averaging in a chunk"
        )
    seeds = torch.randint(2**62, (len(chunks),)).tolist()
    with torch.no_grad():
        student = joined([encode(model, pairs, seed) for pairs, seed in zip(chunks, seeds, strict=True)])
        distilled = joined([teacher(*pairs) for pairs in chunks])
    student = [output.detach().requires_grad_() if isinstance(output, Tensor) else output for output in student]
    loss: Tensor = criterion(*student, *distilled)
    loss.backward()  # reaches what the model returned, and stops there

    by_output: list[Any] = [getattr(output, "grad", None) for output in student]  # a scale may be a number
    image_gradients, text_gradients, *shared = by_output
    gradients = zip(image_gradients.split(chunk), text_gradients.split(chunk), strict=True)
    for i, (pairs, seed, gradient) in enumerate(zip(chunks, seeds, gradients, strict=True), start=1):
        last = i == len(chunks)
        # The gradients of all chunks add up; DistributedDataParallel averages them over ranks in the last one alone.
        with wrapped.no_sync() if across_ranks and not last else nullcontext():
            outputs = zip(encode(model, pairs, seed), (*gradient, *(shared if last else ())), strict=False)
            trained = [(output, given) for output, given in outputs if given is not None and output.requires_grad]
            torch.autograd.backward([output for output, _ in trained], [given for _, given in trained])
    return loss.detach()


def gradients(model: nn.Module) -> Tensor:
    """All gradients in one vector."""
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def main() -> None:
    """One step of 4,096 pairs in chunks, and as one batch to compare with."""
    torch.manual_seed(0)
    model, images, texts = TwoTowers(), torch.randn(PAIRS, 64), torch.randn(PAIRS, 64)
    teacher = cr.EMATeacher(model)
    criterion = cr.CaRotLoss(label_smoothing=0.1, distillation_weight=1.5, memory_budget=16 * 2**20)

    loss = backward_in_chunks(criterion, model, teacher, images, texts, CHUNK)
    in_chunks = gradients(model)
    model.zero_grad()
    criterion(*model(images, texts), *teacher(images, texts)).backward()
    whole = gradients(model)
    difference = ((in_chunks - whole).norm() / whole.norm()).item()
    print(f"loss {loss:.4f}; chunks of {CHUNK} give the gradients of all {PAIRS} pairs up to {difference:.0e}")


if __name__ == "__main__":
    main()
