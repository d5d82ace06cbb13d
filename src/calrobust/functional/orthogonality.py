"""The orthogonality constraint (OC) on a projection."""

import torch
from torch import Tensor, nn

from calrobust._checks import check_flag, check_floating


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
