"""A metric is the value of the samples it has seen, whatever else was done to it, and in whatever order."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from strategies import Predictions, classifier, seeds
from test_metrics import MAKERS, updated
from torch.testing import assert_close
from torchmetrics import Metric

SLOTS = st.integers(0, 1)
MOVES: list[Callable[[Metric], object]] = [
    lambda metric: metric.half(),
    lambda metric: metric.to(torch.bfloat16),
    lambda metric: metric.set_dtype(torch.float64),
    lambda metric: metric.to("cpu"),
    lambda metric: metric.eval().requires_grad_(False),
]
COPIES: list[Callable[[Metric], Metric]] = [
    lambda metric: metric.clone(),
    copy.deepcopy,
    lambda metric: pickle.loads(pickle.dumps(metric)),
]


class AnyOrder(RuleBasedStateMachine):
    """Two metrics of one kind, and the samples that each of them should have seen."""

    @initialize(name=st.sampled_from(list(MAKERS)))
    def make(self, name: str) -> None:
        """Both empty."""
        self.new = MAKERS[name]
        self.metrics = [self.new(), self.new()]
        self.seen: list[list[Predictions]] = [[], []]

    def expected(self, batches: list[Predictions]) -> Any:
        """One update with all samples, in the reverse order."""
        logits, target = (torch.cat(side).flip(0) for side in zip(*batches, strict=True))
        return updated(self.new(), (logits, target)).compute()

    @rule(slot=SLOTS, n=st.integers(0, 20), seed=seeds(), forward=st.booleans())
    def update(self, slot: int, n: int, seed: int, forward: bool) -> None:
        """By ``update``, or by ``forward``, which gives the value of the batch alone."""
        batch = classifier(n, 5, seed, sharpness=0.5, dtype=torch.float64)
        if forward and n:
            self.check(self.metrics[slot](*batch), [batch])
        else:
            self.metrics[slot].update(*batch)
        self.seen[slot].append(batch)

    @rule(slot=SLOTS)
    def refuse(self, slot: int) -> None:
        """A batch that is refused was never there."""
        for call in (self.metrics[slot].update, self.metrics[slot].forward):
            try:
                call(torch.full((2, 5), torch.nan), torch.tensor([0, 1]))
            except ValueError:
                continue
            raise AssertionError("a NaN passed")

    @rule(slot=SLOTS, as_dict=st.booleans())
    def merge(self, slot: int, as_dict: bool) -> None:
        """The other's samples come too."""
        other = self.metrics[1 - slot]
        self.metrics[slot].merge_state(dict(other.metric_state) if as_dict else other)
        self.seen[slot] = self.seen[slot] + self.seen[1 - slot]

    @rule(slot=SLOTS)
    def reset(self, slot: int) -> None:
        """It forgets."""
        self.metrics[slot].reset()
        self.seen[slot] = []

    @rule(slot=SLOTS, fresh=st.booleans())
    def load(self, slot: int, fresh: bool) -> None:
        """A new metric, or the other, takes over by ``state_dict``."""
        source, target = self.metrics[slot], self.new() if fresh else self.metrics[1 - slot]
        for metric in (source, target):
            metric.persistent(True)
        target.load_state_dict(source.state_dict())
        if fresh:
            self.metrics[slot] = target
        else:
            self.seen[1 - slot] = list(self.seen[slot])
        if not self.samples(self.seen[slot]):  # an empty batch is an update, but leaves nothing that could be loaded
            self.seen[slot if fresh else 1 - slot] = []

    @rule(slot=SLOTS, duplicate=st.sampled_from(COPIES))
    def copy(self, slot: int, duplicate: Callable[[Metric], Metric]) -> None:
        """The copy goes on; what happens to the original does not reach it."""
        original, self.metrics[slot] = self.metrics[slot], duplicate(self.metrics[slot])
        original.update(*classifier(5, 5, 0))

    @rule(slot=SLOTS, move=st.sampled_from(MOVES))
    def move(self, slot: int, move: Callable[[Metric], object]) -> None:
        """To another dtype, device or mode."""
        move(self.metrics[slot])

    @rule()
    def compute_the_second(self) -> None:
        """Now and then."""
        self.compute(1)

    @invariant()
    def compute_the_first(self) -> None:
        """After every step, so that it always has a value to go stale."""
        self.compute(0)

    def compute(self, slot: int) -> None:
        """With a warning if there was no update."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            value = self.metrics[slot].compute()
        assert caught or self.seen[slot]
        self.check(value, self.seen[slot])

    def samples(self, batches: list[Predictions]) -> int:
        """How many."""
        return sum(len(batch.target) for batch in batches)

    def check(self, value: Any, batches: list[Predictions]) -> None:
        """Against one update; NaN without samples."""
        if self.samples(batches):
            # The l2 norms are roots of what may be a rounding error.
            assert_close(value, self.expected(batches), rtol=1e-9, atol=1e-7)
        else:
            assert all(v.isnan() for v in (value.values() if isinstance(value, dict) else [value]))


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=settings().max_examples // 4, stateful_step_count=20)
