"""Wrong calls of the report, the plots and the callbacks."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from bad_input.table import Table, Target, Wrong
from matplotlib.figure import Figure
from strategies import classifier
from torch import Tensor, nn

from calrobust import EMATeacher, ShiftReport
from calrobust.functional import bin_confidences
from calrobust.integrations import lightning, transformers
from calrobust.plotting import differences, reliability_diagram, reliability_grid, risk_coverage, shift_scatter
from calrobust.report._figures import HEADINGS

FOLDER = TemporaryDirectory()
FILE = Path(FOLDER.name) / "table.csv"
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


def two_methods(logits: Tensor = OTHER, target: Tensor = OTHER_TARGET) -> ShiftReport:
    """A second method, with the same data as the first or with others in the second domain."""
    report = filled()
    report.add("ZS", "photo", OTHER, TARGET)
    report.add("ZS", "sketch", logits, target)
    return report


COMPARE = Target(
    "ShiftReport.compare",
    lambda report, **arguments: report.compare(**arguments),
    lambda: {"report": two_methods(), "a": "FT", "b": "ZS"},
)
ADD = on("add", method="CaRot", domain="photo", logits=LOGITS, target=TARGET)
FIT = on("fit_temperature", method="CaRot", logits=LOGITS, target=TARGET)
READS = [on(name) for name in ("summary", "to_markdown", "to_latex", "to_dict", "to_pandas")]
CSV = on("to_csv", path=FILE)
PLOTS: list[Callable[..., Any]] = [reliability_grid, shift_scatter]
DRAWN = [Target(f"plotting.{plot.__name__}", plot, lambda: {"report": filled()}) for plot in PLOTS]
CALLBACKS: list[Any] = [lightning.EMATeacherCallback, transformers.EMATeacherCallback]

COLUMNS = ", ".join(map(repr, HEADINGS))
NO_DATA = "the report must hold data, got none; call add(method, domain, logits, target) first"
PROBABILITIES = torch.full((30, 3), 1 / 3)
PROBABILITIES[:, 0] = torch.linspace(0.1, 0.9, 30)
PROBABILITIES[:, 1:] = ((1 - PROBABILITIES[:, 0]) / 2)[:, None]

TABLE: Table = [
    (
        [Target("ShiftReport", ShiftReport, lambda: {"id_domain": "photo"})],
        [
            Wrong({"id_domain": 3}, TypeError, "id_domain must be of type str, got int; pass its name, not 3"),
            Wrong(
                {"id_domain": "  "},
                ValueError,
                "id_domain must not be blank, got '  '; it is a heading of tables",
            ),
            Wrong({"n_bins": 0}, ValueError),
            Wrong({"n_bins": 1.5}, TypeError),
            Wrong({"keep_logits": 1}, TypeError, "keep_logits must be True or False, got int 1"),
        ],
    ),
    (
        [ADD, FIT],
        [
            Wrong({"method": None}, TypeError),
            Wrong({"method": ""}, ValueError),
            Wrong({"logits": LOGITS[0]}, ValueError),
            Wrong({"logits": LOGITS[:, :1], "target": 0 * TARGET}, ValueError),
            Wrong({"logits": LOGITS.long()}, TypeError),
            Wrong({"logits": LOGITS.numpy()}, TypeError),
            Wrong({"logits": LOGITS.to(torch.float8_e4m3fn)}, TypeError),
            Wrong(
                {"logits": LOGITS[:0], "target": TARGET[:0]},
                ValueError,
                "logits must hold at least one sample, got shape [0, 3]; is the loader empty?",
            ),
            Wrong({"logits": LOGITS * math.nan}, ValueError),
            Wrong({"logits": LOGITS.abs() / 0}, ValueError),
            Wrong({"logits": PROBABILITIES}, ValueError),
            Wrong({"target": TARGET[:29]}, ValueError),
            Wrong({"target": TARGET.float()}, TypeError),
            Wrong({"target": TARGET * 2}, ValueError),
            Wrong({"target": TARGET - 3}, ValueError),
            Wrong({"target": None}, TypeError),
        ],
    ),
    (
        READS[1:3],
        [
            Wrong({"columns": "ood_nll"}, TypeError, "columns must be a list of names, got str 'ood_nll'"),
            Wrong({"columns": ["id_ece", "ece"]}, ValueError, f"columns[1] must be one of {COLUMNS}, got 'ece'"),
            Wrong({"columns": ["ood_nll_low"]}, ValueError),
        ],
    ),
    (
        [ADD],
        [
            Wrong({"domain": ["photo"]}, TypeError),
            Wrong(
                {"method": "FT", "logits": classifier(30, 4, 3).logits},
                ValueError,
                "logits must have the same number of classes in every batch of a domain, got 3 and then 4 for 'FT' in "
                "'photo'; set the classes that a batch lacks to -inf",
            ),
            Wrong({"domain": "\t"}, ValueError),
            Wrong(
                {"method": "FT", "logits": classifier(30, 3, 2).logits, "target": classifier(30, 3, 2).target},
                ValueError,
                "the temperature of 'FT' must be fitted on data that the report does not score, got 30 of 30 samples "
                "with the same logits and label in domain 'photo'; fit it on a validation split",
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
                "1.71225; concatenate the batches, or use another name",
            ),
            Wrong(
                {"report": filled(fit=False), "method": "FT", "logits": OTHER, "target": OTHER_TARGET},
                ValueError,
                "the temperature of 'FT' must be fitted on data that the report does not score, got 30 of 30 samples "
                "with the same logits and label in domain 'sketch'; fit it on a validation split",
            ),
        ],
    ),
    (
        [COMPARE],
        [
            Wrong({"b": "zs"}, ValueError, "b must be one of 'FT', 'ZS', got 'zs'"),
            Wrong({"a": None}, ValueError),
            Wrong({"report": ShiftReport(id_domain="photo")}, ValueError, NO_DATA),
            Wrong(
                {"report": two_methods(OTHER[:29], OTHER_TARGET[:29])},
                ValueError,
                "a and b must have the same targets in the same order, got 30 of 'FT' and others, 29, of 'ZS' in "
                "'sketch'; add both from one data loader without shuffling",
            ),
        ],
    ),
    (
        [on("confidences", method="FT", domain="photo")],
        [Wrong({"method": "ft"}, ValueError), Wrong({"domain": None}, ValueError)],
    ),
    (
        [on("bins", method="FT", domain="photo")],
        [
            Wrong({"method": "ft"}, ValueError),
            Wrong({"domain": None}, ValueError),
            Wrong(
                {"report": filled(fit=False), "scaled": True},
                ValueError,
                "'FT' must have a temperature to be scaled, got none; call fit_temperature first",
            ),
            Wrong({"report": ShiftReport(id_domain="photo")}, ValueError, NO_DATA),
        ],
    ),
    (
        [READS[0]],
        [
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
        [
            *(*READS, CSV, *DRAWN, on("per_domain")),
            *(on("to_csv", path=FILE, per_domain=True), on("to_pandas", per_domain=True)),
        ],
        [Wrong({"report": ShiftReport(id_domain="photo")}, ValueError, NO_DATA)],
    ),
    (
        DRAWN,
        [
            Wrong(
                {"report": None},
                TypeError,
                "report must be of type ShiftReport, got NoneType; make it with ShiftReport(id_domain=...)",
            ),
        ],
    ),
    (
        [Target("plotting.risk_coverage", risk_coverage, lambda: {"report": filled(), "domain": "photo"})],
        [
            Wrong({"domain": "art"}, ValueError, "domain must be one of 'photo', 'sketch', got 'art'"),
            Wrong({"report": ShiftReport(id_domain="photo"), "domain": "photo"}, ValueError, NO_DATA),
            Wrong({"ax": Figure()}, TypeError),
            Wrong({"correct": "photo", "domain": None}, TypeError, "correct must be None with a report, got 'photo'"),
        ],
    ),
    (
        [Target("plotting.risk_coverage", risk_coverage, lambda: {"report": BINS[0], "correct": BINS[0] > 0})],
        [
            Wrong({"correct": None}, TypeError),
            Wrong({"domain": "photo"}, TypeError, "domain must be None without a report, got 'photo'"),
            Wrong(
                {"report": [0.5]},
                TypeError,
                "confidences must be a torch.Tensor, got list; convert it with torch.as_tensor",
            ),
        ],
    ),
    (
        [Target("plotting.differences", differences, lambda: {"report": two_methods(), "method": "FT"})],
        [
            Wrong({"method": "ft"}, ValueError, "method must be one of 'FT', 'ZS', got 'ft'"),
            Wrong({"columns": ["ood_loss"]}, ValueError),
            Wrong({"columns": ["temperature"]}, ValueError),
            Wrong(
                {"columns": []},
                ValueError,
                "columns must hold at least one name, got []; leave it out for the usual ones",
            ),
            Wrong({"report": None}, TypeError),
            Wrong(
                {"report": filled()}, ValueError, "report must hold methods to compare with 'FT', got none; add another"
            ),
        ],
    ),
    (
        DRAWN[:1],
        [
            Wrong({"methods": 3}, TypeError, "methods must be a list of names, got int 3"),
            Wrong({"methods": "FT"}, TypeError, "methods must be a list of names, got str 'FT'"),
            Wrong(
                {"methods": []},
                ValueError,
                "methods must hold at least one name, got []; leave it out for the usual ones",
            ),
            Wrong({"methods": ["FT", "ft"]}, ValueError, "methods[1] must be one of 'FT', got 'ft'"),
        ],
    ),
    (
        [Target("plotting.reliability_diagram", reliability_diagram, lambda: {"bins": BINS}), DRAWN[1]],
        [
            Wrong(
                {"ax": Figure()}, TypeError, "ax must be of type Axes, got Figure; make them with figure.add_subplot()"
            ),
        ],
    ),
    (
        [Target("plotting.reliability_diagram", reliability_diagram, lambda: {"bins": BINS})],
        [
            Wrong({"bins": torch.zeros(3, 5)}, TypeError),
            Wrong({"bins": filled()}, TypeError),
            Wrong(
                {"bins": tuple(torch.zeros(3, 2, 5))},
                ValueError,
                "bins must be sums of shape [n_bins], got [2, 5]; take one class or one set at a time",
            ),
            Wrong({"bins": (*BINS[:2], BINS[2][:3])}, ValueError),
            Wrong({"bins": (*BINS[:2], None)}, TypeError),
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
            Wrong({"teacher": None}, TypeError),
            Wrong({"student": "model"}, TypeError, "student must be of type Module, got str; pass the model itself"),
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
