"""Proper scores: the Brier score and the negative log-likelihood."""

import torch
from torch import Tensor

from calrobust.functional._rows import Block, as_rows, can_read_values, probability_blocks


def log_losses(block: Block) -> Tensor:
    """``[n]``: minus the logarithm of the label's probability; from logits it does not underflow."""
    own, losses = block.own, -block.own.log()
    if not block.from_logits:
        return losses
    lost = own < torch.finfo(own.dtype).tiny
    if can_read_values(lost) and not lost.any():
        return losses
    distances = block.scores.amax(1) - block.scores.gather(1, block.target[:, None])[:, 0]
    return torch.where(lost, distances - block.confidences.log(), losses)  # 1 / confidence: the sum of exp(score - top)


def squared_errors(block: Block) -> Tensor:
    """``[n]``: squared distance of the probabilities from the label's indicator."""
    # The label's square is replaced before the sum: subtracting it later would lose the small score of a confident row.
    own = (block.own - 1).square()
    return block.probs.square().scatter_(1, block.target[:, None], own[:, None]).sum(1)


def brier_score(preds: Tensor, target: Tensor, *, from_logits: bool = True, ignore_index: int | None = None) -> Tensor:
    r"""Mean squared distance of the probabilities from the label's indicator (multiclass Brier score).

    .. math:: \frac{1}{N} \sum_i \sum_c (p_{ic} - \mathbb{1}[y_i = c])^2

    The sum is over all classes, as Brier defined it. With two classes this is twice the binary score of one class. The
    result is a float64 scalar in [0, 2], NaN without samples or with NaN in ``preds``. Arguments and errors are those
    of :func:`~calrobust.functional.calibration_error`.

    Example:
        >>> import torch
        >>> from calrobust.functional import brier_score
        >>> brier_score(torch.tensor([[0.75, 0.25]]), torch.tensor([1]), from_logits=False)  # 0.75² + 0.75²
        tensor(1.1250, dtype=torch.float64)

    Reference: Brier, 1950, *Verification of forecasts expressed in terms of probability*, equation 2.
    """
    blocks = probability_blocks(*as_rows(target, ignore_index, preds=preds), from_logits)
    return torch.cat([squared_errors(block) for block in blocks]).double().mean()


def negative_log_likelihood(
    preds: Tensor, target: Tensor, *, from_logits: bool = True, ignore_index: int | None = None
) -> Tensor:
    r"""Mean negative log-likelihood of the labels, in nats (log loss).

    .. math:: -\frac{1}{N} \sum_i \log p_{i y_i} = \frac{1}{N} \sum_i \Bigl(\log \sum_c e^{z_{ic}} - z_{i y_i}\Bigr)

    From logits nothing underflows, however far the label's logit lies below the others. A label of probability 0 makes
    the value inf, and so does a label on a masked class, whose logit is ``-inf``. The result is a float64 scalar ≥ 0,
    NaN without samples or with NaN in ``preds``. Arguments and errors are those of
    :func:`~calrobust.functional.calibration_error`.

    Example:
        >>> import torch
        >>> from calrobust.functional import negative_log_likelihood
        >>> negative_log_likelihood(torch.tensor([[0.0, 500.0]]), torch.tensor([0]))
        tensor(500., dtype=torch.float64)

    Reference: Guo et al., 2017, :arxiv:`1706.04599`, equation 6.
    """
    blocks = probability_blocks(*as_rows(target, ignore_index, preds=preds), from_logits)
    return torch.cat([log_losses(block) for block in blocks]).double().mean()
