"""Selective prediction: how often the most confident predictions are wrong."""

import torch
from torch import Tensor

from calrobust.functional.calibration import check_confidences, top_label


def selective_risk(
    preds: Tensor,
    target: Tensor,
    *,
    generalized: bool = False,
    from_logits: bool = True,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Area under the risk-coverage curve (AURC): how often the most confident predictions are wrong.

    .. math:: \mathrm{AURC} = \frac{1}{N} \sum_{k=1}^N r_k, \qquad
        \mathrm{AUGRC} = \frac{1}{N} \sum_{k=1}^N \tfrac{k}{N} r_k

    where :math:`r_k` is the share of errors among the k most confident predictions, see
    :func:`~calrobust.functional.risk_coverage_curve`. ``generalized`` gives AUGRC, in which an error counts the same at
    every rank. The result is a float64 scalar in [0, 1]. NaN, other arguments and errors are as for
    :func:`~calrobust.functional.calibration_error`.

    Example:
        >>> import torch
        >>> from calrobust.functional import selective_risk
        >>> probs = torch.tensor([[0.75, 0.25], [1.0, 0.0]])
        >>> selective_risk(probs, torch.tensor([1, 0]), from_logits=False)  # risks 0 and 1 / 2
        tensor(0.2500, dtype=torch.float64)

    Reference: Geifman and El-Yaniv, 2017, :arxiv:`1705.08500`, section 2; AUGRC: Traub et al., 2024,
    :arxiv:`2407.01032`, equation 7.
    """
    curve = risk_coverage_curve(*top_label(preds, target, from_logits=from_logits, ignore_index=ignore_index))
    return area(curve, generalized)


def risk_coverage_curve(confidences: Tensor, correct: Tensor) -> Tensor:
    """``[N]``: the share of errors among the k most confident predictions, k = 1 ... N.

    Equal confidences have no order, so each value is the mean over all their orders, exactly.

    Args:
        confidences: shape ``[N]``, floating; any score that is higher for what is accepted first. NaN gives NaN.
        correct: shape ``[N]``, bool.

    Raises:
        TypeError, ValueError: as for :func:`~calrobust.functional.bin_confidences`.

    Example:
        >>> import torch
        >>> from calrobust.functional import risk_coverage_curve
        >>> risk_coverage_curve(torch.tensor([0.5, 0.9, 0.5]), torch.tensor([True, True, False]))  # 0, 1/4 and 1/3
        tensor([0.0000, 0.2500, 0.3333], dtype=torch.float64)

    Reference: Geifman and El-Yaniv, 2017, :arxiv:`1705.08500`, section 2.
    """
    ordered, ties, wrong = _ranked(confidences, correct)[1:]
    # The expected number of errors is linear in k within a tie, as if each had the mean error.
    return _shared(wrong, ties).cumsum(0) / _ranks(ordered)


def area(curve: Tensor, generalized: bool) -> Tensor:
    """AURC or AUGRC."""
    return (curve * _ranks(curve) / len(curve) if generalized else curve).mean()


def risk_contributions(confidences: Tensor, correct: Tensor) -> Tensor:
    """float64 ``[N]``: AURC plus the influence of each sample on it, whose mean is the AURC."""
    order, ordered, ties, wrong = _ranked(confidences, correct)
    shares = _shared(wrong, ties) / _ranks(ordered)
    weights = (1 / _ranks(ordered)).flip(0).cumsum(0).flip(0)
    found = wrong * _shared(weights, ties) - _shared(shares.flip(0).cumsum(0).flip(0), ties) + wrong.mean()
    return torch.empty_like(found).index_copy(0, order, found)


def _ranked(confidences: Tensor, correct: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The order, and in this order confidences, the number of the tie, and errors, which are NaN for NaN."""
    check_confidences(confidences, correct)
    ordered, order = confidences.detach().sort(descending=True)
    changes = torch.ones_like(ordered, dtype=torch.int64)
    changes[1:] = ordered[1:] != ordered[:-1]
    wrong = (~correct[order]).double().where(~ordered.isnan(), torch.nan)
    return order, ordered, changes.cumsum(0) - 1, wrong


def _ranks(like: Tensor) -> Tensor:
    return torch.arange(1, len(like) + 1, dtype=torch.float64, device=like.device)


def _shared(values: Tensor, ties: Tensor) -> Tensor:
    """Each value replaced by the mean of its tie."""
    sums, counts = torch.zeros(2, len(values), dtype=torch.float64, device=values.device)
    sums.index_add_(0, ties, values)
    counts.index_add_(0, ties, torch.ones_like(values))
    means: Tensor = (sums / counts)[ties]
    return means
