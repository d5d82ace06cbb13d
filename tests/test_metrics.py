from __future__ import annotations

import copy
import inspect
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from metrics_on_a_rank import every_metric
from strategies import Predictions, classifier, predictions
from torch import Tensor, nn
from torch.testing import assert_close
from torchmetrics import Metric, MetricCollection
from torchmetrics.wrappers import Running

from calrobust import _checks
from calrobust.functional.calibration import (
    adaptive_calibration_error,
    bin_confidences,
    calibration_error,
    classwise_calibration_error,
)
from calrobust.functional.scoring import brier_score, negative_log_likelihood, selective_risk, top_label
from calrobust.metrics import (
    AdaptiveCalibrationError,
    BrierScore,
    CalibrationError,
    CalibrationSummary,
    ClasswiseCalibrationError,
    NegativeLogLikelihood,
    SelectiveRisk,
)

Make = Callable[..., Metric]
MAKERS: dict[str, Make] = {
    "l1": CalibrationError,
    "l2": lambda **options: CalibrationError(n_bins=7, norm="l2", **options),
    "debiased": lambda **options: CalibrationError(norm="l2", debiased=True, **options),
    "max": lambda **options: CalibrationError(norm="max", **options),
    "adaptive": AdaptiveCalibrationError,
    "classwise": lambda **options: ClasswiseCalibrationError(num_classes=5, **options),
    "brier": BrierScore,
    "nll": NegativeLogLikelihood,
    "aurc": SelectiveRisk,
    "augrc": lambda **options: SelectiveRisk(generalized=True, **options),
    "summary": CalibrationSummary,
}
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "l1": calibration_error,
    "l2": lambda *args, **options: calibration_error(*args, n_bins=7, norm="l2", **options),
    "debiased": lambda *args, **options: calibration_error(*args, norm="l2", debiased=True, **options),
    "max": lambda *args, **options: calibration_error(*args, norm="max", **options),
    "adaptive": adaptive_calibration_error,
    "classwise": classwise_calibration_error,
    "brier": brier_score,
    "nll": negative_log_likelihood,
    "aurc": selective_risk,
    "augrc": lambda *args, **options: selective_risk(*args, generalized=True, **options),
}
every_maker = pytest.mark.parametrize("make", list(MAKERS.values()), ids=list(MAKERS))


def updated(metric: Metric, *batches: tuple[Tensor, Tensor]) -> Metric:
    """Updates the metric with the batches and returns it."""
    for batch in batches:
        metric.update(*batch)
    return metric


def pieces(p: Predictions, size: int) -> list[tuple[Tensor, Tensor]]:
    """Cuts samples into batches of ``size``; the last one may be smaller."""
    return list(zip(p.logits.split(size), p.target.split(size), strict=True))


@pytest.mark.parametrize("name", list(FUNCTIONS))
@pytest.mark.parametrize("from_logits", [True, False])
def test_is_its_function_of_all_samples(name: str, from_logits: bool) -> None:
    """This holds for logits and probabilities, with samples to ignore, and for batches of any size (trap 20)."""
    logits, target = classifier(200, 5, 0, dtype=torch.float64)
    p = Predictions(logits if from_logits else logits.softmax(1), target.where(target != 4, -100))
    options: dict[str, Any] = {"from_logits": from_logits, "ignore_index": -100}
    metric = updated(MAKERS[name](**options), *pieces(p, 33))
    assert_close(metric.compute(), FUNCTIONS[name](*p, **options), rtol=1e-12, atol=1e-15)


@given(predictions(min_samples=0, min_classes=5), st.integers(1, 20), st.sampled_from(list(MAKERS)))
def test_any_split_into_batches_gives_the_same_value(p: Predictions, size: int, name: str) -> None:
    """The value is of all samples, never a mean over batches (trap 22)."""
    p = Predictions(p.logits[:, :5], p.target % 5)
    whole = updated(MAKERS[name](), p).compute()
    parts = updated(MAKERS[name](), *pieces(p, size)).compute()
    assert_close(parts, whole, rtol=1e-6, atol=1e-12, equal_nan=True)


def test_summary_is_its_parts() -> None:
    """One pass gives what the single metrics give."""
    p = classifier(300, 5, 0)
    summary = updated(CalibrationSummary(n_bins=10), p).compute()
    bins = bin_confidences(*top_label(*p), n_bins=10)
    assert list(summary) == ["accuracy", "confidence", "nll", "brier", "ece", "rmsce", "mce"]
    assert_close(summary["accuracy"], (p.logits.argmax(1) == p.target).double().mean())
    assert_close(summary["confidence"], bins.confidence_sums.sum() / 300)
    assert_close(summary["nll"], negative_log_likelihood(*p))
    assert_close(summary["brier"], brier_score(*p))
    for key, norm in (("ece", "l1"), ("rmsce", "l2"), ("mce", "max")):
        assert_close(summary[key], calibration_error(*p, n_bins=10, norm=norm))  # type: ignore[arg-type]  # a norm each


@every_maker
def test_state_does_not_grow_with_the_samples(make: Make) -> None:
    """Sums take at most 400 bytes for 15 bins. What needs an order keeps eight bytes a sample."""
    metric, batch = make(), classifier(100, 5, 0)
    sizes = []
    for _ in range(3):
        metric.update(*batch)
        states = [state if isinstance(state, list) else [state] for state in metric.metric_state.values()]
        sizes.append(sum(t.numel() * t.element_size() for state in states for t in state))
    if isinstance(metric, (AdaptiveCalibrationError, SelectiveRisk)):
        assert sizes == [800, 1600, 2400]
    else:
        assert sizes[0] == sizes[1] == sizes[2] <= (400 if not isinstance(metric, ClasswiseCalibrationError) else 1800)


@every_maker
def test_compute_before_update_is_nan_with_torchmetrics_warning(make: Make) -> None:
    """It is never 0: at the start, after a reset and after batches that were all refused."""
    metric = make()
    reset = updated(make(), classifier(10, 5, 0))
    reset.reset()
    refused = make()
    with pytest.raises(ValueError, match="NaN"):
        refused.update(torch.full((2, 5), torch.nan), torch.tensor([0, 1]))
    for empty in (metric, reset, refused):
        with pytest.warns(UserWarning, match="was called before the ``update`` method"):
            value = empty.compute()
        assert all(v.isnan() for v in (value.values() if isinstance(value, dict) else [value]))


BAD: dict[str, tuple[Tensor, Tensor, str]] = {
    "shape, seen at once": (torch.zeros(5), torch.tensor([0] * 5), r"preds must have shape \[N, C, \.\.\.\]"),
    "label, among the values": (torch.zeros(2, 5), torch.tensor([0, 5]), r"target must be in \[0, 5\).*got 5"),
    "nan, in the sums": (torch.full((2, 5), torch.nan), torch.tensor([0, 1]), "got NaN in row 0, whose label is 0"),
}


@every_maker
@pytest.mark.parametrize(("preds", "target", "message"), list(BAD.values()), ids=list(BAD))
def test_a_refused_batch_is_named_and_leaves_the_state_alone(
    make: Make, preds: Tensor, target: Tensor, message: str
) -> None:
    """This holds for update, and for forward, in which torchmetrics empties the state first (traps 20, 21)."""
    metric = updated(make(), classifier(20, 5, 0))
    before, expected = copy.deepcopy(metric.metric_state), metric.compute()
    for call in (metric.update, metric.forward):
        with pytest.raises((TypeError, ValueError), match=message):
            call(preds, target)
        assert_close(metric.metric_state, before, rtol=0, atol=0)
        assert metric.update_count == 1
    assert_close(metric.compute(), expected, rtol=0, atol=0)
    again = updated(metric, classifier(20, 5, 1)).compute()
    assert_close(again, updated(make(), classifier(20, 5, 0), classifier(20, 5, 1)).compute())


class Exhausted(Tensor):
    """Logits too large for the memory that a softmax needs."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Fails where the library asks for memory."""
        if func is torch.softmax:
            raise torch.OutOfMemoryError("out of memory")
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]  # torch's own


@every_maker
def test_a_batch_that_fails_for_another_reason_leaves_the_state_alone_too(make: Make) -> None:
    """A user who catches it and goes on has lost that batch, and nothing before it."""
    p = classifier(20, 5, 0)
    metric = updated(make(), p)
    before, expected = copy.deepcopy(metric.metric_state), metric.compute()
    for call in (metric.update, metric.forward):
        with pytest.raises(torch.OutOfMemoryError):
            call(p.logits.as_subclass(Exhausted), p.target)
        assert_close(metric.metric_state, before, rtol=0, atol=0)
        assert metric.update_count == 1
    assert_close(metric.compute(), expected, rtol=0, atol=0)


def test_logits_where_probabilities_are_due_are_refused() -> None:
    """Rows out of [0, 1], and rows such as CLIP's cosines, which lie within it but do not sum to 1 (trap 20)."""
    metric = CalibrationError(from_logits=False)
    for logits in (torch.randn(4, 5), torch.rand(4, 5)):
        with pytest.raises(ValueError, match=r"must be probabilities with from_logits=False.*set from_logits=True"):
            metric.update(logits, torch.zeros(4, dtype=torch.int64))


def test_cosines_are_taken_for_logits() -> None:
    """They lie in [0, 1], but their softmax is taken, in one batch or in four (trap 20)."""
    p = Predictions(torch.rand(40, 5, dtype=torch.float64), torch.arange(40) % 5)
    expected = updated(CalibrationError(), Predictions(p.logits + 100, p.target)).compute()
    for size in (40, 10):
        assert_close(updated(CalibrationError(), *pieces(p, size)).compute(), expected)


def test_validation_can_be_switched_off() -> None:
    """Then NaN reaches the value, which is never finite and wrong (trap 21)."""
    metric = CalibrationError(validate_args=False)
    metric.update(torch.full((2, 3), 1 / 3), torch.tensor([0, 1]))
    assert metric.compute().isfinite()
    metric.update(torch.full((1, 3), torch.nan), torch.tensor([0]))
    assert metric.compute().isnan()


def test_ignored_rows_are_not_validated() -> None:
    """They may hold anything."""
    metric = CalibrationError(ignore_index=-1)
    logits, target = classifier(20, 3, 0)
    metric.update(torch.cat([logits, torch.full((1, 3), torch.nan)]), torch.cat([target, torch.tensor([-1])]))
    assert_close(metric.compute(), calibration_error(logits, target))


@every_maker
def test_forward_gives_the_batch_and_keeps_the_whole(make: Make) -> None:
    """Any metric of torchmetrics does so."""
    first, second = classifier(20, 5, 0), classifier(30, 5, 1)
    metric = make()
    assert_close(metric(*first), updated(make(), first).compute())
    assert_close(metric(*second), updated(make(), second).compute())
    assert_close(metric.compute(), updated(make(), first, second).compute())


@every_maker
def test_clone_pickle_and_state_dict_keep_the_state(make: Make) -> None:
    """The state_dict holds the state if it is persistent."""
    metric = updated(make(), classifier(20, 5, 0))
    expected = metric.compute()
    copies = [metric.clone(), pickle.loads(pickle.dumps(metric))]
    metric.persistent(True)
    loaded = make()
    loaded.persistent(True)
    loaded.load_state_dict(metric.state_dict())
    for other in [*copies, loaded]:
        other._computed = None
        assert_close(other.compute(), expected, rtol=0, atol=0)


@every_maker
def test_a_state_saved_while_synchronised_is_loaded_and_merged(make: Make) -> None:
    """Then the samples of `AdaptiveCalibrationError` are one tensor instead of a list."""
    p, more = classifier(20, 5, 0), classifier(10, 5, 1)
    metric = updated(make(), p)
    metric.persistent(True)
    metric.sync(dist_sync_fn=lambda tensor, group: [tensor], distributed_available=lambda: True)
    loaded, merged = make(), updated(make(), more)
    loaded.persistent(True)
    loaded.load_state_dict(metric.state_dict())
    merged.merge_state(metric)
    assert_close(loaded.compute(), updated(make(), p).compute())
    assert_close(updated(loaded, more).compute(), updated(make(), p, more).compute())
    assert_close(merged.compute(), updated(make(), p, more).compute())


class Judged(nn.Module):
    """A model that holds a metric of its own."""

    def __init__(self, metric: Metric) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 5)
        self.metric = metric

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        logits: Tensor = self.layer(x)
        return logits


@every_maker
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:", "ignore:This property will be removed:DeprecationWarning")
def test_scripts_alone_and_inside_a_module(make: Make) -> None:
    """Every metric of torchmetrics can be scripted. The scripted module gives what the module gives."""
    torch.jit.script(make())
    module, x = Judged(make()), torch.randn(3, 4)
    assert_close(torch.jit.script(module)(x), module(x))


@every_maker
def test_a_device_without_float64_is_refused_by_name(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds for batches there and for a move of the metric there (`meta` plays the device)."""
    monkeypatch.setattr(_checks, "WITHOUT_FLOAT64", {"meta"})
    metric, p = make(), classifier(20, 5, 0)
    message = r"must be on a device that has float64, in which sums are taken, got meta; move it with \.cpu\(\)$"
    with pytest.raises(ValueError, match="^preds " + message):
        metric.update(p.logits.to("meta"), p.target.to("meta"))
    with pytest.raises(ValueError, match="^metric " + message):
        nn.ModuleList([metric]).to("meta")
    assert metric.device.type == "cpu"
    updated(metric, p)


@every_maker
def test_further_dimensions_are_samples(make: Make) -> None:
    """Metrics take ``[N, C, H, W]`` with ``[N, H, W]``, as torch's cross-entropy does."""
    logits, target = classifier(24, 5, 0)
    image, labels = logits.view(2, 3, 4, 5).movedim(-1, 1), target.view(2, 3, 4)
    assert_close(updated(make(), (image, labels)).compute(), updated(make(), (logits, target)).compute())
    with pytest.raises(ValueError, match=r"^target must have shape \[2, 3, 4\], one label for each row, got \[24\]$"):
        make().update(image, target)


@pytest.mark.parametrize("make", [CalibrationError, AdaptiveCalibrationError, CalibrationSummary])
def test_a_number_of_classes_is_not_taken_for_a_number_of_bins(make: Any) -> None:
    """``MulticlassCalibrationError(10)`` is over ten classes; options are keyword-only (here and in the functions)."""
    with pytest.raises(TypeError, match="positional argument"):
        make(10)
    assert all(p.kind is not p.POSITIONAL_OR_KEYWORD for p in inspect.signature(make).parameters.values())
    assert {"n_bins", "from_logits", "ignore_index", "validate_args"} <= set(inspect.signature(make).parameters)


def test_a_state_of_another_shape_is_not_loaded() -> None:
    """A state of ten bins does not fit a metric of fifteen, which stays as it was."""
    metric, other = updated(CalibrationError(), classifier(20, 5, 0)), CalibrationError(n_bins=10)
    expected = metric.compute()
    for each in (metric, other):
        each.persistent(True)
    with pytest.raises(RuntimeError, match=r"must have the states .*\[15\].* got .*\[10\]"):
        metric.load_state_dict(other.state_dict())
    assert_close(updated(metric).compute(), expected, rtol=0, atol=0)
    assert metric.counts.shape == (15,)


CASTS: list[Callable[[Metric], object]] = [
    lambda m: m.half(),
    lambda m: m.to(torch.float16),
    lambda m: m.bfloat16(),
    lambda m: nn.ModuleList([m]).half(),
    lambda m: nn.ModuleList([m]).to(torch.bfloat16),
]


@every_maker
@pytest.mark.parametrize("cast", CASTS)
def test_no_cast_lowers_the_precision_of_the_sums(make: Make, cast: Callable[[Metric], object]) -> None:
    """This holds before and after a reset; half-precision counters would stop at 2,048 (trap 19)."""
    p = classifier(50, 5, 0)
    metric = updated(make(), p)
    expected, before = metric.compute(), copy.deepcopy(metric.metric_state)
    cast(metric)
    assert metric.dtype == torch.float64
    assert_close(metric.metric_state, before, rtol=0, atol=0)
    metric.reset()
    assert_close(updated(metric, p).compute(), expected, rtol=0, atol=0)


def test_counts_and_small_terms_are_not_lost_in_full_bins() -> None:
    """A million confident samples in batches give the value of one float64 sum, to 1e-9 (trap 19)."""
    generator = torch.Generator().manual_seed(0)
    confidences = torch.sigmoid((2 * torch.randn(10**6, generator=generator) + 3).abs())
    target = (torch.rand(10**6, generator=generator) > confidences).long()
    probs = torch.stack([confidences, 1 - confidences], dim=1)
    metric = updated(CalibrationError(from_logits=False), *pieces(Predictions(probs, target), 50_000))
    gaps = confidences.double() - (target == 0).double()
    index = (confidences.double() * 15).floor().clamp(max=14).long()
    expected = sum(gaps[index == b].sum().abs().item() for b in range(15)) / 10**6
    assert metric.compute().item() == pytest.approx(expected, rel=1e-9)


def test_collection_shares_sums_only_between_metrics_of_the_same_sums() -> None:
    """Perfect predictions make both the Brier score and the likelihood 0, but they are different sums."""
    makers = {**MAKERS, "mean": lambda: AdaptiveCalibrationError(n_bins=3)}
    collection = MetricCollection({name: make() for name, make in makers.items() if name != "summary"})
    perfect = Predictions(200.0 * torch.eye(5), torch.arange(5))
    batches = [perfect, classifier(30, 5, 0), classifier(40, 5, 1)]
    for batch in batches:
        collection.update(*batch)
    groups = {frozenset(group) for group in collection.compute_groups.values()}
    assert groups == {
        frozenset(group)
        for group in (
            ["l1", "debiased", "max"],
            ["l2"],
            ["adaptive", "mean"],
            ["aurc", "augrc"],
            ["classwise"],
            ["brier"],
            ["nll"],
        )
    }
    for name, value in collection.compute().items():
        assert_close(value, updated(makers[name](), *batches).compute())


def test_a_collection_forwards_resets_and_is_copied_as_its_metrics() -> None:
    """It gives batch values by name, and values of all samples after a reset or in a clone, while states are shared."""
    makers = {name: make for name, make in MAKERS.items() if name != "summary"}
    collection = MetricCollection({name: make() for name, make in makers.items()}, prefix="val/")
    batches = [classifier(n, 5, n) for n in (30, 40, 50)]
    for _ in range(2):
        for batch in batches[:2]:
            values = collection(*batch)
            assert_close(values, {f"val/{name}": updated(make(), batch).compute() for name, make in makers.items()})
        twin = pickle.loads(pickle.dumps(collection.clone(prefix="test/")))
        twin.update(*batches[2])
        for copied, prefix, seen in ((collection, "val/", batches[:2]), (twin, "test/", batches)):
            expected = {f"{prefix}{name}": updated(make(), *seen).compute() for name, make in makers.items()}
            assert_close(copied.compute(), expected)
        collection.reset()


@every_maker
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_batches_are_summed_as_their_float32_values(make: Make, dtype: torch.dtype) -> None:
    """The only loss is the rounding of the logits. The value is float64, also after a cast of the metric."""
    batches = [classifier(30, 5, seed, dtype=dtype) for seed in range(2)]
    expected = updated(make(), *((logits.float(), target) for logits, target in batches)).compute()
    for metric in (make(), make().to(dtype)):
        value = updated(metric, *batches).compute()
        assert_close(value, expected, rtol=0, atol=0)
        assert {v.dtype for v in (value.values() if isinstance(value, dict) else [value])} == {torch.float64}


@every_maker
def test_is_a_torchmetrics_metric_in_all_else(make: Make) -> None:
    """It has fixed constants, a hash, arithmetic, no gradient, and a state_dict that is empty unless asked for."""
    metric, p = make(), classifier(20, 5, 0)
    for constant in ("is_differentiable", "higher_is_better"):
        with pytest.raises(RuntimeError, match="Can't change const"):
            setattr(metric, constant, True)
    assert metric.dtype == torch.float64
    with pytest.raises(ValueError, match=r"dst_type must be torch\.float64"):
        metric.set_dtype(torch.float32)
    assert metric.set_dtype(torch.float64) is metric
    assert hash(updated(metric, p)) != hash(updated(make(), p))
    assert metric.state_dict() == {}
    metric.load_state_dict({})
    assert metric.update_count == 1
    metric.persistent(True)
    assert set(metric.state_dict()) == set(metric.metric_state)
    value = make()(p.logits.clone().requires_grad_(), p.target)
    values = list(value.values()) if isinstance(value, dict) else [value]
    assert not any(v.requires_grad for v in values)
    if len(values) == 1:
        sum_of_two = make() + 2 * make()
        sum_of_two.update(*p)
        assert_close(sum_of_two.compute(), 3 * values[0])


def test_ranks_give_the_value_of_all_samples(tmp_path: Path) -> None:
    """Two gloo processes with uneven shares, or none, give it: read on the way, synchronised, and in a collection."""
    script = Path(__file__).with_name("metrics_on_a_rank.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), str(rank), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    p = classifier(100, 5, 0)
    first = {"read after step 0", "synced in step 0"}
    last = {"synced in step 1"}
    expected: dict[tuple[str, str | None], Any] = {}
    for rows, moments in ((slice(40), first), (slice(40, None), last), (slice(None), None)):
        for name, metric in every_metric().items():
            value = updated(metric, (p.logits[rows], p.target[rows])).compute()
            expected |= {(name, moment): value for moment in moments or [None]}
    for rank in range(2):
        values = torch.load(tmp_path / f"{rank}.pt")
        assert len(values) == 8 * len(every_metric()) - 1  # the collection does without the summary
        for key, value in values.items():
            name, moment = key.split(", ")
            wanted = expected[name, moment if moment in first | last else None]
            assert_close(value, wanted, rtol=1e-12, atol=1e-15)


@every_maker
def test_plot_draws_the_value(make: Make) -> None:
    """It draws one value or a list, into the axes that are given or into new ones."""
    mpl.use("Agg")
    metric = updated(make(), classifier(20, 5, 0))
    figure, axes = metric.plot()
    assert figure is not None
    assert axes is not None
    if not isinstance(metric, CalibrationSummary):
        _, own = plt.subplots()
        _, drawn = metric.plot([metric.compute(), metric.compute()], ax=own)
        assert drawn is own
    plt.close("all")


def test_an_empty_batch_adds_nothing() -> None:
    """The last batch of a loader may be empty."""
    empty = torch.empty(0, 5), torch.empty(0, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for make in MAKERS.values():
            metric = updated(make(), classifier(20, 5, 0))
            expected = metric.compute()
            assert_close(updated(metric, empty).compute(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("make", [BrierScore, NegativeLogLikelihood, CalibrationError, AdaptiveCalibrationError])
def test_a_collection_keeps_metrics_of_other_ignored_labels_apart(make: Any) -> None:
    """Although the first batch, which decides what is shared, has no label that one of them ignores."""
    logits, target = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 4
    collection = MetricCollection({"all": make(), "some": make(ignore_index=0), "others": make(ignore_index=-1)})
    for kept in (target != 0, target == 0):
        collection.update(logits[kept], target[kept])
    values = collection.compute()
    assert_close(values["all"], values["others"], rtol=0, atol=0)
    alone = make()
    alone.update(logits[target != 0], target[target != 0])
    assert_close(values["some"], alone.compute())


@pytest.mark.parametrize("make", [BrierScore, AdaptiveCalibrationError])
def test_a_running_metric_is_that_of_the_last_batches(make: Any) -> None:
    """The ``Running`` of torchmetrics keeps the states of a metric that it resets."""
    logits, target = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 4
    running, alone = Running(make(), window=2), make()
    for batch in (slice(0, 10), slice(10, 20), slice(20, 30), slice(30, 40)):
        running.update(logits[batch], target[batch])
    alone.update(logits[20:], target[20:])
    assert_close(running.compute(), alone.compute())
