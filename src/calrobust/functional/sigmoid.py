"""The losses of sigmoid models such as SigLIP, which ask of each image and each text whether they belong together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from calrobust._checks import check_positive
from calrobust.functional.pairs import Directions, PairOptions, Request, Shared, weighted_terms
from calrobust.kernels import Labels
from calrobust.kernels.sigmoid import Classes, Model, sigmoid_sums


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

    Here :math:`z_{ij}` is ``logit_scale`` times the dot product of image :math:`i` and text :math:`j`, plus
    ``logit_bias``, and :math:`m_{ij}` is 1 for positives and -1 for all others.

    Args:
        image_features: shape ``[N, D]``, as for :func:`~calrobust.functional.multimodal_contrastive_loss`.
        text_features: shape ``[M, D]``.
        logit_scale: > 0, already exponentiated.
        logit_bias: a number or a tensor of one element; 0.0 for a model without one.
        labels: as for the same function, but an image may have no positive.
        **options: see :class:`~calrobust.functional.PairOptions`. Mean, sum and ``"none"`` are over the N images.

    Returns:
        A scalar ≥ 0 in nats, or ``[N]`` for ``reduction="none"``; float32, or float64 for float64 features.

    Raises:
        ValueError, TypeError: as for the same function, or the bias is not a finite number.

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

    Here :math:`z_{ij}` is as in :func:`~calrobust.functional.sigmoid_contrastive_loss`, :math:`\tilde z_{ij}` is the
    teacher's, and KL is that of two answers, yes and no.

    Args:
        image_features: shape ``[N, D]``, as for :func:`~calrobust.functional.multimodal_contrastive_loss`.
        text_features: shape ``[M, D]``.
        logit_scale: > 0, already exponentiated.
        logit_bias: a number or a tensor of one element; 0.0 for a model without one.
        teacher_image_features: shape ``[N, E]``: the same images seen by the teacher, which gets no gradient.
        teacher_text_features: shape ``[M, E]``.
        teacher_logit_scale: the teacher's own.
        teacher_logit_bias: the teacher's own.
        temperature: :math:`\tau` > 0, which softens both.
        **options: see :class:`~calrobust.functional.PairOptions`. Mean, sum and ``"none"`` are over the N images.

    Returns:
        A scalar ≥ 0 in nats, or ``[N]`` for ``reduction="none"``; float32, or float64 if any features are. Exactly 0
        where teacher and student are equal.

    Raises:
        ValueError, TypeError: as for :func:`~calrobust.functional.multimodal_distillation_loss`, or a bias is not a
            finite number.

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
                for (x, y, scale), bias in zip(factors, shared.request.biases, strict=False)
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
