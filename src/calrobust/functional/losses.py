"""The losses as functions."""

from typing import Unpack

import torch
from torch import Tensor, nn

from calrobust._checks import check_flag, check_floating, check_instance, check_not_meta, check_number
from calrobust.functional.pairs import Directions, Modality, Outputs, PairOptions, Request, Term, weighted_terms
from calrobust.kernels import Labels


def multimodal_contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    labels: Labels | None = None,
    label_smoothing: float = 0.0,
    direction: Directions = "both",
    **options: Unpack[PairOptions],
) -> Tensor:
    r"""Cross-entropy of images against all texts and of texts against all images (MCL).

    .. math:: \ell_i = \log \sum_j e^{s_{ij}} - (1 - \varepsilon) \bar s_i - \frac{\varepsilon}{M} \sum_j s_{ij}

    Here :math:`s_{ij}` is ``logit_scale`` times the dot product of image :math:`i` and text :math:`j`, and
    :math:`\bar s_i` its mean over the positives of image :math:`i`. From text to image the two are exchanged, and the
    two directions are averaged.

    Args:
        image_features: shape ``[N, D]``, floating, unit norm; not normalised here.
        text_features: shape ``[M, D]``. Without labels, text :math:`i` is the positive of image :math:`i`, and others
            are only candidates.
        logit_scale: a number or a tensor of one element, > 0, already exponentiated.
        labels: ``int64``, equal for positives: ``[N]`` of pairs, or ``(image_labels [N], text_labels [M])``, such as
            ``(target, torch.arange(C))`` for a class bank. From image to text each image needs a positive, or else
            compiled code and GPUs give NaN; from text to image a text without one is left out.
        label_smoothing: :math:`\varepsilon` in [0, 1), as in torch.
        direction: ``"both"``, ``"image_to_text"`` or ``"text_to_image"``.
        **options: see :class:`~calrobust.functional.PairOptions`.

    Returns:
        A scalar ≥ 0 in nats, float32, or float64 if any features are. For ``reduction="none"`` a value of each pair or
        image ``[N]``, or of each text ``[M]``, 0 without a positive.

    Raises:
        ValueError: features or ``labels`` do not fit, or M < N without; an image has no positive; a number or option is
            out of range; ``reduction="none"`` is of both directions of unpaired features; ``impl="triton"`` finds no
            CUDA device.
        TypeError: features are not floating, ``labels`` not ``int64``, or an option is unknown.

    Example:
        >>> import torch
        >>> from calrobust.functional import multimodal_contrastive_loss
        >>> multimodal_contrastive_loss(torch.eye(2), torch.eye(2), 1.0)  # log(1 + 1/e)
        tensor(0.3133)

    Reference: Radford et al., 2021, :arxiv:`2103.00020`; Oh et al., 2024, :arxiv:`2311.01723`.
    """
    student = Outputs(image_features, text_features, logit_scale)

    def request() -> Request:
        term = Term("contrastive", label_smoothing=label_smoothing, direction=direction)
        return Request([(1, term)], student, labels=labels)

    return weighted_terms(request, lambda: options)[0]


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

    .. math:: \ell_i = \tau^2 (\mathrm{KL}(\tilde p_i \| p_i) + \mathrm{KL}(\tilde q_i \| q_i))

    Here :math:`p_i` is the softmax of image :math:`i` over all texts, :math:`q_i` that of text :math:`i` over all
    images, :math:`\tilde p_i, \tilde q_i` are the teacher's, and all logits are divided by ``temperature``
    :math:`\tau` > 0. The means of the two directions are **summed**, as in the paper but not in open_clip.

    Other arguments and results are those of :func:`~calrobust.functional.multimodal_contrastive_loss`, but images and
    texts need not be pairs. The teacher's features, of the same images ``[N, E]`` and texts ``[M, E]``, get no
    gradient. The value is exactly 0 for equal models.

    Raises:
        ValueError, TypeError: as for MCL, or the teacher's batch differs in size.

    Example:
        >>> import torch
        >>> from calrobust.functional import multimodal_distillation_loss
        >>> image = text = torch.eye(2)
        >>> multimodal_distillation_loss(image, text, 1.0, image, text, 1.0)
        tensor(0.)
        >>> multimodal_distillation_loss(image, text, 0.001, image, text, 100.0)  # 2 log 2: certain against uniform
        tensor(1.3853)

    Reference: Oh et al., 2024, :arxiv:`2311.01723`.
    """
    student = Outputs(image_features, text_features, logit_scale)
    teacher = Outputs(teacher_image_features, teacher_text_features, teacher_logit_scale)

    def request() -> Request:
        term = Term("distillation", temperature=temperature, direction=direction)
        return Request([(1, term)], student, teacher)

    return weighted_terms(request, lambda: options)[0]


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
    """CaRot's objective on pairs, without OC: MCL with label smoothing plus ``distillation_weight`` times MKD.

    Arguments, results and errors are those of :func:`~calrobust.functional.multimodal_contrastive_loss` and
    :func:`~calrobust.functional.multimodal_distillation_loss`.

    Example:
        >>> import torch
        >>> from calrobust.functional import carot_loss
        >>> image = text = torch.eye(2)
        >>> carot_loss(image, text, 1.0, image, text, 1.0, label_smoothing=0.0, distillation_weight=1.5)
        tensor(0.3133)
    """
    student = Outputs(image_features, text_features, logit_scale)
    teacher = Outputs(teacher_image_features, teacher_text_features, teacher_logit_scale)

    def request() -> Request:
        check_number(distillation_weight=distillation_weight)
        contrastive = Term("contrastive", label_smoothing=label_smoothing, direction=direction)
        distillation = Term("distillation", direction=direction)
        return Request([(1, contrastive), (distillation_weight, distillation)], student, teacher, labels)

    contrastive, distillation = weighted_terms(request, lambda: options)
    return contrastive + distillation


def sigmoid_contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    labels: Labels | None = None,
    **options: Unpack[PairOptions],
) -> Tensor:
    r"""Binary cross-entropy of every image with every text, summed over the texts: SigLIP's loss.

    .. math:: \ell_i = \sum_j \log(1 + e^{-m_{ij} z_{ij}})

    Here :math:`z_{ij}` is ``logit_scale`` times a dot product, plus ``logit_bias``, a finite number or scalar tensor,
    and :math:`m_{ij}` is 1 for positives and -1 for all others. Arguments, results and errors are those of
    :func:`~calrobust.functional.multimodal_contrastive_loss`, but images need no positive, and reductions are over
    images.

    Example:
        >>> import torch
        >>> from calrobust.functional import sigmoid_contrastive_loss
        >>> sigmoid_contrastive_loss(torch.eye(2), torch.eye(2), 1.0, 0.0)  # log(1 + 1/e) + log(2)
        tensor(1.0064)

    Reference: Zhai et al., 2023, :arxiv:`2303.15343`, Algorithm 1.
    """
    student = Outputs(image_features, text_features, logit_scale, logit_bias)
    terms = weighted_terms(lambda: Request([(1, Term("sigmoid_contrastive"))], student, labels=labels), lambda: options)
    return terms[0]


def sigmoid_distillation_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    teacher_image_features: Tensor,
    teacher_text_features: Tensor,
    teacher_logit_scale: Tensor | float,
    teacher_logit_bias: Tensor | float,
    *,
    temperature: float = 1.0,
    **options: Unpack[PairOptions],
) -> Tensor:
    r"""Divergence of a sigmoid model's probabilities from a teacher's, of every image with every text.

    .. math:: \ell_i = \tau^2 \sum_j \mathrm{KL}(\sigma(\tilde z_{ij} / \tau) \| \sigma(z_{ij} / \tau))

    Here :math:`\tilde z_{ij}` is the teacher's, and KL is binary. Arguments, results and errors are those of
    :func:`~calrobust.functional.sigmoid_contrastive_loss` and
    :func:`~calrobust.functional.multimodal_distillation_loss`.

    Example:
        >>> import torch
        >>> from calrobust.functional import sigmoid_distillation_loss
        >>> image = text = torch.eye(2)
        >>> sigmoid_distillation_loss(image, text, 1e-6, 0.0, image, text, 100.0, -50.0)  # 2 log 2
        tensor(1.3863)
    """
    student = Outputs(image_features, text_features, logit_scale, logit_bias)
    teacher = Outputs(teacher_image_features, teacher_text_features, teacher_logit_scale, teacher_logit_bias)
    return weighted_terms(
        lambda: Request([(1, Term("sigmoid_distillation", temperature=temperature))], student, teacher), lambda: options
    )[0]


def feature_distillation_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    teacher_image_features: Tensor,
    teacher_text_features: Tensor,
    teacher_logit_scale: Tensor | float,
    *,
    modality: Modality = "both",
    **options: Unpack[PairOptions],
) -> Tensor:
    r"""Half the squared distance of features from a teacher's.

    .. math:: \ell_i = \tfrac{1}{2} \lVert x_i - \tilde x_i \rVert^2

    For unit norm this is :math:`1 - x_i^\top \tilde x_i`. The means over images and over texts are **summed**, unless
    ``modality`` is ``"image"`` or ``"text"``.

    Arguments, results and errors are those of :func:`~calrobust.functional.multimodal_distillation_loss`, but features
    may have any norm, and the teacher's must have the student's width D. The logit scales are not used.

    Example:
        >>> import torch
        >>> from calrobust.functional import feature_distillation_loss
        >>> image = text = torch.eye(2)
        >>> feature_distillation_loss(image, text, 1.0, image.flip(0), text, 1.0)  # images at right angles: 1 - 0
        tensor(1.)
    """
    student = Outputs(image_features, text_features, logit_scale)
    teacher = Outputs(teacher_image_features, teacher_text_features, teacher_logit_scale)
    return weighted_terms(
        lambda: Request([(1, Term("feature", modality=modality))], student, teacher), lambda: options
    )[0]


def orthogonality_loss(weight: Tensor | nn.Linear, *, squared: bool = True) -> Tensor:
    r"""Distance of a projection's columns from an orthonormal system (OC).

    .. math:: \lVert W^\top W - I \rVert_F^2

    Args:
        weight: shape ``[in, out]``, floating, applied as ``x @ W``, such as open_clip's ``visual.proj``; or an
            ``nn.Linear``. A ``DTensor`` (FSDP2) is gathered, so every rank must call this.
        squared: False gives the norm itself, whose gradient at an orthonormal ``W`` is zero.

    Returns:
        A scalar ≥ 0; float32, or float64 for a float64 weight. Zero needs in ≥ out.

    Raises:
        TypeError: ``weight`` has the wrong type.
        ValueError: ``weight`` is not 2-D.

    Example:
        >>> import torch
        >>> from calrobust.functional import orthogonality_loss
        >>> orthogonality_loss(2 * torch.eye(3))  # three diagonal entries of 4 - 1
        tensor(27.)

    Reference: Oh et al., 2024, :arxiv:`2311.01723`.
    """
    matrix = weight.weight.T if isinstance(weight, nn.Linear) else weight
    if hasattr(matrix, "full_tensor"):
        matrix = matrix.full_tensor()
    check_instance(Tensor, "pass the projection, e.g. model.visual.proj", weight=matrix)
    check_floating(weight=matrix)
    check_not_meta(weight=matrix)
    check_flag(squared=squared)
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise ValueError(
            f"weight must have shape [in, out], got {list(matrix.shape)}; pass the projection, e.g. model.visual.proj"
        )
    with torch.autocast(matrix.device.type, enabled=False):
        matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        difference = matrix.T @ matrix - torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
        return difference.square().sum() if squared else torch.linalg.vector_norm(difference)
