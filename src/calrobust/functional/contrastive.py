"""The multimodal contrastive loss (MCL), with label smoothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Unpack

from torch import Tensor

from calrobust._checks import check_choice, check_fraction
from calrobust.functional.pairs import DIRECTIONS, Directions, PairOptions, Request, SoftmaxTerm, weighted_terms
from calrobust.kernels import Direction, Labels


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

    Here :math:`s_{ij}` is ``logit_scale`` times the dot product of image :math:`i` and text :math:`j`, the sums are
    over all M texts, and :math:`\bar s_i` is the mean of :math:`s_{ij}` over the positives of image :math:`i`, which
    share the target. From text to image the two are exchanged. The value is the average of the two directions, or that
    of the one which ``direction`` names. Without ``labels``, text :math:`i` is the only positive of image :math:`i`.

    Args:
        image_features: shape ``[N, D]``, floating, unit norm; used as given, never normalised.
        text_features: shape ``[M, D]``. Without labels, row ``i`` belongs to row ``i`` of the images, and M ≥ N: any
            further texts are candidates of the images, but are not compared with images themselves.
        logit_scale: what multiplies the dot products, > 0: a number or a tensor of one element, already exponentiated.
        labels: shape ``[N]``, ``int64``: pairs with equal labels are positives of each other. Or a pair of tensors
            ``(image_labels [N], text_labels [M])``: an image and a text with equal labels are positives, as the texts
            of a class bank are with ``(target, torch.arange(C))``. Each image needs a positive unless ``direction`` is
            ``"text_to_image"``; where values are not looked at, off the CPU and in compiled code, its loss is NaN. A
            text may have none and is then left out of the second direction. Costs O(N·D + M·D), no mask.
        label_smoothing: :math:`\varepsilon` in [0, 1), as in torch: :math:`\varepsilon / M` of the target on each of
            the M candidates.
        direction: ``"image_to_text"`` or ``"text_to_image"`` for one of them, at the cost of one.
        **options: see :class:`~calrobust.functional.PairOptions`.

    Returns:
        A scalar ≥ 0 in nats, float32, or float64 for float64 features. For ``reduction="none"`` the value of each pair
        ``[N]``, of each image ``[N]``, or of each text ``[M]``, which is 0 for a text without a positive.

    Raises:
        ValueError: the features differ in width, dtype or device, are empty or not 2-D; ``labels`` do not fit, or M < N
            without any; an image has no positive; ``label_smoothing`` is outside [0, 1); ``logit_scale`` is ≤ 0; an
            option has an unknown value; ``reduction="none"`` is asked for both directions of what are no pairs;
            ``impl="triton"`` without a CUDA device.
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
        """Cross-entropy of each anchor, half of it if both directions are averaged, and the number of anchors."""
        smoothing = float(self.label_smoothing)
        loss = statistics.negative_log_likelihood + (1 - smoothing) * statistics.above_positives
        loss = loss + smoothing * statistics.above_mean if smoothing else loss
        weights, number, _ = statistics.anchors
        return loss * weights / (2 if self.direction == "both" else 1), number
