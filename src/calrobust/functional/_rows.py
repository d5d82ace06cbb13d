"""One walk over the rows of a score matrix: the only place where the metrics take a softmax."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from calrobust._checks import (
    check_flag,
    check_float64,
    check_ignore_index,
    check_kind,
    check_label_values,
    check_predictions,
)

# On a CPU a block and its softmax stay in cache from one pass to the next; a GPU needs enough rows to be busy.
CPU_BLOCK_BYTES = 2**20  # for each thread
GPU_BLOCK_BYTES = 2**26


class Block(NamedTuple):
    """Some rows, at least in float32, to be read before the next block is taken."""

    target: Tensor  # [n], as are the last three
    scores: Tensor  # [n, C] logits or probabilities
    from_logits: bool
    probs: Tensor  # [n, C]
    own: Tensor  # the label's probability
    confidences: Tensor
    correct: Tensor


def as_rows(target: Tensor, **preds: Tensor) -> tuple[Tensor, Tensor]:
    """Checks ``preds`` ``[N, C, ...]`` and ``target`` ``[N, ...]``; returns them as ``[M, C]`` and ``[M]``."""
    check_predictions(target, **preds)
    check_float64(**preds)
    (scores,) = preds.values()
    return scores.detach().movedim(1, -1).flatten(0, -2), target.flatten()


def block_rows(scores: Tensor, dtype: torch.dtype) -> int:
    """How many rows of ``scores`` make a block when held in ``dtype``."""
    if torch.compiler.is_compiling():  # the compiler fuses the passes itself
        return max(1, len(scores))
    size = GPU_BLOCK_BYTES if scores.is_cuda else CPU_BLOCK_BYTES * torch.get_num_threads()
    return max(1, size // (scores.shape[1] * dtype.itemsize))


def probability_blocks(
    preds: Tensor, target: Tensor, from_logits: bool, ignore_index: int | None, validate: bool | None = None
) -> Iterator[Block]:
    """Yields the rows of ``preds`` that are not labelled ``ignore_index``: at least one block, maybe an empty one.

    ``validate`` says whether values are checked; None checks them on a CPU, where this does not wait for a device.
    Labels are always checked on a CPU, where a wrong one would be an error of indexing.
    """
    check_flag(from_logits=from_logits)
    check_ignore_index(ignore_index)
    preds, target = as_rows(target, preds=preds)
    on_cpu = preds.device.type == "cpu" and not torch.compiler.is_compiling()
    if validate or on_cpu:
        check_label_values(target, preds.shape[1], ignore_index)
    if on_cpu if validate is None else validate:
        kept = slice(None) if ignore_index is None else target != ignore_index
        check_kind(from_logits=from_logits, preds=preds[kept])
    dtype = torch.promote_types(preds.dtype, torch.float32)
    step = block_rows(preds, dtype)
    buffer = preds.new_empty(min(step, len(preds)) if from_logits else 0, preds.shape[1], dtype=dtype)
    for start in range(0, max(1, len(preds)), step):
        scores, labels = preds[start : start + step], target[start : start + step]
        if ignore_index is not None:
            keep = labels != ignore_index
            scores, labels = scores[keep], labels[keep]
        scores = scores.to(dtype)
        probs = torch.softmax(scores, 1, out=buffer[: len(scores)]) if from_logits else scores
        own, confidences = probs.gather(1, labels[:, None])[:, 0], probs.amax(1)
        correct = _is_predicted(scores, labels, own, confidences)
        yield Block(labels, scores, from_logits, probs, own, confidences, correct)


def _is_predicted(scores: Tensor, labels: Tensor, own: Tensor, confidences: Tensor) -> Tensor:
    """Whether ``argmax`` of the scores gives the label; of equal scores the first one counts."""
    if scores.is_cuda or torch.compiler.is_compiling():
        return scores.argmax(1) == labels
    # On a CPU argmax takes longer than the softmax. Two classes can only both round to the highest probability where it
    # is at most 1/2; these rows alone are searched. 0.999, as exp need not be monotone to the last digit.
    correct = own == confidences
    maybe_tied = ((confidences < 0.501) & (own >= 0.999 * confidences)).nonzero()[:, 0]
    if len(maybe_tied):
        correct[maybe_tied] = scores[maybe_tied].argmax(1) == labels[maybe_tied]
    return correct
