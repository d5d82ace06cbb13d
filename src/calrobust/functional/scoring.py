"""Proper scores: the Brier score and the negative log-likelihood."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from calrobust.functional._rows import Block, probability_blocks


class RowScores(NamedTuple):
    """One value of each for every sample, ``[N]``."""

    confidences: Tensor
    correct: Tensor
    log_losses: Tensor
    squared_errors: Tensor


def row_scores(blocks: Iterable[Block]) -> RowScores:
    """All scores from one pass."""
    rows = ((block.confidences, block.correct, log_losses(block), squared_errors(block)) for block in blocks)
    return RowScores(*map(torch.cat, zip(*rows, strict=True)))


def log_losses(block: Block) -> Tensor:
    """``[n]``: minus the logarithm of the label's probability; from logits it does not underflow."""
    label = block.target[:, None]
    own = block.probs.gather(1, label)[:, 0]
    losses = -own.log()
    if not block.from_logits:
        return losses
    lost = own < torch.finfo(own.dtype).tiny
    if own.device.type == "cpu" and not torch.compiler.is_compiling() and not lost.any():  # a look costs nothing there
        return losses
    distances = block.scores.amax(1) - block.scores.gather(1, label)[:, 0]
    return torch.where(lost, distances - block.confidences.log(), losses)  # 1 / confidence: the sum of exp(score - top)


def squared_errors(block: Block) -> Tensor:
    """``[n]``: squared distance of the probabilities from the label's indicator."""
    # The label's term is replaced before the sum: the score of a confident row is small, a difference would lose it.
    label = block.target[:, None]
    own = (block.probs.gather(1, label) - 1).square()
    return block.probs.square().scatter_(1, label, own).sum(1)


def brier_score(preds: Tensor, target: Tensor, *, from_logits: bool = True, ignore_index: int | None = None) -> Tensor:
    r"""Mean squared distance of the probabilities from the label's indicator (multiclass Brier score).

    .. math:: \frac{1}{N} \sum_i \sum_c (p_{ic} - \mathbb{1}[y_i = c])^2

    The sum is over all classes, as Brier defined it. With two classes this is twice the binary score of one class.

    Args:
        preds: logits or probabilities, as in :func:`~calrobust.functional.top_label`; likewise the others.
        target: labels.
        from_logits: whether ``preds`` are logits.
        ignore_index: label of samples to leave out.

    Returns:
        A float64 scalar in [0, 2]; NaN without samples or with NaN in ``preds``.

    Raises:
        TypeError, ValueError: as :func:`~calrobust.functional.top_label`.

    Example:
        >>> import torch
        >>> from calrobust.functional import brier_score
        >>> brier_score(torch.tensor([[0.75, 0.25]]), torch.tensor([1]), from_logits=False)  # 0.75² + 0.75²
        tensor(1.1250, dtype=torch.float64)

    Reference: Brier, 1950, *Verification of forecasts expressed in terms of probability*, equation 2.
    """
    blocks = probability_blocks(preds, target, from_logits, ignore_index)
    return torch.cat([squared_errors(block) for block in blocks]).double().mean()


def negative_log_likelihood(
    preds: Tensor, target: Tensor, *, from_logits: bool = True, ignore_index: int | None = None
) -> Tensor:
    r"""Mean negative log-likelihood of the labels, in nats (log loss).

    .. math:: -\frac{1}{N} \sum_i \log p_{i y_i} = \frac{1}{N} \sum_i \Bigl(\log \sum_c e^{z_{ic}} - z_{i y_i}\Bigr)

    From logits nothing underflows, however far the label's logit lies under the others. Probabilities have lost such
    labels already: one of 0 makes the value inf. So does a label on a masked class, whose logit is ``-inf``.

    Args:
        preds: logits or probabilities, as in :func:`~calrobust.functional.top_label`; likewise the others.
        target: labels.
        from_logits: whether ``preds`` are logits.
        ignore_index: label of samples to leave out.

    Returns:
        A float64 scalar ≥ 0, in nats; NaN without samples or with NaN in ``preds``.

    Raises:
        TypeError, ValueError: as :func:`~calrobust.functional.top_label`.

    Example:
        >>> import torch
        >>> from calrobust.functional import negative_log_likelihood
        >>> negative_log_likelihood(torch.tensor([[0.0, 500.0]]), torch.tensor([0]))
        tensor(500., dtype=torch.float64)

    Reference: Guo et al., 2017, :arxiv:`1706.04599`, equation 6.
    """
    blocks = probability_blocks(preds, target, from_logits, ignore_index)
    return torch.cat([log_losses(block) for block in blocks]).double().mean()
