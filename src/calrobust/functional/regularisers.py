"""Losses on features and on weights, without the pair matrix: feature distillation and the orthogonality constraint."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Unpack, cast, get_args

import torch
from torch import Tensor, nn

from calrobust._checks import check_choice, check_flag, check_floating
from calrobust.functional.pairs import DIRECTIONS, Directions, PairOptions, Request, Shared, weighted_terms

Modality = Literal["both", "image", "text"]
MODALITIES: tuple[str, ...] = get_args(Modality)  # in the order of `DIRECTIONS`


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
    r"""Half the squared distance of the student's features from a teacher's, to which it anchors them.

    .. math:: \ell_i = \tfrac{1}{2} \lVert x_i - \tilde x_i \rVert^2

    For unit norm this is :math:`1 - x_i^\top \tilde x_i`, but a small value keeps its digits. Features of another norm
    are used as they are: the value is their distance, and 0 only where they are equal. The means over images and over
    texts are **summed**, unless ``modality`` is ``"image"`` or ``"text"``, which leaves the other without a gradient. A
    mean is D/2 times torch's ``mse_loss``. Costs O(N·D + M·D), with no pass over pairs.

    Arguments, results and errors are those of :func:`~calrobust.functional.multimodal_distillation_loss`, but the
    teacher's features must have the student's width D. The logit scales only let models' results go in as they are.

    Example:
        >>> import torch
        >>> from calrobust.functional import feature_distillation_loss
        >>> image = text = torch.eye(2)
        >>> feature_distillation_loss(image, text, 1.0, image.flip(0), text, 1.0)  # images at right angles: 1 - 0
        tensor(1.)
    """
    student = (image_features, text_features, logit_scale)
    teacher = (teacher_image_features, teacher_text_features, teacher_logit_scale)
    (value,) = weighted_terms(lambda: Request([(1, FeatureDistillation(modality))], student, teacher, None), options)
    return value


@dataclass(frozen=True)
class FeatureDistillation:
    """Distances from the teacher's features as a term of a sum."""

    name: ClassVar[str] = "feature"
    needs_teacher: ClassVar[bool] = True
    needs_positives: ClassVar[bool] = False
    temperature: ClassVar[float] = 1.0

    modality: Modality = "both"

    def __post_init__(self) -> None:
        """Checks the modality."""
        check_choice(MODALITIES, modality=self.modality)

    @property
    def direction(self) -> Directions:
        """That from the modality to the other."""
        return cast(Directions, DIRECTIONS[MODALITIES.index(self.modality)])

    @staticmethod
    def evaluate(sharing: Sequence[tuple[float, Any]], shared: Shared) -> list[Tensor]:
        """From the features, without the pair matrix."""
        _, student, teacher, _, _ = shared.request
        models, each = zip(student[:2], (teacher or student)[:2], shared.ranks, strict=True), {}
        for name, (ours, theirs, ranks) in zip(MODALITIES[1:], models, strict=True):
            if ours.shape[1] != theirs.shape[1]:
                raise ValueError(
                    f"teacher_{name}_features must have the student's width, got {list(theirs.shape)} for "
                    f"{list(ours.shape)}; project them, or distil similarities with MultimodalDistillationLoss"
                )
            dtype = torch.promote_types(torch.promote_types(ours.dtype, theirs.dtype), torch.float32)
            if any(term.modality in ("both", name) for _, term in sharing):
                each[name] = (ours.to(dtype) - theirs.detach().to(dtype)).square().sum(1) / 2, ranks.total
        chosen = [[value for name, value in each.items() if term.modality in ("both", name)] for _, term in sharing]
        values = [weight * shared.reduce(some) for (weight, _), some in zip(sharing, chosen, strict=True)]
        if isinstance(student[2], Tensor):  # it counts for nothing, but DistributedDataParallel waits for its gradient
            values = [value + (0 * student[2].sum()).to(value) for value in values]
        return values


def orthogonality_loss(weight: Tensor | nn.Linear, *, squared: bool = True) -> Tensor:
    r"""Distance of a projection's columns from an orthonormal system (OC).

    .. math:: \lVert W^\top W - I \rVert_F^2

    Args:
        weight: shape ``[in, out]``, floating: a projection applied as ``x @ W``, as open_clip's ``visual.proj`` is; or
            an ``nn.Linear``, whose weight is stored as ``[out, in]`` and is transposed here. A ``DTensor`` (FSDP2) is
            gathered, which every rank must do.
        squared: False gives the norm itself, whose gradient at an orthonormal ``W`` is zero.

    Returns:
        A scalar ≥ 0; float32, or float64 for a float64 weight. Zero needs orthonormal columns, hence in ≥ out.

    Raises:
        TypeError: ``weight`` is neither a floating-point tensor nor an ``nn.Linear``.
        ValueError: ``weight`` is not 2-D.

    Example:
        >>> import torch
        >>> from calrobust.functional import orthogonality_loss
        >>> orthogonality_loss(2 * torch.eye(3))  # three diagonal entries of 4 - 1
        tensor(27.)

    Reference: Oh et al., 2024, :arxiv:`2311.01723`, the orthogonality constraint of its contrastive loss.
    """
    matrix = weight.weight.T if isinstance(weight, nn.Linear) else weight
    if hasattr(matrix, "full_tensor"):  # sharded by FSDP2 or tensor parallelism
        matrix = matrix.full_tensor()
    check_floating(weight=matrix)
    check_flag(squared=squared)
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise ValueError(
            f"weight must have shape [in, out], got {list(matrix.shape)}; pass the projection, e.g. model.visual.proj"
        )
    with torch.autocast(matrix.device.type, enabled=False):
        matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        difference = matrix.T @ matrix - torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
        return difference.square().sum() if squared else torch.linalg.vector_norm(difference)
