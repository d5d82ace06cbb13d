"""Losses on pairs as weighted sums of terms, which share one pass over the pair matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypedDict, get_args

import torch
from torch import Tensor

from calrobust._checks import (
    check_choice,
    check_flag,
    check_floating,
    check_integer,
    check_labels,
    check_number,
    check_one_device,
    check_positive,
)
from calrobust.distributed import REDUCTIONS, REFUSED, ProcessGroup, Ranks, Reduction, agree
from calrobust.kernels import IMPLS, MEMORY_BUDGET, Features, Impl, Labels, PairBatch, pair_statistics
from calrobust.kernels.operators import obstacle_to_triton

Directions = Literal["both", "image_to_text", "text_to_image"]
DIRECTIONS: tuple[str, ...] = get_args(Directions)
Biases = tuple[Tensor | float, Tensor | float]  # of the student's logits and of the teacher's; no softmax sees them


class PairOptions(TypedDict, total=False):
    """The keyword options that all losses on pairs share, each with a default.

    Example:
        >>> from calrobust import MultimodalContrastiveLoss
        >>> from calrobust.functional import PairOptions
        >>> options: PairOptions = {"reduction": "sum", "impl": "tiled"}
        >>> MultimodalContrastiveLoss(**options)
        MultimodalContrastiveLoss(reduction='sum', impl='tiled')
    """

    reduction: Reduction
    """``"mean"`` (default) or ``"sum"`` over the N pairs, or ``"none"`` for a value of each. If images and texts differ
    in number or have labels of their own, mean and sum are over the images or texts of a direction, and ``"none"`` is
    for one direction."""
    gather: bool
    """Contrast against the images and texts of every rank (default False); see :ref:`many-processes`."""
    group: ProcessGroup | None
    """The process group of ``gather``; None (default) is the world."""
    impl: Impl
    """``"dense"`` holds the whole pair matrix, and has derivatives of every order and mode. The others have first
    derivatives in reverse mode: ``"tiled"`` needs O(N·D) memory; ``"triton"`` does the same in CUDA kernels; ``"auto"``
    (default) takes Triton where it runs, and else is tiled and keeps the matrix for backward if it fits into
    ``memory_budget``."""
    memory_budget: int
    """Bytes of logits that ``"auto"`` may hold for backward; 256 MiB by default. The sigmoid losses hold none."""


@dataclass(frozen=True)
class Options:
    """The options of a loss, checked; `PairOptions` says what they do."""

    reduction: Reduction = "mean"
    gather: bool = False
    group: ProcessGroup | None = None
    impl: Impl = "auto"
    memory_budget: int = MEMORY_BUDGET

    def __post_init__(self) -> None:
        """Checks each option."""
        check_choice(REDUCTIONS, reduction=self.reduction)
        check_flag(gather=self.gather)
        check_choice(IMPLS, impl=self.impl)
        check_integer(0, memory_budget=self.memory_budget)

    @classmethod
    def of(cls, options: PairOptions) -> Options:
        """The given options, and defaults for the others."""
        for name in options:
            if name not in OPTIONS:
                raise TypeError(
                    f"a loss on pairs must have only options it knows, got {name!r}; they are {', '.join(OPTIONS)}"
                )
        return cls(**options)


OPTIONS = tuple(field.name for field in fields(Options))


class Term(Protocol):
    """A summand: values of images and texts, from statistics of the pair matrix."""

    name: ClassVar[str]
    needs_teacher: ClassVar[bool]
    needs_positives: ClassVar[bool]

    @staticmethod
    def evaluate(sharing: Sequence[tuple[float, Any]], shared: Shared) -> list[Tensor]:
        """The reduced values of all weighted terms that share this function and a temperature."""

    @property
    def temperature(self) -> float:
        """What divides the logits."""

    @property
    def direction(self) -> Directions:
        """Whose candidates are compared: those of images, of texts or of both."""


class Request(NamedTuple):
    """A weighted sum of terms, and the batch of pairs whose terms are asked for."""

    weighted: Sequence[tuple[float, Term]]
    student: Features
    teacher: Features | None
    labels: Labels | None
    biases: Biases = (0.0, 0.0)


class Shared:
    """What all terms of a call have in common."""

    def __init__(self, request: Request, ranks: tuple[Ranks, Ranks], options: Options, *, together: bool) -> None:
        self.request, self.ranks, self.options, self.together = request, ranks, options, together
        self._batches: dict[bool, PairBatch] = {}

    def batch(self, *, swapped: bool = False) -> PairBatch:
        """The batch, with images as rows and texts as columns, or ``swapped``."""
        if swapped not in self._batches:
            _, student, teacher, labels, _ = self.request
            self._batches[swapped] = PairBatch(student, teacher, labels, self.ranks, swapped=swapped)
        return self._batches[swapped]

    def reduce(self, each: Sequence[tuple[Tensor, Tensor | int]]) -> Tensor:
        """The sum over directions, each with values and the number of anchors over all ranks."""
        reduction = self.options.reduction
        if reduction == "none":
            return torch.stack([values for values, _ in each]).sum(0)
        sums = [values.sum() / (number if reduction == "mean" else 1) for values, number in each]
        return self.ranks[0].sum(torch.stack(sums).sum())


class SoftmaxTerm:
    """Terms whose ``values(direction)`` are those of the anchors of a `Direction`, and their number over all ranks."""

    @staticmethod
    def evaluate(sharing: Sequence[tuple[float, Any]], shared: Shared) -> list[Tensor]:
        """In one pass over the pair matrix."""
        terms = [term for _, term in sharing]
        # Text to image alone is image to text with the two exchanged.
        swapped = all(term.direction == "text_to_image" for term in terms)
        batch = shared.batch(swapped=swapped)
        if any(term.needs_positives and term.direction != "text_to_image" for term in terms):
            _check_positives(batch)
        found = pair_statistics(
            batch,
            temperature=float(terms[0].temperature),
            distils=any(term.needs_teacher for term in terms),
            columns=not swapped and any(term.direction != "image_to_text" for term in terms),
            impl=shared.options.impl,
            memory_budget=shared.options.memory_budget,
        )
        statistics = dict(zip(DIRECTIONS[2:0:-1] if swapped else DIRECTIONS[1:], found, strict=True))
        values = []
        for weight, term in sharing:
            wanted = DIRECTIONS[1:] if term.direction == "both" else (term.direction,)
            value = weight * shared.reduce([term.values(statistics[way]) for way in wanted])
            values.append(value.to(batch.dtype))
        return values


def weighted_terms(request: Callable[[], Request], options: PairOptions, *, together: bool = False) -> list[Tensor]:
    """Each term times its weight, reduced over all ranks; terms of one temperature share one pass.

    If only the sum is to be differentiated, ``together``, sigmoid terms are cheaper. The request is a function because
    with ``gather`` all ranks are told of an error that it raises, or they would wait forever.
    """
    if options.get("gather") is True and torch.compiler.is_compiling():
        torch._dynamo.graph_break(
            msg="with gather=True the ranks tell each other the sizes of their batches, which no graph can hold; "
            "compile the model, and leave the loss out of fullgraph=True"
        )
        terms: list[Tensor] = torch.compiler.disable(_weighted_terms)(request, options, together)
        return terms
    return _weighted_terms(request, options, together)


def _weighted_terms(request: Callable[[], Request], options: PairOptions, together: bool) -> list[Tensor]:
    gather, group = options.get("gather", False), options.get("group")
    check_flag(gather=gather)
    try:
        checked = Options.of(options)
        weighted, student, teacher, labels, biases = asked = request()
        _check_batch(student, teacher)
        _check_logit_bias(logit_bias=biases[0], teacher_logit_bias=biases[1])
        _check_anchors([term for _, term in weighted], student, labels, checked.reduction)
        _check_impl(checked.impl, student[0].device)
    except (TypeError, ValueError):
        if gather:
            agree([REFUSED, REFUSED], group, {}, torch.device("cpu"))
        raise
    n, m = student[0].shape[0], student[1].shape[0]
    ranks = Ranks([n]), Ranks([m])
    if gather:
        images, texts = agree(
            [n, m], group, _facts(weighted, student, teacher, labels, biases, checked), student[0].device
        )
        ranks = images, texts
    shared = Shared(asked, ranks, checked, together=together)
    passes: dict[tuple[Any, float], list[int]] = {}
    for place, (_, term) in enumerate(weighted):
        passes.setdefault((term.evaluate, float(term.temperature)), []).append(place)
    terms: dict[int, Tensor] = {}
    for (evaluate, _), places in passes.items():
        values = evaluate([(float(weighted[place][0]), weighted[place][1]) for place in places], shared)
        terms.update(zip(places, values, strict=True))
    return [terms[place] for place in range(len(weighted))]


def _facts(
    weighted: Sequence[tuple[float, Term]],
    student: Features,
    teacher: Features | None,
    labels: Labels | None,
    biases: Biases,
    options: Options,
) -> dict[str, object]:
    """What must be the same on all ranks: otherwise their collectives do not fit, or their losses differ."""
    facts: dict[str, object] = {
        "the loss": " + ".join(f"{weight:g} * {term!r}" for weight, term in weighted),
        "reduction": options.reduction,
        "whether labels are given": labels is not None,
        "whether labels are a pair": isinstance(labels, tuple),
    }
    for whose, features, bias in (("", student, biases[0]), ("the teacher's ", teacher, biases[1])):
        facts[f"whether {whose or 'the '}features are given"] = features is not None
        if features is None:
            continue
        images, texts, scale = features
        facts[f"the width of {whose}features"] = images.shape[1]
        facts[f"the dtype of {whose}features"] = str(images.dtype)
        facts[f"{whose}logit_scale, if it is a number"] = None if isinstance(scale, Tensor) else float(scale)
        facts[f"{whose}logit_bias, if it is a number"] = None if isinstance(bias, Tensor) else float(bias)
        if features is student:
            facts["whether image_features need a gradient"] = torch.is_grad_enabled() and images.requires_grad
            facts["whether text_features need a gradient"] = torch.is_grad_enabled() and texts.requires_grad
    return facts


def _check_batch(student: Features, teacher: Features | None) -> None:
    """Raises unless student and teacher have features of the same images and texts, and logit scales."""
    for prefix, features in (("", student), *([("teacher_", teacher)] if teacher else [])):
        images, texts, scale = features
        _check_features(**{f"{prefix}image_features": images, f"{prefix}text_features": texts})
        _check_logit_scale(**{f"{prefix}logit_scale": scale})
    if teacher is None:
        return
    for name, theirs, ours in zip(("image_features", "text_features"), teacher[:2], student[:2], strict=True):
        if theirs.shape[0] != ours.shape[0]:
            raise ValueError(
                f"teacher_{name} and {name} must have as many rows, got {list(theirs.shape)} and {list(ours.shape)}; "
                "run the teacher on the same batch"
            )
    check_one_device(teacher_image_features=teacher[0], image_features=student[0])


def _check_impl(impl: Impl, device: torch.device) -> None:
    if impl == "triton" and (obstacle := obstacle_to_triton(device)):
        raise ValueError(
            "impl='triton' must find triton and features on a CUDA device of compute capability 8.0 or more, "
            f"got {obstacle}; provide that, or pass impl='auto', which takes what there is"
        )


def _check_anchors(terms: list[Term], student: Features, labels: Labels | None, reduction: Reduction) -> None:
    """Raises for labels that do not fit, and where images and texts that are no pairs are treated as pairs."""
    images, texts, _ = student
    n, m, device = images.shape[0], texts.shape[0], images.device
    if isinstance(labels, tuple):
        if len(labels) != 2:
            raise ValueError(f"labels must be one tensor or a pair, of images and of texts, got {len(labels)} of them")
        for k, length in enumerate((n, m)):
            named: dict[str, Any] = {f"labels[{k}]": labels[k]}
            check_labels(length, device, **named)
    elif labels is not None and n != m:
        raise ValueError(
            f"labels must be a pair where images and texts differ in number, got one tensor for {n} images and {m} "
            "texts; pass labels=(image_labels, text_labels)"
        )
    elif labels is not None:
        check_labels(n, device, labels=labels)
    elif n > m and any(term.needs_positives for term in terms):
        raise ValueError(
            f"text_features must hold a text for each image, got {m} texts for {n} images; "
            "pass labels=(image_labels, text_labels) to say which text belongs to which image"
        )
    directions = {term.direction for term in terms}
    one = len(directions) == 1 and "both" not in directions
    if reduction == "none" and not one and (n != m or isinstance(labels, tuple)):
        raise ValueError(
            f"reduction='none' must be of pairs or of one direction, got {' and '.join(sorted(directions))} with "
            f"{n} images and {m} texts that are no pairs; pass direction='image_to_text' or 'text_to_image', "
            "and modality='image' or 'text' to a distillation of features"
        )


def _check_positives(batch: PairBatch) -> None:
    """Raises on all ranks for an image without a text, where values may be looked at; elsewhere its loss is NaN."""
    number, total = batch.of_rows.number, batch.rows.total
    if not isinstance(number, Tensor) or number.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if int(number) < total:
        raise ValueError(
            f"labels must give each image a text of the same label, got none for {total - int(number)} of {total} "
            "images; add their texts, or pass direction='text_to_image'"
        )


def _check_features(**features: Any) -> None:
    """Raises unless the arguments are floating ``[N, D]`` and ``[M, D]``, not empty, alike in dtype and device."""
    check_floating(**features)
    (first, a), (second, b) = features.items()
    for name, value in features.items():
        if value.ndim != 2:
            raise ValueError(
                f"{name} must have shape [N, D], got {list(value.shape)}; flatten or pool it to one row a pair"
            )
        if value.numel() == 0:
            raise ValueError(f"{name} must hold at least one row and one dimension, got {list(value.shape)}")
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{first} and {second} must have the same width D, got {list(a.shape)} and {list(b.shape)}; "
            "pass what one model gives for both"
        )
    if a.dtype != b.dtype:
        raise ValueError(
            f"{first} and {second} must have the same dtype, got {a.dtype} and {b.dtype}; cast one with .to()"
        )
    check_one_device(**features)


def _check_logit_scale(**scales: Any) -> None:
    """Raises unless the argument is a positive number, or a floating tensor of one positive value."""
    for name, value in scales.items():
        if not isinstance(value, Tensor):
            check_positive(**{name: value})
            continue
        _check_scalar(value, name, "model.logit_scale.exp()")
        # Elsewhere, a look at the value would wait for the device.
        if value.device.type == "cpu" and not torch.compiler.is_compiling() and bool((value <= 0).any()):
            raise ValueError(f"{name} must be > 0, got {value.flatten()[0].item():g}; pass model.logit_scale.exp()")


def _check_logit_bias(**biases: Any) -> None:
    """Raises unless the argument is a finite number, or a floating tensor of one value."""
    for name, value in biases.items():
        if isinstance(value, Tensor):
            _check_scalar(value, name, "model.logit_bias")
        else:
            check_number(**{name: value})


def _check_scalar(value: Tensor, name: str, source: str) -> None:
    check_floating(**{name: value})
    if value.numel() == 0:
        raise ValueError(f"{name} must be a scalar, got shape {list(value.shape)}; pass {source}")
    if value.numel() > 1 and (value.ndim > 1 or not bool((value == value[0]).all())):
        raise ValueError(
            f"{name} must be a scalar, or a vector of equal entries as DataParallel gives it, got shape "
            f"{list(value.shape)}; pass {source}"
        )
