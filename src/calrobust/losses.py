"""Losses as modules: they hold the keyword arguments of their functions, and those on pairs compose like numbers."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NoReturn

from torch import Tensor, nn

from calrobust._checks import (
    check_choice,
    check_flag,
    check_fraction,
    check_nonnegative_integer,
    check_number,
    check_positive,
)
from calrobust.distributed import REDUCTIONS, ProcessGroup, Reduction
from calrobust.functional.contrastive import contrastive_terms, multimodal_contrastive_loss
from calrobust.functional.distillation import distillation_terms, multimodal_distillation_loss
from calrobust.functional.orthogonality import orthogonality_loss
from calrobust.kernels import IMPLS, MEMORY_BUDGET, Impl, PairStatistics, Teacher, pair_statistics

__all__ = [
    "CaRotLoss",
    "LossSum",
    "MultimodalContrastiveLoss",
    "MultimodalDistillationLoss",
    "OrthogonalityLoss",
    "PairLoss",
]


class PairLoss(nn.Module, ABC):
    """A loss on pairs: ``a + b``, ``w * a`` and ``a * w`` are losses too, and share one pass over the pair matrix.

    Base class of :class:`~calrobust.MultimodalContrastiveLoss`, :class:`~calrobust.MultimodalDistillationLoss` and
    their sums.

    Example:
        >>> from calrobust import MultimodalContrastiveLoss, MultimodalDistillationLoss
        >>> sum([MultimodalContrastiveLoss(), 1.5 * MultimodalDistillationLoss()])
        MultimodalContrastiveLoss() + 1.5 * MultimodalDistillationLoss()
    """

    @abstractmethod
    def terms(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The weighted terms by name, for logging.

        Takes the arguments of ``forward``, whose value is the sum of the terms.
        """

    @abstractmethod
    def _weighted(self) -> list[tuple[float, _Term]]:
        """The loss as a weighted sum."""

    def __add__(self, other: PairLoss) -> LossSum:
        return LossSum(*self._weighted(), *other._weighted()) if isinstance(other, PairLoss) else NotImplemented

    def __radd__(self, other: object) -> PairLoss:
        return self if other == 0 else NotImplemented  # the built-in sum() starts from 0

    def __mul__(self, weight: float) -> LossSum:
        check_number(weight=weight)
        return LossSum(*((weight * own, term) for own, term in self._weighted()))

    __rmul__ = __mul__


class _Term(PairLoss):
    """One summand: a value for each pair, read off the statistics of the pair matrix at the term's temperature."""

    name: ClassVar[str]
    needs_teacher: ClassVar[bool]
    temperature: float = 1.0

    def __init__(
        self, reduction: Reduction, gather: bool, group: ProcessGroup | None, impl: Impl, memory_budget: int
    ) -> None:
        super().__init__()
        check_choice(REDUCTIONS, reduction=reduction)
        check_flag(gather=gather)
        check_choice(IMPLS, impl=impl)
        check_nonnegative_integer(memory_budget=memory_budget)
        self.reduction: Reduction = reduction
        self.gather = gather
        self.group = group
        self.impl: Impl = impl
        self.memory_budget = memory_budget

    @abstractmethod
    def values(self, statistics: PairStatistics) -> Tensor:
        """The loss of each pair, shape ``[N]``."""

    def reduced(self, statistics: PairStatistics) -> Tensor:
        """The loss, as ``reduction`` asks."""
        return statistics.ranks.reduce(self.values(statistics), self.reduction)

    @property
    def options(self) -> dict[str, Any]:
        """What all terms of a sum agree in."""
        return {name: getattr(self, name) for name in ("reduction", "gather", "group", "impl", "memory_budget")}

    def extra_repr(self) -> str:
        """The arguments that are not at their defaults."""
        return _changed_arguments(self)

    def terms(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """One entry: the loss under its name."""
        return {self.name: self(*args, **kwargs)}

    def _weighted(self) -> list[tuple[float, _Term]]:
        return [(1.0, self)]


class MultimodalContrastiveLoss(_Term):
    """Contrastive loss over both directions of a batch of pairs (MCL), with label smoothing.

    Module form of :func:`~calrobust.functional.multimodal_contrastive_loss`, which has formula, shapes and errors.

    Args:
        label_smoothing: ε in [0, 1), torch's.
        reduction: ``"mean"`` or ``"sum"`` over the N pairs, or ``"none"``.
        gather: contrast against the pairs of every rank; see :ref:`many-processes`.
        group: the process group of ``gather``; None is the world.
        impl: ``"auto"``, ``"dense"``, ``"tiled"`` or ``"triton"``.
        memory_budget: bytes of temporary logits that ``"auto"`` may hold from forward to backward.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> import torch
        >>> from calrobust import MultimodalContrastiveLoss
        >>> criterion = MultimodalContrastiveLoss(label_smoothing=0.1)
        >>> criterion(torch.eye(2), torch.eye(2), 1.0)  # log(1 + 1/e) + 0.1 / 2
        tensor(0.3633)
    """

    name = "contrastive"
    needs_teacher = False

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        gather: bool = False,
        group: ProcessGroup | None = None,
        impl: Impl = "auto",
        memory_budget: int = MEMORY_BUDGET,
    ) -> None:
        super().__init__(reduction, gather, group, impl, memory_budget)
        check_fraction(closed=False, label_smoothing=label_smoothing)
        self.label_smoothing = label_smoothing

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        *,
        labels: Tensor | None = None,
    ) -> Tensor:
        """MCL of a batch of pairs."""
        return multimodal_contrastive_loss(
            image_features,
            text_features,
            logit_scale,
            labels=labels,
            label_smoothing=self.label_smoothing,
            **self.options,
        )

    def values(self, statistics: PairStatistics) -> Tensor:
        """MCL of each pair."""
        return contrastive_terms(statistics, self.label_smoothing)


class MultimodalDistillationLoss(_Term):
    """Divergence of the student's similarity maps from a teacher's, summed over both directions (MKD).

    Module form of :func:`~calrobust.functional.multimodal_distillation_loss`, which has formula, shapes and errors.

    Args:
        temperature: τ > 0, which softens both maps; the value is multiplied by τ².
        reduction: ``"mean"`` or ``"sum"`` over the N pairs, or ``"none"``.
        gather: contrast against the pairs of every rank; see :ref:`many-processes`.
        group: the process group of ``gather``; None is the world.
        impl: ``"auto"``, ``"dense"``, ``"tiled"`` or ``"triton"``.
        memory_budget: bytes of temporary logits that ``"auto"`` may hold from forward to backward.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> import torch
        >>> from calrobust import MultimodalContrastiveLoss, MultimodalDistillationLoss
        >>> criterion = MultimodalContrastiveLoss() + 1.5 * MultimodalDistillationLoss()
        >>> criterion
        MultimodalContrastiveLoss() + 1.5 * MultimodalDistillationLoss()
        >>> image = text = torch.eye(2)
        >>> criterion.terms(image, text, 1.0, image, text, 1.0)
        {'contrastive': tensor(0.3133), 'distillation': tensor(0.)}
    """

    name = "distillation"
    needs_teacher = True

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        reduction: Reduction = "mean",
        gather: bool = False,
        group: ProcessGroup | None = None,
        impl: Impl = "auto",
        memory_budget: int = MEMORY_BUDGET,
    ) -> None:
        super().__init__(reduction, gather, group, impl, memory_budget)
        check_positive(temperature=temperature)
        self.temperature = temperature

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        teacher_image_features: Tensor,
        teacher_text_features: Tensor,
        teacher_logit_scale: Tensor | float,
    ) -> Tensor:
        """MKD of a batch of pairs seen by student and teacher."""
        return multimodal_distillation_loss(
            image_features,
            text_features,
            logit_scale,
            teacher_image_features,
            teacher_text_features,
            teacher_logit_scale,
            temperature=self.temperature,
            **self.options,
        )

    def values(self, statistics: PairStatistics) -> Tensor:
        """MKD of each pair."""
        return distillation_terms(statistics, self.temperature)


class LossSum(PairLoss):
    """A weighted sum of losses on pairs, as ``a + 1.5 * b`` makes it.

    Terms of one temperature read the same statistics, so that a sum costs one pass over the pair matrix.

    Args:
        weighted: pairs of a weight and a loss.

    Raises:
        TypeError: there is no pair, or one of them is not a number and a loss.
        ValueError: the losses differ in ``reduction``, ``gather``, ``group``, ``impl`` or ``memory_budget``.

    Example:
        >>> from calrobust import MultimodalContrastiveLoss, MultimodalDistillationLoss
        >>> 2 * (MultimodalContrastiveLoss(label_smoothing=0.1) + 1.5 * MultimodalDistillationLoss())
        2 * MultimodalContrastiveLoss(label_smoothing=0.1) + 3 * MultimodalDistillationLoss()
    """

    def __init__(self, *weighted: tuple[float, _Term]) -> None:
        super().__init__()
        if not weighted:
            raise TypeError("a sum must have at least one pair of a weight and a loss, got none")
        for pair in weighted:
            if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], _Term)):
                raise TypeError(f"a sum must be of pairs of a weight and a loss, got {pair!r}; write it as a + 1.5 * b")
            check_number(weight=pair[0])
        self.weighted = tuple((float(weight), loss) for weight, loss in weighted)  # torch takes no int of any size
        (_, first), *others = weighted
        for _, other in others:
            if other.options != first.options:
                raise ValueError(
                    f"losses that add must agree in all options but their own, got {first!r} and {other!r}; "
                    "pass the same keyword arguments to both"
                )

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        teacher_image_features: Tensor | None = None,
        teacher_text_features: Tensor | None = None,
        teacher_logit_scale: Tensor | float | None = None,
        *,
        labels: Tensor | None = None,
    ) -> Tensor:
        """The sum of the terms.

        Args:
            image_features: shape ``[N, D]``.
            text_features: shape ``[N, D]``.
            logit_scale: > 0, already exponentiated.
            teacher_image_features: shape ``[N, E]``; with the next two required if a term distils, and else an error.
            teacher_text_features: shape ``[N, E]``.
            teacher_logit_scale: the teacher's own.
            labels: shape ``[N]``, ``int64``: positives of the contrastive terms.

        Returns:
            A scalar, or ``[N]`` for ``reduction="none"``.
        """
        teacher = (teacher_image_features, teacher_text_features, teacher_logit_scale)
        first, *others = self.terms(image_features, text_features, logit_scale, *teacher, labels=labels).values()
        return sum(others, first)

    def terms(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        teacher_image_features: Tensor | None = None,
        teacher_text_features: Tensor | None = None,
        teacher_logit_scale: Tensor | float | None = None,
        *,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The weighted terms by name: ``contrastive``, ``distillation``; a second of a kind is ``distillation_2``."""
        teacher = self._teacher(teacher_image_features, teacher_text_features, teacher_logit_scale)
        if labels is not None and not any(isinstance(loss, MultimodalContrastiveLoss) for _, loss in self._weighted()):
            raise TypeError(f"labels are the positives of a contrastive term, and {self!r} has none; leave them out")
        statistics: dict[float, PairStatistics] = {}
        terms: dict[str, Tensor] = {}
        for weight, loss in self._weighted():
            if loss.temperature not in statistics:
                alike = [other for _, other in self._weighted() if other.temperature == loss.temperature]
                statistics[loss.temperature] = pair_statistics(
                    image_features,
                    text_features,
                    logit_scale,
                    teacher=teacher if any(other.needs_teacher for other in alike) else None,
                    labels=labels,
                    temperature=loss.temperature,
                    gather=loss.gather,
                    group=loss.group,
                    impl=loss.impl,
                    memory_budget=loss.memory_budget,
                )
            count = sum(name.split("_")[0] == loss.name for name in terms)
            name = f"{loss.name}_{count + 1}" if count else loss.name
            terms[name] = weight * loss.reduced(statistics[loss.temperature])
        return terms

    def _teacher(self, image: Tensor | None, text: Tensor | None, scale: Tensor | float | None) -> Teacher | None:
        if not any(loss.needs_teacher for _, loss in self._weighted()):
            if image is text is scale is None:
                return None
            raise TypeError(f"{self!r} has no distillation term; leave out the teacher's features and logit scale")
        if image is None or text is None or scale is None:
            raise TypeError(
                f"{self!r} needs teacher_image_features, teacher_text_features and teacher_logit_scale; "
                "call it as criterion(*student(images, texts), *teacher(images, texts))"
            )
        return image, text, scale

    def _weighted(self) -> list[tuple[float, _Term]]:
        return list(self.weighted)

    def __repr__(self) -> str:
        return " + ".join(repr(loss) if weight == 1 else f"{weight:g} * {loss!r}" for weight, loss in self._weighted())


class CaRotLoss(LossSum):
    """MCL with label smoothing plus a weight times MKD: CaRot's objective on pairs.

    Module form of :func:`~calrobust.functional.carot_loss`, which has formula, shapes and errors. The same as
    ``MultimodalContrastiveLoss(label_smoothing=...) + distillation_weight * MultimodalDistillationLoss()``.

    Args:
        label_smoothing: ε in [0, 1), of MCL.
        distillation_weight: λ, finite; 1.5 in the paper.
        reduction: ``"mean"`` or ``"sum"`` over the N pairs, or ``"none"``.
        gather: contrast against the pairs of every rank; see :ref:`many-processes`.
        group: the process group of ``gather``; None is the world.
        impl: ``"auto"``, ``"dense"``, ``"tiled"`` or ``"triton"``.
        memory_budget: bytes of temporary logits that ``"auto"`` may hold from forward to backward.

    Raises:
        ValueError: an argument is outside its range.

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
        reduction: Reduction = "mean",
        gather: bool = False,
        group: ProcessGroup | None = None,
        impl: Impl = "auto",
        memory_budget: int = MEMORY_BUDGET,
    ) -> None:
        check_number(distillation_weight=distillation_weight)
        options: dict[str, Any] = {
            "reduction": reduction,
            "gather": gather,
            "group": group,
            "impl": impl,
            "memory_budget": memory_budget,
        }
        super().__init__(
            (1.0, MultimodalContrastiveLoss(label_smoothing=label_smoothing, **options)),
            (distillation_weight, MultimodalDistillationLoss(**options)),
        )
        self.label_smoothing = label_smoothing
        self.distillation_weight = distillation_weight
        self.reduction: Reduction = reduction
        self.gather = gather
        self.group = group
        self.impl: Impl = impl
        self.memory_budget = memory_budget

    def __repr__(self) -> str:
        return f"{type(self).__name__}({_changed_arguments(self)})"


class OrthogonalityLoss(nn.Module):
    """Distance of a projection's columns from an orthonormal system (OC).

    Module form of :func:`~calrobust.functional.orthogonality_loss`, which has formula, shapes and errors. It is a loss
    on weights, so its value adds to that of a loss on pairs, but the modules do not add.

    Args:
        squared: False gives the norm itself instead of its square.

    Raises:
        TypeError: ``squared`` is no bool.

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
        return _changed_arguments(self)

    def _no_sum(self, other: object) -> NoReturn:
        raise TypeError(
            "OrthogonalityLoss is a loss on weights and adds to no loss on pairs; add the values: "
            "criterion(...) + 0.2 * orthogonality(model.visual.proj)"
        )

    __add__ = __radd__ = __mul__ = __rmul__ = _no_sum


def _changed_arguments(loss: nn.Module) -> str:
    arguments = ((name, p.default) for name, p in inspect.signature(type(loss)).parameters.items())
    return ", ".join(f"{name}={getattr(loss, name)!r}" for name, default in arguments if getattr(loss, name) != default)
