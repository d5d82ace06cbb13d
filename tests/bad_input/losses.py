"""Wrong calls of the losses, as functions and as modules."""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from bad_input.table import DEEP, Odd, Table, Target, Wrong
from strategies import unit_rows
from torch import nn

from calrobust import (
    CaRotLoss,
    FeatureDistillationLoss,
    MultimodalContrastiveLoss,
    MultimodalDistillationLoss,
    OrthogonalityLoss,
    SigmoidContrastiveLoss,
    SigmoidDistillationLoss,
)
from calrobust.functional import (
    carot_loss,
    feature_distillation_loss,
    multimodal_contrastive_loss,
    multimodal_distillation_loss,
    orthogonality_loss,
    sigmoid_contrastive_loss,
    sigmoid_distillation_loss,
)
from calrobust.integrations.open_clip import OpenClipLoss
from calrobust.kernels import Impl
from calrobust.losses import LossSum

ROWS, MORE = unit_rows(4, 3, 0, torch.float32), unit_rows(5, 3, 1, torch.float32)
MCL: Any = MultimodalContrastiveLoss()
MKD: Any = MultimodalDistillationLoss()
OC: Any = OrthogonalityLoss()


def pairs(**more: Any) -> dict[str, Any]:
    """The arguments of a loss on pairs."""
    return {"image_features": ROWS.clone(), "text_features": ROWS.clone(), "logit_scale": 10.0, **more}


def taught(**more: Any) -> dict[str, Any]:
    """And a teacher's."""
    teacher = {"teacher_image_features": MORE[:4], "teacher_text_features": MORE[:4], "teacher_logit_scale": 5.0}
    return pairs(**teacher, **more)


def taught_sigmoids() -> dict[str, Any]:
    """And the biases of both."""
    return taught(logit_bias=-10.0, teacher_logit_bias=-9.0)


CONTRASTIVE = Target("functional.multimodal_contrastive_loss", multimodal_contrastive_loss, pairs)
CONTRASTIVE_MODULE = Target("MultimodalContrastiveLoss.forward", MCL, pairs)
DISTILLATION = Target("functional.multimodal_distillation_loss", multimodal_distillation_loss, taught)
DISTILLATION_MODULE = Target("MultimodalDistillationLoss.forward", MKD, taught)
CAROT = Target("functional.carot_loss", carot_loss, lambda: taught(label_smoothing=0.1, distillation_weight=1.5))
CAROT_MODULE = Target("CaRotLoss.forward", CaRotLoss(label_smoothing=0.1, distillation_weight=1.5), taught)
SIGMOID = Target("functional.sigmoid_contrastive_loss", sigmoid_contrastive_loss, lambda: pairs(logit_bias=-10.0))
SIGMOID_MODULE = Target("SigmoidContrastiveLoss.forward", SigmoidContrastiveLoss(), lambda: pairs(logit_bias=-10.0))
SIGMOID_DISTILLATION = Target("functional.sigmoid_distillation_loss", sigmoid_distillation_loss, taught_sigmoids)
SIGMOID_SUM = Target("SigmoidDistillationLoss.forward", SigmoidDistillationLoss() + MCL, taught_sigmoids)
FEATURE = Target("functional.feature_distillation_loss", feature_distillation_loss, taught)
FEATURE_SUM = Target("FeatureDistillationLoss.forward", FeatureDistillationLoss() + MKD, taught)
SUM = Target("losses.LossSum.forward", MCL + 1.5 * MKD, taught)
TERMS = Target("losses.LossSum.terms", (MCL + 1.5 * MKD).terms, taught)
OPEN_CLIP = Target("integrations.open_clip.OpenClipLoss.forward", OpenClipLoss(MCL), pairs)
NEW_CONTRASTIVE = Target("MultimodalContrastiveLoss", MultimodalContrastiveLoss, dict)
NEW_DISTILLATION = Target("MultimodalDistillationLoss", MultimodalDistillationLoss, dict)
NEW_CAROT = Target("CaRotLoss", CaRotLoss, lambda: {"label_smoothing": 0.1, "distillation_weight": 1.5})
ADD_THE_VALUES = (
    "OrthogonalityLoss is a loss on weights and adds to no loss on pairs; add the values: "
    "criterion(...) + 0.2 * orthogonality(model.visual.proj)"
)
NEW = [NEW_CONTRASTIVE, NEW_DISTILLATION, NEW_CAROT]


def given(call: Any) -> Any:
    """A loss that takes all its positional arguments as one."""
    return lambda given, **named: call(*given, **named)


def several(name: str, error: type[Exception], *values: Any) -> list[Wrong]:
    """Values of one argument, whose messages are written out elsewhere."""
    return [Wrong({name: value}, error) for value in values]


TABLE: Table = [
    (  # all losses on pairs take one path, on which each is shown to be by one case
        [
            CONTRASTIVE,
            DISTILLATION,
            CAROT,
            CONTRASTIVE_MODULE,
            DISTILLATION_MODULE,
            CAROT_MODULE,
            SIGMOID,
            SIGMOID_MODULE,
            SIGMOID_DISTILLATION,
            SIGMOID_SUM,
            FEATURE,
            FEATURE_SUM,
            SUM,
            TERMS,
            OPEN_CLIP,
        ],
        [Wrong({"logit_scale": 0.0}, ValueError, "logit_scale must be > 0, got 0.0")],
    ),
    (
        [CONTRASTIVE],
        [
            Wrong(
                {"image_features": ROWS[0]},
                ValueError,
                "image_features must have shape [N, D], at least one row and one column, got [3]; "
                "flatten or pool it to one row a pair",
            ),
            Wrong(
                {"text_features": ROWS[:, :2]},
                ValueError,
                "image_features and text_features must have the same width D and dtype, got [4, 3] of torch.float32 "
                "and [4, 2] of torch.float32; pass what one model gives",
            ),
            Wrong(
                {"text_features": ROWS[:3]},
                ValueError,
                "text_features must hold a text for each image, got 4 images and 3 texts; "
                "pass labels=(image_labels, text_labels)",
            ),
            Wrong(
                {"text_features": MORE, "reduction": "none"},
                ValueError,
                "reduction='none' must be of pairs or of one direction, got both with 4 images and 5 texts that are "
                "no pairs; pass one direction, and one modality to a distillation of features",
            ),
            Wrong(
                {"text_features": MORE, "labels": [torch.arange(4), torch.arange(5)]},
                ValueError,
                "labels must be one tensor for pairs, or (image_labels, text_labels), got a list of 2 for 4 images "
                "and 5 texts",
            ),
            Wrong(
                {"text_features": MORE, "labels": torch.arange(4)},
                ValueError,
                "labels must be one tensor for pairs, or (image_labels, text_labels), got one Tensor for 4 images "
                "and 5 texts",
            ),
            Wrong({"text_features": MORE, "labels": 3}, ValueError),
            Wrong(
                {"text_features": ROWS.to("meta")},
                ValueError,
                "image_features and text_features must be on one device, got cpu and meta; move one with .to()",
            ),
            Wrong(
                {"image_features": ROWS.long()},
                TypeError,
                "image_features must be floating point, got torch.int64; convert it with .float()",
            ),
            Wrong(
                {"image_features": ROWS.to(torch.float8_e4m3fn)},
                TypeError,
                "image_features must be floating point of at least 16 bits, got torch.float8_e4m3fn; "
                "convert it with .float()",
            ),
            Wrong(
                {"image_features": ROWS.to_sparse()},
                TypeError,
                "image_features must be a dense tensor, got torch.sparse_coo; convert it with .to_dense(), or pad it",
            ),
            Wrong(
                {"image_features": ROWS.tolist()},
                TypeError,
                "image_features must be a torch.Tensor, got list; convert it with torch.as_tensor",
            ),
            Wrong({"image_features": ROWS[:0], "text_features": ROWS[:0]}, ValueError),
            Wrong({"image_features": ROWS[:, :0], "text_features": ROWS[:, :0]}, ValueError),
            *several("text_features", ValueError, ROWS[None]),
            *several("image_features", ValueError, ROWS[:, :2], ROWS.double()),
            *several("text_features", ValueError, ROWS[:0]),
            *several("text_features", TypeError, ROWS > 0, ROWS.numpy()),
            *several("image_features", TypeError, ROWS.to(torch.complex64)),
            *several("image_features", TypeError, "image_features", None),
            Wrong(
                {"image_features": ROWS.to("meta"), "text_features": ROWS.to("meta")},
                ValueError,
                "image_features must have values, got a meta tensor; load or initialise the model first",
            ),
            *several("logit_scale", ValueError, torch.ones((), device="meta"), torch.ones(2, device="meta")),
            Wrong({"logit_scale": math.nan}, ValueError, "logit_scale must be finite, got nan"),
            Wrong({"logit_scale": "100"}, TypeError, "logit_scale must be a real number, got str '100'"),
            Wrong(
                {"logit_scale": torch.tensor([1.0, 2.0])},
                ValueError,
                "logit_scale must be a scalar, or a vector of equal entries as DataParallel gives it, got shape [2]; "
                "pass the model's own",
            ),
            Wrong(
                {"logit_scale": torch.tensor(-2.0)},
                ValueError,
                "logit_scale must be > 0, got -2; pass model.logit_scale.exp()",
            ),
            *several("logit_scale", ValueError, -1, math.inf, 10**400, torch.ones(0), torch.ones(2, 1)),
            *several("logit_scale", TypeError, True, 1j, torch.tensor(100)),
            Wrong(
                {"temperature": 2.0},
                TypeError,
                "options must be among reduction, gather, group, impl, memory_budget, got 'temperature'",
            ),
            Wrong(
                {"impl": "triton"},
                ValueError,
                "impl='triton' needs triton and features on a CUDA device of compute capability 8.0 or more, "
                "got features on cpu; impl='auto' takes what there is",
            ),
        ],
    ),
    (
        [SIGMOID, SIGMOID_MODULE, SIGMOID_SUM],
        [
            Wrong({"logit_bias": math.nan}, ValueError, "logit_bias must be finite, got nan"),
            Wrong({"logit_bias": "0"}, TypeError, "logit_bias must be a real number, got str '0'"),
            Wrong(
                {"logit_bias": torch.arange(2.0)},
                ValueError,
                "logit_bias must be a scalar, or a vector of equal entries as DataParallel gives it, got shape [2]; "
                "pass the model's own",
            ),
            *several("logit_bias", ValueError, torch.zeros(0), torch.zeros(2, 2), math.inf),
            *several("logit_bias", TypeError, torch.tensor(1), True),
        ],
    ),
    (
        [SIGMOID_DISTILLATION, SIGMOID_SUM],
        [
            *several("teacher_logit_bias", ValueError, math.nan, torch.arange(2.0)),
            *several("teacher_logit_bias", TypeError, "0", torch.tensor(1)),
        ],
    ),
    (
        [FEATURE, FEATURE_SUM],
        [
            Wrong(
                {name: MORE[:4, :2] for name in ("teacher_image_features", "teacher_text_features")},
                ValueError,
                "teacher_image_features must have the student's width, got [4, 2] for [4, 3]; project them, or distil "
                "similarities",
            ),
            *several("teacher_text_features", ValueError, MORE, MORE[:3]),
        ],
    ),
    (
        [FEATURE, Target("FeatureDistillationLoss", FeatureDistillationLoss, dict)],
        [
            Wrong({"modality": "images"}, ValueError, "modality must be one of 'both', 'image', 'text', got 'images'"),
            *several("modality", ValueError, None, ("image",)),
        ],
    ),
    ([SIGMOID], [*several("text_features", ValueError, ROWS[:3]), *several("logit_bias", TypeError, None)]),
    (
        [Target("SigmoidContrastiveLoss", SigmoidContrastiveLoss, dict)],
        several("reduction", ValueError, "batchmean"),
    ),
    (
        [SIGMOID_SUM],
        [
            Wrong(
                {name: None},
                TypeError,
                "SigmoidDistillationLoss() + MultimodalContrastiveLoss() needs a logit bias of both models or of none; "
                "pass 0.0 if one has none",
            )
            for name in ("logit_bias", "teacher_logit_bias")
        ],
    ),
    (
        [SIGMOID_DISTILLATION, Target("SigmoidDistillationLoss", SigmoidDistillationLoss, dict)],
        several("temperature", ValueError, 0.0, math.nan),
    ),
    (
        [CONTRASTIVE, TERMS],
        [
            Wrong(
                {"labels": torch.arange(3)}, ValueError, "labels must have shape [4], one label for each row, got [3]"
            ),
            Wrong({"labels": torch.eye(4)}, ValueError, DEEP.format("labels", 4, [4, 4])),
            Wrong(
                {"labels": (torch.arange(4), torch.arange(4)[:, None])},
                ValueError,
                DEEP.format("labels[1]", 4, [4, 1]),
            ),
            Wrong(
                {"labels": torch.ones(4)},
                TypeError,
                "labels must have dtype torch.int64, got torch.float32; convert it with .long()",
            ),
            Wrong(
                {"labels": torch.arange(4, device="meta")},
                ValueError,
                "labels must be on cpu, as the rows it labels, got meta; move it with .to()",
            ),
            Wrong(
                {"labels": (torch.arange(4), torch.arange(5))},
                ValueError,
                "labels[1] must have shape [4], one label for each row, got [5]",
            ),
            Wrong(
                {"labels": (torch.arange(4),)},
                ValueError,
                "labels must be one tensor for pairs, or (image_labels, text_labels), got a tuple of 1 for 4 images "
                "and 4 texts",
            ),
            Wrong(
                {"labels": (torch.arange(4), torch.arange(4) % 2)},
                ValueError,
                "labels must give each image a text of the same label, got none for 2 of 4 images; "
                "add texts with their labels, or correct the labels",
            ),
            Wrong(
                {"labels": ["a cat", "a dog", "a cat", "a cow"]},
                TypeError,
                "labels must be a torch.Tensor, got texts; number them, equal ones alike",
            ),
            Wrong(
                {"labels": ("a cat", "a dog")},
                TypeError,
                "labels[0] must be a torch.Tensor, got texts; number them, equal ones alike",
            ),
            *several("labels", TypeError, (torch.arange(4), [0, 1, 2, 3]), (None, torch.arange(4))),
            *several("labels", ValueError, torch.eye(4, dtype=torch.int64)),
            *several(
                "labels", TypeError, torch.arange(4, dtype=torch.int32), torch.arange(4).to_sparse(), [0, 1, 2, 3]
            ),
        ],
    ),
    (
        [DISTILLATION],
        [
            Wrong(
                {"teacher_image_features": MORE[:3], "teacher_text_features": MORE[:3]},
                ValueError,
                "teacher_image_features and image_features must have as many rows, got [3, 3] and [4, 3]; "
                "run the teacher on the same batch",
            ),
            *several("teacher_text_features", ValueError, MORE, MORE[:3]),
            *several("teacher_image_features", ValueError, MORE[:3], MORE[:4].double()),
            *several("teacher_image_features", TypeError, MORE[:4].long(), MORE[:4].tolist()),
            *several("teacher_text_features", TypeError, None),
            *several("teacher_logit_scale", ValueError, 0),
            *several("teacher_logit_scale", TypeError, "5"),
            Wrong(
                {name: MORE[:4].to("meta") for name in ("teacher_image_features", "teacher_text_features")}, ValueError
            ),
        ],
    ),
    (
        [SUM],
        [
            Wrong(
                {"logit_biases": 1.0},
                TypeError,
                "MultimodalContrastiveLoss() + 1.5 * MultimodalDistillationLoss() takes image_features, text_features, "
                "logit_scale and maybe logit_bias of the student, then of the teacher, and labels=, got "
                "'logit_biases'; call it as criterion(*student(images, texts), *teacher(images, texts))",
            ),
            *(
                Wrong(
                    {name: None},
                    TypeError,
                    "MultimodalContrastiveLoss() + 1.5 * MultimodalDistillationLoss() needs "
                    "teacher_image_features, teacher_text_features, teacher_logit_scale; call it as "
                    "criterion(*student(images, texts), *teacher(images, texts))",
                )
                for name in ("teacher_text_features", "teacher_logit_scale")
            ),
        ],
    ),
    (
        [
            Target("losses.PairLoss.forward", given(MCL), lambda: {"given": (ROWS, ROWS, 1.0)}),
            Target("losses.PairLoss.terms", given(MCL.terms), lambda: {"given": (ROWS, ROWS, 1.0)}),
        ],
        [
            Wrong(
                {"given": (ROWS, ROWS, 1.0, 0.0, ROWS, ROWS, 1.0, 0.0, 2.0)},
                TypeError,
                "MultimodalContrastiveLoss() takes image_features, text_features, logit_scale and maybe logit_bias of "
                "the student, then of the teacher, and labels=, got 9 arguments; "
                "call it as criterion(*student(images, texts), *teacher(images, texts))",
            ),
            Wrong(
                {"given": (ROWS, ROWS, 1.0, torch.arange(4))},
                TypeError,
                "MultimodalContrastiveLoss() takes image_features, text_features, logit_scale and maybe logit_bias of "
                "the student, then of the teacher, and labels=, got labels without labels=; "
                "call it as criterion(*student(images, texts), *teacher(images, texts))",
            ),
            Wrong(
                {"given": (ROWS, ROWS, 1.0, 0.5), "logit_bias": 1.0},
                TypeError,
                "MultimodalContrastiveLoss() takes image_features, text_features, logit_scale and maybe logit_bias of "
                "the student, then of the teacher, and labels=, got 'logit_bias' twice; "
                "call it as criterion(*student(images, texts), *teacher(images, texts))",
            ),
            Wrong(
                {"given": (ROWS, ROWS, 1.0, ROWS, ROWS, 1.0)},
                TypeError,
                "MultimodalContrastiveLoss() has no distillation term; "
                "leave out the teacher's features and logit scale",
            ),
        ],
    ),
    (
        [Target("losses.LossSum.forward", 2 * MKD, taught)],
        [
            Wrong(
                {"labels": torch.arange(4)},
                TypeError,
                "labels must go to a contrastive term, and 2 * MultimodalDistillationLoss() has none; leave them out",
            )
        ],
    ),
    (
        [CONTRASTIVE, NEW_CONTRASTIVE, NEW_CAROT],
        [
            Wrong(
                {"label_smoothing": 1.5},
                ValueError,
                "label_smoothing must be in [0, 1), got 1.5; did you mean 0.15?",
            ),
            *several("label_smoothing", ValueError, 1.0, -0.1, math.nan),
            *several("label_smoothing", TypeError, "0.1", torch.tensor(0.1)),
        ],
    ),
    (
        [DISTILLATION, NEW_DISTILLATION],
        [*several("temperature", ValueError, 0.0, -2.0, math.nan), *several("temperature", TypeError, None)],
    ),
    (
        [CAROT, NEW_CAROT],
        [*several("distillation_weight", ValueError, math.inf), *several("distillation_weight", TypeError, "1.5")],
    ),
    (
        [CONTRASTIVE, DISTILLATION, *NEW],
        [
            Wrong(
                {"direction": "texts"},
                ValueError,
                "direction must be one of 'both', 'image_to_text', 'text_to_image', got 'texts'",
            ),
            *several("direction", ValueError, None, ("image_to_text",)),
        ],
    ),
    (
        [CONTRASTIVE, *NEW],
        [
            Wrong(
                {"impl": "fast"}, ValueError, f"impl must be one of {', '.join(map(repr, get_args(Impl)))}, got 'fast'"
            ),
            Wrong({"gather": "no"}, TypeError, "gather must be True or False, got str 'no'"),
            Wrong({"memory_budget": -1}, ValueError, "memory_budget must be >= 0, got -1"),
            Wrong({"memory_budget": 0.5}, TypeError, "memory_budget must be an int, got float 0.5"),
            *several("reduction", ValueError, "batchmean", None),
        ],
    ),
    (
        [Target("losses.PairLoss.__mul__", lambda weight: weight * MCL, lambda: {"weight": 2})],
        [
            Wrong({"weight": math.inf}, ValueError, "weight must be finite, got inf"),
            Wrong({"weight": "2"}, TypeError, "weight must be a real number, got str '2'"),
            Wrong({"weight": True}, TypeError, "weight must be a real number, got bool True"),
            Wrong(
                {"weight": MKD},
                TypeError,
                "weight must be a real number, got MultimodalContrastiveLoss MultimodalContrastiveLoss()",
            ),
            Wrong(
                {"weight": OC},
                TypeError,
                ADD_THE_VALUES,
            ),
        ],
    ),
    (
        [Target("losses.PairLoss.__add__", lambda other: MCL + other, lambda: {"other": MKD})],
        [
            Wrong(
                {"other": 1.0}, TypeError, "unsupported operand type(s) for +: 'MultimodalContrastiveLoss' and 'float'"
            ),
            Wrong(
                {"other": nn.CrossEntropyLoss()},
                TypeError,
                "unsupported operand type(s) for +: 'MultimodalContrastiveLoss' and 'CrossEntropyLoss'",
            ),
            Wrong(
                {"other": OC},
                TypeError,
                ADD_THE_VALUES,
            ),
            Wrong(
                {"other": MultimodalDistillationLoss(reduction="sum")},
                ValueError,
                "losses that add must agree in their shared options, got MultimodalContrastiveLoss() and "
                "MultimodalDistillationLoss(reduction='sum'); pass the same to both",
            ),
        ],
    ),
    (
        [Target("OrthogonalityLoss.__add__", lambda other: OC + other, dict)],
        [
            Wrong(
                {"other": MCL},
                TypeError,
                ADD_THE_VALUES,
            ),
            Wrong(
                {"other": 1.0},
                TypeError,
                ADD_THE_VALUES,
            ),
        ],
    ),
    (
        [Target("losses.LossSum", lambda weighted: LossSum(*weighted), lambda: {"weighted": [(1.0, MCL)]})],
        [
            Wrong(
                {"weighted": []},
                TypeError,
                "a sum must be of pairs of a weight and a loss, got 'nothing'; write it as a + 1.5 * b",
            ),
            Wrong(
                {"weighted": [MCL]},
                TypeError,
                "a sum must be of pairs of a weight and a loss, got MultimodalContrastiveLoss(); write it"
                " as a + 1.5 * b",
            ),
            Wrong(
                {"weighted": [(1.0, Odd())]},
                TypeError,
                "a sum must be of pairs of a weight and a loss, got (1.0, <odd>); write it as a + 1.5 * b",
            ),
            Wrong({"weighted": [("1", MCL)]}, TypeError, "weight must be a real number, got str '1'"),
            Wrong({"weighted": [(1.0, MCL), (math.nan, MKD)]}, ValueError, "weight must be finite, got nan"),
        ],
    ),
    (
        [
            Target("functional.orthogonality_loss", orthogonality_loss, lambda: {"weight": ROWS.clone()}),
            Target("OrthogonalityLoss.forward", OC, lambda: {"weight": ROWS.clone()}),
        ],
        [
            Wrong(
                {"weight": torch.ones(3)},
                ValueError,
                "weight must have shape [in, out], got [3]; pass the projection, e.g. model.visual.proj",
            ),
            *several("weight", ValueError, torch.ones(2, 3, 4), torch.ones(0, 3)),
            *several("weight", TypeError, torch.ones(2, 2, dtype=torch.int64), ROWS.to_sparse()),
            Wrong(
                {"weight": torch.compile(nn.Linear(3, 3))},
                TypeError,
                "weight must be of type Tensor, got OptimizedModule; pass the projection, e.g. model.visual.proj",
            ),
            *several("weight", TypeError, "visual.proj", nn.Conv2d(1, 1, 1), None),
            *several("weight", ValueError, ROWS.to("meta"), nn.Linear(3, 3, device="meta")),
        ],
    ),
    (
        [
            Target("functional.orthogonality_loss", orthogonality_loss, lambda: {"weight": ROWS.clone()}),
            Target("OrthogonalityLoss", OrthogonalityLoss, dict),
        ],
        [Wrong({"squared": "no"}, TypeError, "squared must be True or False, got str 'no'")],
    ),
    (
        [Target("integrations.open_clip.OpenClipLoss", OpenClipLoss, lambda: {"criterion": MCL})],
        [
            Wrong(
                {"criterion": nn.CrossEntropyLoss()},
                TypeError,
                "criterion must be of type PairLoss, got CrossEntropyLoss; pass a loss on pairs, such as "
                "MultimodalContrastiveLoss() or a sum of them",
            ),
            *several("criterion", TypeError, OC, MultimodalContrastiveLoss),
        ],
    ),
    (
        [
            Target(
                "integrations.open_clip.OpenClipLoss.forward",
                OpenClipLoss(MCL + MKD),
                lambda: pairs(dist_image_features=ROWS, dist_text_features=ROWS, dist_logit_scale=1.0),
            )
        ],
        [
            Wrong(
                {"dist_text_features": None},
                TypeError,
                "MultimodalContrastiveLoss() + MultimodalDistillationLoss() needs teacher_image_features,"
                " teacher_text_features, teacher_logit_scale; call it as criterion(*student(images, "
                "texts), *teacher(images, texts)); open_clip's trainer passes a teacher's outputs with --distill-model "
                "and --distill-pretrained, and never with --accum-freq above 1",
            ),
            Wrong(
                {"dist_image_features": MORE},
                ValueError,
                "teacher_image_features and image_features must have as many rows, got [5, 3] and [4, 3]; "
                "run the teacher on the same batch",
            ),
        ],
    ),
]
