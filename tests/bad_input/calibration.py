"""Wrong calls of the metrics, their functions, and temperature scaling.

Each message is written out once, at the first callable that a check guards. For the others the row says what is raised,
and the test that the message begins with the argument's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
from bad_input.table import DEEP, NESTED, Table, Target, Wrong
from strategies import classifier

from calrobust import PlattScaler, TemperatureScaler, metrics
from calrobust import functional as F

LOGITS, TARGET = classifier(6, 3, 0)
BINS = F.bin_confidences(torch.tensor([0.3, 0.9]), torch.tensor([False, True]), n_bins=5)


def wrong_row(value: float, name: str = "preds") -> dict[str, torch.Tensor]:
    """Two rows, the second of which holds ``value`` at class 1, its label."""
    return {name: torch.tensor([[0.0, 1.0, 2.0], [0.0, value, 2.0]]), "target": torch.tensor([0, 1])}


def batch() -> dict[str, Any]:
    """Good logits and labels."""
    return {"preds": LOGITS.clone(), "target": TARGET.clone()}


def held_out() -> dict[str, Any]:
    """The same for a fit."""
    return {"logits": LOGITS.clone(), "target": TARGET.clone()}


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
    update = updating(make, **options)
    return Target(f"metrics.{make.__name__}.forward", lambda metric, **given: metric(**given), update.arguments)


def merging(make: Callable[..., Any], **options: Any) -> Target:
    """A metric that has seen a batch, about to take in another metric."""
    return Target(
        f"metrics.{make.__name__}.merge_state",
        lambda metric, incoming_state: metric.merge_state(incoming_state),
        lambda: {"metric": updating(make, **options).arguments()["metric"], "incoming_state": make(**options)},
    )


def guarded(targets: Sequence[Target], wrongs: Sequence[Wrong]) -> Table:
    """The rows as they are for the first target, without the message for the others."""
    return [(targets[:1], wrongs), (targets[1:], [Wrong(wrong.change, wrong.error) for wrong in wrongs])]


METRICS: list[tuple[Any, dict[str, Any]]] = [
    (metrics.CalibrationError, {}),
    (metrics.AdaptiveCalibrationError, {}),
    (metrics.ClasswiseCalibrationError, {"num_classes": 3}),
    (metrics.BrierScore, {}),
    (metrics.NegativeLogLikelihood, {}),
    (metrics.CalibrationSummary, {}),
    (metrics.SelectiveRisk, {}),
]
UPDATES = [updating(make, **options) for make, options in METRICS]
FORWARDS = [called(make, **options) for make, options in METRICS]
OF_PROBABILITIES = [f(make, **options, from_logits=False) for make, options in METRICS for f in (updating, called)]
MERGES = [merging(make, **options) for make, options in METRICS]
NEW = [Target(f"metrics.{make.__name__}", make, options.copy) for make, options in METRICS]
ERRORS = [
    Target(f"functional.{function.__name__}", function, batch)
    for function in (F.calibration_error, F.adaptive_calibration_error, F.classwise_calibration_error)
]
OTHERS = (F.top_label, F.brier_score, F.negative_log_likelihood, F.selective_risk)
FUNCTIONS = [*ERRORS, *(Target(f"functional.{function.__name__}", function, batch) for function in OTHERS)]
FITS = [
    Target("functional.fit_temperature", F.fit_temperature, held_out),
    Target(
        "TemperatureScaler.fit",
        lambda scaler, **given: scaler.fit(**given),
        lambda: {"scaler": TemperatureScaler().fit(LOGITS, TARGET), **held_out()},
    ),
]
MATCHED = (LOGITS > 0) ^ (torch.arange(18) % 7 == 0).view(6, 3)
PLATT = Target(
    "PlattScaler.fit",
    lambda scaler, **given: scaler.fit(**given),
    lambda: {"scaler": PlattScaler(), "similarities": LOGITS.clone(), "matched": MATCHED.clone()},
)
SCALE = [
    Target("TemperatureScaler.forward", TemperatureScaler().fit(LOGITS, TARGET), lambda: {"logits": LOGITS.clone()})
]
BINNED_ERROR = Target("functional.binned_error", F.binned_error, lambda: {"bins": BINS})
OF_CONFIDENCES = [
    Target(
        f"functional.{function.__name__}",
        function,
        lambda: {"confidences": torch.tensor([0.3, 0.9]), "correct": torch.tensor([False, True])},
    )
    for function in (F.bin_confidences, F.calibration_interval, F.risk_coverage_curve)
]

TENSOR = "{} must be a torch.Tensor, got {}; convert it with torch.as_tensor"


def no_floats(name: str, fix: str = "convert it with .float()") -> list[Wrong]:
    """In the place of a floating tensor."""
    return [
        Wrong({name: LOGITS.long()}, TypeError, f"{name} must be floating point, got torch.int64; {fix}"),
        Wrong({name: LOGITS > 0}, TypeError),
        Wrong({name: LOGITS.to(torch.complex64)}, TypeError),
        Wrong(
            {name: LOGITS.to(torch.float8_e5m2)},
            TypeError,
            f"{name} must be floating point of at least 16 bits, got torch.float8_e5m2; convert it with .float()",
        ),
        Wrong(
            {name: LOGITS.to_sparse()},
            TypeError,
            f"{name} must be a dense tensor, got torch.sparse_coo; convert it with .to_dense(), or pad it",
        ),
        Wrong({name: NESTED}, TypeError),
        Wrong({name: LOGITS.numpy()}, TypeError, TENSOR.format(name, "ndarray")),
        Wrong({name: None}, TypeError),
        Wrong({name: torch.nn.Linear(2, 2)}, TypeError),
    ]


def no_batches(name: str) -> list[Wrong]:
    """In the place of scores and labels."""
    shape = f"{name} must have shape [N, C, ...], one row for each sample and one column for each class, got [3]"
    column = (
        f"{name} must have a column for each of two classes or more, got shape [6, 1]; for a single logit of the "
        f"class 1 pass torch.cat((torch.zeros_like({name}), {name}), 1), for a single probability "
        f"torch.cat((1 - {name}, {name}), 1)"
    )
    return [
        *no_floats(name, "pass the scores first, then the labels"),
        Wrong({name: LOGITS[0]}, ValueError, f"{shape}; add the dimension that is missing with .unsqueeze()"),
        Wrong({name: LOGITS[:, :1]}, ValueError, column),
        Wrong({name: LOGITS[:, :0]}, ValueError),
        Wrong({"target": TARGET[:5]}, ValueError, "target must have shape [6], one label for each row, got [5]"),
        *(
            Wrong({"target": wrong}, ValueError, DEEP.format("target", 6, list(wrong.shape)))
            for wrong in (torch.eye(3, dtype=torch.int64)[TARGET], torch.eye(3)[TARGET], TARGET[:, None])
        ),
        Wrong({"target": TARGET[:1].expand(2**40)}, ValueError),
        Wrong(
            {"target": TARGET.float().requires_grad_()},
            TypeError,
            "target must have dtype torch.int64, got torch.float32; convert it with .long()",
        ),
        Wrong({"target": TARGET.int()}, TypeError),
        Wrong({"target": TARGET.tolist()}, TypeError),
        Wrong(
            {"target": pd.Series(TARGET.tolist())},
            TypeError,
            "target must be a torch.Tensor, got Series; convert it with its .to_numpy() and torch.as_tensor",
        ),
        Wrong({"target": None}, TypeError),
        Wrong(
            {"target": TARGET.to("meta")},
            ValueError,
            "target must be on cpu, as the rows it labels, got meta; move it with .to()",
        ),
        Wrong(
            {"target": TARGET - 1},
            ValueError,
            "target must be in [0, 3), one of the C classes, got -1; drop these samples, or pass ignore_index=-1 "
            "where it is an option",
        ),
        Wrong({"target": TARGET + 1}, ValueError),
        Wrong({"target": torch.full_like(TARGET, -100)}, ValueError),
        Wrong(
            {name: LOGITS.softmax(1)},
            ValueError,
            f"{name} must be logits, got rows in [0, 1] that sum to 1; if they are probabilities, pass {name}.log() "
            f"or, where there is that option, from_logits=False; if they are logits after all, pass {name} + 1, which "
            "has the same softmax",
        ),
        Wrong({name: LOGITS.half().softmax(1)}, ValueError),
    ]


def without_softmax(name: str) -> list[Wrong]:
    """Rows that have none."""
    rest = "drop such rows, or find where the model overflows"
    return [
        Wrong(
            wrong_row(value, name),
            ValueError,
            f"{name} must be finite, or -inf in masked classes, got {kind} in row 1, whose label is 1; {rest}",
        )
        for value, kind in ((math.nan, "NaN"), (math.inf, "+inf"))
    ] + [
        Wrong(
            {name: torch.full((6, 3), -torch.inf)},
            ValueError,
            f"{name} must be finite, or -inf in masked classes, got -inf in every class in row 0, whose label is 1; "
            f"{rest}",
        )
    ]


IGNORED = [
    Wrong(
        {"ignore_index": 2**63},
        ValueError,
        "ignore_index must be at most 9,223,372,036,854,775,807, got 9223372036854775808; was another number meant?",
    ),
    Wrong(
        {"ignore_index": 2.0},
        TypeError,
        "ignore_index must be an int, got float 2.0",
    ),
    Wrong({"ignore_index": "-100"}, TypeError),
    Wrong({"ignore_index": torch.tensor(1)}, TypeError),
    Wrong({"from_logits": "False"}, TypeError, "from_logits must be True or False, got str 'False'"),
]
STATES = (
    "incoming_state must have the states {'counts': [15], 'confidence_sums': [15], 'correct_sums': [15]}, got {}; make "
    "both metrics with the same arguments"
)

TABLE: Table = [
    *guarded([*FUNCTIONS, *UPDATES], no_batches("preds")),
    *guarded(FITS, [*no_batches("logits"), *without_softmax("logits")]),
    *guarded(SCALE, no_floats("logits")),
    (
        FITS,
        [
            Wrong({"weight": torch.ones(3).long()}, TypeError),
            Wrong({"weight": [1.0, 1.0, 1.0]}, TypeError),
            Wrong({"weight": torch.ones(2)}, ValueError),
            Wrong(
                {"weight": torch.tensor([1.0, -1.0, 2.0])},
                ValueError,
                "weight must be a finite number >= 0 for each of the 3 classes, got shape [3] and values from -1 to 2",
            ),
            Wrong({"weight": torch.tensor([1.0, math.nan, 2.0])}, ValueError),
            Wrong({"weight": torch.ones(3).to("meta")}, ValueError),
            Wrong({"ignore_index": 1.5}, TypeError),
        ],
    ),
    (
        [PLATT],
        [
            *no_floats("similarities"),
            Wrong(
                {"matched": TARGET},
                TypeError,
                "matched must have dtype torch.bool, got torch.int64; convert it with .bool()",
            ),
            Wrong({"matched": None}, TypeError),
            Wrong(
                {"matched": MATCHED[:, :2]},
                ValueError,
                "similarities and matched must have one shape and hold at least one pair, got [6, 3] and [6, 2]; pass "
                "one flag for each pair",
            ),
            Wrong({"similarities": LOGITS[:0], "matched": MATCHED[:0]}, ValueError),
            Wrong(
                {"matched": MATCHED.to("meta")},
                ValueError,
                "similarities and matched must be on one device, got cpu and meta; move one with .to()",
            ),
            Wrong(
                {"similarities": LOGITS / 0},
                ValueError,
                "similarities must be finite, got NaN or inf; drop such pairs",
            ),
        ],
    ),
    (
        [Target("PlattScaler.forward", PlattScaler().fit(LOGITS, MATCHED), lambda: {"similarities": LOGITS.clone()})],
        [Wrong({"similarities": LOGITS.long()}, TypeError)],
    ),
    *guarded([*UPDATES, *FORWARDS], without_softmax("preds")),
    *guarded([*FUNCTIONS, *NEW], IGNORED),
    *guarded(
        [*UPDATES, *FORWARDS],
        [
            Wrong(
                {"preds": LOGITS.to("meta"), "target": TARGET.to("meta")},
                ValueError,
                "preds must be on cpu, as the metric's state, got meta; move the metric with .to()",
            )
        ],
    ),
    *guarded(
        OF_PROBABILITIES,
        [
            Wrong(
                {"preds": torch.tensor([[0.0, 0.5, 1.5]] * 6)},
                ValueError,
                "preds must be probabilities with from_logits=False: rows in [0, 1] that sum to 1, got a row from 0 to "
                "1.5 that sums to 2; set from_logits=True if these are logits",
            ),
            Wrong({"preds": torch.tensor([[-0.25, 0.25, 1.0]] * 6)}, ValueError),
            Wrong(
                {"preds": torch.tensor([[0.25, 0.25, 0.25]] * 6)},
                ValueError,
                "preds must be probabilities with from_logits=False: rows in [0, 1] that sum to 1, got a row from 0.25 "
                "to 0.25 that sums to 0.75; divide each row by its sum if these are probabilities, set "
                "from_logits=True if these are logits",
            ),
            Wrong({"preds": torch.tensor([[0.25, math.nan, 0.25]] * 6)}, ValueError),
        ],
    ),
    *guarded(
        [updating(metrics.ClasswiseCalibrationError, num_classes=3), FORWARDS[2]],
        [
            Wrong(
                {"preds": torch.arange(30.0).view(6, 5)},
                ValueError,
                "preds must have num_classes=3 columns, got 5; make the metric with num_classes=5",
            )
        ],
    ),
    *guarded(
        [*ERRORS, NEW[0], NEW[1], NEW[2], NEW[5], *OF_CONFIDENCES[:2]],
        [
            Wrong({"n_bins": 0}, ValueError, "n_bins must be >= 1, got 0"),
            Wrong(
                {"n_bins": 50_000_000},
                ValueError,
                "n_bins must be at most 1,000,000, got 50000000; was another number meant?",
            ),
            Wrong({"n_bins": -3}, ValueError),
            Wrong({"n_bins": 2.5}, TypeError, "n_bins must be an int, got float 2.5"),
            Wrong({"n_bins": True}, TypeError),
            Wrong({"n_bins": None}, TypeError),
        ],
    ),
    *guarded(
        [BINNED_ERROR, *ERRORS, NEW[0], NEW[1], NEW[2]],
        [
            Wrong({"norm": "l3"}, ValueError, "norm must be one of 'l1', 'l2', 'max', got 'l3'"),
            Wrong({"norm": 1}, ValueError),
        ],
    ),
    (NEW[6:], [Wrong({"generalized": 1}, TypeError, "generalized must be True or False, got int 1")]),
    *guarded(
        [BINNED_ERROR, ERRORS[0], NEW[0]],
        [
            Wrong(
                {"debiased": True},
                ValueError,
                "debiased must be False unless norm is 'l2', whose bias is known, got norm='l1'",
            ),
            Wrong({"debiased": "no"}, TypeError),
            Wrong({"debiased": True, "norm": "max"}, ValueError),
        ],
    ),
    *guarded(
        MERGES,
        [
            Wrong(
                {"incoming_state": None},
                TypeError,
                "incoming_state must be of type Mapping, got NoneType; pass a metric or its metric_state",
            ),
            Wrong({"incoming_state": [1.0]}, TypeError),
            Wrong({"incoming_state": {}}, ValueError, STATES),
            Wrong({"incoming_state": metrics.CalibrationError(n_bins=1)}, ValueError),
        ],
    ),
    *guarded(
        [NEW[3], *NEW],
        [
            Wrong({"validate_args": None}, TypeError, "validate_args must be True or False, got NoneType None"),
            Wrong({"from_logits": 0}, TypeError),
        ],
    ),
    (NEW, [Wrong({"bins": 10}, ValueError, "Unexpected keyword arguments: `bins`")]),
    (
        [NEW[2]],
        [
            Wrong({"num_classes": 0}, ValueError, "num_classes must be >= 2, got 0"),
            Wrong({"num_classes": 1}, ValueError, "num_classes must be >= 2, got 1"),
            Wrong({"num_classes": 2**31}, ValueError),
            Wrong({"num_classes": 2.5}, TypeError),
        ],
    ),
    (
        [BINNED_ERROR, Target("functional.brier_decomposition", F.brier_decomposition, lambda: {"bins": BINS})],
        [
            Wrong(
                {"bins": torch.zeros(3, 5)},
                TypeError,
                "bins must be a tuple of three sums, got Tensor; see functional.bin_confidences, or ShiftReport.bins",
            ),
            Wrong({"bins": BINS[:2]}, TypeError),
            Wrong({"bins": (1.0, 2.0, 3.0)}, TypeError),
            Wrong({"bins": (*BINS[:2], BINS[2].long())}, TypeError),
            Wrong(
                {"bins": (*BINS[:2], BINS[2][:4])},
                ValueError,
                "bins must be sums of one shape [..., n_bins], got [5], [5], [4]; take them from one call of "
                "bin_confidences",
            ),
            Wrong({"bins": (BINS[0][0],) * 3}, ValueError),
            Wrong({"bins": (BINS[0][:0],) * 3}, ValueError),
            Wrong(
                {"bins": (*BINS[:2], BINS[2].to("meta"))},
                ValueError,
                "bins[0] and bins[1] and bins[2] must be on one device, got cpu and cpu and meta; move one with .to()",
            ),
        ],
    ),
    *guarded(
        OF_CONFIDENCES,
        [
            Wrong(
                {"confidences": torch.rand(3)},
                ValueError,
                "confidences and correct must have the same shape [N], got [3] and [2]; top_label gives both",
            ),
            Wrong({"confidences": torch.rand(2, 3), "correct": torch.ones(2, 3, dtype=torch.bool)}, ValueError),
            Wrong({"confidences": torch.tensor(0.5), "correct": torch.tensor(True)}, ValueError),
            Wrong({"confidences": torch.ones(2, dtype=torch.int64)}, TypeError),
            Wrong({"confidences": [0.3, 0.9]}, TypeError),
            Wrong(
                {"correct": torch.tensor([0, 1])},
                TypeError,
                "correct must have dtype torch.bool, got torch.int64; convert it with .bool()",
            ),
            Wrong({"correct": [False, True]}, TypeError),
        ],
    ),
    (
        OF_CONFIDENCES,
        [
            Wrong(
                {"correct": torch.tensor([False, True], device="meta")},
                ValueError,
                "confidences and correct must be on one device, got cpu and meta; move one with .to()",
            )
        ],
    ),
    (
        OF_CONFIDENCES[1:2],
        [
            Wrong({"level": 95}, ValueError, "level must be in [0, 1), got 95; did you mean 0.95?"),
            Wrong({"level": 1.0}, ValueError),
            Wrong({"level": 0.0}, ValueError, "level must be > 0, got 0.0"),
            Wrong({"level": math.nan}, ValueError, "level must be finite, got nan"),
            Wrong({"level": "95 %"}, TypeError, "level must be a real number, got str '95 %'"),
        ],
    ),
    (
        FITS,
        [
            Wrong(
                {"logits": LOGITS[:0], "target": TARGET[:0]},
                ValueError,
                "logits must hold at least one sample, got none; pass the validation set's logits and labels",
            ),
            Wrong(
                wrong_row(-math.inf, "logits"),
                ValueError,
                "target must not be a masked class, got label 1 in row 1, whose logit is -inf; unmask the class or "
                "drop the sample",
            ),
        ],
    ),
]
