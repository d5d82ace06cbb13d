"""Wrong calls of the report, the plots and the callbacks."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from bad_input.table import Table, Target, Wrong
from matplotlib.figure import Figure
from strategies import classifier
from torch import nn

from calrobust import EMATeacher, ShiftReport
from calrobust.functional import bin_confidences
from calrobust.integrations import lightning, transformers
from calrobust.plotting import reliability_diagram, reliability_grid, shift_scatter

LOGITS, TARGET = classifier(30, 3, 0)
OTHER, OTHER_TARGET = classifier(30, 3, 1)
BINS = bin_confidences(torch.tensor([0.3, 0.9]), torch.tensor([False, True]), n_bins=5)


def filled(*, fit: bool = True) -> ShiftReport:
    """A report on one method in two domains."""
    report = ShiftReport(id_domain="photo")
    report.add("FT", "photo", LOGITS, TARGET)
    report.add("FT", "sketch", OTHER, OTHER_TARGET)
    if fit:
        report.fit_temperature("FT", *classifier(30, 3, 2))
    return report


def lacking() -> ShiftReport:
    """A second method without the second domain."""
    report = filled()
    report.add("ZS", "photo", OTHER, TARGET)
    return report


def misnamed() -> ShiftReport:
    """Its ID domain was added under another name."""
    report = ShiftReport(id_domain="Photo")
    report.add("FT", "photo", LOGITS, TARGET)
    return report


def on(name: str, **given: Any) -> Target:
    """A method of a filled report."""
    return Target(
        f"ShiftReport.{name}",
        lambda report, **arguments: getattr(report, name)(**arguments),
        lambda: {"report": filled(), **given},
    )


ADD = on("add", method="CaRot", domain="photo", logits=LOGITS, target=TARGET)
FIT = on("fit_temperature", method="CaRot", logits=LOGITS, target=TARGET)
READS = [on(name) for name in ("summary", "to_markdown", "to_latex", "to_dict", "to_pandas")]
CSV = on("to_csv", path="/dev/null")
PLOTS: list[Callable[..., Any]] = [reliability_grid, shift_scatter]
DRAWN = [Target(f"plotting.{plot.__name__}", plot, lambda: {"report": filled()}) for plot in PLOTS]
CALLBACKS: list[Any] = [lightning.EMATeacherCallback, transformers.EMATeacherCallback]

TABLE: Table = [
    (
        [Target("ShiftReport", ShiftReport, lambda: {"id_domain": "photo"})],
        [
            Wrong({"id_domain": 3}, TypeError, "id_domain must be a str, got int 3"),
            Wrong({"id_domain": None}, TypeError, "id_domain must be a str, got NoneType None"),
            Wrong(
                {"id_domain": "  "},
                ValueError,
                "id_domain must not be blank, got '  '; it is a heading of the report's tables",
            ),
            Wrong({"n_bins": 0}, ValueError, "n_bins must be > 0, got 0"),
            Wrong({"n_bins": 1.5}, TypeError, "n_bins must be an int, got float 1.5"),
        ],
    ),
    (
        [ADD, FIT],
        [
            Wrong({"method": 3}, TypeError, "method must be a str, got int 3"),
            Wrong(
                {"method": ""}, ValueError, "method must not be blank, got ''; it is a heading of the report's tables"
            ),
            Wrong(
                {"logits": LOGITS[0]},
                ValueError,
                "logits must have shape [N, C, ...], one row for each sample and one column for each class, got [3]; "
                "add the dimension that is missing with .unsqueeze()",
            ),
            Wrong(
                {"logits": LOGITS.long()},
                TypeError,
                "logits must be floating point, got torch.int64; convert it with .float()",
            ),
            Wrong(
                {"logits": LOGITS.numpy()},
                TypeError,
                "logits must be a torch.Tensor, got ndarray; convert it with torch.as_tensor",
            ),
            Wrong(
                {"logits": LOGITS.to(torch.float8_e4m3fn)},
                TypeError,
                "logits must be floating point of at least 16 bits, got torch.float8_e4m3fn; convert it with .float()",
            ),
            Wrong(
                {"logits": LOGITS[:0], "target": TARGET[:0]},
                ValueError,
                "logits must hold at least one sample, got shape [0, 3]; is the loader empty?",
            ),
            Wrong(
                {"logits": LOGITS * math.nan},
                ValueError,
                "logits must be finite, or -inf in masked classes, got NaN in row 0, whose label is 1; "
                "drop such rows, or find where the model overflows",
            ),
            Wrong(
                {"logits": LOGITS.abs() / 0},
                ValueError,
                "logits must be finite, or -inf in masked classes, got +inf in row 0, whose label is 1; "
                "drop such rows, or find where the model overflows",
            ),
            Wrong({"target": TARGET[:29]}, ValueError, "target must have shape [30], one label for each row, got [29]"),
            Wrong(
                {"target": TARGET.float()},
                TypeError,
                "target must have dtype torch.int64, got torch.float32; convert it with .long()",
            ),
            Wrong(
                {"target": TARGET * 2},
                ValueError,
                "target must be in [0, 3), one of the C classes, got 4; drop these samples, or leave them"
                " out of a metric with ignore_index=4",
            ),
            Wrong(
                {"target": TARGET - 3},
                ValueError,
                "target must be in [0, 3), one of the C classes, got -2; drop these samples, or leave "
                "them out of a metric with ignore_index=-2",
            ),
            Wrong(
                {"target": None},
                TypeError,
                "target must be a torch.Tensor, got NoneType; convert it with torch.as_tensor",
            ),
        ],
    ),
    (
        [ADD],
        [
            Wrong({"domain": ["photo"]}, TypeError, "domain must be a str, got list ['photo']"),
            Wrong(
                {"domain": "\t"},
                ValueError,
                "domain must not be blank, got '\\t'; it is a heading of the report's tables",
            ),
            Wrong(
                {"method": "FT", "logits": classifier(30, 3, 2).logits, "target": classifier(30, 3, 2).target},
                ValueError,
                "the temperature of 'FT' must be fitted on data that the report does not score, got 30 of"
                " its 30 samples with the same logits and label in domain 'photo'; fit it on a validation"
                " split, or see why the model gives many inputs the same logits",
            ),
        ],
    ),
    (
        [FIT],
        [
            Wrong(
                {"method": "FT"},
                ValueError,
                "'FT' must be fitted once, on all its validation data, got a second call after T = "
                "1.71225; concatenate the batches, or use another method name",
            ),
            Wrong(
                {"report": filled(fit=False), "method": "FT", "logits": OTHER, "target": OTHER_TARGET},
                ValueError,
                "the temperature of 'FT' must be fitted on data that the report does not score, got 30 of"
                " its 30 samples with the same logits and label in domain 'sketch'; fit it on a "
                "validation split, or see why the model gives many inputs the same logits",
            ),
        ],
    ),
    (
        [on("bins", method="FT", domain="photo")],
        [
            Wrong({"method": "ft"}, ValueError, "method must be one of 'FT', got 'ft'"),
            Wrong({"domain": "Photo"}, ValueError, "domain must be one of 'photo', 'sketch', got 'Photo'"),
            Wrong({"domain": None}, ValueError, "domain must be one of 'photo', 'sketch', got None"),
            Wrong(
                {"report": filled(fit=False), "scaled": True},
                ValueError,
                "'FT' must have a temperature to be scaled, got none; call fit_temperature first",
            ),
            Wrong(
                {"report": ShiftReport(id_domain="photo")},
                ValueError,
                "the report must hold data, got none; call add(method, domain, logits, target) first",
            ),
        ],
    ),
    (
        [*READS, CSV, *DRAWN],
        [
            Wrong(
                {"report": ShiftReport(id_domain="photo")},
                ValueError,
                "the report must hold data, got none; call add(method, domain, logits, target) first",
            ),
            Wrong(
                {"report": lacking()},
                ValueError,
                "every method must be added in the same domains, since means over different ones do not "
                "compare; 'ZS' lacks 'sketch'; add them, or see per_domain()",
            ),
            Wrong(
                {"report": misnamed()},
                ValueError,
                "id_domain must be one of the domains added, got 'Photo' and 'photo'; add its data, or "
                "give the report the name you used",
            ),
        ],
    ),
    (
        [on("per_domain"), on("to_csv", path="/dev/null", per_domain=True), on("to_pandas", per_domain=True)],
        [
            Wrong(
                {"report": ShiftReport(id_domain="photo")},
                ValueError,
                "the report must hold data, got none; call add(method, domain, logits, target) first",
            )
        ],
    ),
    (
        DRAWN,
        [
            Wrong(
                {"report": filled().summary()},
                TypeError,
                "report must be of type ShiftReport, got list; make it with ShiftReport(id_domain=...)",
            ),
            Wrong(
                {"report": None},
                TypeError,
                "report must be of type ShiftReport, got NoneType; make it with ShiftReport(id_domain=...)",
            ),
        ],
    ),
    (
        [Target("plotting.reliability_diagram", reliability_diagram, lambda: {"bins": BINS}), DRAWN[1]],
        [
            Wrong(
                {"ax": Figure()}, TypeError, "ax must be of type Axes, got Figure; make them with figure.add_subplot()"
            ),
            Wrong({"ax": "left"}, TypeError, "ax must be of type Axes, got str; make them with figure.add_subplot()"),
        ],
    ),
    (
        [Target("plotting.reliability_diagram", reliability_diagram, lambda: {"bins": BINS})],
        [
            Wrong(
                {"bins": torch.zeros(3, 5)},
                TypeError,
                "bins must be the three sums that bin_confidences gives, got Tensor; see "
                "functional.bin_confidences, or ShiftReport.bins",
            ),
            Wrong(
                {"bins": filled()},
                TypeError,
                "bins must be the three sums that bin_confidences gives, got ShiftReport; see "
                "functional.bin_confidences, or ShiftReport.bins",
            ),
            Wrong(
                {"bins": tuple(torch.zeros(3, 2, 5))},
                ValueError,
                "bins must be sums of shape [n_bins], got [2, 5]; take one class or one set at a time",
            ),
            Wrong(
                {"bins": (*BINS[:2], BINS[2][:3])},
                ValueError,
                "bins must be sums of one shape [..., n_bins], got [5], [5], [3]; take them from one call"
                " of bin_confidences",
            ),
            Wrong(
                {"bins": (*BINS[:2], None)},
                TypeError,
                "bins[2] must be a torch.Tensor, got NoneType; convert it with torch.as_tensor",
            ),
        ],
    ),
    (
        [
            Target(
                f"{make.__module__.removeprefix('calrobust.')}.{make.__name__}",
                make,
                lambda: {"teacher": EMATeacher(nn.Linear(1, 1)), "student": nn.Linear(1, 1)},
            )
            for make in CALLBACKS
        ],
        [
            Wrong(
                {"teacher": nn.Linear(1, 1)},
                TypeError,
                "teacher must be of type EMATeacher, got Linear; make it with EMATeacher(student)",
            ),
            Wrong(
                {"teacher": None},
                TypeError,
                "teacher must be of type EMATeacher, got NoneType; make it with EMATeacher(student)",
            ),
            Wrong({"student": "model"}, TypeError, "student must be a torch.nn.Module, got str"),
        ],
    ),
    (
        [
            Target(
                "integrations.transformers.clip_features",
                transformers.clip_features,
                lambda: {
                    "output": SimpleNamespace(image_embeds=LOGITS, text_embeds=LOGITS),
                    "model": nn.ParameterDict({"logit_scale": torch.ones(())}),
                },
            )
        ],
        [
            Wrong(
                {"output": SimpleNamespace(image_embeds=LOGITS, text_embeds=None)},
                TypeError,
                "output must have text_embeds, got SimpleNamespace without; call the model with "
                "input_ids, pixel_values and return_dict=True",
            ),
            Wrong(
                {"output": (LOGITS, LOGITS)},
                TypeError,
                "output must have image_embeds and text_embeds, got tuple without; call the model with "
                "input_ids, pixel_values and return_dict=True",
            ),
            Wrong(
                {"model": nn.Linear(1, 1)},
                TypeError,
                "model must have logit_scale, got Linear without; pass the CLIPModel or SiglipModel that "
                "gave the output",
            ),
        ],
    ),
]
