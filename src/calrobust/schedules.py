"""Schedules for :class:`~calrobust.EMATeacher`: from the index of an update to the decay it uses.

Each is a small immutable object that can be compared, printed and pickled with the teacher. Any function from
``n = 0, 1, ...`` to a float in ``[0, 1]`` serves as well. The share of the pre-trained model that is left in the
teacher after ``k`` updates is the product of the first ``k`` decays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from calrobust._checks import (
    check_count,
    check_fraction,
    check_nonnegative_integer,
    check_positive,
    check_positive_integer,
)

__all__ = ["beta", "constant", "every", "linear_warmup", "power", "uniform"]


class _Schedule:
    def __call__(self, n: int) -> float:
        """The decay of update ``n``."""
        check_nonnegative_integer(n=n)
        return self._decay(n)

    def _decay(self, n: int) -> float:
        raise NotImplementedError


@dataclass(frozen=True)
class constant(_Schedule):
    r"""The same decay at every update, as a float alone gives it.

    Args:
        decay: :math:`\alpha` in ``[0, 1]``; 1 freezes the teacher, 0 makes it the student.

    Raises:
        ValueError: ``decay`` is outside ``[0, 1]``.

    Example:
        >>> from calrobust import schedules
        >>> schedules.constant(0.99)(1000)
        0.99
    """

    decay: float

    def __post_init__(self) -> None:
        check_fraction(closed=True, decay=self.decay)

    def _decay(self, n: int) -> float:
        return self.decay


@dataclass(frozen=True)
class linear_warmup(_Schedule):
    r"""A straight line from ``start`` to ``end``, then ``end``.

    .. math:: \alpha_n = \text{start} + (\text{end} - \text{start}) \min(n / \text{updates}, 1)

    The paper goes from 0.05 to 0.9 over the first 20 % of training. A low start gives the pre-trained model up at
    once: after one update the teacher is 95 % student, and the ten updates below leave a weight of 2e-5 on it. Where it
    is to be an anchor, start high or use :class:`constant`.

    Args:
        start: the decay of update 0, in ``[0, 1]``.
        end: the decay from update ``updates`` on, in ``[0, 1]``.
        updates: how many updates the line takes, at least 1; training steps over ``update_every``.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: ``updates`` is no int.

    Example:
        >>> import math
        >>> from calrobust import schedules
        >>> schedule = schedules.linear_warmup(0.05, 0.9, updates=10)
        >>> [round(schedule(n), 3) for n in (0, 1, 10, 11)]
        [0.05, 0.135, 0.9, 0.9]
        >>> print(f"{math.prod(map(schedule, range(10))):.0e}")  # weight left on the pre-trained model
        2e-05

    Reference: Oh et al., 2024, :arxiv:`2311.01723`.
    """

    start: float
    end: float
    updates: int

    def __post_init__(self) -> None:
        check_fraction(closed=True, start=self.start, end=self.end)
        check_positive_integer(updates=self.updates)

    def _decay(self, n: int) -> float:
        if n >= self.updates:
            return self.end
        return self.start + (self.end - self.start) * (n / self.updates)


@dataclass(frozen=True)
class power(_Schedule):
    r"""A decay that rises towards 1 by a power law, so that the average spans a fixed share of the past.

    .. math::
        \alpha_n = \min\bigl(\text{end},\, \max(\text{start},\, 1 - (1 + n / \text{scale})^{-\text{exponent}})\bigr)

    The warm-up of timm's ``ModelEmaV3``, whose ``warmup_power`` is ``exponent``, ``warmup_gamma`` is ``scale``,
    ``min_decay`` is ``start`` and ``decay`` is ``end``; but timm's first update copies the student whatever
    ``min_decay`` says, ours only with ``start=0``.

    Args:
        exponent: how fast the decay rises, > 0. At 1 (and ``scale=1``) the teacher is the mean of the students it
            has seen, below 1 it favours the recent ones.
        scale: updates until the share of the newest student has fallen to ``2 ** -exponent``, > 0.
        start: lowest decay, in ``[0, 1]``.
        end: highest decay, in ``[0, 1]``.

    Raises:
        ValueError: an argument is out of its range, or ``start`` is above ``end``.

    Example:
        >>> from calrobust import schedules
        >>> schedule = schedules.power(exponent=1.0)
        >>> [schedule(n) for n in (0, 1, 3)]
        [0.0, 0.5, 0.75]
    """

    exponent: float = 2 / 3
    scale: float = 1.0
    start: float = 0.0
    end: float = 0.9999

    def __post_init__(self) -> None:
        check_positive(exponent=self.exponent, scale=self.scale)
        check_fraction(closed=True, start=self.start, end=self.end)
        if self.start > self.end:
            raise ValueError(f"start <= end must hold, got {self.start!r}, {self.end!r}; swap them")

    def _decay(self, n: int) -> float:
        newest: float = (1 + n / self.scale) ** -self.exponent
        return min(self.end, max(self.start, 1 - newest))


@dataclass(frozen=True)
class uniform(_Schedule):
    r"""The plain mean of the trajectory, the pre-trained model included: stochastic weight averaging.

    .. math:: \alpha_n = \frac{n + 1}{n + 2}

    After ``k`` updates the teacher is the mean of ``k + 1`` models. ``torch.optim.swa_utils.AveragedModel`` leaves the
    first of them out, as ``power(exponent=1.0, end=1.0)`` does.

    Example:
        >>> from calrobust import schedules
        >>> [schedules.uniform()(n) for n in (0, 2, 4)]
        [0.5, 0.75, 0.8333333333333334]

    Reference: Izmailov et al., 2018, :arxiv:`1803.05407`, Algorithm 1.
    """

    def _decay(self, n: int) -> float:
        return (n + 1) / (n + 2)


@dataclass(frozen=True)
class beta(_Schedule):
    r"""A mean of the whole trajectory, the pre-trained model included, weighted by the density of a Beta distribution.

    .. math::
        w_t \propto x_t^{a - 1} (1 - x_t)^{b - 1}, \qquad x_t = \frac{t + 1/2}{T + 1}, \quad t = 0, \dots, T

        \alpha_n = \frac{w_0 + \dots + w_n}{w_0 + \dots + w_{n + 1}}

    where :math:`T` is ``updates``, :math:`t = 0` the model the teacher started from and :math:`t = n + 1` the student
    at update ``n``. After ``updates`` updates the weights are the density at the midpoints; each earlier teacher is the
    mean of what there was by then. From there on the decay is 1: the average is complete and stays. The decays are a
    table, so ``torch.compile`` of an update would compile each entry anew; compile with another schedule.

    Args:
        a: first shape of the distribution, > 0; below 1 it favours the pre-trained model.
        b: second shape, > 0; below 1 it favours the last students. ``a = b = 1`` weighs all alike, as :class:`uniform`.
        updates: how many updates the trajectory has, from 1 to ten million.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: ``updates`` is no int.

    Example:
        >>> from calrobust import schedules
        >>> schedule = schedules.beta(1, 1, updates=3)  # the mean of 1 + 3 models
        >>> [round(schedule(n), 3) for n in (0, 1, 2, 3)]
        [0.5, 0.667, 0.75, 1.0]

    Reference: Shu et al., 2023, :arxiv:`2302.00864`, Beta moving average.
    """

    a: float
    b: float
    updates: int
    _decays: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_positive(a=self.a, b=self.b)
        check_count(10**7, updates=self.updates)  # each has its weight computed here
        decays, log_total = [], -math.inf
        for t in range(self.updates + 1):
            x = (t + 0.5) / (self.updates + 1)
            log_weight = (self.a - 1) * math.log(x) + (self.b - 1) * math.log1p(-x)
            # In logarithms: with large shapes the weights at either end underflow, but their ratios do not.
            larger, smaller = max(log_total, log_weight), min(log_total, log_weight)
            log_sum = larger + math.log1p(math.exp(smaller - larger))
            decays.append(math.exp(log_total - log_sum))
            log_total = log_sum
        object.__setattr__(self, "_decays", tuple(decays[1:]))

    def _decay(self, n: int) -> float:
        return self._decays[n] if n < self.updates else 1.0


@dataclass(frozen=True)
class every(_Schedule):
    """A schedule by training step: the teacher moves at steps 0, k, 2k, ..., and stays as it is in between.

    For a teacher with ``update_every=1``, whose updates are then the training steps. With ``update_every=k`` alone the
    teacher moves after k, 2k, ... steps, and schedules count these moves.

    Args:
        steps: k, at least 1.
        decay: a float in ``[0, 1]``, or a schedule, which is asked for steps 0, k, 2k, ....

    Raises:
        ValueError: ``steps`` is below 1, or ``decay`` is outside ``[0, 1]``.
        TypeError: ``steps`` is no int, or ``decay`` neither a number nor callable.

    Example:
        >>> from calrobust import schedules
        >>> schedule = schedules.every(500, schedules.linear_warmup(0.05, 0.9, updates=5000))
        >>> [round(schedule(step), 3) for step in (0, 1, 499, 500, 1000)]
        [0.05, 1.0, 1.0, 0.135, 0.22]
    """

    steps: int
    decay: float | Callable[[int], float]

    def __post_init__(self) -> None:
        check_positive_integer(steps=self.steps)
        if not callable(self.decay):
            check_fraction(closed=True, decay=self.decay)

    def _decay(self, n: int) -> float:
        if n % self.steps != 0:
            return 1.0
        return float(self.decay(n) if callable(self.decay) else self.decay)
