"""Multimodal knowledge distillation (MKD), where a student follows a teacher's similarity maps; and MCL plus MKD."""

from __future__ import annotations

from torch import Tensor

from calrobust._checks import check_choice, check_fraction, check_number, check_positive
from calrobust.distributed import REDUCTIONS, ProcessGroup, Reduction
from calrobust.functional.contrastive import contrastive_terms
from calrobust.kernels import MEMORY_BUDGET, Impl, PairStatistics, pair_statistics


def multimodal_distillation_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    teacher_image_features: Tensor,
    teacher_text_features: Tensor,
    teacher_logit_scale: Tensor | float,
    *,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    gather: bool = False,
    group: ProcessGroup | None = None,
    impl: Impl = "auto",
    memory_budget: int = MEMORY_BUDGET,
) -> Tensor:
    r"""Divergence of the student's image-to-text and text-to-image softmaxes from those of a teacher (MKD).

    .. math:: \ell_i = \tau^2 \left( \mathrm{KL}(\tilde p_i \,\|\, p_i) + \mathrm{KL}(\tilde q_i \,\|\, q_i) \right)

    where :math:`p_i` is the softmax of image :math:`i` over all texts, :math:`q_i` that of text :math:`i` over all
    images, :math:`\tilde p_i, \tilde q_i` are the teacher's, and all logits are divided by :math:`\tau`. The two
    directions are **summed**, as in the paper; open_clip's ``DistillClipLoss`` averages them, and its value (not its
    gradient) also holds the teacher's entropy. The teacher never receives a gradient.

    Args:
        image_features: shape ``[N, D]``, floating, unit norm; used as given, never normalised.
        text_features: shape ``[N, D]``; row ``i`` belongs to row ``i`` of the images.
        logit_scale: what multiplies the dot products, > 0: a number or a tensor of one element, already exponentiated.
        teacher_image_features: shape ``[N, E]``: the same pairs seen by the teacher, in a width of its own.
        teacher_text_features: shape ``[N, E]``.
        teacher_logit_scale: the teacher's own.
        temperature: :math:`\tau` > 0, which softens both maps.
        reduction: ``"mean"`` or ``"sum"`` over the N pairs, or ``"none"``.
        gather: contrast against the pairs of every rank; see :ref:`many-processes`.
        group: the process group of ``gather``; None is the world.
        impl: as in :func:`~calrobust.functional.multimodal_contrastive_loss`.
        memory_budget: likewise.

    Returns:
        A scalar ≥ 0 in nats, or ``[N]`` for ``"none"``; float32, or float64 if any features are. Exactly 0 where
        teacher and student are equal.

    Raises:
        ValueError: as for MCL, of student and teacher; the teacher's batch differs in size; ``temperature`` ≤ 0.
        TypeError: the features are no floating-point tensors.

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
    check_positive(temperature=temperature)
    check_choice(REDUCTIONS, reduction=reduction)
    statistics = pair_statistics(
        image_features,
        text_features,
        logit_scale,
        teacher=(teacher_image_features, teacher_text_features, teacher_logit_scale),
        temperature=temperature,
        gather=gather,
        group=group,
        impl=impl,
        memory_budget=memory_budget,
    )
    return statistics.ranks.reduce(distillation_terms(statistics, temperature), reduction)


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
    labels: Tensor | None = None,
    reduction: Reduction = "mean",
    gather: bool = False,
    group: ProcessGroup | None = None,
    impl: Impl = "auto",
    memory_budget: int = MEMORY_BUDGET,
) -> Tensor:
    r"""MCL with label smoothing plus ``distillation_weight`` times MKD, in one pass over the pair matrix.

    .. math:: \mathcal{L} = \mathcal{L}_\mathrm{MCL}(\varepsilon) + \lambda\, \mathcal{L}_\mathrm{MKD}

    Args:
        image_features: shape ``[N, D]``, as in :func:`~calrobust.functional.multimodal_contrastive_loss`.
        text_features: shape ``[N, D]``.
        logit_scale: > 0, already exponentiated.
        teacher_image_features: shape ``[N, E]``, as in :func:`~calrobust.functional.multimodal_distillation_loss`.
        teacher_text_features: shape ``[N, E]``.
        teacher_logit_scale: the teacher's own.
        label_smoothing: :math:`\varepsilon` in [0, 1), of MCL.
        distillation_weight: :math:`\lambda`, finite; 1.5 in the paper, for MKD summed over its two directions.
        labels: shape ``[N]``, ``int64``: positives of MCL.
        reduction: ``"mean"`` or ``"sum"`` over the N pairs, or ``"none"``.
        gather: contrast against the pairs of every rank; see :ref:`many-processes`.
        group: the process group of ``gather``; None is the world.
        impl: as in MCL.
        memory_budget: as in MCL.

    Returns:
        A scalar in nats, or ``[N]`` for ``"none"``; float32, or float64 if any features are.

    Raises:
        ValueError: as for MCL and MKD.
        TypeError: as for MCL and MKD.

    Example:
        >>> import torch
        >>> from calrobust.functional import carot_loss
        >>> image = text = torch.eye(2)
        >>> carot_loss(image, text, 1.0, image, text, 1.0, label_smoothing=0.0, distillation_weight=1.5)
        tensor(0.3133)

    Reference: Oh et al., 2024, :arxiv:`2311.01723`, its objective without the orthogonality term, which is on weights
    (:func:`~calrobust.functional.orthogonality_loss`).
    """
    check_fraction(closed=False, label_smoothing=label_smoothing)
    check_number(distillation_weight=distillation_weight)
    check_choice(REDUCTIONS, reduction=reduction)
    statistics = pair_statistics(
        image_features,
        text_features,
        logit_scale,
        teacher=(teacher_image_features, teacher_text_features, teacher_logit_scale),
        labels=labels,
        gather=gather,
        group=group,
        impl=impl,
        memory_budget=memory_budget,
    )
    contrastive = contrastive_terms(statistics, label_smoothing)
    values = contrastive + float(distillation_weight) * distillation_terms(statistics, 1.0)
    return statistics.ranks.reduce(values, reduction)


def distillation_terms(statistics: PairStatistics, temperature: float) -> Tensor:
    """MKD of each pair, shape ``[N]``, from statistics taken with a teacher and at this temperature."""
    # Not temperature**2, where Python raises an error for what overflows; nor an int that torch has no room for.
    return float(temperature) * temperature * (statistics.rows.divergence + statistics.columns.divergence)
