# TorchScript cannot read postponed annotations.
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from calrobust._checks import (
    check_flag,
    check_float64,
    check_ignore_index,
    check_instance,
    check_n_bins,
    check_softmax_exists,
    check_tensor,
)
from calrobust._state import keeping_dtype
from calrobust.functional.scoring import Bins, Block, as_rows, confidences_of, probability_blocks, top_labels


class PredictionMetric(Metric):
    """A metric of float64 sums, which a refused batch leaves alone."""

    __jit_unused_properties__: ClassVar = [*Metric.__jit_unused_properties__, "bins"]
    higher_is_better: bool | None = False
    is_differentiable = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot = Metric._plot
    scalar_sums: tuple[str, ...] = ()  # MetricCollection shares states of equal name

    def __init__(
        self, *, from_logits: bool = True, ignore_index: int | None = None, validate_args: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        check_flag(from_logits=from_logits, validate_args=validate_args)
        check_ignore_index(ignore_index)
        self.from_logits, self.ignore_index, self.validate_args = from_logits, ignore_index, validate_args
        self._dtype = torch.float64
        self._add_sums(self.scalar_sums)
        if ignore_index is not None:  # so that other labels' metrics share no state
            self._add_sums([f"without_{ignore_index}".replace("-", "minus_")], 0)

    def _add_sums(self, names: Iterable[str], *shape: int) -> None:
        for name in names:
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    @abstractmethod
    def _summands(self, blocks: Iterable[Block]) -> dict[str, Tensor]:
        """What a batch adds to each state."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds a batch.

        As for :func:`~calrobust.functional.calibration_error`. ``validate_args`` checks values on every device; NaN,
        +inf and rows of -inf raise ``ValueError``.
        """
        try:
            preds, target = as_rows(target, self.ignore_index, preds=preds)
            if preds.device != self.device:
                raise ValueError(
                    f"preds must be on {self.device}, as the metric's state, got {preds.device}; "
                    "move the metric with .to()"
                )
            summands = self._summands(probability_blocks(preds, target, self.from_logits, self.validate_args))
            if self.validate_args and torch.cat([each.flatten() for each in summands.values()]).isnan().any():
                check_softmax_exists(target, preds=preds)
        except BaseException:
            self._update_count -= 1  # torchmetrics has counted the call
            raise
        for name, summand in summands.items():
            state = getattr(self, name)
            setattr(self, name, [*state, summand] if isinstance(state, list) else state + summand)

    @torch.jit.unused
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Adds a batch and returns its own value."""
        before = {**self.__dict__}  # states are replaced
        try:
            return super().forward(*args, **kwargs)
        except BaseException:
            self.__dict__.update(before)
            raise

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Adds a metric of the same kind, or its ``metric_state``; ``TypeError`` or ``ValueError`` for others."""
        states = getattr(incoming_state, "metric_state", incoming_state)
        own, incoming = map(self._as_states, (self.metric_state, states))
        seen = getattr(incoming_state, "update_count", _any_samples(incoming))
        states = {name: own[name] + state for name, state in incoming.items()}
        # torchmetrics would keep the computed value.
        self.__dict__.update(states, _computed=None, _update_count=self._update_count + seen)

    def _load_from_state_dict(self, state_dict: dict[str, Any], *args: Any) -> None:
        before = self.metric_state
        super()._load_from_state_dict(state_dict, *args)
        if all(after is before[name] for name, after in self.metric_state.items()):
            return  # the states are not persistent
        try:
            states = self._as_states(self.metric_state)
        except (TypeError, ValueError) as error:
            self.__dict__.update(before)
            args[-1].append(str(error))
        else:
            self.__dict__.update(states, _computed=None, _update_count=_any_samples(states))

    def _as_states(self, states: Any) -> dict[str, Any]:
        check_instance(Mapping, "pass a metric or its metric_state", incoming_state=states)
        kept: dict[str, Any] = {}
        for name, state in states.items():
            pieces = state if isinstance(state, list) else [state]
            for piece in pieces:
                check_tensor(**{name: piece})
            pieces = [piece.to(self.device, torch.float64) for piece in pieces]
            sampled = isinstance(self._defaults.get(name), list)  # one tensor when synchronised
            kept[name] = pieces if sampled or isinstance(state, list) else pieces[0]
        expected, got = (
            {name: "list" if isinstance(state, list) else list(state.shape) for name, state in each.items()}
            for each in (self._defaults, kept)
        )
        if expected != got:
            raise ValueError(
                f"incoming_state must have the states {expected}, got {got}; make both metrics with the same arguments"
            )
        return kept

    def set_dtype(self, dst_type: str | torch.dtype) -> "PredictionMetric":
        """Raises ``ValueError`` for a dtype other than float64."""
        if dst_type != torch.float64:
            raise ValueError(
                f"dst_type must be torch.float64, the dtype of the metric's sums, got {dst_type}; "
                "convert the result of compute() instead"
            )
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> "PredictionMetric":
        check_float64(metric=fn(torch.empty(0, device=self.device)))
        super()._apply(keeping_dtype(fn), exclude_state)
        self._dtype = torch.float64
        return self


class BinnedMetric(PredictionMetric):
    plot_upper_bound: float | None = 1.0
    counts: Tensor
    confidence_sums: Tensor
    correct_sums: Tensor

    def _add_bins(self, n_bins: int, *leading: int) -> None:
        check_n_bins(n_bins)
        self.n_bins = n_bins
        self._add_sums(Bins._fields, *leading, n_bins)

    @property
    def bins(self) -> Bins:
        """The sums so far, on this rank."""
        return Bins(self.counts, self.confidence_sums, self.correct_sums)


class SampledMetric(PredictionMetric):
    """Its state is a score of each sample, negative for wrong predictions."""

    plot_upper_bound = 1.0
    sampled = "confidences"
    _score = staticmethod(confidences_of)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state(self.sampled, [], dist_reduce_fx="cat")

    def reset(self) -> None:
        """Forgets all samples."""
        setattr(self, self.sampled, [])  # torchmetrics would empty the list, which its Running keeps
        super().reset()

    def _summands(self, blocks: Iterable[Block]) -> dict[str, Tensor]:
        scores, correct = top_labels(blocks, self._score)
        return {self.sampled: scores.where(correct, -scores).double()}

    def _all_samples(self) -> tuple[Tensor, Tensor]:
        nothing = torch.empty(0, dtype=torch.float64, device=self.device)
        samples = torch.cat([nothing, *self._as_states(self.metric_state)[self.sampled]])
        return samples.abs(), ~samples.signbit()


class MeanMetric(PredictionMetric):
    @abstractmethod
    def _values(self, block: Block) -> Tensor:
        """``[n]``."""

    def _summands(self, blocks: Iterable[Block]) -> dict[str, Tensor]:
        values = torch.cat([self._values(block) for block in blocks]).double()
        return dict(zip(self.scalar_sums, (values.sum(), values.new_full((), len(values))), strict=True))

    def compute(self) -> Tensor:
        """The value over all batches and ranks."""
        return torch.div(*(getattr(self, name) for name in self.scalar_sums))


def _any_samples(states: dict[str, Any]) -> int:
    return int(any(len(state) if isinstance(state, list) else state.any() for state in states.values()))
