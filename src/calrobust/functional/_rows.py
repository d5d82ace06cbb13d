"""One walk over the rows of a score matrix: the only place where the metrics take a softmax."""

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


def as_rows(target: Tensor, ignore_index: int | None = None, **preds: Tensor) -> tuple[Tensor, Tensor]:
    """Checks scores ``[N, C, ...]`` and labels; gives the samples to keep as rows ``[M, C]`` and labels ``[M]``."""
    check_predictions(target, **preds)
    check_float64(**preds)
    check_ignore_index(ignore_index)
    (scores,) = preds.values()
    scores, target = scores.detach().movedim(1, -1).flatten(0, -2), target.flatten()
    if ignore_index is None:
        return scores, target
    kept = target != ignore_index
    return scores[kept], target[kept]


def can_read_values(tensor: Tensor) -> bool:
    """Whether reading values waits for no device and breaks no graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def block_rows(scores: Tensor, dtype: torch.dtype) -> int:
    """How many rows of ``scores`` make a block when held in ``dtype``."""
    rows = len(scores)
    if not torch.compiler.is_compiling():  # the compiler fuses the passes itself
        size = GPU_BLOCK_BYTES if scores.is_cuda else CPU_BLOCK_BYTES * torch.get_num_threads()
        rows = min(rows, size // (scores.shape[1] * dtype.itemsize))
    return max(1, rows)


def probability_blocks(
    preds: Tensor, target: Tensor, from_logits: bool, validate: bool | None = None
) -> Iterator[Block]:
    """Yields rows that :func:`as_rows` has checked: at least one block, maybe an empty one.

    ``validate`` says whether values are checked; None checks them where that is free. There, labels are always checked,
    because a wrong one would be an error of indexing.
    """
    check_flag(from_logits=from_logits)
    free = can_read_values(preds)
    validate = free if validate is None else validate
    if validate or free:
        check_label_values(target, preds.shape[1])
    if validate:
        check_kind(from_logits=from_logits, preds=preds)
    dtype = torch.promote_types(preds.dtype, torch.float32)
    step = block_rows(preds, dtype)
    buffer = preds.new_empty(step if from_logits else 0, preds.shape[1], dtype=dtype)
    for some, labels in zip(preds.split(step), target.split(step), strict=True):
        scores = some.to(dtype)
        probs = torch.softmax(scores, 1, out=buffer[: len(scores)]) if from_logits else scores
        own, confidences = probs.gather(1, labels[:, None])[:, 0], probs.amax(1)
        correct = _is_predicted(scores, labels, own, confidences)
        yield Block(labels, scores, from_logits, probs, own, confidences, correct)


def _is_predicted(scores: Tensor, labels: Tensor, own: Tensor, confidences: Tensor) -> Tensor:
    """Whether ``argmax`` of the scores gives the label; of equal scores the first one counts."""
    if not can_read_values(scores):
        return scores.argmax(1) == labels
    # On a CPU argmax takes longer than the softmax. Two classes can only both round to the highest probability where it
    # is at most 1/2; these rows alone are searched. 0.999, as exp need not be monotone to the last digit.
    correct = own == confidences
    maybe_tied = ((confidences < 0.501) & (own >= 0.999 * confidences)).nonzero()[:, 0]
    if len(maybe_tied):
        correct[maybe_tied] = scores[maybe_tied].argmax(1) == labels[maybe_tied]
    return correct
