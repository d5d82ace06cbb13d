"""Decays for :class:`~calrobust.EMATeacher` by the index ``n`` = 0, 1, ... of the update.

Invalid arguments raise ``ValueError`` or ``TypeError``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from calrobust._checks import check_fraction, check_integer, check_positive

__all__ = ["beta", "constant", "every", "linear_warmup", "power", "uniform"]


class _Schedule:
    _decay: Callable[[int], float]

    def __call__(self, n: int) -> float:
        check_integer(0, n=n)
        return float(self._decay(n))


@dataclass(frozen=True)
class constant(_Schedule):
    """One decay: 1 freezes the teacher, 0 copies the student.

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

    The example is the paper's, over the first 20 % of training: one update makes the teacher 95 % student, and ten
    leave 2e-5 of the pre-trained model.

    Example:
        >>> from calrobust import schedules
        >>> [round(schedules.linear_warmup(0.05, 0.9, updates=10)(n), 3) for n in (0, 1, 10, 11)]
        [0.05, 0.135, 0.9, 0.9]

    Reference: Oh et al., 2024, :arxiv:`2311.01723`.
    """

    start: float
    end: float
    updates: int

    def __post_init__(self) -> None:
        check_fraction(closed=True, start=self.start, end=self.end)
        check_integer(1, updates=self.updates)

    def _decay(self, n: int) -> float:
        return self.end if n >= self.updates else self.start + (self.end - self.start) * (n / self.updates)


@dataclass(frozen=True)
class power(_Schedule):
    r"""The warm-up of timm's ``ModelEmaV3``, a power law.

    .. math::
        \alpha_n = \min(\text{end}, \max(\text{start}, 1 - (1 + n / \text{scale})^{-\text{exponent}}))

    ``exponent`` and ``scale`` are > 0, and ``start <= end``.

    Example:
        >>> from calrobust import schedules
        >>> [schedules.power(exponent=1.0)(n) for n in (0, 1, 3)]
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
            raise ValueError(f"start must be <= end, got {self.start!r} and {self.end!r}; swap them")

    def _decay(self, n: int) -> float:
        newest: float = (1 + n / self.scale) ** -self.exponent
        return min(self.end, max(self.start, 1 - newest))


@dataclass(frozen=True)
class uniform(_Schedule):
    r"""The mean of the trajectory with the pre-trained model: stochastic weight averaging.

    .. math:: \alpha_n = \frac{n + 1}{n + 2}

    Example:
        >>> from calrobust import schedules
        >>> [schedules.uniform()(n) for n in (0, 2, 4)]
        [0.5, 0.75, 0.8333333333333334]

    Reference: Izmailov et al., 2018, :arxiv:`1803.05407`.
    """

    def _decay(self, n: int) -> float:
        return (n + 1) / (n + 2)


@dataclass(frozen=True)
class beta(_Schedule):
    r"""The mean of the trajectory, weighted by the density of a Beta distribution.

    .. math::
        w_t \propto x_t^{a - 1} (1 - x_t)^{b - 1}, \quad x_t = \frac{t + 1/2}{T + 1}

        \alpha_n = \frac{w_0 + \dots + w_n}{w_0 + \dots + w_{n + 1}}

    Model 0 is the pre-trained one, and model n + 1 the student at update ``n``. :math:`T` is ``updates``, at
    most ten million; after T updates the decay is 1. Both ``a`` and ``b`` are > 0: ``a`` < 1 favours the pre-trained
    model, ``b`` < 1 the last students.

    Example:
        >>> from calrobust import schedules
        >>> [round(schedules.beta(1, 1, updates=3)(n), 3) for n in (0, 1, 2, 3)]
        [0.5, 0.667, 0.75, 1.0]

    Reference: Shu et al., 2023, :arxiv:`2302.00864`.
    """

    a: float
    b: float
    updates: int

    def __post_init__(self) -> None:
        check_positive(a=self.a, b=self.b)
        check_integer(1, 10**7, updates=self.updates)

    @cached_property
    def _decays(self) -> list[float]:
        x = (torch.arange(self.updates + 1, dtype=torch.float64, device="cpu") + 0.5) / (self.updates + 1)
        log_sums = ((float(self.a) - 1) * x.log() + (float(self.b) - 1) * (-x).log1p()).logcumsumexp(0)  # no underflow
        return list((-log_sums.diff()).exp().tolist())

    def _decay(self, n: int) -> float:
        return self._decays[n] if n < self.updates else 1.0


@dataclass(frozen=True)
class every(_Schedule):
    """Moves the teacher only at the steps 0, ``steps``, 2 * ``steps`` and so on.

    ``decay`` is in [0, 1], or a schedule of the step. The teacher needs ``update_every=1``.

    Example:
        >>> from calrobust import schedules
        >>> [schedules.every(500, 0.9)(step) for step in (0, 1, 499, 500)]
        [0.9, 1.0, 1.0, 0.9]
    """

    steps: int
    decay: float | Callable[[int], float]

    def __post_init__(self) -> None:
        check_integer(1, steps=self.steps)
        if not callable(self.decay):
            check_fraction(closed=True, decay=self.decay)

    def _decay(self, n: int) -> float:
        decay = self.decay if n % self.steps == 0 else 1.0
        return decay(n) if callable(decay) else decay
