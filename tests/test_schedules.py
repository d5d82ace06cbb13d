from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import decay_schedules
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torch.distributions import Beta

from calrobust import EMATeacher, schedules

Schedule = Callable[[int], float]


def trajectory_weights(schedule: Schedule, updates: int) -> list[float]:
    """The weight of each model after ``updates`` updates, the initial one first."""
    decays = [schedule(n) for n in range(updates)]
    new = [1.0, *(1 - decay for decay in decays)]
    return [share * math.prod(decays[k:]) for k, share in enumerate(new)]


@given(decay_schedules(), st.integers(0, 10**7))
def test_every_decay_is_a_float_in_the_unit_interval(schedule: Schedule, n: int) -> None:
    """This holds for every schedule, whatever its arguments, at every index."""
    decay = schedule(n)
    assert type(decay) is float
    assert 0 <= decay <= 1


@given(decay_schedules(), st.integers(0, 30))
def test_a_schedule_survives_pickle_and_reads_as_it_was_written(schedule: Schedule, n: int) -> None:
    """Copies are equal and give the same decays; the repr evaluates to the schedule."""
    copies = [pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule), eval(repr(schedule), vars(schedules))]
    for twin in copies:
        assert twin == schedule
        assert hash(twin) == hash(schedule)
        assert twin(n) == schedule(n)


@given(st.floats(0, 1), st.integers(0, 10**6))
def test_constant_is_the_same_at_every_update(decay: float, n: int) -> None:
    """This includes 0 and 1."""
    assert schedules.constant(decay)(n) == decay


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 1000))
def test_the_warmup_is_a_line_from_start_to_end(start: float, end: float, updates: int) -> None:
    """It is exact at both ends, has one slope between them, and stays at its end."""
    schedule = schedules.linear_warmup(start, end, updates)
    assert schedule(0) == start
    assert schedule(updates) == schedule(updates + 12345) == end
    for n in range(updates):
        assert schedule(n + 1) - schedule(n) == pytest.approx((end - start) / updates, abs=1e-12)


def test_the_papers_warmup_gives_its_anchor_up_and_says_so() -> None:
    """One update leaves 5 % of the pre-trained model, ten leave 2e-5; the docstring tells both (trap 13)."""
    schedule = schedules.linear_warmup(0.05, 0.9, updates=10)
    assert trajectory_weights(schedule, 1)[0] == 0.05
    assert f"{trajectory_weights(schedule, 10)[0]:.0e}" == "2e-05"
    documentation = schedules.linear_warmup.__doc__ or ""
    assert "95 % student" in documentation
    assert "2e-5" in documentation


@given(
    exponent=st.floats(0.1, 3),
    scale=st.floats(0.1, 1000),
    start=st.floats(0, 0.5),
    end=st.floats(0.5, 1),
    n=st.integers(1, 10**6),
)
def test_power_is_the_warmup_of_timm(exponent: float, scale: float, start: float, end: float, n: int) -> None:
    """It equals ModelEmaV3 at step n + 1 from the second update on; the first of ModelEmaV3 is always a copy."""
    peer = ModelEmaV3(
        nn.Linear(1, 1), decay=end, min_decay=start, use_warmup=True, warmup_gamma=scale, warmup_power=exponent
    )
    schedule = schedules.power(exponent, scale, start, end)
    assert schedule(n) == pytest.approx(peer.get_decay(n + 1), rel=1e-14)
    assert schedule(0) == start
    assert peer.get_decay(1) == 0


def test_power_starts_as_timm_does_by_default() -> None:
    """The default arguments are timm's."""
    peer = ModelEmaV3(nn.Linear(1, 1), use_warmup=True)
    assert [schedules.power()(n) for n in range(100)] == pytest.approx([peer.get_decay(n + 1) for n in range(100)])


@given(st.integers(0, 200))
def test_uniform_weighs_every_model_alike(updates: int) -> None:
    """This includes the initial model."""
    weights = trajectory_weights(schedules.uniform(), updates)
    assert weights == pytest.approx([1 / (updates + 1)] * (updates + 1), rel=1e-12)


@given(st.integers(1, 200))
def test_power_of_one_leaves_the_first_model_out_of_the_mean(updates: int) -> None:
    """Its docstring and that of ``uniform`` say so."""
    weights = trajectory_weights(schedules.power(exponent=1.0, end=1.0), updates)
    assert weights == pytest.approx([0, *[1 / updates] * updates], rel=1e-12)


@given(a=st.floats(0.1, 20), b=st.floats(0.1, 20), updates=st.integers(1, 60))
def test_beta_weighs_the_trajectory_by_the_density(a: float, b: float, updates: int) -> None:
    """After all updates the weights are torch's Beta density at the midpoints; later updates change nothing."""
    midpoints = (torch.arange(updates + 1, dtype=torch.float64) + 0.5) / (updates + 1)
    shape = torch.tensor([a, b], dtype=torch.float64)
    expected = Beta(*shape).log_prob(midpoints).softmax(0).tolist()
    schedule = schedules.beta(a, b, updates)
    assert trajectory_weights(schedule, updates) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert trajectory_weights(schedule, updates + 5)[: updates + 1] == trajectory_weights(schedule, updates)


@given(st.integers(1, 100))
def test_beta_of_one_and_one_is_uniform(updates: int) -> None:
    """They are equal as long as the trajectory lasts."""
    schedule = schedules.beta(1, 1, updates)
    assert [schedule(n) for n in range(updates)] == pytest.approx([schedules.uniform()(n) for n in range(updates)])
    assert schedule(updates) == 1


def test_beta_keeps_the_ratio_of_weights_that_underflow() -> None:
    """A density below the smallest float at both ends still gives the right first and last decays."""
    first, second = 0.5 / 1001, 1.5 / 1001
    assert (first * (1 - first)) ** 149 == 0
    schedule = schedules.beta(150, 150, updates=1000)
    ratio = ((first * (1 - first)) / (second * (1 - second))) ** 149
    assert schedule(0) == pytest.approx(ratio / (1 + ratio), rel=1e-9, abs=0)
    assert schedule(999) == 1


@pytest.mark.parametrize("decay", [0.25, schedules.constant(0.25), schedules.linear_warmup(0.0, 1.0, updates=12)])
def test_every_moves_the_teacher_at_steps_0_k_2k(decay: float | Schedule) -> None:
    """The schedule is asked by training step; in between the teacher stays bit for bit."""
    schedule = schedules.every(3, decay)
    student = nn.Linear(1, 1)
    teacher = EMATeacher(student, schedule)
    nn.init.constant_(student.weight, 5.0)
    expected = teacher.module.get_parameter("weight").item()
    for step in range(13):
        if step % 3 == 0:
            share = decay(step) if callable(decay) else decay
            expected = share * expected + (1 - share) * 5
        before = teacher.module.get_parameter("weight").clone()
        teacher.update(student)
        assert teacher.module.get_parameter("weight").item() == pytest.approx(expected)
        assert step % 3 == 0 or torch.equal(teacher.module.get_parameter("weight"), before)


def test_a_schedule_cannot_be_changed() -> None:
    """Its arguments are checked only once."""
    with pytest.raises(AttributeError):
        schedules.constant(0.9).decay = 2.0  # type: ignore[misc]  # the assignment is the test
