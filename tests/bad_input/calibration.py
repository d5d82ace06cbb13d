"""Wrong calls of the metrics, their functions, and temperature scaling."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from bad_input.table import NESTED, Table, Target, Wrong
from strategies import classifier

from calrobust import TemperatureScaler, metrics
from calrobust.functional import (
    adaptive_calibration_error,
    bin_confidences,
    binned_error,
    bootstrap_interval,
    brier_score,
    calibration_error,
    classwise_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    top_label,
)

LOGITS, TARGET = classifier(6, 3, 0)
ONE_HOT = torch.eye(3, dtype=torch.int64)[TARGET]


def wrong_row(value: float, label: int = 0) -> dict[str, torch.Tensor]:
    """Two rows, the second of which holds ``value`` at class 1."""
    return {"preds": torch.tensor([[0.0, 1.0, 2.0], [0.0, value, 2.0]]), "target": torch.tensor([0, label])}


def batch() -> dict[str, Any]:
    """Good logits and labels."""
    return {"preds": LOGITS.clone(), "target": TARGET.clone()}


def updating(make: Callable[..., Any], **options: Any) -> Target:
    """A metric that has seen a batch, about to see another."""

    def arguments() -> dict[str, Any]:
        preds = LOGITS.softmax(1) if options.get("from_logits") is False else LOGITS
        metric = make(**options)
        metric.update(preds, TARGET)
        return {"metric": metric, **batch(), "preds": preds.clone()}

    return Target(f"metrics.{make.__name__}.update", lambda metric, **given: metric.update(**given), arguments)


def called(make: Callable[..., Any], **options: Any) -> Target:
    """The same by ``forward``."""
    return Target(
        f"metrics.{make.__name__}.forward",
        lambda metric, **given: metric(**given),
        updating(make, **options).arguments,
    )


def merging(make: Callable[..., Any], **options: Any) -> Target:
    """A metric that has seen a batch, about to take in another metric."""
    return Target(
        f"metrics.{make.__name__}.merge_state",
        lambda metric, incoming_state: metric.merge_state(incoming_state),
        lambda: {"metric": updating(make, **options).arguments()["metric"], "incoming_state": make(**options)},
    )


METRICS: list[tuple[Any, dict[str, Any]]] = [
    (metrics.CalibrationError, {}),
    (metrics.AdaptiveCalibrationError, {}),
    (metrics.ClasswiseCalibrationError, {"num_classes": 3}),
    (metrics.BrierScore, {}),
    (metrics.NegativeLogLikelihood, {}),
    (metrics.CalibrationSummary, {}),
]
UPDATES = [updating(make, **options) for make, options in METRICS]
FORWARDS = [called(make, **options) for make, options in METRICS]
MERGES = [merging(make, **options) for make, options in METRICS]
NEW = [Target(f"metrics.{make.__name__}", make, options.copy) for make, options in METRICS]
ERRORS = [
    Target(f"functional.{function.__name__}", function, batch)
    for function in (calibration_error, adaptive_calibration_error, classwise_calibration_error)
]
FUNCTIONS = [
    *ERRORS,
    *(Target(f"functional.{f.__name__}", f, batch) for f in (top_label, brier_score, negative_log_likelihood)),
]
FITS = [
    Target("functional.fit_temperature", fit_temperature, lambda: {"logits": LOGITS.clone(), "target": TARGET.clone()}),
    Target(
        "TemperatureScaler.fit",
        lambda scaler, **given: scaler.fit(**given),
        lambda: {"scaler": TemperatureScaler().fit(LOGITS, TARGET), "logits": LOGITS.clone(), "target": TARGET.clone()},
    ),
]
BINS = bin_confidences(torch.tensor([0.3, 0.9]), torch.tensor([False, True]), 5)

TABLE: Table = [
    (
        [*FUNCTIONS, *UPDATES],
        [
            Wrong(
                {"preds": LOGITS[0]},
                ValueError,
                "preds must have shape [N, C], one row a sample and one column a class, got [3]; move "
                "other dimensions into the rows",
            ),
            Wrong(
                {"preds": LOGITS[None]},
                ValueError,
                "preds must have shape [N, C], one row a sample and one column a class, got [1, 6, 3]; "
                "move other dimensions into the rows",
            ),
            Wrong(
                {"preds": LOGITS[:, :0]},
                ValueError,
                "preds must have shape [N, C], one row a sample and one column a class, got [6, 0]; move "
                "other dimensions into the rows",
            ),
            Wrong(
                {"preds": LOGITS.long()},
                TypeError,
                "preds must be floating point, got torch.int64; convert it with .float()",
            ),
            Wrong(
                {"preds": LOGITS > 0},
                TypeError,
                "preds must be floating point, got torch.bool; convert it with .float()",
            ),
            Wrong(
                {"preds": LOGITS.to(torch.complex64)},
                TypeError,
                "preds must be floating point, got torch.complex64; convert it with .float()",
            ),
            Wrong(
                {"preds": LOGITS.to(torch.float8_e5m2)},
                TypeError,
                "preds must be floating point of at least 16 bits, got torch.float8_e5m2; convert it with .float()",
            ),
            Wrong(
                {"preds": LOGITS.to_sparse()},
                TypeError,
                "preds must be a dense tensor, got torch.sparse_coo; convert it with .to_dense(), or pad it",
            ),
            Wrong(
                {"preds": NESTED},
                TypeError,
                "preds must be a dense tensor, got a nested one; convert it with .to_dense(), or pad it",
            ),
            Wrong(
                {"preds": LOGITS.numpy()},
                TypeError,
                "preds must be a torch.Tensor, got ndarray; convert it with torch.as_tensor",
            ),
            Wrong(
                {"preds": None},
                TypeError,
                "preds must be a torch.Tensor, got NoneType; convert it with torch.as_tensor",
            ),
            Wrong({"target": TARGET[:5]}, ValueError, "target must have shape [6], one label for each row, got [5]"),
            Wrong({"target": ONE_HOT}, ValueError, "target must have shape [6], one label for each row, got [6, 3]"),
            Wrong(
                {"target": TARGET[:1].expand(2**40)},
                ValueError,
                "target must have shape [6], one label for each row, got [1099511627776]",
            ),
            Wrong(
                {"target": TARGET.float().requires_grad_()},
                TypeError,
                "target must have dtype torch.int64, got torch.float32; convert it with .long()",
            ),
            Wrong(
                {"target": TARGET.int()},
                TypeError,
                "target must have dtype torch.int64, got torch.int32; convert it with .long()",
            ),
            Wrong(
                {"target": TARGET.tolist()},
                TypeError,
                "target must be a torch.Tensor, got list; convert it with torch.as_tensor",
            ),
            Wrong(
                {"target": None},
                TypeError,
                "target must be a torch.Tensor, got NoneType; convert it with torch.as_tensor",
            ),
            Wrong(
                {"target": TARGET.to("meta")},
                ValueError,
                "target must be on cpu, as the rows it labels, got meta; move it with .to()",
            ),
            Wrong(
                {"target": TARGET + 1},
                ValueError,
                "target must be in [0, 3), one of the C classes, got 3; drop these samples, or leave them"
                " out of a metric with ignore_index=3",
            ),
            Wrong(
                {"target": TARGET - 1},
                ValueError,
                "target must be in [0, 3), one of the C classes, got -1; drop these samples, or leave "
                "them out of a metric with ignore_index=-1",
            ),
            Wrong(
                {"target": torch.full_like(TARGET, -100)},
                ValueError,
                "target must be in [0, 3), one of the C classes, got -100; drop these samples, or leave "
                "them out of a metric with ignore_index=-100",
            ),
        ],
    ),
    (
        FUNCTIONS,
        [
            Wrong({"from_logits": "False"}, TypeError, "from_logits must be True or False, got str 'False'"),
            Wrong(
                {"ignore_index": 2**63},
                ValueError,
                "ignore_index must be a label, which has 64 bits, got 9223372036854775808",
            ),
            Wrong(
                {"ignore_index": 2.0},
                TypeError,
                "ignore_index must be an int or None, got float 2.0; pass the label of the samples to leave out",
            ),
            Wrong(
                {"ignore_index": "-100"},
                TypeError,
                "ignore_index must be an int or None, got str '-100'; pass the label of the samples to leave out",
            ),
            Wrong(
                {"ignore_index": torch.tensor(1)},
                TypeError,
                "ignore_index must be an int or None, got Tensor tensor(1); pass the label of the samples to leave out",
            ),
        ],
    ),
    (
        [*UPDATES, *FORWARDS],
        [
            Wrong(
                wrong_row(math.nan),
                ValueError,
                "preds must be finite, or -inf in masked classes, got NaN in row 1, whose label is 0; "
                "drop such rows, or find where the model overflows",
            ),
            Wrong(
                wrong_row(math.inf),
                ValueError,
                "preds must be finite, or -inf in masked classes, got +inf in row 1, whose label is 0; "
                "drop such rows, or find where the model overflows",
            ),
            Wrong(
                {"preds": torch.full((6, 3), -torch.inf)},
                ValueError,
                "preds must be finite, or -inf in masked classes, got -inf in every class in row 0, whose"
                " label is 1; drop such rows, or find where the model overflows",
            ),
            Wrong(
                {"preds": LOGITS.softmax(1)},
                ValueError,
                "preds must be logits with from_logits=True, got rows in [0, 1] that all sum to 1; set "
                "from_logits=False if these are probabilities, or validate_args=False if they are logits "
                "after all",
            ),
            Wrong(
                {"preds": LOGITS.half().softmax(1)},
                ValueError,
                "preds must be logits with from_logits=True, got rows in [0, 1] that all sum to 1; set "
                "from_logits=False if these are probabilities, or validate_args=False if they are logits "
                "after all",
            ),
            Wrong(
                {"preds": LOGITS.to("meta"), "target": TARGET.to("meta")},
                ValueError,
                "preds must be on cpu, as the metric's state, got meta; move the metric with .to()",
            ),
        ],
    ),
    (
        [f(make, **options, from_logits=False) for make, options in METRICS for f in (updating, called)],
        [
            Wrong(
                {"preds": torch.tensor([[0.0, 0.5, 1.5]] * 6)},
                ValueError,
                "preds must be probabilities with from_logits=False: rows in [0, 1] that sum to 1, got a "
                "row from 0 to 1.5 that sums to 2; set from_logits=True if these are logits",
            ),
            Wrong(
                {"preds": torch.tensor([[-0.25, 0.25, 1.0]] * 6)},
                ValueError,
                "preds must be probabilities with from_logits=False: rows in [0, 1] that sum to 1, got a "
                "row from -0.25 to 1 that sums to 1; set from_logits=True if these are logits",
            ),
            Wrong(
                {"preds": torch.tensor([[0.25, 0.25, 0.25]] * 6)},
                ValueError,
                "preds must be probabilities with from_logits=False: rows in [0, 1] that sum to 1, got a "
                "row from 0.25 to 0.25 that sums to 0.75; set from_logits=True if these are logits",
            ),
            Wrong(
                {"preds": torch.tensor([[0.25, math.nan, 0.25]] * 6)},
                ValueError,
                "preds must be probabilities with from_logits=False: rows in [0, 1] that sum to 1, got a "
                "row from nan to nan that sums to nan; set from_logits=True if these are logits",
            ),
        ],
    ),
    (
        [
            updating(metrics.ClasswiseCalibrationError, num_classes=3),
            called(metrics.ClasswiseCalibrationError, num_classes=3),
        ],
        [
            Wrong(
                {"preds": torch.arange(30.0).view(6, 5)},
                ValueError,
                "preds must have num_classes=3 columns, got [6, 5]; make the metric with num_classes=5",
            )
        ],
    ),
    (
        [*ERRORS, NEW[0], NEW[1], NEW[2], NEW[5]],
        [
            Wrong({"n_bins": 0}, ValueError, "n_bins must be > 0, got 0"),
            Wrong(
                {"n_bins": 50_000_000},
                ValueError,
                "n_bins must be at most 1,000,000, got 50000000; was another number meant?",
            ),
            Wrong({"n_bins": -3}, ValueError, "n_bins must be > 0, got -3"),
            Wrong({"n_bins": 2.5}, TypeError, "n_bins must be an int, got float 2.5"),
            Wrong({"n_bins": True}, TypeError, "n_bins must be an int, got bool True"),
            Wrong({"n_bins": None}, TypeError, "n_bins must be an int, got NoneType None"),
        ],
    ),
    (
        [*ERRORS, NEW[0], NEW[1], NEW[2]],
        [
            Wrong({"norm": "l3"}, ValueError, "norm must be one of 'l1', 'l2', 'max', got 'l3'"),
            Wrong({"norm": 1}, ValueError, "norm must be one of 'l1', 'l2', 'max', got 1"),
        ],
    ),
    (
        [ERRORS[0], NEW[0], Target("functional.binned_error", binned_error, lambda: {"bins": BINS})],
        [
            Wrong(
                {"debiased": True},
                ValueError,
                "debiased must be False unless norm is 'l2', whose bias is known, got norm='l1'",
            ),
            Wrong({"debiased": "no"}, TypeError, "debiased must be True or False, got str 'no'"),
            Wrong(
                {"debiased": True, "norm": "max"},
                ValueError,
                "debiased must be False unless norm is 'l2', whose bias is known, got norm='max'",
            ),
        ],
    ),
    (
        MERGES,
        [
            Wrong(
                {"incoming_state": None},
                TypeError,
                "incoming_state must be a metric or a dict of states, got NoneType",
            ),
            Wrong(
                {"incoming_state": [1.0]},
                TypeError,
                "incoming_state must be a metric or a dict of states, got list",
            ),
        ],
    ),
    (
        MERGES[:1],
        [
            Wrong(
                {"incoming_state": metrics.CalibrationError(n_bins=1)},
                ValueError,
                "incoming_state must have the states {'counts': [15], 'confidence_sums': [15], "
                "'correct_sums': [15]}, got {'counts': [1], 'confidence_sums': [1], 'correct_sums': [1]};"
                " make both metrics with the same arguments",
            ),
            Wrong(
                {"incoming_state": metrics.BrierScore()},
                ValueError,
                "incoming_state must have the states {'counts': [15], 'confidence_sums': [15], "
                "'correct_sums': [15]}, got {'brier_sum': [], 'count': []}; make both metrics with the "
                "same arguments",
            ),
            Wrong(
                {"incoming_state": {}},
                ValueError,
                "incoming_state must have the states {'counts': [15], 'confidence_sums': [15], "
                "'correct_sums': [15]}, got {}; make both metrics with the same arguments",
            ),
        ],
    ),
    (
        NEW,
        [
            Wrong(
                {"ignore_index": 2**63},
                ValueError,
                "ignore_index must be a label, which has 64 bits, got 9223372036854775808",
            ),
            Wrong(
                {"ignore_index": 2.0},
                TypeError,
                "ignore_index must be an int or None, got float 2.0; pass the label of the samples to leave out",
            ),
            Wrong({"from_logits": 0}, TypeError, "from_logits must be True or False, got int 0"),
            Wrong({"validate_args": None}, TypeError, "validate_args must be True or False, got NoneType None"),
            Wrong({"bins": 10}, ValueError, "Unexpected keyword arguments: `bins`"),
        ],
    ),
    (
        [NEW[2]],
        [
            Wrong({"num_classes": 0}, ValueError, "num_classes must be > 0, got 0"),
            Wrong(
                {"num_classes": 2**31},
                ValueError,
                "num_classes must be at most 10,000,000, got 2147483648; was another number meant?",
            ),
            Wrong({"num_classes": 2.5}, TypeError, "num_classes must be an int, got float 2.5"),
        ],
    ),
    (
        [Target("functional.binned_error", binned_error, lambda: {"bins": BINS})],
        [
            Wrong(
                {"bins": torch.zeros(3, 5)},
                TypeError,
                "bins must be the three sums that bin_confidences gives, got Tensor; see "
                "functional.bin_confidences, or ShiftReport.bins",
            ),
            Wrong(
                {"bins": BINS[:2]},
                TypeError,
                "bins must be the three sums that bin_confidences gives, got tuple; see "
                "functional.bin_confidences, or ShiftReport.bins",
            ),
            Wrong(
                {"bins": (1.0, 2.0, 3.0)},
                TypeError,
                "bins[0] must be a torch.Tensor, got float; convert it with torch.as_tensor",
            ),
            Wrong(
                {"bins": (*BINS[:2], BINS[2].long())},
                TypeError,
                "bins[2] must be floating point, got torch.int64; convert it with .float()",
            ),
            Wrong(
                {"bins": (*BINS[:2], BINS[2][:4])},
                ValueError,
                "bins must be sums of one shape [..., n_bins], got [5], [5], [4]; take them from one call"
                " of bin_confidences",
            ),
            Wrong(
                {"bins": (BINS[0][0],) * 3},
                ValueError,
                "bins must be sums of one shape [..., n_bins], got [], [], []; take them from one call of"
                " bin_confidences",
            ),
            Wrong(
                {"bins": (BINS[0][:0],) * 3},
                ValueError,
                "bins must be sums of one shape [..., n_bins], got [0], [0], [0]; take them from one call"
                " of bin_confidences",
            ),
            Wrong(
                {"bins": (*BINS[:2], BINS[2].to("meta"))},
                ValueError,
                "bins must be on one device, got cpu, cpu, meta; move them with .to()",
            ),
            Wrong({"norm": "l0"}, ValueError, "norm must be one of 'l1', 'l2', 'max', got 'l0'"),
        ],
    ),
    (
        [
            Target(
                f"functional.{function.__name__}",
                function,
                lambda: {"confidences": torch.tensor([0.3, 0.9]), "correct": torch.tensor([False, True])},
            )
            for function in (bin_confidences, bootstrap_interval)
        ],
        [
            Wrong(
                {"confidences": torch.rand(3)},
                ValueError,
                "confidences and correct must have the same shape [N], got [3] and [2]; top_label gives both",
            ),
            Wrong(
                {"confidences": torch.rand(2, 3), "correct": torch.ones(2, 3, dtype=torch.bool)},
                ValueError,
                "confidences and correct must have the same shape [N], got [2, 3] and [2, 3]; top_label gives both",
            ),
            Wrong(
                {"confidences": torch.tensor(0.5), "correct": torch.tensor(True)},
                ValueError,
                "confidences and correct must have the same shape [N], got [] and []; top_label gives both",
            ),
            Wrong(
                {"confidences": torch.ones(2, dtype=torch.int64)},
                TypeError,
                "confidences must be floating point, got torch.int64; convert it with .float()",
            ),
            Wrong(
                {"confidences": [0.3, 0.9]},
                TypeError,
                "confidences must be a torch.Tensor, got list; convert it with torch.as_tensor",
            ),
            Wrong(
                {"correct": torch.tensor([0, 1])},
                TypeError,
                "correct must have dtype torch.bool, got torch.int64; convert it with .bool()",
            ),
            Wrong(
                {"correct": torch.tensor([0.0, 1.0])},
                TypeError,
                "correct must have dtype torch.bool, got torch.float32; convert it with .bool()",
            ),
            Wrong(
                {"correct": [False, True]},
                TypeError,
                "correct must be a torch.Tensor, got list; convert it with torch.as_tensor",
            ),
            Wrong(
                {"correct": torch.tensor([False, True], device="meta")},
                ValueError,
                "confidences and correct must be on one device, got cpu and meta; move one with .to()",
            ),
            Wrong({"n_bins": 0}, ValueError, "n_bins must be > 0, got 0"),
            Wrong({"n_bins": 15.0}, TypeError, "n_bins must be an int, got float 15.0"),
        ],
    ),
    (
        [
            Target(
                "functional.bootstrap_interval",
                bootstrap_interval,
                lambda: {"confidences": torch.tensor([0.3, 0.9]), "correct": torch.tensor([False, True])},
            )
        ],
        [
            Wrong({"norm": "L1"}, ValueError, "norm must be one of 'l1', 'l2', 'max', got 'L1'"),
            Wrong({"level": 95}, ValueError, "level must be in [0, 1), got 95; did you mean 9.5 or 0.95?"),
            Wrong({"level": 1.0}, ValueError, "level must be in [0, 1), got 1.0; did you mean 0.1 or 0.01?"),
            Wrong({"level": 0.0}, ValueError, "level must be > 0, got 0.0"),
            Wrong({"level": math.nan}, ValueError, "level must be finite, got nan"),
            Wrong({"level": "95 %"}, TypeError, "level must be a real number, got str '95 %'"),
            Wrong({"n_resamples": 0}, ValueError, "n_resamples must be > 0, got 0"),
            Wrong(
                {"n_resamples": 2**31},
                ValueError,
                "n_resamples must be at most 1,000,000, got 2147483648; was another number meant?",
            ),
            Wrong({"n_resamples": 1e3}, TypeError, "n_resamples must be an int, got float 1000.0"),
            Wrong(
                {"generator": 0},
                TypeError,
                "generator must be of type Generator, got int; pass torch.Generator().manual_seed(seed)",
            ),
        ],
    ),
    (
        FITS,
        [
            Wrong(
                {"logits": LOGITS[0]},
                ValueError,
                "logits must have shape [N, C], one row a sample and one column a class, got [3]; move "
                "other dimensions into the rows",
            ),
            Wrong(
                {"logits": LOGITS[:, :0]},
                ValueError,
                "logits must have shape [N, C], one row a sample and one column a class, got [6, 0]; move"
                " other dimensions into the rows",
            ),
            Wrong(
                {"logits": LOGITS[:0], "target": TARGET[:0]},
                ValueError,
                "logits must hold at least one sample, got none; pass the validation set's logits and labels",
            ),
            Wrong(
                {"logits": LOGITS.long()},
                TypeError,
                "logits must be floating point, got torch.int64; convert it with .float()",
            ),
            Wrong(
                {"logits": LOGITS.to(torch.float8_e4m3fn)},
                TypeError,
                "logits must be floating point of at least 16 bits, got torch.float8_e4m3fn; convert it with .float()",
            ),
            Wrong(
                {"logits": torch.nn.Linear(2, 2)},
                TypeError,
                "logits must be a torch.Tensor, got Linear; convert it with torch.as_tensor",
            ),
            Wrong(
                {"logits": LOGITS.numpy()},
                TypeError,
                "logits must be a torch.Tensor, got ndarray; convert it with torch.as_tensor",
            ),
            Wrong({"target": TARGET[:5]}, ValueError, "target must have shape [6], one label for each row, got [5]"),
            Wrong({"target": ONE_HOT}, ValueError, "target must have shape [6], one label for each row, got [6, 3]"),
            Wrong(
                {"target": TARGET.float()},
                TypeError,
                "target must have dtype torch.int64, got torch.float32; convert it with .long()",
            ),
            Wrong(
                {"target": TARGET.numpy()},
                TypeError,
                "target must be a torch.Tensor, got ndarray; convert it with torch.as_tensor",
            ),
            Wrong(
                {"target": TARGET.to("meta")},
                ValueError,
                "target must be on cpu, as the rows it labels, got meta; move it with .to()",
            ),
            Wrong(
                {"target": TARGET + 1},
                ValueError,
                "target must be in [0, 3), one of the C classes, got 3; drop these samples, or leave them"
                " out of a metric with ignore_index=3",
            ),
            Wrong(
                {"target": TARGET - 1},
                ValueError,
                "target must be in [0, 3), one of the C classes, got -1; drop these samples, or leave "
                "them out of a metric with ignore_index=-1",
            ),
            Wrong(
                {"logits": wrong_row(math.nan)["preds"], "target": torch.tensor([0, 1])},
                ValueError,
                "logits must be finite, or -inf in masked classes, got NaN in row 1, whose label is 1; "
                "drop such rows, or find where the model overflows",
            ),
            Wrong(
                {"logits": wrong_row(math.inf)["preds"], "target": torch.tensor([0, 1])},
                ValueError,
                "logits must be finite, or -inf in masked classes, got +inf in row 1, whose label is 1; "
                "drop such rows, or find where the model overflows",
            ),
            Wrong(
                {"logits": wrong_row(-math.inf)["preds"], "target": torch.tensor([0, 1])},
                ValueError,
                "target must not be a masked class, got label 1 in row 1, whose logit is -inf; unmask the"
                " class or drop the sample",
            ),
            Wrong(
                {"logits": torch.full((6, 3), -torch.inf)},
                ValueError,
                "logits must be finite, or -inf in masked classes, got -inf in every class in row 0, "
                "whose label is 1; drop such rows, or find where the model overflows",
            ),
        ],
    ),
    (
        [
            Target(
                "TemperatureScaler.forward", TemperatureScaler().fit(LOGITS, TARGET), lambda: {"logits": LOGITS.clone()}
            )
        ],
        [
            Wrong(
                {"logits": LOGITS.long()},
                TypeError,
                "logits must be floating point, got torch.int64; convert it with .float()",
            ),
            Wrong(
                {"logits": LOGITS.to(torch.float8_e4m3fn)},
                TypeError,
                "logits must be floating point of at least 16 bits, got torch.float8_e4m3fn; convert it with .float()",
            ),
            Wrong(
                {"logits": LOGITS.to_sparse()},
                TypeError,
                "logits must be a dense tensor, got torch.sparse_coo; convert it with .to_dense(), or pad it",
            ),
            Wrong(
                {"logits": LOGITS.tolist()},
                TypeError,
                "logits must be a torch.Tensor, got list; convert it with torch.as_tensor",
            ),
        ],
    ),
]
