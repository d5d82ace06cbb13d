"""Losses for the trainer of open_clip."""

import sys
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from calrobust._checks import check_instance, check_number, warn
from calrobust.functional.pairs import Outputs
from calrobust.losses import PairLoss, check_forward

__all__ = ["OpenClipLoss"]


class OpenClipLoss(nn.Module):
    """A loss on pairs, called as open_clip's ``ClipLoss``, ``DistillClipLoss`` and ``CoCaLoss``.

    Terms include the criterion's weights. See also :doc:`/guides/open_clip`.

    Args:
        criterion: a loss on pairs, or a sum, with ``reduction="mean"`` or ``"sum"``.
        caption_weight: of the caption loss, which CoCa models need.

    Raises:
        TypeError: an argument has the wrong type, or ``criterion`` overrides ``forward``.

    Example:
        >>> import torch
        >>> from calrobust import MultimodalContrastiveLoss
        >>> from calrobust.integrations.open_clip import OpenClipLoss
        >>> loss = OpenClipLoss(MultimodalContrastiveLoss())
        >>> loss(torch.eye(2), torch.eye(2), 1.0, output_dict=True)  # log(1 + 1/e)
        {'contrastive_loss': tensor(0.3133)}
    """

    def __init__(self, criterion: PairLoss, *, caption_weight: float | None = None) -> None:
        super().__init__()
        fix = "pass a loss on pairs, such as MultimodalContrastiveLoss() or a sum of them"
        check_instance(PairLoss, fix, criterion=criterion)
        check_forward(criterion)
        if caption_weight is not None:
            check_number(caption_weight=caption_weight)
        self.criterion = criterion
        self.caption_weight = caption_weight
        create_task = getattr(sys.modules.get("open_clip_train.main"), "create_task", None)
        if getattr(create_task, "__module__", "") == "open_clip.factory":
            fix = "assign the loss to the task: task.loss = loss, as examples/open_clip_trainer.py does"
            warn(f"the trainer of open_clip 4 never calls create_loss; {fix}")

    def forward(self, *outputs: Any, output_dict: bool = False, **named: Any) -> Tensor | dict[str, Tensor]:
        """A scalar, or its terms ``contrastive_loss``, ``distillation_loss`` and ``caption_loss``.

        Args:
            *outputs: the student's and the teacher's: image and text features, logit scale, maybe logit bias.
            output_dict: whether to return the terms.
            **named: the same by name, the teacher's as ``dist_image_features``, and ``logits`` and ``labels`` of
                captions. Other names are ignored.

        Raises:
            TypeError: a teacher or caption weight is missing, or there is a teacher but no term for it.
        """
        alone = not self.criterion.options()["gather"]
        if alone and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            warn(
                "the criterion contrasts the pairs of each rank alone, open_clip those of all ranks; "
                "pass gather=True to its losses"
            )
        found = {
            name.replace("dist_", "teacher_"): value
            for name, value in named.items()
            if name.removeprefix("dist_") in Outputs._fields
        }
        try:
            terms = self.criterion.terms(*outputs, **found)
        except TypeError as error:
            if "teacher" not in str(error):
                raise
            raise TypeError(
                f"{error}; open_clip's trainer passes a teacher's outputs with --distill-model and "
                "--distill-pretrained, and never with --accum-freq above 1"
            ) from None
        if (logits := named.get("logits")) is not None:
            labels, fix = named.get("labels"), "pass OpenClipLoss(criterion, caption_weight="
            if self.caption_weight is None:
                rule = "caption_weight must be given for a model that returns logits of captions, as CoCa does"
                raise TypeError(f"{rule}; {fix}2.0), or 0.0 to leave captions untrained")
            if labels is not None:
                caption = nn.functional.cross_entropy(logits.movedim(-1, 1), labels, ignore_index=0)
                terms = {**terms, "caption": self.caption_weight * caption}
            elif self.caption_weight:
                raise TypeError(f"labels must be given with logits of captions; {fix}0.0) for a task that has none")
        if output_dict:
            return {f"{name}_loss": term for name, term in terms.items()}
        first, *others = terms.values()
        return sum(others, first)
