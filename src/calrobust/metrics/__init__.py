"""Calibration metrics for ``torchmetrics``.

:mod:`calrobust.functional` has the formulas. ``compute()`` gives float64 scalars, NaN before an ``update``.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from calrobust._checks import check_flag, check_integer, check_n_bins
from calrobust.functional.calibration import (
    Norm,
    bin_classes,
    bin_confidences,
    binned_error,
    check_norm,
    classwise_error,
    equal_mass_bins,
)
from calrobust.functional.scoring import (
    Block,
    area,
    certainties,
    log_losses,
    risk_coverage_curve,
    squared_errors,
    top_labels,
)
from calrobust.metrics._shared import BinnedMetric, MeanMetric, SampledMetric

__all__ = [
    "AdaptiveCalibrationError",
    "BrierScore",
    "CalibrationError",
    "CalibrationSummary",
    "ClasswiseCalibrationError",
    "NegativeLogLikelihood",
    "SelectiveRisk",
]


class CalibrationError(BinnedMetric):
    """Expected calibration error of the top label (ECE), streaming.

    The state is three float64 sums for each bin: ``metric.bins``.

    Args:
        n_bins, norm, debiased, from_logits, ignore_index: as for :func:`~calrobust.functional.calibration_error`.
        validate_args: check values, which reads them back from the device.
        **kwargs: of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from calrobust.metrics import CalibrationError
        >>> metric = CalibrationError(n_bins=10, from_logits=False)
        >>> metric.update(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 0]))
        >>> metric.update(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([1, 1]))
        >>> metric.compute()  # right half of the time
        tensor(0.2500, dtype=torch.float64)
    """

    def __init__(
        self,
        *,
        n_bins: int = 15,
        norm: Norm = "l1",
        debiased: bool = False,
        from_logits: bool = True,
        ignore_index: int | None = None,
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(from_logits=from_logits, ignore_index=ignore_index, validate_args=validate_args, **kwargs)
        check_norm(norm, debiased=debiased)
        self.norm, self.debiased = norm, debiased
        self._add_bins(n_bins)

    def _summands(self, blocks: Iterable[Block]) -> dict[str, Tensor]:
        return bin_confidences(*top_labels(blocks), n_bins=self.n_bins)._asdict()

    def compute(self) -> Tensor:
        """The value over all batches and ranks."""
        return binned_error(self.bins, norm=self.norm, debiased=self.debiased)


class AdaptiveCalibrationError(SampledMetric):
    """:func:`~calrobust.functional.adaptive_calibration_error` of all batches.

    The state is eight bytes for each sample.
    Arguments are those of :class:`CalibrationError` without ``debiased``.

    Example:
        >>> import torch
        >>> from calrobust.metrics import AdaptiveCalibrationError
        >>> metric = AdaptiveCalibrationError(n_bins=2, from_logits=False)
        >>> probs = torch.tensor([[0.75, 0.25], [0.75, 0.25], [1.0, 0.0], [1.0, 0.0]])
        >>> metric(probs, torch.tensor([0, 1, 0, 0]))  # (2 * 0.25 + 0) / 4
        tensor(0.1250, dtype=torch.float64)
    """

    def __init__(
        self,
        *,
        n_bins: int = 15,
        norm: Norm = "l1",
        from_logits: bool = True,
        ignore_index: int | None = None,
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(from_logits=from_logits, ignore_index=ignore_index, validate_args=validate_args, **kwargs)
        check_n_bins(n_bins)
        check_norm(norm)
        self.n_bins, self.norm = n_bins, norm

    def compute(self) -> Tensor:
        """The value over all batches and ranks."""
        return binned_error(equal_mass_bins(*self._all_samples(), n_bins=self.n_bins), norm=self.norm)


class ClasswiseCalibrationError(BinnedMetric):
    """:func:`~calrobust.functional.classwise_calibration_error` of all batches, streaming.

    The state is three float64 sums for each bin of each class.
    Arguments are those of :class:`CalibrationError` without ``debiased``, and ``num_classes`` ≥ 2.

    Example:
        >>> import torch
        >>> from calrobust.metrics import ClasswiseCalibrationError
        >>> metric = ClasswiseCalibrationError(num_classes=2, from_logits=False)
        >>> metric(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1]))  # each is right half of the time
        tensor(0.2500, dtype=torch.float64)
    """

    def __init__(
        self,
        *,
        num_classes: int,
        n_bins: int = 15,
        norm: Norm = "l1",
        from_logits: bool = True,
        ignore_index: int | None = None,
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(from_logits=from_logits, ignore_index=ignore_index, validate_args=validate_args, **kwargs)
        check_integer(2, 10**7, num_classes=num_classes)
        check_norm(norm)
        self.num_classes, self.norm = num_classes, norm
        self._add_bins(n_bins, num_classes)

    def _summands(self, blocks: Iterable[Block]) -> dict[str, Tensor]:
        bins = bin_classes(blocks, self.n_bins)
        if len(bins.counts) != self.num_classes:
            raise ValueError(
                f"preds must have num_classes={self.num_classes} columns, got {len(bins.counts)}; "
                f"make the metric with num_classes={len(bins.counts)}"
            )
        return bins._asdict()

    def compute(self) -> Tensor:
        """The value over all batches and ranks."""
        return classwise_error(self.bins, self.norm)


class BrierScore(MeanMetric):
    """:func:`~calrobust.functional.brier_score` of all batches, in [0, 2], streaming.

    Arguments are those of :class:`CalibrationError` that are not about bins.

    Example:
        >>> import torch
        >>> from calrobust.metrics import BrierScore
        >>> BrierScore(from_logits=False)(torch.tensor([[0.75, 0.25]]), torch.tensor([1]))  # 0.75² + 0.75²
        tensor(1.1250, dtype=torch.float64)
    """

    plot_upper_bound = 2.0
    scalar_sums = ("brier_sum", "count")
    _values = staticmethod(squared_errors)


class NegativeLogLikelihood(MeanMetric):
    """:func:`~calrobust.functional.negative_log_likelihood` of all batches, in nats, streaming.

    Arguments are those of :class:`CalibrationError` that are not about bins.

    Example:
        >>> import torch
        >>> from calrobust.metrics import NegativeLogLikelihood
        >>> NegativeLogLikelihood()(torch.tensor([[0.0, 500.0]]), torch.tensor([0]))
        tensor(500., dtype=torch.float64)
    """

    scalar_sums = ("nll_sum", "count")
    _values = staticmethod(log_losses)


class SelectiveRisk(SampledMetric):
    """:func:`~calrobust.functional.selective_risk` of all batches: AURC, or AUGRC if ``generalized``.

    The state is eight bytes for each sample.
    Arguments are those of :class:`CalibrationError` that are not about bins, and ``generalized``.

    Example:
        >>> import torch
        >>> from calrobust.metrics import SelectiveRisk
        >>> metric = SelectiveRisk(from_logits=False)
        >>> metric(torch.tensor([[0.75, 0.25], [1.0, 0.0]]), torch.tensor([1, 0]))  # (0 + 1 / 2) / 2
        tensor(0.2500, dtype=torch.float64)
    """

    sampled = "certainties"
    _score = staticmethod(certainties)

    def __init__(
        self,
        *,
        generalized: bool = False,
        from_logits: bool = True,
        ignore_index: int | None = None,
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(from_logits=from_logits, ignore_index=ignore_index, validate_args=validate_args, **kwargs)
        check_flag(generalized=generalized)
        self.generalized = generalized

    def compute(self) -> Tensor:
        """The value over all batches and ranks."""
        return area(risk_coverage_curve(*self._all_samples()), self.generalized)


class CalibrationSummary(BinnedMetric):
    """Accuracy, confidence, scores and calibration errors, streaming.

    ``compute`` gives ``accuracy``, ``confidence``, ``nll`` in nats, ``brier``, ``ece``, ``rmsce``, ``mce``.
    Arguments are those of :class:`CalibrationError` without ``norm`` and ``debiased``.

    Example:
        >>> import torch
        >>> from calrobust.metrics import CalibrationSummary
        >>> metric = CalibrationSummary(from_logits=False)
        >>> metric(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1]))["brier"]  # 0.25² + 0.75²
        tensor(0.6250, dtype=torch.float64)
    """

    higher_is_better = None
    plot_upper_bound = None
    scalar_sums = ("nll_sum", "brier_sum")
    nll_sum: Tensor
    brier_sum: Tensor

    def __init__(
        self,
        *,
        n_bins: int = 15,
        from_logits: bool = True,
        ignore_index: int | None = None,
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(from_logits=from_logits, ignore_index=ignore_index, validate_args=validate_args, **kwargs)
        self._add_bins(n_bins)

    def _summands(self, blocks: Iterable[Block]) -> dict[str, Tensor]:
        rows = ((block.confidences, block.correct, log_losses(block), squared_errors(block)) for block in blocks)
        confidences, correct, losses, errors = map(torch.cat, zip(*rows, strict=True))
        sums = {"nll_sum": losses.sum(dtype=torch.float64), "brier_sum": errors.sum(dtype=torch.float64)}
        return sums | bin_confidences(confidences, correct, n_bins=self.n_bins)._asdict()

    def compute(self) -> dict[str, Tensor]:
        """The values over all batches and ranks."""
        count = self.counts.sum()
        return {
            "accuracy": self.correct_sums.sum() / count,
            "confidence": self.confidence_sums.sum() / count,
            "nll": self.nll_sum / count,
            "brier": self.brier_sum / count,
            "ece": binned_error(self.bins),
            "rmsce": binned_error(self.bins, norm="l2"),
            "mce": binned_error(self.bins, norm="max"),
        }
