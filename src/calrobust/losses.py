"""The losses as modules; those on pairs compose like numbers."""

from abc import ABC, abstractmethod
from typing import Any, NoReturn, Unpack, cast

import torch
from torch import Tensor, nn

from calrobust._checks import check_flag, check_number
from calrobust.functional import PairOptions, orthogonality_loss
from calrobust.functional.pairs import DEFAULTS, Directions, Modality, Outputs, Request, Term, filled, weighted_terms
from calrobust.kernels import Labels

__all__ = [
    "CaRotLoss",
    "FeatureDistillationLoss",
    "LossSum",
    "MultimodalContrastiveLoss",
    "MultimodalDistillationLoss",
    "OrthogonalityLoss",
    "PairLoss",
    "SigmoidContrastiveLoss",
    "SigmoidDistillationLoss",
]

_OTHERS = ("logit_bias", *(f"teacher_{name}" for name in Outputs._fields))


class PairLoss(nn.Module, ABC):
    """Base class of losses on pairs, whose sums and multiples are losses too, in one pass over all pairs.

    Call ``criterion(*model(images, texts), *teacher(images, texts))``, without a teacher if no term distils. Models
    return image features, text features, logit scale, and maybe a logit bias, which softmaxes ignore (default 0).
    Keyword arguments are attributes, which may change while training.

    Example:
        >>> from calrobust import MultimodalContrastiveLoss, MultimodalDistillationLoss
        >>> sum([MultimodalContrastiveLoss(), 1.5 * MultimodalDistillationLoss()])
        MultimodalContrastiveLoss() + 1.5 * MultimodalDistillationLoss()
    """

    @abstractmethod
    def options(self) -> PairOptions:
        """The options of all terms."""

    @abstractmethod
    def weighted(self) -> list[tuple[float, "_TermLoss"]]:
        """Pairs of a weight and a term."""

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

        By place or name follow ``logit_bias`` and, only if a term distils, the same four values of the teacher, whose
        names begin with ``teacher_``. Both biases may be left out. ``labels`` are for contrastive terms.
        """
        given = image_features, text_features, logit_scale, *others
        first, *rest = weighted_terms(lambda: self._request(*given, labels=labels, **named), self.options)
        return sum(rest, first)

    def terms(self, *given: Tensor | float | None, labels: Labels | None = None, **named: Any) -> dict[str, Tensor]:
        """The weighted terms by name; ``forward`` gives their sum.

        Names are ``contrastive``, ``distillation``, ``sigmoid_contrastive``, ``sigmoid_distillation`` and ``feature``;
        a second one is ``feature_2``.
        """
        check_forward(self)
        each = weighted_terms(lambda: self._request(*given, labels=labels, **named)._replace(apart=True), self.options)
        terms: dict[str, Tensor] = {}
        for (_, loss), value in zip(self.weighted(), each, strict=True):
            count = sum(name.startswith(loss._kind) for name in terms)
            terms[f"{loss._kind}_{count + 1}" if count else loss._kind] = value
        return terms

    def _request(
        self, image_features: Any, text_features: Any, logit_scale: Any, *others: Any, labels: Any, **named: Any
    ) -> Request:
        has_features = isinstance(others[0] if others else None, Tensor) and others[0].ndim > 1  # no logit bias
        names = _OTHERS[1:] if has_features else _OTHERS
        found = dict(zip(names, others, strict=False))
        wrong = [f"{3 + len(others)} arguments"] if len(others) > len(names) else []
        wrong += ["labels without labels=" for one in others if isinstance(one, Tensor) and one.dtype == torch.int64]
        wrong += [f"{name!r} twice" for name in named if name in found]
        wrong += [repr(name) for name in named if name not in _OTHERS]
        way = "call it as criterion(*student(images, texts), *teacher(images, texts))"
        if wrong:
            raise TypeError(
                f"{self!r} takes image_features, text_features, logit_scale and maybe logit_bias of the student, then "
                f"of the teacher, and labels=, got {wrong[0]}; {way}"
            )
        found = {name: value for name, value in {**found, **named}.items() if value is not None}
        biased, bias = "logit_bias" in found, found.pop("logit_bias", 0.0)
        terms = [(weight, loss.term()) for weight, loss in self.weighted()]
        distil = [term.distils for _, term in terms]
        teacher = None
        if any(distil):
            if not {*_OTHERS[1:4]} <= found.keys():
                raise TypeError(f"{self!r} needs {', '.join(_OTHERS[1:4])}; {way}")
            teacher = Outputs(*(found[name] for name in _OTHERS[1:] if name in found))
            if biased != ("teacher_logit_bias" in found) and any("sigmoid_dis" in term.kind for _, term in terms):
                raise TypeError(f"{self!r} needs a logit bias of both models or of none; pass 0.0 if one has none")
        elif found:
            raise TypeError(f"{self!r} has no distillation term; leave out the teacher's features and logit scale")
        if labels is not None and all(distil):
            raise TypeError(f"labels must go to a contrastive term, and {self!r} has none; leave them out")
        return Request(terms, Outputs(image_features, text_features, logit_scale, bias), teacher, labels)

    def __add__(self, other: "PairLoss") -> "LossSum":
        return LossSum((1.0, self), (1.0, other)) if isinstance(other, PairLoss) else NotImplemented

    def __radd__(self, other: object) -> "PairLoss":
        return self if other == 0 else NotImplemented  # sum() starts from 0

    def __mul__(self, weight: float) -> "LossSum":
        return LossSum((weight, self))

    __rmul__ = __mul__


def check_forward(loss: PairLoss) -> None:
    if type(loss).forward is not PairLoss.forward:
        rule = "a loss in sums, terms() or OpenClipLoss must not override forward"
        raise TypeError(f"{rule}, got {type(loss).__name__}; call it alone, and add the values: a(...) + 1.5 * b(...)")


class _TermLoss(PairLoss):
    """A loss of one term, whose attributes are checked at every call."""

    _kind: str

    def __init__(self, options: PairOptions, **arguments: Any) -> None:
        super().__init__()
        self._arguments = tuple(arguments)
        for name, value in {**arguments, **filled(options)}.items():
            setattr(self, name, value)
        self.term()

    def term(self) -> Term:
        return Term(self._kind, **{name: getattr(self, name) for name in self._arguments})

    def options(self) -> PairOptions:
        return cast(PairOptions, {name: getattr(self, name) for name in DEFAULTS})

    def weighted(self) -> list[tuple[float, "_TermLoss"]]:
        return [(1.0, self)]

    def extra_repr(self) -> str:
        defaults = {**vars(Term(self._kind)), **DEFAULTS}
        return ", ".join(f"{name}={own!r}" for name, own in vars(self).items() if own != defaults.get(name, own))


class MultimodalContrastiveLoss(_TermLoss):
    """Contrastive loss of images and texts (MCL), with label smoothing.

    Module form of :func:`~calrobust.functional.multimodal_contrastive_loss`, which has formula, shapes and errors.

    Example:
        >>> import torch
        >>> from calrobust import MultimodalContrastiveLoss
        >>> criterion = MultimodalContrastiveLoss(label_smoothing=0.1)
        >>> criterion(torch.eye(2), torch.eye(2), 1.0)  # log(1 + 1/e) + 0.1 / 2
        tensor(0.3633)
    """

    _kind = "contrastive"
    label_smoothing: float
    direction: Directions

    def __init__(
        self, *, label_smoothing: float = 0.0, direction: Directions = "both", **options: Unpack[PairOptions]
    ) -> None:
        super().__init__(options, label_smoothing=label_smoothing, direction=direction)


class MultimodalDistillationLoss(_TermLoss):
    """Divergence of the student's softmaxes from a teacher's (MKD).

    Module form of :func:`~calrobust.functional.multimodal_distillation_loss`, which has formula, shapes and errors.

    Example:
        >>> import torch
        >>> from calrobust import MultimodalContrastiveLoss, MultimodalDistillationLoss
        >>> criterion = MultimodalContrastiveLoss() + 1.5 * MultimodalDistillationLoss()
        >>> image = text = torch.eye(2)
        >>> criterion.terms(image, text, 1.0, image, text, 1.0)
        {'contrastive': tensor(0.3133), 'distillation': tensor(0.)}
    """

    _kind = "distillation"
    temperature: float
    direction: Directions

    def __init__(
        self, *, temperature: float = 1.0, direction: Directions = "both", **options: Unpack[PairOptions]
    ) -> None:
        super().__init__(options, temperature=temperature, direction=direction)


class SigmoidContrastiveLoss(_TermLoss):
    """Binary cross-entropy of every image with every text: SigLIP's loss.

    Module form of :func:`~calrobust.functional.sigmoid_contrastive_loss`, which has formula, shapes and errors.

    Example:
        >>> import torch
        >>> from calrobust import SigmoidContrastiveLoss
        >>> criterion = SigmoidContrastiveLoss()
        >>> criterion(torch.eye(2), torch.eye(2), 1.0, 0.0)  # log(1 + 1/e) + log(2)
        tensor(1.0064)
    """

    _kind = "sigmoid_contrastive"

    def __init__(self, **options: Unpack[PairOptions]) -> None:
        super().__init__(options)


class SigmoidDistillationLoss(_TermLoss):
    """Divergence of a sigmoid model's probabilities from a teacher's.

    Module form of :func:`~calrobust.functional.sigmoid_distillation_loss`, which has formula, shapes and errors.

    Example:
        >>> import torch
        >>> from calrobust import SigmoidContrastiveLoss, SigmoidDistillationLoss
        >>> criterion = SigmoidContrastiveLoss() + 1.5 * SigmoidDistillationLoss()
        >>> image = text = torch.eye(2)
        >>> criterion(image, text, 1.0, 0.0, image, text, 1.0, 0.0)
        tensor(1.0064)
    """

    _kind = "sigmoid_distillation"
    temperature: float

    def __init__(self, *, temperature: float = 1.0, **options: Unpack[PairOptions]) -> None:
        super().__init__(options, temperature=temperature)


class FeatureDistillationLoss(_TermLoss):
    """Distance of the student's features from a teacher's.

    Module form of :func:`~calrobust.functional.feature_distillation_loss`, which has formula, shapes and errors.

    Example:
        >>> import torch
        >>> from calrobust import FeatureDistillationLoss
        >>> image = text = torch.eye(2)
        >>> FeatureDistillationLoss(modality="image")(image, text, 1.0, image.flip(0), text, 1.0)  # 1 - 0
        tensor(1.)
    """

    _kind = "feature"
    modality: Modality

    def __init__(self, *, modality: Modality = "both", **options: Unpack[PairOptions]) -> None:
        super().__init__(options, modality=modality)


class LossSum(PairLoss):
    """A weighted sum of losses on pairs, like ``a + 1.5 * b``, from pairs of a weight and a loss.

    ``weights`` and ``losses`` are lists, whose entries may change while training: ``criterion.weights[1] = 0.5``.

    Raises:
        TypeError: there is no pair, one of them is not a number and a loss, or ``forward`` is overridden.
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
        for pair in weighted or ("nothing",):
            if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], PairLoss)):
                raise TypeError(f"a sum must be of pairs of a weight and a loss, got {pair!r}; write it as a + 1.5 * b")
            check_number(weight=pair[0])
            check_forward(pair[1])
        self.losses = [term for _, loss in weighted for _, term in loss.weighted()]
        self.weights = [float(weight) * own for weight, loss in weighted for own, _ in loss.weighted()]
        self.weighted()  # checks the options

    def options(self) -> PairOptions:
        """The options of all terms."""
        return self.losses[0].options()

    def weighted(self) -> list[tuple[float, _TermLoss]]:
        """Pairs of a weight and a term."""
        if len(self.weights) != len(self.losses):
            raise ValueError(f"weights must be one for each loss of the sum, got {self.weights}")
        for weight, loss in (pairs := list(zip(self.weights, self.losses, strict=True))):
            check_number(weight=weight)
            check_forward(loss)
            if loss.options() != self.losses[0].options():
                came = f"got {self.losses[0]!r} and {loss!r}; pass the same to both"
                raise ValueError(f"losses that add must agree in their shared options, {came}")
        return pairs

    def __setattr__(self, name: str, value: Any) -> None:
        for k, loss in enumerate(vars(self).get("losses", ())):
            if hasattr(loss, name) and not hasattr(self, name) and name[0] != "_":  # torch.compile's
                raise AttributeError(f"{name} belongs to a term of the sum; set criterion.losses[{k}].{name}")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        terms = zip(self.weights, self.losses, strict=False)
        return " + ".join(repr(loss) if weight == 1 else f"{weight:g} * {loss!r}" for weight, loss in terms)


class CaRotLoss(LossSum):
    """MCL with label smoothing plus a weight times MKD: CaRot's objective on pairs.

    Module form of :func:`~calrobust.functional.carot_loss`, which has formula, shapes and errors.

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

    Module form of :func:`~calrobust.functional.orthogonality_loss`, which has formula, shapes and errors.

    Example:
        >>> import torch
        >>> from calrobust import OrthogonalityLoss
        >>> OrthogonalityLoss()(2 * torch.eye(3))
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
