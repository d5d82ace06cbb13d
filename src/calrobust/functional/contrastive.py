"""The multimodal contrastive loss (MCL), with label smoothing."""

from __future__ import annotations

from torch import Tensor

from calrobust._checks import check_choice, check_fraction
from calrobust.distributed import REDUCTIONS, ProcessGroup, Reduction
from calrobust.kernels import MEMORY_BUDGET, Direction, Impl, PairStatistics, pair_statistics


def multimodal_contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    labels: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    gather: bool = False,
    group: ProcessGroup | None = None,
    impl: Impl = "auto",
    memory_budget: int = MEMORY_BUDGET,
) -> Tensor:
    r"""Cross-entropy of each image against all texts and of each text against all images (MCL).

    .. math:: \ell_i = \log \sum_j e^{s_{ij}} - (1 - \varepsilon)\, s_{ii} - \tfrac{\varepsilon}{M} \sum_j s_{ij}

    where :math:`s_{ij}` is ``logit_scale`` times the dot product of image :math:`i` and text :math:`j` for the first
    direction, transposed for the second, and the value of a pair is the average of its two directions. With ``labels``
    the mean of :math:`s_{ij}` over the pairs :math:`j` of the same label takes the place of :math:`s_{ii}`: they share
    the target.

    Args:
        image_features: shape ``[N, D]``, floating, unit norm; used as given, never normalised.
        text_features: shape ``[N, D]``; row ``i`` belongs to row ``i`` of the images.
        logit_scale: what multiplies the dot products, > 0: a number or a tensor of one element, already exponentiated.
        labels: shape ``[N]``, ``int64``: pairs with equal labels are positives of each other. Costs O(N·D), no mask.
        label_smoothing: :math:`\varepsilon` in [0, 1), torch's: :math:`\varepsilon / M` of the target on every one.
        reduction: ``"mean"`` or ``"sum"`` over the N pairs, or ``"none"``.
        gather: contrast against the pairs of every rank; see :ref:`many-processes`.
        group: the process group of ``gather``; None is the world.
        impl: ``"dense"`` holds the N×N matrix and can be differentiated twice; ``"tiled"`` needs O(N·D) memory and
            recomputes; ``"triton"`` does the same in kernels for CUDA devices; ``"auto"`` is tiled and keeps the matrix
            for backward where it fits into ``memory_budget``, and beyond it Triton where that runs.
        memory_budget: bytes of temporary logits that ``"auto"`` may hold from forward to backward.

    Returns:
        A scalar in nats, or ``[N]`` for ``"none"``; float32, or float64 for float64 features.

    Raises:
        ValueError: the features differ in shape, dtype or device, are empty or not 2-D; ``labels`` do not fit;
            ``label_smoothing`` is outside [0, 1); ``logit_scale`` is a number ≤ 0; unknown ``reduction`` or ``impl``;
            ``impl="triton"`` without a CUDA device.
        TypeError: the features are no floating-point tensors, or ``labels`` are not ``int64``.

    Example:
        >>> import torch
        >>> from calrobust.functional import multimodal_contrastive_loss
        >>> multimodal_contrastive_loss(torch.eye(2), torch.eye(2), 1.0)  # log(1 + 1/e)
        tensor(0.3133)

    Reference: Radford et al., 2021, :arxiv:`2103.00020`, Figure 3; with label smoothing Oh et al., 2024,
    :arxiv:`2311.01723`.
    """
    check_fraction(closed=False, label_smoothing=label_smoothing)
    check_choice(REDUCTIONS, reduction=reduction)
    statistics = pair_statistics(
        image_features,
        text_features,
        logit_scale,
        labels=labels,
        gather=gather,
        group=group,
        impl=impl,
        memory_budget=memory_budget,
    )
    return statistics.ranks.reduce(contrastive_terms(statistics, label_smoothing), reduction)


def contrastive_terms(statistics: PairStatistics, label_smoothing: float) -> Tensor:
    """MCL of each pair, shape ``[N]``."""
    rows = _smoothed_cross_entropy(statistics.rows, label_smoothing)
    return (rows + _smoothed_cross_entropy(statistics.columns, label_smoothing)) / 2


def _smoothed_cross_entropy(direction: Direction, label_smoothing: float) -> Tensor:
    loss = direction.lse - (1 - label_smoothing) * direction.positive
    return loss - label_smoothing * direction.mean if label_smoothing else loss
