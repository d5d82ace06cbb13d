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
    check_one_device,
    check_positive,
)
from calrobust.distributed import REDUCTIONS, REFUSED, ProcessGroup, Ranks, Reduction, agree
from calrobust.kernels import IMPLS, MEMORY_BUDGET, Direction, Features, Impl, Labels, PairBatch, pair_statistics
from calrobust.kernels.operators import obstacle_to_triton

Directions = Literal["both", "image_to_text", "text_to_image"]
DIRECTIONS: tuple[str, ...] = get_args(Directions)


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
    """``"mean"`` (default) or ``"sum"`` over the N pairs, or ``"none"`` for a value of each. Where images and texts
    are no pairs, as they differ in number or have labels of their own, mean and sum of image to text are over images,
    those of text to image over texts, and ``"none"`` is for one direction."""
    gather: bool
    """Contrast against the images and texts of every rank (default False); see :ref:`many-processes`."""
    group: ProcessGroup | None
    """The process group of ``gather``; None (default) is the world."""
    impl: Impl
    """``"dense"`` holds the whole pair matrix, and has derivatives of every order and mode. The others have first
    derivatives in reverse mode: ``"tiled"`` needs O(N·D) memory; ``"triton"`` does the same in kernels for CUDA
    devices; ``"auto"`` (default) takes Triton where it runs, and is tiled elsewhere, where it keeps the matrix for
    backward if it fits into ``memory_budget``."""
    memory_budget: int
    """Bytes of logits that ``"auto"`` may hold from forward to backward; 256 MiB by default."""


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
    """A summand: values of images and texts, read off the statistics of the pair matrix at the term's temperature."""

    name: ClassVar[str]
    needs_teacher: ClassVar[bool]
    needs_positives: ClassVar[bool]

    @property
    def temperature(self) -> float:
        """What divides the logits."""

    @property
    def direction(self) -> Directions:
        """Whose candidates are compared: those of images, of texts or of both."""

    def values(self, statistics: Direction) -> tuple[Tensor, Tensor | int]:
        """Of each anchor of a direction, and the number of anchors over all ranks, by which a mean divides.

        The term is the sum over its directions.
        """


class Request(NamedTuple):
    """A weighted sum of terms, and the batch of pairs whose terms are asked for."""

    weighted: Sequence[tuple[float, Term]]
    student: Features
    teacher: Features | None
    labels: Labels | None


def weighted_terms(request: Callable[[], Request], options: PairOptions) -> list[Tensor]:
    """Each term times its weight, reduced over all ranks; terms of one temperature share one pass.

    With ``gather``, an error on one rank must raise on all of them, or the others would wait for it forever. So the
    request is a function: errors that it raises are told to the other ranks too.
    """
    if options.get("gather") is True and torch.compiler.is_compiling():
        torch._dynamo.graph_break(
            msg="with gather=True the ranks tell each other the sizes of their batches, which no graph can hold; "
            "compile the model, and leave the loss out of fullgraph=True"
        )
        terms: list[Tensor] = torch.compiler.disable(_weighted_terms)(request, options)
        return terms
    return _weighted_terms(request, options)


def _weighted_terms(request: Callable[[], Request], options: PairOptions) -> list[Tensor]:
    gather, group = options.get("gather", False), options.get("group")
    check_flag(gather=gather)
    try:
        checked = Options.of(options)
        weighted, student, teacher, labels = request()
        _check_batch(student, teacher)
        _check_anchors([term for _, term in weighted], student, labels, checked.reduction)
        _check_impl(checked.impl, student[0].device)
    except (TypeError, ValueError):
        if gather:
            agree([REFUSED, REFUSED], group, {}, torch.device("cpu"))
        raise
    n, m = student[0].shape[0], student[1].shape[0]
    ranks = Ranks([n]), Ranks([m])
    if gather:
        images, texts = agree([n, m], group, _facts(weighted, student, teacher, labels, checked), student[0].device)
        ranks = images, texts
    batches: dict[bool, PairBatch] = {}
    statistics: dict[float, dict[str, Direction]] = {}
    terms = []
    for weight, term in weighted:
        temperature = float(term.temperature)
        sharing = [other for _, other in weighted if other.temperature == temperature]
        # Text to image alone is image to text with the two exchanged.
        swapped = all(other.direction == "text_to_image" for other in sharing)
        if swapped not in batches:
            batches[swapped] = PairBatch(student, teacher, labels, ranks, swapped=swapped)
        batch = batches[swapped]
        if term.needs_positives and term.direction != "text_to_image":
            _check_positives(batch)
        if temperature not in statistics:
            found = pair_statistics(
                batch,
                temperature=temperature,
                distils=any(other.needs_teacher for other in sharing),
                columns=not swapped and any(other.direction != "image_to_text" for other in sharing),
                impl=checked.impl,
                memory_budget=checked.memory_budget,
            )
            names = DIRECTIONS[2:] if swapped else DIRECTIONS[1:]
            statistics[temperature] = {way: each for way, each in zip(names, found, strict=False) if each is not None}
        wanted = DIRECTIONS[1:] if term.direction == "both" else (term.direction,)
        values = [term.values(statistics[temperature][way]) for way in wanted]
        terms.append((float(weight) * _reduce(values, checked.reduction, ranks[0])).to(batch.dtype))
    return terms


def _reduce(each: Sequence[tuple[Tensor, Tensor | int]], reduction: Reduction, ranks: Ranks) -> Tensor:
    """The sum over directions of their values, or of the mean or sum over the anchors of all ranks."""
    if reduction == "none":
        return torch.stack([values for values, _ in each]).sum(0)
    divisors = (number if reduction == "mean" else 1 for _, number in each)
    return ranks.sum(torch.stack([v.sum() / divisor for (v, _), divisor in zip(each, divisors, strict=True)]).sum())


def _facts(
    weighted: Sequence[tuple[float, Term]],
    student: Features,
    teacher: Features | None,
    labels: Labels | None,
    options: Options,
) -> dict[str, object]:
    """What must be the same on all ranks: otherwise their collectives do not fit, or their losses differ."""
    facts: dict[str, object] = {
        "the loss": " + ".join(f"{weight:g} * {term!r}" for weight, term in weighted),
        "reduction": options.reduction,
        "whether labels are given": labels is not None,
        "whether labels are a pair": isinstance(labels, tuple),
    }
    for whose, features in (("", student), ("the teacher's ", teacher)):
        facts[f"whether {whose or 'the '}features are given"] = features is not None
        if features is None:
            continue
        images, texts, scale = features
        facts[f"the width of {whose}features"] = images.shape[1]
        facts[f"the dtype of {whose}features"] = str(images.dtype)
        facts[f"{whose}logit_scale, if it is a number"] = None if isinstance(scale, Tensor) else float(scale)
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
            f"{n} images and {m} texts that are no pairs; pass direction='image_to_text' or 'text_to_image'"
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
        check_floating(**{name: value})
        if value.numel() == 0:
            raise ValueError(f"{name} must be a scalar, got shape {list(value.shape)}; pass model.logit_scale.exp()")
        if value.numel() > 1 and (value.ndim > 1 or not bool((value == value[0]).all())):
            raise ValueError(
                f"{name} must be a scalar, or a vector of equal entries as DataParallel gives it, got shape "
                f"{list(value.shape)}; pass model.logit_scale.exp()"
            )
        # Elsewhere, a look at the value would wait for the device.
        if value.device.type == "cpu" and not torch.compiler.is_compiling() and bool((value <= 0).any()):
            raise ValueError(f"{name} must be > 0, got {value.flatten()[0].item():g}; pass model.logit_scale.exp()")
