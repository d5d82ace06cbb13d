"""Losses as modules: they hold the keyword arguments of their functions, and those on pairs compose like numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NoReturn, Unpack, cast

from torch import Tensor, nn

from calrobust._checks import check_flag, check_number
from calrobust.functional.pairs import OPTIONS, Directions, Options, PairOptions, Request, Term, weighted_terms
from calrobust.functional.regularisers import FeatureDistillation, Modality, orthogonality_loss
from calrobust.functional.similarity import Contrastive, Distillation
from calrobust.kernels import Features, Labels

__all__ = [
    "CaRotLoss",
    "FeatureDistillationLoss",
    "LossSum",
    "MultimodalContrastiveLoss",
    "MultimodalDistillationLoss",
    "OrthogonalityLoss",
    "PairLoss",
]

_STUDENT = ("image_features", "text_features", "logit_scale", "logit_bias")
_TEACHER = tuple(f"teacher_{name}" for name in _STUDENT)


class PairLoss(nn.Module, ABC):
    """Base class of losses on pairs: ``a + b`` and ``w * a`` are losses too, and share one pass over the pair matrix.

    Call them as ``criterion(*model(images, texts), *teacher(images, texts))``, without a teacher if no term distils.
    Models return image features, text features, the logit scale and maybe a logit bias, which no softmax sees.

    Example:
        >>> from calrobust import MultimodalContrastiveLoss, MultimodalDistillationLoss
        >>> sum([MultimodalContrastiveLoss(), 1.5 * MultimodalDistillationLoss()])
        MultimodalContrastiveLoss() + 1.5 * MultimodalDistillationLoss()
    """

    @abstractmethod
    def options(self) -> PairOptions:
        """The options in which all terms agree."""

    @abstractmethod
    def weighted(self) -> list[tuple[float, _TermLoss]]:
        """The loss as a weighted sum: pairs of a weight and a loss."""

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        *others: Tensor | float | None,
        labels: Labels | None = None,
        **named: Tensor | float | None,
    ) -> Tensor:
        """The sum of the terms, with arguments, result and errors as in their functions.

        After the logit scale may come the student's logit bias, then the teacher's image features ``[N, E]``, text
        features ``[M, E]``, logit scale and maybe logit bias, by place or by name (``logit_bias``,
        ``teacher_image_features``, ...). They are required if a term distils, and else an error. ``labels`` are for
        contrastive terms: ``[N]`` of pairs, or ``(image_labels [N], text_labels [M])``.
        """
        given = (image_features, text_features, logit_scale, *others)
        first, *rest = self._values(given, named, labels, together=True)
        return sum(rest, first)

    def terms(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        *others: Tensor | float | None,
        labels: Labels | None = None,
        **named: Tensor | float | None,
    ) -> dict[str, Tensor]:
        """The weighted terms by name, for logging, from the arguments of ``forward``, which gives their sum.

        Names are ``contrastive``, ``distillation``, ``feature``, ``sigmoid_contrastive`` and ``sigmoid_distillation``,
        and ``distillation_2`` for a second one.
        """
        given = (image_features, text_features, logit_scale, *others)
        values = self._values(given, named, labels, together=False)
        kinds = [loss._kind.name for _, loss in self.weighted()]
        counts = [kinds[:k].count(kind) for k, kind in enumerate(kinds)]
        names = [f"{kind}_{count + 1}" if count else kind for kind, count in zip(kinds, counts, strict=True)]
        return dict(zip(names, values, strict=True))

    def _values(
        self, given: tuple[Any, ...], named: dict[str, Any], labels: Labels | None, *, together: bool
    ) -> list[Tensor]:
        """The weighted terms, or ``together`` values of which only the sum is to be differentiated."""
        bias: Tensor | float | None = None

        def request() -> Request:
            nonlocal bias
            found = self._by_name(given, named)
            terms = [(weight, loss.term()) for weight, loss in self.weighted()]
            if labels is not None and not any(term.needs_positives for _, term in terms):
                raise TypeError(f"labels must go to a contrastive term, and {self!r} has none; leave them out")
            student, teacher = (cast(Features, tuple(map(found.get, names[:3]))) for names in (_STUDENT, _TEACHER))
            bias, other = (found.get(names[3]) for names in (_STUDENT, _TEACHER))
            biases = (0.0 if bias is None else bias, 0.0 if other is None else other)
            return Request(terms, student, None if teacher[0] is None else teacher, labels, biases)

        values = weighted_terms(request, self.options(), together=together)
        if isinstance(bias, Tensor):  # no softmax sees it, but DistributedDataParallel would wait for its gradient
            values = [value + 0 * bias.sum() for value in values]
        return values

    def _by_name(
        self, given: tuple[Tensor | float | None, ...], named: dict[str, Tensor | float | None]
    ) -> dict[str, Tensor | float | None]:
        """All arguments but ``labels`` by name, with those of a teacher if and only if a term distils."""
        has_bias = len(given) > 3 and getattr(given[3], "ndim", 0) < 2  # it is a scalar, unlike a teacher's features
        names = [*_STUDENT[: 4 if has_bias else 3], *_TEACHER]
        found = dict(zip(names, given, strict=False))
        if twice := [name for name in named if name in found]:
            raise TypeError(f"{twice[0]} must be given once, got it by position and by name")
        found |= named
        unknown = [repr(name) for name in named if name not in (*_STUDENT, *_TEACHER)]
        if unknown or len(given) > len(names):
            raise TypeError(
                f"{self!r} must be called with image_features, text_features, logit_scale and maybe logit_bias of the "
                f"student, then of the teacher, and labels=, got {(unknown or [f'{len(given)} arguments'])[0]}; "
                "write criterion(*student(images, texts), *teacher(images, texts))"
            )
        taught = [name for name in _TEACHER if found.get(name) is not None]
        if any(loss._kind.needs_teacher for _, loss in self.weighted()):
            if not {*_TEACHER[:3]} <= {*taught}:
                raise TypeError(
                    f"{self!r} needs teacher_image_features, teacher_text_features and teacher_logit_scale; "
                    "call it as criterion(*student(images, texts), *teacher(images, texts))"
                )
        elif taught:
            raise TypeError(f"{self!r} has no distillation term; leave out the teacher's features and logit scale")
        return found

    def __add__(self, other: PairLoss) -> LossSum:
        return LossSum((1.0, self), (1.0, other)) if isinstance(other, PairLoss) else NotImplemented

    def __radd__(self, other: object) -> PairLoss:
        return self if other == 0 else NotImplemented  # the built-in sum() starts from 0

    def __mul__(self, weight: float) -> LossSum:
        return LossSum((weight, self))

    __rmul__ = __mul__


class _TermLoss(PairLoss):
    """A loss of one term. Its arguments are attributes, which are read and checked at every call."""

    _kind: type[Term]

    def __init__(self, options: PairOptions, **arguments: Any) -> None:
        super().__init__()
        self._arguments = tuple(arguments)
        for name, value in {**arguments, **vars(Options.of(options))}.items():
            setattr(self, name, value)
        self.term()

    def term(self) -> Term:
        """The term with today's arguments, checked."""
        return self._kind(**{name: getattr(self, name) for name in self._arguments})

    def options(self) -> PairOptions:
        """Today's options, in which all terms of a sum agree."""
        return cast(PairOptions, {name: getattr(self, name) for name in OPTIONS})

    def weighted(self) -> list[tuple[float, _TermLoss]]:
        """The loss itself, once."""
        return [(1.0, self)]

    def extra_repr(self) -> str:
        """The arguments that are not at their defaults."""
        defaults = {**vars(self._kind()), **vars(Options())}
        values = {name: getattr(self, name) for name in defaults}
        return ", ".join(f"{name}={value!r}" for name, value in values.items() if value != defaults[name])


class MultimodalContrastiveLoss(_TermLoss):
    """Contrastive loss over one or both directions of images and texts (MCL), with label smoothing.

    Module form of :func:`~calrobust.functional.multimodal_contrastive_loss`, which has formula, shapes and errors.
    The keyword arguments are attributes, which may change while training.

    Example:
        >>> import torch
        >>> from calrobust import MultimodalContrastiveLoss
        >>> criterion = MultimodalContrastiveLoss(label_smoothing=0.1)
        >>> criterion(torch.eye(2), torch.eye(2), 1.0)  # log(1 + 1/e) + 0.1 / 2
        tensor(0.3633)
    """

    _kind = Contrastive
    label_smoothing: float
    direction: Directions

    def __init__(
        self, *, label_smoothing: float = 0.0, direction: Directions = "both", **options: Unpack[PairOptions]
    ) -> None:
        super().__init__(options, label_smoothing=label_smoothing, direction=direction)


class MultimodalDistillationLoss(_TermLoss):
    """Divergence of the student's similarity maps from a teacher's, summed over its directions (MKD).

    Module form of :func:`~calrobust.functional.multimodal_distillation_loss`, which has formula, shapes and errors.
    The keyword arguments are attributes, which may change while training.

    Example:
        >>> import torch
        >>> from calrobust import MultimodalContrastiveLoss, MultimodalDistillationLoss
        >>> criterion = MultimodalContrastiveLoss() + 1.5 * MultimodalDistillationLoss()
        >>> image = text = torch.eye(2)
        >>> criterion.terms(image, text, 1.0, image, text, 1.0)
        {'contrastive': tensor(0.3133), 'distillation': tensor(0.)}
    """

    _kind = Distillation
    temperature: float
    direction: Directions

    def __init__(
        self, *, temperature: float = 1.0, direction: Directions = "both", **options: Unpack[PairOptions]
    ) -> None:
        super().__init__(options, temperature=temperature, direction=direction)


class FeatureDistillationLoss(_TermLoss):
    """Distance of the student's features from a teacher's, which anchors one tower or both.

    Module form of :func:`~calrobust.functional.feature_distillation_loss`, which has formula, shapes and errors.

    Example:
        >>> import torch
        >>> from calrobust import FeatureDistillationLoss
        >>> image = text = torch.eye(2)
        >>> FeatureDistillationLoss(modality="image")(image, text, 1.0, image.flip(0), text, 1.0)  # 1 - 0
        tensor(1.)
    """

    _kind = FeatureDistillation
    modality: Modality

    def __init__(self, *, modality: Modality = "both", **options: Unpack[PairOptions]) -> None:
        super().__init__(options, modality=modality)


class LossSum(PairLoss):
    """A weighted sum of losses on pairs, as ``a + 1.5 * b`` makes it.

    ``weights`` and ``losses`` are lists, whose entries may change while training: ``criterion.weights[1] = 0.5``,
    ``criterion.losses[0].label_smoothing = 0.1``. Terms of one temperature share a pass over the pair matrix.

    Args:
        weighted: pairs of a weight and a loss.

    Raises:
        TypeError: there is no pair, or one of them is not a number and a loss.
        ValueError: the losses differ in their options.

    Example:
        >>> from calrobust import MultimodalContrastiveLoss, MultimodalDistillationLoss
        >>> 2 * (MultimodalContrastiveLoss(label_smoothing=0.1) + 1.5 * MultimodalDistillationLoss())
        2 * MultimodalContrastiveLoss(label_smoothing=0.1) + 3 * MultimodalDistillationLoss()
    """

    weights: list[float]
    losses: list[_TermLoss]

    def __init__(self, *weighted: tuple[float, PairLoss]) -> None:
        super().__init__()
        if not weighted:
            raise TypeError("a sum must have at least one pair of a weight and a loss, got none")
        for pair in weighted:
            if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], PairLoss)):
                raise TypeError(f"a sum must be of pairs of a weight and a loss, got {pair!r}; write it as a + 1.5 * b")
            check_number(weight=pair[0])
        terms = [(float(weight) * own, term) for weight, loss in weighted for own, term in loss.weighted()]
        self.losses = [term for _, term in terms]
        self.weights = [weight for weight, _ in terms]
        self.weighted()  # checks that the options agree

    def options(self) -> PairOptions:
        """Those of the first loss."""
        return self.losses[0].options()

    def weighted(self) -> list[tuple[float, _TermLoss]]:
        """The terms with today's weights, checked."""
        for weight, loss in zip(self.weights, self.losses, strict=True):
            check_number(weight=weight)
            if loss.options() != self.losses[0].options():
                raise ValueError(
                    f"losses that add must agree in all options but their own, got {self.losses[0]!r} and {loss!r}; "
                    "pass the same keyword arguments to both"
                )
        return list(zip(self.weights, self.losses, strict=True))

    def __setattr__(self, name: str, value: Any) -> None:
        holders = [f"losses[{k}]" for k, loss in enumerate(vars(self).get("losses", ())) if hasattr(loss, name)]
        if holders and not hasattr(self, name):
            raise AttributeError(f"{name} belongs to a term of the sum; set criterion.{holders[0]}.{name}")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        shown = ("" if weight == 1 else f"{weight:g} * " for weight in self.weights)
        return " + ".join(f"{weight}{loss!r}" for weight, loss in zip(shown, self.losses, strict=True))


class CaRotLoss(LossSum):
    """MCL with label smoothing plus a weight times MKD: CaRot's objective on pairs.

    The sum ``MultimodalContrastiveLoss(label_smoothing=...) + distillation_weight * MultimodalDistillationLoss()``;
    module form of :func:`~calrobust.functional.carot_loss`, which has formula, shapes and errors.
    ``label_smoothing`` and ``distillation_weight`` are attributes, which may change while training.

    Example:
        >>> import torch
        >>> from calrobust import CaRotLoss
        >>> criterion = CaRotLoss(label_smoothing=0.1, distillation_weight=1.5)
        >>> image = text = torch.eye(2)
        >>> criterion(image, text, 1.0, image, text, 1.0)
        tensor(0.3633)
    """

    def __init__(
        self,
        *,
        label_smoothing: float,
        distillation_weight: float,
        direction: Directions = "both",
        **options: Unpack[PairOptions],
    ) -> None:
        check_number(distillation_weight=distillation_weight)
        contrastive = MultimodalContrastiveLoss(label_smoothing=label_smoothing, direction=direction, **options)
        distillation = MultimodalDistillationLoss(direction=direction, **options)
        super().__init__((1.0, contrastive), (distillation_weight, distillation))

    @property
    def label_smoothing(self) -> float:
        """ε of the contrastive term."""
        return cast(MultimodalContrastiveLoss, self.losses[0]).label_smoothing

    @label_smoothing.setter
    def label_smoothing(self, value: float) -> None:
        cast(MultimodalContrastiveLoss, self.losses[0]).label_smoothing = value

    @property
    def distillation_weight(self) -> float:
        """λ, the weight of the distillation term."""
        return self.weights[1]

    @distillation_weight.setter
    def distillation_weight(self, value: float) -> None:
        check_number(distillation_weight=value)
        self.weights[1] = float(value)


class OrthogonalityLoss(nn.Module):
    """Distance of a projection's columns from an orthonormal system (OC).

    Module form of :func:`~calrobust.functional.orthogonality_loss`, which has formula, shapes and errors. It is a loss
    on weights, so its value adds to that of a loss on pairs, but the modules do not add.

    Example:
        >>> import torch
        >>> from calrobust import OrthogonalityLoss
        >>> orthogonality = OrthogonalityLoss()
        >>> orthogonality(2 * torch.eye(3))
        tensor(27.)
    """

    def __init__(self, *, squared: bool = True) -> None:
        super().__init__()
        check_flag(squared=squared)
        self.squared = squared

    def forward(self, weight: Tensor | nn.Linear) -> Tensor:
        """OC of a projection ``[in, out]`` or of an ``nn.Linear``."""
        return orthogonality_loss(weight, squared=self.squared)

    def extra_repr(self) -> str:
        """The arguments that are not at their defaults."""
        return "" if self.squared else "squared=False"

    def _refuse(self, other: object) -> NoReturn:
        raise TypeError(
            "OrthogonalityLoss is a loss on weights and adds to no loss on pairs; add the values: "
            "criterion(...) + 0.2 * orthogonality(model.visual.proj)"
        )

    __add__ = __radd__ = __mul__ = __rmul__ = _refuse
