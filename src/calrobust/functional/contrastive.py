"""The multimodal contrastive loss (MCL), with label smoothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Unpack

from torch import Tensor

from calrobust._checks import check_fraction
from calrobust.functional.pairs import PairOptions, Request, weighted_terms
from calrobust.kernels import Direction, PairStatistics


def multimodal_contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    labels: Tensor | None = None,
    label_smoothing: float = 0.0,
    **options: Unpack[PairOptions],
) -> Tensor:
    r"""Cross-entropy of each image against all texts and of each text against all images (MCL).

    .. math:: \ell_i = \log \sum_j e^{s_{ij}} - (1 - \varepsilon)\, s_{ii} - \tfrac{\varepsilon}{M} \sum_j s_{ij}

    Here :math:`s_{ij}` is ``logit_scale`` times the dot product of image :math:`i` and text :math:`j` for the first
    direction, and its transpose for the second. The value of a pair is the average of its two directions. With
    ``labels``, the mean of :math:`s_{ij}` over the pairs :math:`j` of the same label takes the place of
    :math:`s_{ii}`: these pairs share the target.

    Args:
        image_features: shape ``[N, D]``, floating, unit norm; used as given, never normalised.
        text_features: shape ``[N, D]``; row ``i`` belongs to row ``i`` of the images.
        logit_scale: what multiplies the dot products, > 0: a number or a tensor of one element, already exponentiated.
        labels: shape ``[N]``, ``int64``: pairs with equal labels are positives of each other. Costs O(N·D), no mask.
        label_smoothing: :math:`\varepsilon` in [0, 1), as in torch: :math:`\varepsilon / M` of the target on each of
            the M candidates.
        **options: see :class:`~calrobust.functional.PairOptions`.

    Returns:
        A scalar ≥ 0 in nats, or ``[N]`` for ``reduction="none"``; float32, or float64 for float64 features.

    Raises:
        ValueError: the features differ in shape, dtype or device, are empty or not 2-D; ``labels`` do not fit;
            ``label_smoothing`` is outside [0, 1); ``logit_scale`` is ≤ 0; an option has an unknown value;
            ``impl="triton"`` without a CUDA device.
        TypeError: the features are not floating-point tensors, ``labels`` are not ``int64``, or an option is unknown.

    Example:
        >>> import torch
        >>> from calrobust.functional import multimodal_contrastive_loss
        >>> multimodal_contrastive_loss(torch.eye(2), torch.eye(2), 1.0)  # log(1 + 1/e)
        tensor(0.3133)

    Reference: Radford et al., 2021, :arxiv:`2103.00020`, Figure 3; with label smoothing Oh et al., 2024,
    :arxiv:`2311.01723`.
    """
    student = (image_features, text_features, logit_scale)
    (value,) = weighted_terms(lambda: Request([(1, Contrastive(label_smoothing))], student, None, labels), options)
    return value


@dataclass(frozen=True)
class Contrastive:
    """MCL as a term of a sum."""

    name: ClassVar[str] = "contrastive"
    needs_teacher: ClassVar[bool] = False
    temperature: ClassVar[float] = 1.0

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Checks the smoothing."""
        check_fraction(closed=False, label_smoothing=self.label_smoothing)

    def values(self, statistics: PairStatistics) -> Tensor:
        """MCL of each pair, shape ``[N]``."""
        return (self._cross_entropy(statistics.rows) + self._cross_entropy(statistics.columns)) / 2

    def _cross_entropy(self, direction: Direction) -> Tensor:
        smoothing = float(self.label_smoothing)
        loss = direction.negative_log_likelihood + (1 - smoothing) * direction.above_positives
        return loss + smoothing * direction.above_mean if smoothing else loss
