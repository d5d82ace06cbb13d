"""Losses on similarities of images and texts: of softmax models such as CLIP, and of sigmoid models such as SigLIP."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from calrobust._checks import check_choice, check_fraction, check_number, check_positive
from calrobust.functional.pairs import DIRECTIONS, Directions, PairOptions, Request, Shared, SoftmaxTerm, weighted_terms
from calrobust.kernels import Direction, Labels
from calrobust.kernels.sigmoid import Classes, Model, sigmoid_sums


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
    r"""Cross-entropy of each image against all texts and of each text against all images (MCL).

    .. math:: \ell_i = \log \sum_j e^{s_{ij}} - (1 - \varepsilon)\, \bar s_i - \tfrac{\varepsilon}{M} \sum_j s_{ij}

    Here :math:`s_{ij}` is ``logit_scale`` times the dot product of image :math:`i` and text :math:`j`, sums are over
    all M texts, and :math:`\bar s_i` is the mean of :math:`s_{ij}` over the positives of image :math:`i`. From text to
    image the two are exchanged. The value is the average of the two directions, or that of the one in ``direction``.

    Args:
        image_features: shape ``[N, D]``, floating, unit norm; used as given, never normalised.
        text_features: shape ``[M, D]``. Without labels, text :math:`i` is the positive of image :math:`i`, and M ≥ N:
            further texts are only candidates of the images.
        logit_scale: what multiplies the dot products, > 0: a number or a tensor of one element, already exponentiated.
        labels: shape ``[N]``, ``int64``: pairs with equal labels are positives of each other. Or a pair of tensors
            ``(image_labels [N], text_labels [M])``: an image and a text with equal labels are positives; for a class
            bank they are ``(target, torch.arange(C))``. Each image needs a positive unless ``direction`` is
            ``"text_to_image"``; off the CPU and in compiled code its loss is NaN without. A text without a positive is
            left out of the second direction. Costs O(N·D + M·D), no mask.
        label_smoothing: :math:`\varepsilon` in [0, 1): each of the M candidates gets :math:`\varepsilon / M` of the
            target, as in torch.
        direction: ``"image_to_text"`` or ``"text_to_image"`` for one of them, at the cost of one.
        **options: see :class:`~calrobust.functional.PairOptions`.

    Returns:
        A scalar ≥ 0 in nats, float32, or float64 for float64 features. For ``reduction="none"`` the value of each pair
        ``[N]``, of each image ``[N]``, or of each text ``[M]``, which is 0 for a text without a positive.

    Raises:
        ValueError: the features differ in width, dtype or device, are empty or not 2-D; ``labels`` do not fit, or M < N
            without any; an image has no positive; a number or option is out of range; ``reduction="none"`` is asked for
            both directions of what are no pairs; ``impl="triton"`` without a CUDA device.
        TypeError: the features are not floating-point tensors, ``labels`` are not ``int64``, or an option is unknown.

    Example:
        >>> import torch
        >>> from calrobust.functional import multimodal_contrastive_loss
        >>> multimodal_contrastive_loss(torch.eye(2), torch.eye(2), 1.0)  # log(1 + 1/e)
        tensor(0.3133)
        >>> target, bank = torch.tensor([1, 1]), torch.eye(2)  # plain cross-entropy: log(1 + 1/e) and log(1 + e)
        >>> labels = target, torch.arange(2)
        >>> multimodal_contrastive_loss(torch.eye(2), bank, 1.0, labels=labels, direction="image_to_text")
        tensor(0.8133)

    Reference: Radford et al., 2021, :arxiv:`2103.00020`, Figure 3; with label smoothing Oh et al., 2024,
    :arxiv:`2311.01723`.
    """
    student = (image_features, text_features, logit_scale)
    (value,) = weighted_terms(
        lambda: Request([(1, Contrastive(label_smoothing, direction))], student, None, labels), options
    )
    return value


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
    the two directions are **summed**, as in the paper. open_clip's ``DistillClipLoss`` averages them, and its value
    (not its gradient) also holds the teacher's entropy. Images and texts need not be pairs, nor as many.

    Arguments of the student, ``direction`` and ``options`` are those of
    :func:`~calrobust.functional.multimodal_contrastive_loss`. The teacher's features, of the same images ``[N, E]`` and
    texts ``[M, E]``, get no gradient, and its logit scale is its own. ``temperature`` is :math:`\tau` > 0.

    Returns:
        A scalar ≥ 0 in nats, or ``[N]`` for ``reduction="none"`` (``[M]`` from text to image); float32, or float64 if
        any features are. Exactly 0 where teacher and student are equal.

    Raises:
        ValueError, TypeError: as for MCL, of student and teacher; the teacher's batch differs in size.

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
    :func:`~calrobust.functional.multimodal_distillation_loss`; ``distillation_weight`` is :math:`\lambda`, 1.5 in the
    paper.

    Example:
        >>> import torch
        >>> from calrobust.functional import carot_loss
        >>> image = text = torch.eye(2)
        >>> carot_loss(image, text, 1.0, image, text, 1.0, label_smoothing=0.0, distillation_weight=1.5)
        tensor(0.3133)

    Reference: Oh et al., 2024, :arxiv:`2311.01723`, without :func:`~calrobust.functional.orthogonality_loss`.
    """
    student = (image_features, text_features, logit_scale)
    teacher = (teacher_image_features, teacher_text_features, teacher_logit_scale)

    def request() -> Request:
        check_number(distillation_weight=distillation_weight)
        contrastive, distillation = Contrastive(label_smoothing, direction), Distillation(direction=direction)
        return Request([(1, contrastive), (distillation_weight, distillation)], student, teacher, labels)

    contrastive, distillation = weighted_terms(request, options)
    return contrastive + distillation


@dataclass(frozen=True)
class Contrastive(SoftmaxTerm):
    """MCL as a term of a sum."""

    name: ClassVar[str] = "contrastive"
    needs_teacher: ClassVar[bool] = False
    needs_positives: ClassVar[bool] = True
    temperature: ClassVar[float] = 1.0

    label_smoothing: float = 0.0
    direction: Directions = "both"

    def __post_init__(self) -> None:
        """Checks the arguments."""
        check_fraction(closed=False, label_smoothing=self.label_smoothing)
        check_choice(DIRECTIONS, direction=self.direction)

    def values(self, statistics: Direction) -> tuple[Tensor, Tensor | int]:
        """Cross-entropy of each anchor, half of it for both directions, and the number of anchors."""
        smoothing = float(self.label_smoothing)
        loss = statistics.negative_log_likelihood + (1 - smoothing) * statistics.above_positives
        loss = loss + smoothing * statistics.above_mean if smoothing else loss
        weights, number, _ = statistics.anchors
        return loss * weights / (2 if self.direction == "both" else 1), number


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
        """MKD of each anchor, and the number of anchors."""
        # Not temperature**2, which raises an error where it overflows.
        return float(self.temperature) * float(self.temperature) * statistics.divergence, statistics.total


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

    .. math:: \ell_i = \sum_j \log \left( 1 + e^{-m_{ij} z_{ij}} \right)

    Here :math:`z_{ij}` is ``logit_scale`` times a dot product, plus ``logit_bias``, a finite number or a tensor of one
    element, and :math:`m_{ij}` is 1 for positives and -1 for all others. Arguments, results and errors are those of
    :func:`~calrobust.functional.multimodal_contrastive_loss`, but an image may have no positive, and mean, sum and
    ``"none"`` are over the N images.

    Example:
        >>> import torch
        >>> from calrobust.functional import sigmoid_contrastive_loss
        >>> sigmoid_contrastive_loss(torch.eye(2), torch.eye(2), 1.0, 0.0)  # log(1 + 1/e) + log(2)
        tensor(1.0064)

    Reference: Zhai et al., 2023, :arxiv:`2303.15343`, Algorithm 1.
    """
    student = (image_features, text_features, logit_scale)
    biases = (logit_bias, 0.0)
    (value,) = weighted_terms(lambda: Request([(1, SigmoidContrastive())], student, None, labels, biases), options)
    return value


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

    .. math:: \ell_i = \tau^2 \sum_j \mathrm{KL}\left(\sigma(\tilde z_{ij} / \tau) \,\|\, \sigma(z_{ij} / \tau)\right)

    Here :math:`\tilde z_{ij}` is the teacher's, and KL is that of two answers, yes and no. Arguments, results and
    errors are those of :func:`~calrobust.functional.sigmoid_contrastive_loss`, and for the teacher and ``temperature``
    :math:`\tau` those of :func:`~calrobust.functional.multimodal_distillation_loss`. It is exactly 0 where teacher and
    student are equal.

    Example:
        >>> import torch
        >>> from calrobust.functional import sigmoid_distillation_loss
        >>> image = text = torch.eye(2)
        >>> sigmoid_distillation_loss(image, text, 1e-6, 0.0, image, text, 100.0, -50.0)  # 2 log 2: certain against 1/2
        tensor(1.3863)
    """
    student = (image_features, text_features, logit_scale)
    teacher = (teacher_image_features, teacher_text_features, teacher_logit_scale)
    biases = (logit_bias, teacher_logit_bias)
    (value,) = weighted_terms(
        lambda: Request([(1, SigmoidDistillation(temperature))], student, teacher, None, biases), options
    )
    return value


class SigmoidTerm:
    """Terms that are a ``multiple`` of one of the `Sums` over the texts of an image: the second if they distil."""

    direction: ClassVar[Directions] = "image_to_text"

    @staticmethod
    def evaluate(sharing: Sequence[tuple[float, Any]], shared: Shared) -> list[Tensor]:
        """In one pass over the pair matrix; if only their sum is differentiated, the first of them is the sum."""
        batch, options, temperature = shared.batch(), shared.options, float(sharing[0][1].temperature)
        distils = any(term.needs_teacher for _, term in sharing)
        factors = [batch.student, *([batch.teacher] if distils and batch.teacher else [])]
        each = [(weight * term.multiple, int(term.needs_teacher)) for weight, term in sharing]
        totalled = options.reduction != "none" and (shared.together or len(sharing) == 1)
        device = batch.partner.device
        with torch.autocast(device.type, enabled=False):
            models = [
                Model(x, y, scale / temperature, batch.scalar(bias, device) / temperature)
                for (x, y, scale), bias in zip(factors, shared.request.biases[: len(factors)], strict=True)
            ]
            sums, total = sigmoid_sums(
                models,
                Classes(*(batch.classes or (batch.partner, torch.arange(batch.columns.total, device=device)))),
                [sum(multiple for multiple, which in each if which == k) for k in (0, 1)],
                impl=options.impl,
                operands=batch.operands,
                totalled=totalled,
            )
        number = batch.rows.total
        if totalled:
            total = batch.rows.sum(total) / (number if options.reduction == "mean" else 1)
            values = [total, *(torch.zeros_like(total) for _ in sharing[1:])]
        else:
            values = [multiple * shared.reduce([(sums[which], number)]) for multiple, which in each]
        return [value.to(batch.dtype) for value in values]


@dataclass(frozen=True)
class SigmoidContrastive(SigmoidTerm):
    """The negative log-likelihoods of sigmoids as a term of a sum."""

    name: ClassVar[str] = "sigmoid_contrastive"
    needs_teacher: ClassVar[bool] = False
    needs_positives: ClassVar[bool] = True
    temperature: ClassVar[float] = 1.0
    multiple: ClassVar[float] = 1.0


@dataclass(frozen=True)
class SigmoidDistillation(SigmoidTerm):
    """The divergences of sigmoids as a term of a sum."""

    name: ClassVar[str] = "sigmoid_distillation"
    needs_teacher: ClassVar[bool] = True
    needs_positives: ClassVar[bool] = False

    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Checks the temperature."""
        check_positive(temperature=self.temperature)

    @property
    def multiple(self) -> float:
        """τ², which keeps gradients as large as they are without a temperature."""
        return float(self.temperature) ** 2
