"""Proper scores: the Brier score and the negative log-likelihood."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from calrobust._checks import check_predictions
from calrobust.functional._rows import Block, probability_blocks


class RowScores(NamedTuple):
    """One value of each for every sample, ``[N]``."""

    confidences: Tensor
    correct: Tensor
    log_losses: Tensor
    squared_errors: Tensor


def log_losses(block: Block) -> Tensor:
    """Minus the logarithm of the label's probability; from logits it does not underflow. Before `squared_errors`."""
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
    """Squared distance of the probabilities from the label's indicator. Overwrites ``block.probs``."""
    # Subtracting before squaring keeps the digits of a confident row, whose score is the small difference of two ones.
    differences = block.probs.scatter_add_(1, block.target[:, None], -torch.ones_like(block.probs[:, :1]))
    norms: Tensor = torch.linalg.vector_norm(differences, dim=1)
    return norms.square()


def row_scores(preds: Tensor, target: Tensor, *, from_logits: bool, ignore_index: int | None) -> RowScores:
    """Everything a summary needs, from one pass over ``preds``."""
    blocks = probability_blocks(preds, target, from_logits=from_logits, ignore_index=ignore_index)
    rows = [RowScores(b.confidences, b.correct, log_losses(b), squared_errors(b)) for b in blocks]
    return RowScores(*(torch.cat(values) for values in zip(*rows, strict=True)))


def score(
    preds: Tensor, target: Tensor, per_row: Callable[[Block], Tensor], *, from_logits: bool, ignore_index: int | None
) -> Tensor:
    """``[N]`` values of ``per_row``."""
    check_predictions(target, preds=preds)
    blocks = probability_blocks(preds, target, from_logits=from_logits, ignore_index=ignore_index)
    return torch.cat([per_row(block) for block in blocks])


def brier_score(preds: Tensor, target: Tensor, *, from_logits: bool = True, ignore_index: int | None = None) -> Tensor:
    r"""Mean squared distance of the probabilities from the label's indicator (multiclass Brier score).

    .. math:: \frac{1}{N} \sum_i \sum_c (p_{ic} - \mathbb{1}[y_i = c])^2

    The sum is over all classes, as Brier defined it. With two classes this is twice the binary score of one class.

    Args:
        preds: shape ``[N, C]``, floating: logits, or probabilities with ``from_logits=False``.
        target: shape ``[N]``, int64 labels in [0, C).
        from_logits: whether ``preds`` are logits; never guessed.
        ignore_index: samples with this label are left out.

    Returns:
        A float64 scalar in [0, 2]; NaN without samples or with NaN in ``preds``.

    Raises:
        TypeError: ``preds`` is not floating or ``target`` is not int64.
        ValueError: shapes or devices do not fit, or (looked at on the CPU alone) a label is out of range.

    Example:
        >>> import torch
        >>> from calrobust.functional import brier_score
        >>> brier_score(torch.tensor([[0.75, 0.25]]), torch.tensor([1]), from_logits=False)  # 0.75² + 0.75²
        tensor(1.1250, dtype=torch.float64)

    Reference: Brier, 1950, *Verification of forecasts expressed in terms of probability*, equation 2.
    """
    return score(preds, target, squared_errors, from_logits=from_logits, ignore_index=ignore_index).double().mean()


def negative_log_likelihood(
    preds: Tensor, target: Tensor, *, from_logits: bool = True, ignore_index: int | None = None
) -> Tensor:
    r"""Mean negative log-likelihood of the labels, in nats (log loss).

    .. math:: -\frac{1}{N} \sum_i \log p_{i y_i} = \frac{1}{N} \sum_i \Bigl(\log \sum_c e^{z_{ic}} - z_{i y_i}\Bigr)

    From logits nothing underflows, however far the label's logit lies under the others. Probabilities have lost such
    labels already: one of 0 makes the value inf. So does a label on a masked class, whose logit is ``-inf``.

    Args:
        preds: shape ``[N, C]``, floating: logits, or probabilities with ``from_logits=False``.
        target: shape ``[N]``, int64 labels in [0, C).
        from_logits: whether ``preds`` are logits; never guessed.
        ignore_index: samples with this label are left out.

    Returns:
        A float64 scalar ≥ 0, in nats; NaN without samples or with NaN in ``preds``.

    Raises:
        TypeError: ``preds`` is not floating or ``target`` is not int64.
        ValueError: shapes or devices do not fit, or (looked at on the CPU alone) a label is out of range.

    Example:
        >>> import torch
        >>> from calrobust.functional import negative_log_likelihood
        >>> negative_log_likelihood(torch.tensor([[0.0, 500.0]]), torch.tensor([0]))
        tensor(500., dtype=torch.float64)

    Reference: Guo et al., 2017, :arxiv:`1706.04599`, equation 6.
    """
    return score(preds, target, log_losses, from_logits=from_logits, ignore_index=ignore_index).double().mean()
