"""Losses on pairs as weighted sums of terms, which share one pass over the pair matrix."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypedDict, get_args

import torch
from torch import Tensor

from calrobust._checks import (
    can_read_values,
    check_choice,
    check_flag,
    check_floating,
    check_fraction,
    check_integer,
    check_labels,
    check_not_meta,
    check_number,
    check_one_device,
    check_positive,
)
from calrobust.distributed import REFUSED, ProcessGroup, Ranks, agree
from calrobust.kernels import Direction, Impl, Labels, PairBatch, pair_statistics
from calrobust.kernels.operators import obstacle_to_triton
from calrobust.kernels.sigmoid import Classes, Model, sigmoid_sums

Directions = Literal["both", "image_to_text", "text_to_image"]
Modality = Literal["both", "image", "text"]
Reduction = Literal["mean", "sum", "none"]


class PairOptions(TypedDict, total=False):
    """The options that all losses on pairs share.

    Example:
        >>> from calrobust import MultimodalContrastiveLoss
        >>> from calrobust.functional import PairOptions
        >>> options: PairOptions = {"reduction": "sum", "impl": "tiled"}
        >>> MultimodalContrastiveLoss(**options)
        MultimodalContrastiveLoss(reduction='sum', impl='tiled')
    """

    reduction: Reduction
    """``"mean"`` (default) or ``"sum"`` over the N pairs, or ``"none"`` for a value of each. If images and texts are
    no pairs, it is over those of each direction, and ``"none"`` needs a single one."""
    gather: bool
    """Contrast against all ranks (default False); see :ref:`many-processes`."""
    group: ProcessGroup | None
    """The process group of ``gather``; None (default) is the world."""
    impl: Impl
    """``"dense"`` holds the whole pair matrix, and has all derivatives. The others have the first in reverse mode:
    ``"tiled"`` in O(N·D) memory; ``"triton"`` likewise in CUDA kernels; ``"auto"`` (default) is Triton where it runs,
    else tiled, but keeps a matrix that fits into ``memory_budget``."""
    memory_budget: int
    """Bytes that ``"auto"`` may keep (default 256 MiB). The sigmoid losses keep nothing."""


DEFAULTS: PairOptions = {
    "reduction": "mean",
    "gather": False,
    "group": None,
    "impl": "auto",
    "memory_budget": 256 * 2**20,
}


def filled(options: PairOptions) -> PairOptions:
    """The options, checked and completed."""
    for name in options:
        if name not in DEFAULTS:
            raise TypeError(f"options must be among {', '.join(DEFAULTS)}, got {name!r}")
    every: PairOptions = {**DEFAULTS, **options}
    check_choice(get_args(Reduction), reduction=every["reduction"])
    check_flag(gather=every["gather"])
    check_choice(get_args(Impl), impl=every["impl"])
    check_integer(0, memory_budget=every["memory_budget"])
    return every


class Outputs(NamedTuple):
    """What a model returns for a batch."""

    image_features: Tensor
    text_features: Tensor
    logit_scale: Tensor | float
    logit_bias: Tensor | float = 0.0  # which no softmax sees


@dataclass(frozen=True)
class Term:
    """A summand of a loss."""

    kind: str  # a key of `PASSES`
    label_smoothing: float = 0.0
    temperature: float = 1.0
    direction: Directions = "both"
    modality: Modality = "both"

    def __post_init__(self) -> None:
        check_fraction(closed=False, label_smoothing=self.label_smoothing)
        check_positive(temperature=self.temperature)
        check_choice(get_args(Directions), direction=self.direction)
        check_choice(get_args(Modality), modality=self.modality)

    @property
    def distils(self) -> bool:
        """Whether it has a teacher."""
        return "contrastive" not in self.kind

    @property
    def anchors(self) -> str:
        """The modality of its values."""
        if "sigmoid" in self.kind:
            return "image"
        return self.modality if self.kind == "feature" else self.direction.partition("_")[0]


Weighted = Sequence[tuple[float, Term]]


class Request(NamedTuple):
    """A weighted sum of terms of a batch of pairs."""

    weighted: Weighted
    student: Outputs
    teacher: Outputs | None = None
    labels: Labels | None = None
    apart: bool = False  # whether each term is wanted, not only the sum

    def models(self) -> list[dict[str, Any]]:
        """Their outputs by name."""
        return [
            {f"{prefix}{name}": value for name, value in zip(Outputs._fields, outputs, strict=True)}
            for prefix, outputs in (("", self.student), ("teacher_", self.teacher))
            if outputs
        ]


class Shared(NamedTuple):
    """What all terms read."""

    request: Request
    ranks: tuple[Ranks, Ranks]
    options: PairOptions
    batches: dict[bool, PairBatch]

    def batch(self, *, swapped: bool = False) -> PairBatch:
        """The batch, made once."""
        if swapped not in self.batches:
            _, student, taught, labels, _ = self.request
            self.batches[swapped] = PairBatch(student[:3], taught and taught[:3], labels, self.ranks, swapped=swapped)
        return self.batches[swapped]

    def reduce(self, each: Sequence[tuple[Tensor, Tensor | int]]) -> Tensor:
        """The sum over directions, each with values and the number of anchors."""
        reduction = self.options["reduction"]
        if reduction == "none":
            return torch.stack([values for values, _ in each]).sum(0)
        sums = [values.sum() / (number if reduction == "mean" else 1) for values, number in each]
        return self.ranks[0].sum(torch.stack(sums).sum())


def _softmax_values(sharing: Weighted, shared: Shared) -> list[Tensor]:
    terms = [term for _, term in sharing]
    swapped = all(term.direction == "text_to_image" for term in terms)
    batch = shared.batch(swapped=swapped)
    if any(not term.distils and term.direction != "text_to_image" for term in terms):
        _check_positives(batch)
    found = pair_statistics(
        batch,
        temperature=float(terms[0].temperature),
        distils=any(term.distils for term in terms),
        columns=not swapped and any(term.direction != "image_to_text" for term in terms),
        impl=shared.options["impl"],
        memory_budget=shared.options["memory_budget"],
    )
    ways = ("text_to_image", "image_to_text") if swapped else ("image_to_text", "text_to_image")
    values = []
    for weight, term in sharing:
        each = [
            _of_anchors(term, one) for way, one in zip(ways, found, strict=False) if term.direction in ("both", way)
        ]
        values.append((weight * shared.reduce(each)).to(batch.dtype))
    return values


def _of_anchors(term: Term, statistics: Direction) -> tuple[Tensor, Tensor | int]:
    if term.distils:
        return statistics.divergence, statistics.total
    smoothing = float(term.label_smoothing)
    loss = statistics.negative_log_likelihood + (1 - smoothing) * statistics.above_positives
    loss = loss + smoothing * statistics.above_mean if smoothing else loss
    weights, number, _ = statistics.anchors
    return loss * weights / (2 if term.direction == "both" else 1), number


def _sigmoid_values(sharing: Weighted, shared: Shared) -> list[Tensor]:
    batch, options, temperature = shared.batch(), shared.options, float(sharing[0][1].temperature)
    request, device = shared.request, batch.partner.device
    biased = [(batch.student, batch.scalar(request.student.logit_bias, device))]
    if batch.teacher and request.teacher and any(term.distils for _, term in sharing):
        biased.append((batch.teacher, batch.scalar(request.teacher.logit_bias, device).detach()))
    totalled = options["reduction"] != "none" and (len(sharing) == 1 or not request.apart)
    with torch.autocast(device.type, enabled=False):
        sums, total = sigmoid_sums(
            [Model(x, y, scale / temperature, bias / temperature) for (x, y, scale), bias in biased],
            Classes(*(batch.classes or (batch.partner, torch.arange(batch.columns.total, device=device)))),
            [sum(weight for weight, term in sharing if term.distils == distils) for distils in (False, True)],
            impl=options["impl"],
            operands=batch.operands,
            totalled=totalled,
        )
    found = [(1.0, total)] if totalled else [(weight, sums[term.distils]) for weight, term in sharing]
    return [(weight * shared.reduce([(each, batch.rows.total)])).to(batch.dtype) for weight, each in found]


def _feature_values(sharing: Weighted, shared: Shared) -> list[Tensor]:
    _, ours, theirs, *_ = shared.request
    values = []
    for weight, term in sharing:
        each = []
        for name, x, t, ranks in zip(("image", "text"), ours[:2], (theirs or ours)[:2], shared.ranks, strict=True):
            if x.shape[1] != t.shape[1]:
                raise ValueError(
                    f"teacher_{name}_features must have the student's width, got {list(t.shape)} for {list(x.shape)}; "
                    "project them, or distil similarities"
                )
            if term.modality in ("both", name):
                x, t = (f.to(torch.promote_types(f.dtype, torch.float32)) for f in (x, t.detach()))
                each.append(((x - t).square().sum(1) / 2, ranks.total))
        values.append(weight * shared.reduce(each))
    return values


PASSES = {
    "contrastive": _softmax_values,
    "distillation": _softmax_values,
    "sigmoid_contrastive": _sigmoid_values,
    "sigmoid_distillation": _sigmoid_values,
    "feature": _feature_values,
}


def weighted_terms(request: Callable[[], Request], options: Callable[[], PairOptions]) -> list[Tensor]:
    """Each term times its weight, reduced over all ranks.

    ``request`` may raise: with ``gather`` all ranks are told, so that none waits.
    """
    if torch.compiler.is_compiling() and options().get("gather") is True:
        torch._dynamo.graph_break(
            msg="with gather=True the ranks exchange the sizes of their batches, which no graph can hold; "
            "compile the model, and leave the loss out of fullgraph=True"
        )
        terms: list[Tensor] = torch.compiler.disable(_weighted_terms)(request, options)
        return terms
    return _weighted_terms(request, options)


def _weighted_terms(request: Callable[[], Request], given: Callable[[], PairOptions]) -> list[Tensor]:
    options = given()
    try:
        options = filled(options)
        asked = request()
        _check_outputs(asked, options)
        _check_anchors(asked, options)
    except (TypeError, ValueError):
        if options.get("gather") is True:
            agree([REFUSED, REFUSED], options.get("group"), {}, torch.device("cpu"))
        raise
    weighted, student, *_ = asked
    sizes = [features.shape[0] for features in student[:2]]
    images, texts = (Ranks([size]) for size in sizes)
    if options["gather"]:
        images, texts = agree(sizes, options["group"], _facts(asked, options), student[0].device)
    shared = Shared(asked, (images, texts), options, {})
    passes = [(PASSES[term.kind], float(term.temperature)) for _, term in weighted]
    terms: dict[int, Tensor] = {}
    for evaluate, t in dict.fromkeys(passes):
        places = [place for place, each in enumerate(passes) if each == (evaluate, t)]
        # t² keeps gradients as large as without a temperature.
        values = evaluate([(t * t * float(weighted[place][0]), weighted[place][1]) for place in places], shared)
        terms.update(zip(places, values, strict=False))  # a pass may give one sum
    found = [terms[place] for place in sorted(terms)]
    for number in student[2:]:
        if isinstance(number, Tensor) and number.requires_grad:  # DDP waits for its gradient, used or not
            found = [value + (0 * number.sum()).to(value) for value in found]
    return found


def _facts(request: Request, options: PairOptions) -> dict[str, object]:
    """What must be the same on all ranks."""
    facts: dict[str, object] = {
        "the loss": " + ".join(f"{weight:g} * {term!r}" for weight, term in request.weighted),
        "reduction": options["reduction"],
        "the type of labels": type(request.labels).__name__,
    }
    if sum("sigmoid" in term.kind for _, term in request.weighted) > 1:  # whose forward gives one sum
        facts["whether it is terms() that is called"] = request.apart
    for outputs in request.models():
        for name, value in outputs.items():
            fact = f"{name} (a number, or width, dtype and requires_grad)"
            if isinstance(value, Tensor):
                facts[fact] = *value.shape[1:], str(value.dtype), torch.is_grad_enabled() and value.requires_grad
            else:
                facts[fact] = float(value)
    return facts


def _check_outputs(request: Request, options: PairOptions) -> None:
    for outputs in request.models():
        (first, images), (second, texts), scale, bias = outputs.items()
        features = {first: images, second: texts}
        check_floating(**features)
        for name, value in features.items():
            if value.ndim != 2 or value.numel() == 0:
                raise ValueError(
                    f"{name} must have shape [N, D], at least one row and one column, got {list(value.shape)}; "
                    "flatten or pool it to one row a pair"
                )
        if images.shape[1] != texts.shape[1] or images.dtype != texts.dtype:
            came = " and ".join(f"{list(value.shape)} of {value.dtype}" for value in (images, texts))
            raise ValueError(
                f"{first} and {second} must have the same width D and dtype, got {came}; pass what one model gives"
            )
        check_one_device(**features)
        check_not_meta(**outputs)
        _check_scalar(*scale, positive=True)
        _check_scalar(*bias, positive=False)
    _, student, teacher, *_ = request
    for name, theirs, ours in zip(Outputs._fields, (teacher or student)[:2], student[:2], strict=False):
        if theirs.shape[0] != ours.shape[0]:
            raise ValueError(
                f"teacher_{name} and {name} must have as many rows, got {list(theirs.shape)} and {list(ours.shape)}; "
                "run the teacher on the same batch"
            )
        check_one_device(**{f"teacher_{name}": theirs, name: ours})
    if options["impl"] == "triton" and (obstacle := obstacle_to_triton(student[0].device)):
        raise ValueError(
            "impl='triton' needs triton and features on a CUDA device of compute capability 8.0 or more, "
            f"got {obstacle}; impl='auto' takes what there is"
        )


def _check_scalar(name: str, value: Any, *, positive: bool) -> None:
    if not isinstance(value, Tensor):
        (check_positive if positive else check_number)(**{name: value})
        return
    check_floating(**{name: value})
    if value.numel() != 1 and (value.ndim != 1 or not value.numel() or bool((value != value[0]).any())):
        raise ValueError(
            f"{name} must be a scalar, or a vector of equal entries as DataParallel gives it, got shape "
            f"{list(value.shape)}; pass the model's own"
        )
    if positive and can_read_values(value) and bool((value <= 0).any()):
        raise ValueError(f"{name} must be > 0, got {value.flatten()[0].item():g}; pass model.logit_scale.exp()")


def _check_anchors(request: Request, options: PairOptions) -> None:
    weighted, (images, texts, *_), _, labels, _ = request
    n, m, device = images.shape[0], texts.shape[0], images.device
    if isinstance(labels, tuple) and len(labels) == 2:
        for k, length in enumerate((n, m)):
            check_labels(length, device, (), **{f"labels[{k}]": labels[k]})
    elif labels is not None:
        if isinstance(labels, tuple) or n != m:
            kind = type(labels).__name__
            came = f"a {kind} of {len(labels)}" if isinstance(labels, (list, tuple)) else f"one {kind}"
            raise ValueError(
                f"labels must be one tensor for pairs, or (image_labels, text_labels), got {came} for {n} images and "
                f"{m} texts"
            )
        check_labels(n, device, labels=labels)
    elif n > m and not all(term.distils for _, term in weighted):
        raise ValueError(
            f"text_features must hold a text for each image, got {n} images and {m} texts; "
            "pass labels=(image_labels, text_labels)"
        )
    anchors = {term.anchors for _, term in weighted}
    several = len(anchors) > 1 or "both" in anchors
    if options["reduction"] == "none" and several and (n != m or isinstance(labels, tuple)):
        raise ValueError(
            f"reduction='none' must be of pairs or of one direction, got {' and '.join(sorted(anchors))} with "
            f"{n} images and {m} texts that are no pairs; pass one direction, and one modality to a distillation of "
            "features"
        )


def _check_positives(batch: PairBatch) -> None:
    number, total = batch.of_rows.number, batch.rows.total
    if not isinstance(number, Tensor) or not can_read_values(number):
        return  # the loss will be NaN
    if int(number) < total:
        raise ValueError(
            f"labels must give each image a text of the same label, got none for {total - int(number)} of {total} "
            "images; add texts with their labels, or correct the labels"
        )
