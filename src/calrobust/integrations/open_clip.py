"""open_clip: our losses under the calling conventions of its trainer."""

from __future__ import annotations

from torch import Tensor, nn

from calrobust._checks import check_instance
from calrobust.losses import PairLoss

__all__ = ["OpenClipLoss"]


class OpenClipLoss(nn.Module):
    """A loss on pairs that is called as open_clip calls its ``ClipLoss`` and ``DistillClipLoss``.

    Put it where ``open_clip_train`` makes its own, ``open_clip_train.main.create_loss = lambda args:
    OpenClipLoss(criterion)``, and train with ``--distill-model`` and ``--distill-pretrained`` if the criterion
    distils from a fixed model; ``examples/open_clip_trainer.py`` shows the trainer with an
    :class:`~calrobust.EMATeacher`. The trainer passes no teacher when ``--accum-freq`` is above 1, and a criterion
    that needs one then says so.

    What differs from open_clip's: the terms are the criterion's own, weights included, and without ``output_dict``
    their sum comes back, never a tuple. open_clip's distillation averages its two directions where ours sums them.

    Args:
        criterion: a loss on pairs, or a sum of them, with ``reduction="mean"`` or ``"sum"``.

    Raises:
        TypeError: ``criterion`` is no loss on pairs.

    Example:
        >>> import torch
        >>> from calrobust import MultimodalContrastiveLoss, MultimodalDistillationLoss
        >>> from calrobust.integrations.open_clip import OpenClipLoss
        >>> loss = OpenClipLoss(MultimodalContrastiveLoss() + 1.5 * MultimodalDistillationLoss())
        >>> features = {"image_features": torch.eye(2), "text_features": torch.eye(2), "logit_scale": 1.0}
        >>> teacher = {f"dist_{name}": value for name, value in features.items()}
        >>> loss(**features, **teacher, output_dict=True)  # log(1 + 1/e), and a teacher that agrees
        {'contrastive_loss': tensor(0.3133), 'distillation_loss': tensor(0.)}
    """

    def __init__(self, criterion: PairLoss) -> None:
        super().__init__()
        fix = "pass a loss on pairs, such as MultimodalContrastiveLoss() or a sum of them"
        check_instance(PairLoss, fix, criterion=criterion)
        self.criterion = criterion

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        dist_image_features: Tensor | None = None,
        dist_text_features: Tensor | None = None,
        dist_logit_scale: Tensor | float | None = None,
        *,
        logit_bias: Tensor | None = None,
        dist_logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or its terms.

        Args:
            image_features: shape ``[N, D]``, unit norm.
            text_features: shape ``[N, D]``, unit norm.
            logit_scale: > 0, already exponentiated.
            dist_image_features: the teacher's, shape ``[N, E]``; with the next two, or none of the three.
            dist_text_features: the teacher's, shape ``[N, E]``.
            dist_logit_scale: the teacher's own.
            logit_bias: of a model that has one. It shifts all logits alike and no softmax: its gradient is 0.
            dist_logit_bias: likewise.
            output_dict: whether to give the terms by name, as the trainer asks, which adds them up and logs each.

        Returns:
            A scalar; with ``output_dict``, the scalars ``contrastive_loss`` and ``distillation_loss``, as far as the
            criterion has them, whose sum it is.

        Raises:
            TypeError: the criterion distils and a ``dist_*`` is missing, or it does not and there is one.
            ValueError: as the criterion's ``forward``.
        """
        teacher = (dist_image_features, dist_text_features, dist_logit_scale)
        given = () if all(value is None for value in teacher) else teacher
        terms = self.criterion.terms(image_features, text_features, logit_scale, *given)
        if logit_bias is not None:  # its zero gradient, without which DistributedDataParallel waits for it
            terms = {name: term + 0 * logit_bias.sum() for name, term in terms.items()}
        if output_dict:
            return {f"{name}_loss": term for name, term in terms.items()}
        first, *others = terms.values()
        return sum(others, first)
