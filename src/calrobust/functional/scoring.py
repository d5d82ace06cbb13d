"""Scores, in blocks of rows."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from calrobust._checks import (
    ROUNDING,
    can_read_values,
    check_bins,
    check_bool,
    check_flag,
    check_float64,
    check_floating,
    check_ignore_index,
    check_kind,
    check_label_values,
    check_n_bins,
    check_one_device,
    check_predictions,
)

CPU_BLOCK_BYTES = 2**20  # of a thread, to stay in cache
GPU_BLOCK_BYTES = 2**26
SURE = 0.999  # confidences above are ranked by their odds


class Block(NamedTuple):
    """Some rows, valid until the next block."""

    target: Tensor  # [n]
    scores: Tensor  # [n, C] logits or probabilities
    from_logits: bool
    probs: Tensor  # [n, C]
    own: Tensor  # [n] the label's probability
    confidences: Tensor  # [n]
    correct: Tensor  # [n]


class Bins(NamedTuple):
    """Sums over bins, float64 ``[..., n_bins]``; ``a + b`` has the samples of both.

    Example:
        >>> import torch
        >>> from calrobust.functional import bin_confidences
        >>> first = bin_confidences(torch.tensor([0.25]), torch.tensor([True]), n_bins=2)
        >>> second = bin_confidences(torch.tensor([0.375, 0.75]), torch.tensor([True, False]), n_bins=2)
        >>> (first + second).counts
        tensor([2., 1.], dtype=torch.float64)
    """

    counts: Tensor
    """Number of samples."""
    confidence_sums: Tensor
    """Sum of their confidences."""
    correct_sums: Tensor
    """Number of correct ones."""

    def __add__(self, other: "Bins") -> "Bins":  # type: ignore[override]
        if self.counts.shape != other[0].shape:
            raise ValueError(f"bins must be as many to be added, got {[*self.counts.shape]} and {[*other[0].shape]}")
        return Bins(*(a + b for a, b in zip(self, other, strict=True)))


def as_rows(target: Tensor, ignore_index: int | None = None, **preds: Tensor) -> tuple[Tensor, Tensor]:
    check_predictions(target, **preds)
    check_float64(**preds)
    check_ignore_index(ignore_index)
    (scores,) = preds.values()
    scores, target = scores.detach().movedim(1, -1).flatten(0, -2), target.flatten()
    if ignore_index is None:
        return scores, target
    kept = target != ignore_index
    return scores[kept], target[kept]


def places(where: Tensor) -> Tensor:
    # All of them if no shape may depend on values.
    return where.nonzero()[:, 0] if can_read_values(where) else torch.arange(len(where), device=where.device)


def block_rows(scores: Tensor, dtype: torch.dtype) -> int:
    rows = len(scores)
    if not torch.compiler.is_compiling():  # the compiler fuses the passes itself
        size = GPU_BLOCK_BYTES if scores.is_cuda else CPU_BLOCK_BYTES * torch.get_num_threads()
        rows = min(rows, size // (scores.shape[1] * dtype.itemsize))
    return max(1, rows)


def probability_blocks(
    preds: Tensor,
    target: Tensor,
    from_logits: bool,
    validate: bool | None = None,
    temperature: float | None = None,
) -> Iterator[Block]:
    """At least one; ``validate=None`` checks values where that is free."""
    check_flag(from_logits=from_logits)
    free = can_read_values(preds)
    validate = free if validate is None else validate
    if validate or free:  # on a CPU a wrong label breaks the indexing
        check_label_values(target, preds.shape[1])
    if validate:
        check_kind(from_logits=from_logits, preds=preds)
    dtype = torch.promote_types(preds.dtype, torch.float32)
    step = block_rows(preds, dtype)
    buffer = preds.new_empty(step if from_logits else 0, preds.shape[1], dtype=dtype)
    for some, labels in zip(preds.split(step), target.split(step), strict=True):
        scores = some.to(dtype) if temperature is None else some.to(dtype) / temperature
        probs = torch.softmax(scores, 1, out=buffer[: len(scores)]) if from_logits else scores
        own, confidences = probs.gather(1, labels[:, None])[:, 0], probs.amax(1)
        correct = own == confidences if free else scores.argmax(1) == labels
        # argmax is slow on a CPU, and needed only for ties.
        tied = places((confidences < 0.501) & (own >= 0.999 * confidences)) if free else ()
        if len(tied):
            correct[tied] = scores[tied].argmax(1) == labels[tied]
        yield Block(labels, scores, from_logits, probs, own, confidences, correct)


def log_losses(block: Block) -> Tensor:
    own = block.own.clamp(min=0)
    losses = -own.log()
    if not block.from_logits:
        return losses.where(~block.confidences.isnan(), torch.nan)
    lost = own < torch.finfo(own.dtype).tiny
    if can_read_values(lost) and not lost.any():
        return losses
    distances = block.scores.amax(1) - block.scores.gather(1, block.target[:, None])[:, 0]
    return torch.where(lost, distances - block.confidences.log(), losses)


def certainties(block: Block) -> Tensor:
    """``[n]``, in the order of confidences, even if these round to 1."""
    found = block.confidences.clone()
    if block.from_logits:
        sure = found > SURE
        rows = places(sure)
        scores = block.scores[rows]
        top = scores.amax(1)
        others = scores.masked_fill_(scores == top[:, None], -torch.inf).logsumexp(1)
        found[rows] = torch.where(sure[rows], top - others, found[rows])  # log-odds, above 6
    return found


def squared_errors(block: Block) -> Tensor:
    # Subtracting from the sum would lose small scores.
    own = (block.own - 1).square()
    return block.probs.square().scatter_(1, block.target[:, None], own[:, None]).sum(1)


def top_label(
    preds: Tensor, target: Tensor, *, from_logits: bool = True, ignore_index: int | None = None
) -> tuple[Tensor, Tensor]:
    """The highest probability of each sample, and whether its class is the label.

    Both are ``[N]`` without ignored samples, the first float32 or better. Of equal scores the first counts.
    Arguments, NaN and errors are those of :func:`~calrobust.functional.calibration_error`.

    Example:
        >>> import torch
        >>> from calrobust.functional import top_label
        >>> top_label(torch.tensor([[0.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 0]))  # 1 / (1 + exp(-3))
        (tensor([0.5000, 0.9526]), tensor([ True, False]))
    """
    return top_labels(probability_blocks(*as_rows(target, ignore_index, preds=preds), from_logits))


def confidences_of(block: Block) -> Tensor:
    return block.confidences


def top_labels(blocks: Iterable[Block], score: Callable[[Block], Tensor] = confidences_of) -> tuple[Tensor, Tensor]:
    scores, correct = zip(*((score(block), block.correct) for block in blocks), strict=True)
    return torch.cat(scores), torch.cat(correct)


def check_confidences(confidences: Tensor, correct: Tensor) -> None:
    check_floating(confidences=confidences)
    check_bool(correct=correct)
    if confidences.ndim != 1 or confidences.shape != correct.shape:
        raise ValueError(
            f"confidences and correct must have the same shape [N], "
            f"got {list(confidences.shape)} and {list(correct.shape)}; top_label gives both"
        )
    check_one_device(confidences=confidences, correct=correct)
    check_float64(confidences=confidences)


def valid_confidences(confidences: Tensor, correct: Tensor, n_bins: int) -> Tensor:
    check_confidences(confidences, correct)
    check_n_bins(n_bins)
    confidences = confidences.detach().double()
    return confidences.where((confidences - 0.5).abs() <= 0.5 + ROUNDING, torch.nan)


def brier_score(preds: Tensor, target: Tensor, *, from_logits: bool = True, ignore_index: int | None = None) -> Tensor:
    r"""Mean squared distance of the probabilities from the label's indicator (multiclass Brier score).

    .. math:: \frac{1}{N} \sum_i \sum_c (p_{ic} - \mathbb{1}[y_i = c])^2

    With two classes this is twice the binary score. The result is a float64 scalar in [0, 2].
    Arguments, NaN and errors are those of :func:`~calrobust.functional.calibration_error`.

    Example:
        >>> import torch
        >>> from calrobust.functional import brier_score
        >>> brier_score(torch.tensor([[0.75, 0.25]]), torch.tensor([1]), from_logits=False)  # 0.75² + 0.75²
        tensor(1.1250, dtype=torch.float64)

    Reference: Brier, 1950, *Verification of forecasts expressed in terms of probability*, equation 2.
    """
    blocks = probability_blocks(*as_rows(target, ignore_index, preds=preds), from_logits)
    return torch.cat([squared_errors(block) for block in blocks]).double().mean()


def brier_decomposition(bins: Bins) -> tuple[Tensor, Tensor, Tensor]:
    r"""Reliability, resolution and uncertainty, Murphy's parts of the Brier score of the top label.

    .. math::
        \sum_b \tfrac{n_b}{N} (a_b - c_b)^2, \quad \sum_b \tfrac{n_b}{N} (a_b - \bar a)^2, \quad \bar a (1 - \bar a)

    with the accuracy :math:`\bar a`; other symbols, ``bins``, results and errors are those of
    :func:`~calrobust.functional.binned_error`. Reliability - resolution + uncertainty is the mean of
    :math:`(1 - c_b)^2` for right and :math:`c_b^2` for wrong predictions. Low reliability and high resolution are good.

    Example:
        >>> import torch
        >>> from calrobust.functional import bin_confidences, brier_decomposition
        >>> bins = bin_confidences(torch.tensor([0.25, 0.75]), torch.tensor([False, True]), n_bins=2)
        >>> reliability, resolution, uncertainty = brier_decomposition(bins)
        >>> reliability - resolution + uncertainty  # 0.25²
        tensor(0.0625, dtype=torch.float64)

    Reference: Murphy, 1973, *A New Vector Partition of the Probability Score*, equation 12.
    """
    check_bins(bins)
    counts, confidence_sums, correct_sums = bins
    total = counts.sum(-1)
    accuracy = correct_sums.sum(-1) / total
    gaps = torch.stack((confidence_sums, counts * accuracy[..., None])) - correct_sums
    reliability, resolution = (gaps.square() / counts.where(counts > 0, 1)).sum(-1) / total
    return reliability, resolution, accuracy * (1 - accuracy)


def negative_log_likelihood(
    preds: Tensor, target: Tensor, *, from_logits: bool = True, ignore_index: int | None = None
) -> Tensor:
    r"""Mean negative log-likelihood of the labels, in nats (log loss).

    .. math:: -\frac{1}{N} \sum_i \log p_{i y_i}

    The result is a float64 scalar ≥ 0, inf if a label has probability 0.
    Arguments, NaN and errors are those of :func:`~calrobust.functional.calibration_error`.

    Example:
        >>> import torch
        >>> from calrobust.functional import negative_log_likelihood
        >>> negative_log_likelihood(torch.tensor([[0.0, 500.0]]), torch.tensor([0]))
        tensor(500., dtype=torch.float64)

    Reference: Guo et al., 2017, :arxiv:`1706.04599`, equation 6.
    """
    blocks = probability_blocks(*as_rows(target, ignore_index, preds=preds), from_logits)
    return torch.cat([log_losses(block) for block in blocks]).double().mean()


def selective_risk(
    preds: Tensor,
    target: Tensor,
    *,
    generalized: bool = False,
    from_logits: bool = True,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Area under the risk-coverage curve (AURC): how often the most confident predictions are wrong.

    .. math:: \mathrm{AURC} = \frac{1}{N} \sum_{k=1}^N r_k, \quad
        \mathrm{AUGRC} = \frac{1}{N} \sum_{k=1}^N \tfrac{k}{N} r_k

    where :math:`r_k` is :func:`~calrobust.functional.risk_coverage_curve`. ``generalized`` gives AUGRC.
    The result is a float64 scalar in [0, 1].
    Other arguments, NaN and errors are those of :func:`~calrobust.functional.calibration_error`.

    Example:
        >>> import torch
        >>> from calrobust.functional import selective_risk
        >>> probs = torch.tensor([[0.75, 0.25], [1.0, 0.0]])
        >>> selective_risk(probs, torch.tensor([1, 0]), from_logits=False)  # risks 0 and 1 / 2
        tensor(0.2500, dtype=torch.float64)

    Reference: Geifman and El-Yaniv, 2017, :arxiv:`1705.08500`, section 2; AUGRC: Traub et al., 2024,
    :arxiv:`2407.01032`, equation 7.
    """
    blocks = probability_blocks(*as_rows(target, ignore_index, preds=preds), from_logits)
    return area(risk_coverage_curve(*top_labels(blocks, certainties)), generalized)


def risk_coverage_curve(confidences: Tensor, correct: Tensor) -> Tensor:
    """``[N]``: the share of errors among the k most confident predictions, k = 1 ... N.

    Each value is the mean over all orders of equal confidences.

    Args:
        confidences: shape ``[N]``, floating; any score, higher for what is accepted first. NaN gives NaN.
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
    _, ties, wrong = _ranked(confidences, correct)
    return _shared(wrong, ties).cumsum(0) / _ranks(wrong)


def area(curve: Tensor, generalized: bool) -> Tensor:
    return (curve * _ranks(curve) / len(curve) if generalized else curve).mean()


def risk_contributions(confidences: Tensor, correct: Tensor) -> Tensor:
    """AURC plus the influence of each sample on it."""
    order, ties, wrong = _ranked(confidences, correct)
    shares = _shared(wrong, ties) / _ranks(wrong)
    weights = (1 / _ranks(wrong)).flip(0).cumsum(0).flip(0)
    found = wrong * _shared(weights, ties) - _shared(shares.flip(0).cumsum(0).flip(0), ties) + wrong.mean()
    return found.index_copy(0, order, found)


def _ranked(confidences: Tensor, correct: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_confidences(confidences, correct)
    ordered, order = confidences.detach().sort(descending=True)
    changes = torch.zeros_like(correct)
    changes[1:] = ordered[1:] != ordered[:-1]
    wrong = (~correct[order]).double().where(~ordered.isnan(), torch.nan)
    return order, changes.cumsum(0), wrong


def _ranks(like: Tensor) -> Tensor:
    return torch.arange(1, len(like) + 1, dtype=torch.float64, device=like.device)


def _shared(values: Tensor, ties: Tensor) -> Tensor:
    sums, counts = (torch.zeros_like(values).index_add(0, ties, each) for each in (values, torch.ones_like(values)))
    return (sums / counts)[ties]
