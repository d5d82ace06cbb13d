"""Calibration metrics for ``torchmetrics``: sums that merge exactly over batches and ranks.

Every metric takes ``preds [N, C]`` and ``target [N]``. ``preds`` are logits, or probabilities with
``from_logits=False``; which of the two is never guessed. The formulas are in :mod:`calrobust.functional`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from calrobust._checks import (
    check_beside_state,
    check_count,
    check_flag,
    check_ignore_index,
    check_kind,
    check_label_values,
    check_mergeable,
    check_n_bins,
    check_predictions,
    check_softmax_exists,
)
from calrobust.functional.calibration import (
    Bins,
    Norm,
    bin_classes,
    bin_confidences,
    binned_error,
    check_norm,
    classwise_error,
    equal_mass_bins,
    top_label,
)
from calrobust.functional.scoring import log_losses, row_scores, score, squared_errors

__all__ = [
    "AdaptiveCalibrationError",
    "BrierScore",
    "CalibrationError",
    "CalibrationSummary",
    "ClasswiseCalibrationError",
    "NegativeLogLikelihood",
]


class _PredictionMetric(Metric):
    """What the metrics share: the checks, a state that a refused batch leaves alone, and dtypes that stay."""

    higher_is_better: bool | None = False
    is_differentiable = False
    full_state_update = False
    plot_lower_bound = 0.0

    def __init__(
        self, *, from_logits: bool = True, ignore_index: int | None = None, validate_args: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        check_flag(from_logits=from_logits, validate_args=validate_args)
        check_ignore_index(ignore_index)
        self.from_logits = from_logits
        self.ignore_index = ignore_index
        self.validate_args = validate_args

    @abstractmethod
    def _summands(self, preds: Tensor, target: Tensor) -> dict[str, Tensor]:
        """What a batch adds to each state."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds a batch.

        Args:
            preds: shape ``[N, C]``, floating: logits, or probabilities with ``from_logits=False``.
            target: shape ``[N]``, int64 labels in [0, C), or ``ignore_index``.

        Raises:
            TypeError: ``preds`` is not floating or ``target`` is not int64.
            ValueError: shapes or devices do not fit; with ``validate_args`` also labels out of range, NaN, +inf, and
                rows that are plainly probabilities where logits are due, or the reverse. The state is left as it was.
        """
        try:
            summands = self._checked_summands(preds, target)
        except BaseException:  # also what no check foresees, such as a GPU without memory
            self._update_count -= 1  # torchmetrics counts the call before it is made
            raise
        for name, summand in summands.items():
            state = getattr(self, name)
            if isinstance(state, list):
                state.append(summand)
            else:
                setattr(self, name, state + summand)

    def _checked_summands(self, preds: Tensor, target: Tensor) -> dict[str, Tensor]:
        check_predictions(target, preds=preds)
        check_beside_state(self.device, preds=preds)
        if self.validate_args:
            check_label_values(target, preds.shape[1], self.ignore_index)
            kept = slice(None) if self.ignore_index is None else target != self.ignore_index
            check_kind(preds[kept], from_logits=self.from_logits)
        summands = self._summands(preds, target)
        # A row without a softmax has left NaN in a sum, so that good batches need no search for one.
        if self.validate_args and bool(torch.cat([summand.flatten() for summand in summands.values()]).isnan().any()):
            check_softmax_exists(target[kept], preds=preds[kept])
        return summands

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Adds a batch and returns the value of this batch alone. A batch that fails leaves the state as it was."""
        # torchmetrics empties the state before it looks at the batch.
        before = {**self.__dict__, **self._copy_state_dict()}
        try:
            return super().forward(*args, **kwargs)
        except BaseException:
            self.__dict__.update(before)
            raise

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Adds what another metric of the same kind has seen, as if it had been seen here.

        Args:
            incoming_state: the other metric, or its ``metric_state``; it is not changed.

        Raises:
            TypeError: it is neither a metric nor a dict.
            ValueError: its states are others than ours, or of another shape. The state is left as it was.
        """
        other = incoming_state if isinstance(incoming_state, Metric) else None
        incoming: Any = incoming_state if other is None else other.metric_state
        check_mergeable(self.metric_state, incoming)
        self.__dict__.update({name: own + incoming[name] for name, own in self.metric_state.items()})
        # torchmetrics' own would go on giving the value computed before.
        self._update_count += any(map(_seen, incoming.values())) if other is None else other.update_count
        self._computed = None

    def _load_from_state_dict(self, state_dict: dict[str, Any], *args: Any) -> None:
        before, error_msgs = self.metric_state, args[-1]
        super()._load_from_state_dict(state_dict, *args)
        if all(after is before[name] for name, after in self.metric_state.items()):
            return  # states are in a state_dict only if they are persistent
        # torchmetrics takes whatever bears the name, and would go on giving the value computed before.
        try:
            check_mergeable(before, self.metric_state)
        except ValueError as error:
            error_msgs.append(str(error))
            self.__dict__.update(before)
            return
        self._computed = None
        self._update_count = int(any(_seen(state) for state in self.metric_state.values()))

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draws the value, or values given as ``val``, as every torchmetrics metric does.

        Args:
            val: a result of ``compute`` or ``forward``, or a list of them; None computes one.
            ax: matplotlib axes to draw into; None makes new ones.

        Returns:
            The figure and its axes.
        """
        return self._plot(val, ax)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> _PredictionMetric:
        # Sums follow their module to a device, never to a lower precision.
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, exclude_state)
        return self


class _BinnedMetric(_PredictionMetric):
    """A metric whose state is the sums of bins."""

    plot_upper_bound: float | None = 1.0
    counts: Tensor
    confidence_sums: Tensor
    correct_sums: Tensor

    def __init__(self, n_bins: int, *leading: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_n_bins(n_bins)
        self.n_bins = n_bins
        for name in Bins._fields:
            self.add_state(name, torch.zeros(*leading, n_bins, dtype=torch.float64), dist_reduce_fx="sum")

    @property
    def bins(self) -> Bins:
        """The sums so far, on this rank."""
        return Bins(self.counts, self.confidence_sums, self.correct_sums)


class CalibrationError(_BinnedMetric):
    """Expected calibration error of the top label (ECE), streaming.

    Formula and bins are those of :func:`~calrobust.functional.calibration_error`. The state is three float64 sums a
    bin, whatever the number of samples, and does not depend on how they are split into batches. ``metric.bins`` are
    these sums, for :func:`~calrobust.plotting.reliability_diagram`.

    Args:
        n_bins: number of bins of equal width.
        norm: ``"l1"`` (ECE), ``"l2"`` (RMSCE) or ``"max"`` (MCE).
        debiased: only for ``"l2"``: subtract the bias that noise adds, see :func:`~calrobust.functional.binned_error`.
        from_logits: whether ``preds`` are logits (default) or probabilities.
        ignore_index: samples with this label are left out.
        validate_args: check the values of each batch; reads them back from the device.
        **kwargs: of :class:`torchmetrics.Metric`.

    Returns:
        ``compute`` gives a float64 scalar in [0, 1]; NaN and torchmetrics' warning before the first ``update``.

    Raises:
        ValueError: an option is unknown or out of range.

    Example:
        >>> import torch
        >>> from calrobust.metrics import CalibrationError
        >>> metric = CalibrationError(n_bins=10, from_logits=False)
        >>> metric.update(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 0]))
        >>> metric.update(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([1, 1]))
        >>> metric.compute()  # right half of the time; each batch alone would be 0.25 or 0.75 off
        tensor(0.2500, dtype=torch.float64)

    Reference: Guo et al., 2017, :arxiv:`1706.04599`, equation 3.
    """

    def __init__(self, n_bins: int = 15, norm: Norm = "l1", *, debiased: bool = False, **kwargs: Any) -> None:
        super().__init__(n_bins, **kwargs)
        check_norm(norm, debiased=debiased)
        self.norm: Norm = norm
        self.debiased = debiased

    def _summands(self, preds: Tensor, target: Tensor) -> dict[str, Tensor]:
        rows = top_label(preds, target, from_logits=self.from_logits, ignore_index=self.ignore_index)
        return bin_confidences(*rows, self.n_bins)._asdict()

    def compute(self) -> Tensor:
        """The error over all batches and ranks."""
        return binned_error(self.bins, self.norm, debiased=self.debiased)


class AdaptiveCalibrationError(_PredictionMetric):
    """Calibration error over bins of equally many samples.

    Formula and ties are those of :func:`~calrobust.functional.adaptive_calibration_error`. Where such bins begin
    depends on all samples, so this metric alone keeps them: nine bytes each.

    Args:
        n_bins: number of bins.
        norm: ``"l1"``, ``"l2"`` or ``"max"``.
        from_logits: whether ``preds`` are logits (default) or probabilities.
        ignore_index: samples with this label are left out.
        validate_args: check the values of each batch; reads them back from the device.
        **kwargs: of :class:`torchmetrics.Metric`.

    Returns:
        ``compute`` gives a float64 scalar in [0, 1]; NaN and torchmetrics' warning before the first ``update``.

    Raises:
        ValueError: an option is unknown or out of range.

    Example:
        >>> import torch
        >>> from calrobust.metrics import AdaptiveCalibrationError
        >>> metric = AdaptiveCalibrationError(n_bins=2, from_logits=False)
        >>> probs = torch.tensor([[0.75, 0.25], [0.75, 0.25], [1.0, 0.0], [1.0, 0.0]])
        >>> metric.update(probs, torch.tensor([0, 1, 0, 0]))
        >>> metric.compute()  # bins {0.75, 0.75} and {1, 1}: (2 * 0.25 + 0) / 4
        tensor(0.1250, dtype=torch.float64)

    Reference: Nguyen and O'Connor, 2015, :arxiv:`1508.05154`, adaptive binning.
    """

    plot_upper_bound = 1.0
    confidences: list[Tensor]
    correct: list[Tensor]

    def __init__(self, n_bins: int = 15, norm: Norm = "l1", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_n_bins(n_bins)
        check_norm(norm)
        self.n_bins = n_bins
        self.norm: Norm = norm
        self.add_state("confidences", [], dist_reduce_fx="cat")
        self.add_state("correct", [], dist_reduce_fx="cat")

    def _summands(self, preds: Tensor, target: Tensor) -> dict[str, Tensor]:
        confidences, correct = top_label(preds, target, from_logits=self.from_logits, ignore_index=self.ignore_index)
        return {"confidences": confidences.double(), "correct": correct}

    def _samples(self) -> tuple[Tensor, Tensor]:
        """All so far, in one piece; synchronisation over ranks has joined them already."""
        confidences, correct = self.confidences, self.correct
        if isinstance(confidences, Tensor) and isinstance(correct, Tensor):
            return confidences, correct
        nothing = torch.empty(0, dtype=torch.float64, device=self.device)
        return torch.cat([nothing, *confidences]), torch.cat([nothing.bool(), *correct])

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # Ranks must send the same dtype; torchmetrics sends float32 for a rank that saw no sample.
        confidences, correct = self._samples()
        self.confidences, self.correct = [confidences], [correct]
        super()._sync_dist(*args, **kwargs)

    def compute(self) -> Tensor:
        """The error over all batches and ranks."""
        return binned_error(equal_mass_bins(*self._samples(), self.n_bins), self.norm)


class ClasswiseCalibrationError(_BinnedMetric):
    """Calibration error of the probabilities of all classes (static calibration error), streaming.

    The formula is that of :func:`~calrobust.functional.classwise_calibration_error`.

    Args:
        num_classes: number C of classes; the state is three float64 sums for each bin of each class.
        n_bins: number of bins of each class.
        norm: ``"l1"``, ``"l2"`` or ``"max"``.
        from_logits: whether ``preds`` are logits (default) or probabilities.
        ignore_index: samples with this label are left out.
        validate_args: check the values of each batch; reads them back from the device.
        **kwargs: of :class:`torchmetrics.Metric`.

    Returns:
        ``compute`` gives a float64 scalar in [0, 1]; NaN and torchmetrics' warning before the first ``update``.

    Raises:
        ValueError: an option is unknown or out of range.

    Example:
        >>> import torch
        >>> from calrobust.metrics import ClasswiseCalibrationError
        >>> metric = ClasswiseCalibrationError(num_classes=2, from_logits=False)
        >>> metric.update(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1]))
        >>> metric.compute()  # both classes happen half of the time
        tensor(0.2500, dtype=torch.float64)

    Reference: Nixon et al., 2019, :arxiv:`1904.01685`, static calibration error.
    """

    def __init__(self, num_classes: int, n_bins: int = 15, norm: Norm = "l1", **kwargs: Any) -> None:
        check_count(10**7, num_classes=num_classes)
        super().__init__(n_bins, num_classes, **kwargs)
        check_norm(norm)
        self.num_classes = num_classes
        self.norm: Norm = norm

    def _summands(self, preds: Tensor, target: Tensor) -> dict[str, Tensor]:
        if preds.shape[1] != self.num_classes:
            raise ValueError(
                f"preds must have num_classes={self.num_classes} columns, got {list(preds.shape)}; "
                f"make the metric with num_classes={preds.shape[1]}"
            )
        bins = bin_classes(preds, target, self.n_bins, from_logits=self.from_logits, ignore_index=self.ignore_index)
        return bins._asdict()

    def compute(self) -> Tensor:
        """The error over all batches and ranks."""
        return classwise_error(self.bins, self.norm)


class BrierScore(_PredictionMetric):
    """Mean squared distance of the probabilities from the label's indicator, streaming.

    The formula is that of :func:`~calrobust.functional.brier_score`.

    Args:
        from_logits: whether ``preds`` are logits (default) or probabilities.
        ignore_index: samples with this label are left out.
        validate_args: check the values of each batch; reads them back from the device.
        **kwargs: of :class:`torchmetrics.Metric`.

    Returns:
        ``compute`` gives a float64 scalar in [0, 2]; NaN and torchmetrics' warning before the first ``update``.

    Example:
        >>> import torch
        >>> from calrobust.metrics import BrierScore
        >>> metric = BrierScore(from_logits=False)
        >>> metric.update(torch.tensor([[0.75, 0.25]]), torch.tensor([1]))
        >>> metric.compute()  # 0.75² + 0.75²
        tensor(1.1250, dtype=torch.float64)

    Reference: Brier, 1950, *Verification of forecasts expressed in terms of probability*, equation 2.
    """

    plot_upper_bound = 2.0
    brier_sum: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _add_scalar_states(self, "brier_sum", "count")

    def _summands(self, preds: Tensor, target: Tensor) -> dict[str, Tensor]:
        values = score(preds, target, squared_errors, from_logits=self.from_logits, ignore_index=self.ignore_index)
        return {"brier_sum": values.sum(dtype=torch.float64), "count": _length(values)}

    def compute(self) -> Tensor:
        """The mean over all samples of all batches and ranks."""
        return self.brier_sum / self.count


class NegativeLogLikelihood(_PredictionMetric):
    """Mean negative log-likelihood of the labels in nats, streaming.

    The formula is that of :func:`~calrobust.functional.negative_log_likelihood`.

    Args:
        from_logits: whether ``preds`` are logits (default) or probabilities, which give inf for a label they put at 0.
        ignore_index: samples with this label are left out.
        validate_args: check the values of each batch; reads them back from the device.
        **kwargs: of :class:`torchmetrics.Metric`.

    Returns:
        ``compute`` gives a float64 scalar ≥ 0; NaN and torchmetrics' warning before the first ``update``.

    Example:
        >>> import torch
        >>> from calrobust.metrics import NegativeLogLikelihood
        >>> metric = NegativeLogLikelihood()
        >>> metric.update(torch.tensor([[0.0, 500.0]]), torch.tensor([0]))
        >>> metric.compute()
        tensor(500., dtype=torch.float64)

    Reference: Guo et al., 2017, :arxiv:`1706.04599`, equation 6.
    """

    nll_sum: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _add_scalar_states(self, "nll_sum", "count")

    def _summands(self, preds: Tensor, target: Tensor) -> dict[str, Tensor]:
        values = score(preds, target, log_losses, from_logits=self.from_logits, ignore_index=self.ignore_index)
        return {"nll_sum": values.sum(dtype=torch.float64), "count": _length(values)}

    def compute(self) -> Tensor:
        """The mean over all samples of all batches and ranks."""
        return self.nll_sum / self.count


class CalibrationSummary(_BinnedMetric):
    """Accuracy, mean confidence, proper scores and calibration errors from one pass over the logits, streaming.

    Args:
        n_bins: number of bins of equal width.
        from_logits: whether ``preds`` are logits (default) or probabilities.
        ignore_index: samples with this label are left out.
        validate_args: check the values of each batch; reads them back from the device.
        **kwargs: of :class:`torchmetrics.Metric`.

    Returns:
        ``compute`` gives a dict of float64 scalars: ``accuracy``, ``confidence``, ``nll`` (nats), ``brier``, ``ece``,
        ``rmsce``, ``mce``; NaN and torchmetrics' warning before the first ``update``.

    Raises:
        ValueError: ``n_bins`` < 1.

    Example:
        >>> import torch
        >>> from calrobust.metrics import CalibrationSummary
        >>> metric = CalibrationSummary(from_logits=False)
        >>> metric.update(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1]))
        >>> {name: round(value.item(), 4) for name, value in metric.compute().items()}
        {'accuracy': 0.5, 'confidence': 0.75, 'nll': 0.837, 'brier': 0.625, 'ece': 0.25, 'rmsce': 0.25, 'mce': 0.25}
    """

    higher_is_better = None
    plot_upper_bound = None
    nll_sum: Tensor
    brier_sum: Tensor

    def __init__(self, n_bins: int = 15, **kwargs: Any) -> None:
        super().__init__(n_bins, **kwargs)
        _add_scalar_states(self, "nll_sum", "brier_sum")

    def _summands(self, preds: Tensor, target: Tensor) -> dict[str, Tensor]:
        rows = row_scores(preds, target, from_logits=self.from_logits, ignore_index=self.ignore_index)
        return {
            **bin_confidences(rows.confidences, rows.correct, self.n_bins)._asdict(),
            "nll_sum": rows.log_losses.sum(dtype=torch.float64),
            "brier_sum": rows.squared_errors.sum(dtype=torch.float64),
        }

    def compute(self) -> dict[str, Tensor]:
        """The values over all samples of all batches and ranks."""
        count = self.counts.sum()
        return {
            "accuracy": self.correct_sums.sum() / count,
            "confidence": self.confidence_sums.sum() / count,
            "nll": self.nll_sum / count,
            "brier": self.brier_sum / count,
            "ece": binned_error(self.bins, "l1"),
            "rmsce": binned_error(self.bins, "l2"),
            "mce": binned_error(self.bins, "max"),
        }


def _seen(state: Tensor | list[Tensor]) -> bool:
    """Whether samples have left anything in a state."""
    return len(state) > 0 if isinstance(state, list) else bool(state.any())


def _add_scalar_states(metric: Metric, *names: str) -> None:
    """Names must differ between metrics that sum different things: MetricCollection shares states of equal value."""
    for name in names:
        metric.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")


def _length(values: Tensor) -> Tensor:
    return values.new_tensor(len(values), dtype=torch.float64)
