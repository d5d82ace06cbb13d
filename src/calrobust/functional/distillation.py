"""Multimodal knowledge distillation (MKD), where a student follows a teacher's similarity maps; and MCL plus MKD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Unpack

from torch import Tensor

from calrobust._checks import check_choice, check_number, check_positive
from calrobust.functional.contrastive import Contrastive
from calrobust.functional.pairs import DIRECTIONS, Directions, PairOptions, Request, SoftmaxTerm, Term, weighted_terms
from calrobust.kernels import Direction, Labels


def multimodal_distillation_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    teacher_image_features: Tensor,
    teacher_text_features: Tensor,
    teacher_logit_scale: Tensor | float,
    *,
    temperature: float = 1.0,
    direction: Directions = "both",
    **options: Unpack[PairOptions],
) -> Tensor:
    r"""Divergence of the student's image-to-text and text-to-image softmaxes from those of a teacher (MKD).

    .. math:: \ell_i = \tau^2 \left( \mathrm{KL}(\tilde p_i \,\|\, p_i) + \mathrm{KL}(\tilde q_i \,\|\, q_i) \right)

    Here :math:`p_i` is the softmax of image :math:`i` over all texts, :math:`q_i` that of text :math:`i` over all
    images, :math:`\tilde p_i, \tilde q_i` are the teacher's, and all logits are divided by :math:`\tau`. The means of
    the two directions are **summed**, as in the paper, unless ``direction`` names one. open_clip's ``DistillClipLoss``
    averages them, and its value (not its gradient) also holds the teacher's entropy. Images and texts need not be
    pairs, nor as many. The teacher never receives a gradient.

    Args:
        image_features: shape ``[N, D]``, as in :func:`~calrobust.functional.multimodal_contrastive_loss`.
        text_features: shape ``[M, D]``.
        logit_scale: > 0, already exponentiated.
        teacher_image_features: shape ``[N, E]``: the same images seen by the teacher, in a width of its own.
        teacher_text_features: shape ``[M, E]``.
        teacher_logit_scale: the teacher's own.
        temperature: :math:`\tau` > 0, which softens both maps.
        direction: ``"image_to_text"`` or ``"text_to_image"`` for one of them, at the cost of one.
        **options: see :class:`~calrobust.functional.PairOptions`.

    Returns:
        A scalar ≥ 0 in nats, or ``[N]`` for ``reduction="none"`` (``[M]`` from text to image); float32, or float64 if
        any features are. Exactly 0 where teacher and student are equal.

    Raises:
        ValueError: as for MCL, of student and teacher; the teacher's batch differs in size; ``temperature`` ≤ 0.
        TypeError: the features are not floating-point tensors, or an option is unknown.

    Example:
        >>> import torch
        >>> from calrobust.functional import multimodal_distillation_loss
        >>> image = text = torch.eye(2)
        >>> multimodal_distillation_loss(image, text, 1.0, image, text, 1.0)
        tensor(0.)
        >>> multimodal_distillation_loss(image, text, 0.001, image, text, 100.0)  # 2 log 2: certain against uniform
        tensor(1.3853)

    Reference: Oh et al., 2024, :arxiv:`2311.01723`, the self-distillation term of its objective.
    """
    student = (image_features, text_features, logit_scale)
    teacher = (teacher_image_features, teacher_text_features, teacher_logit_scale)
    (value,) = weighted_terms(
        lambda: Request([(1, Distillation(temperature, direction))], student, teacher, None), options
    )
    return value


def carot_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    teacher_image_features: Tensor,
    teacher_text_features: Tensor,
    teacher_logit_scale: Tensor | float,
    *,
    label_smoothing: float,
    distillation_weight: float,
    labels: Labels | None = None,
    direction: Directions = "both",
    **options: Unpack[PairOptions],
) -> Tensor:
    r"""MCL with label smoothing plus ``distillation_weight`` times MKD, in one pass over the pair matrix.

    .. math:: \mathcal{L} = \mathcal{L}_\mathrm{MCL}(\varepsilon) + \lambda\, \mathcal{L}_\mathrm{MKD}

    Arguments, results and errors are those of :func:`~calrobust.functional.multimodal_contrastive_loss` and
    :func:`~calrobust.functional.multimodal_distillation_loss`; ``distillation_weight`` is :math:`\lambda`, finite: 1.5
    in the paper, for MKD summed over its two directions.

    Example:
        >>> import torch
        >>> from calrobust.functional import carot_loss
        >>> image = text = torch.eye(2)
        >>> carot_loss(image, text, 1.0, image, text, 1.0, label_smoothing=0.0, distillation_weight=1.5)
        tensor(0.3133)

    Reference: Oh et al., 2024, :arxiv:`2311.01723`, its objective without the orthogonality term, which is on weights
    (:func:`~calrobust.functional.orthogonality_loss`).
    """
    student = (image_features, text_features, logit_scale)
    teacher = (teacher_image_features, teacher_text_features, teacher_logit_scale)

    def request() -> Request:
        check_number(distillation_weight=distillation_weight)
        contrastive, distillation = Contrastive(label_smoothing, direction), Distillation(direction=direction)
        weighted: list[tuple[float, Term]] = [(1, contrastive), (distillation_weight, distillation)]
        return Request(weighted, student, teacher, labels)

    contrastive, distillation = weighted_terms(request, options)
    return contrastive + distillation


@dataclass(frozen=True)
class Distillation(SoftmaxTerm):
    """MKD as a term of a sum."""

    name: ClassVar[str] = "distillation"
    needs_teacher: ClassVar[bool] = True
    needs_positives: ClassVar[bool] = False

    temperature: float = 1.0
    direction: Directions = "both"

    def __post_init__(self) -> None:
        """Checks the arguments."""
        check_positive(temperature=self.temperature)
        check_choice(DIRECTIONS, direction=self.direction)

    def values(self, statistics: Direction) -> tuple[Tensor, int]:
        """MKD of each anchor, from statistics with a teacher at this temperature, and the number of anchors."""
        # Not temperature**2: Python raises an error where that overflows.
        return float(self.temperature) * float(self.temperature) * statistics.divergence, statistics.total
