"""Transformers: an EMA teacher and CLIP features."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calrobust.teacher import Following, load_whole_state, share_first_rank, whole_state

try:
    from transformers import TrainerCallback, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(f"{__name__} needs transformers: pip install 'transformers[torch]>=5'") from error

__all__ = ["EMATeacherCallback", "clip_features"]


class EMATeacherCallback(Following, TrainerCallback):
    """Lets a teacher follow the student of a ``Trainer``, and keeps it in checkpoints.

    The teacher gets the trainer's device and is updated after each step of the optimiser, unless a ``GradScaler``
    skips it. It is loaded when training resumes, or with ``load_best_model_at_end``. ``student`` is the trainer's
    model or its copied part. See also :doc:`/guides/transformers`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: in training, if ``student`` is another model's.
        FileNotFoundError: in training, if a checkpoint holds no teacher.

    Example:
        >>> import torch
        >>> from calrobust import EMATeacher
        >>> from calrobust.integrations.transformers import EMATeacherCallback
        >>> teacher = EMATeacher(student := torch.nn.Linear(1, 1))
        >>> callback = EMATeacherCallback(teacher, student)  # for Trainer(..., callbacks=[callback])
        >>> callback.on_step_end()  # which the trainer calls
        >>> teacher.step
        1
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **given: Any) -> None:
        """Gives every rank one teacher."""
        self._start(given.get("model"), given.get("optimizer"))
        self.teacher.to(args.device)
        share_first_rank(self.teacher)
        if state.global_step > 0:
            self._load(_checkpoint(args, state), "copy all files of the resumed checkpoint into output_dir")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Updates the teacher."""
        self._update()

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Adds the teacher to the checkpoint."""
        whole = whole_state(self.teacher)  # on every rank
        if args.should_save:
            torch.save(whole, _checkpoint(args, state) / "teacher.pt")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Loads the teacher of the best checkpoint."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load(Path(state.best_model_checkpoint), "use this callback from the first step on")

    def _load(self, checkpoint: Path, fix: str) -> None:
        path = checkpoint / "teacher.pt"
        if not path.exists():
            raise FileNotFoundError(f"{checkpoint} must hold the teacher as teacher.pt, got no such file; {fix}")
        load_whole_state(self.teacher, torch.load(path, map_location="cpu", weights_only=True))


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def clip_features(output: Any, model: nn.Module) -> tuple[Tensor, ...]:
    """The arguments of a loss on pairs, from a model's output.

    They are image and text features ``[N, D]``, the logit scale, and the logit bias of a model that has one. Features
    have unit norm, except PE-video's. The ``model`` may be in a ``DistributedDataParallel`` or EMA teacher. Outputs and
    models that lack these raise ``TypeError``.

    Example:
        >>> import torch
        >>> from transformers.models.clip.modeling_clip import CLIPOutput
        >>> from calrobust.integrations.transformers import clip_features
        >>> model = torch.nn.ParameterDict({"logit_scale": torch.tensor(0.0)})  # stands in for a CLIPModel
        >>> output = CLIPOutput(image_embeds=torch.eye(1), text_embeds=torch.eye(1))  # model(**inputs)
        >>> [one.item() for one in clip_features(output, model)]  # the scale is exp(0)
        [1.0, 1.0, 1.0]
    """
    inner: Any = getattr(model, "module", model)
    own, image = ("text_video_", "video") if hasattr(inner, "text_video_logit_scale") else ("", "image")
    divisor, scale = getattr(inner, "temperature", None), f"{own}logit_scale"
    features = (f"{image}_embeds", f"{own or 'text_'}embeds")
    call = "call the model with input_ids, pixel_values and return_dict=True"
    give = "pass the CLIPModel or SiglipModel that gave the output"
    wanted = (("output", output, features, call), ("model", inner, (scale,) if divisor is None else (), give))
    for name, value, attributes, fix in wanted:
        if missing := [attribute for attribute in attributes if getattr(value, attribute, None) is None]:
            raise TypeError(f"{name} must have {' and '.join(missing)}, got {type(value).__name__} without; {fix}")
    if divisor is not None:  # ALIGN, TIPSv2
        factor = 1 / divisor
    elif own:
        factor = getattr(inner, scale)
    else:
        limit = getattr(inner, "max_log_logit_scale", None)  # AIMv2
        factor = (inner.logit_scale if limit is None else inner.logit_scale.clamp(0.0, limit)).exp()
    scalars = (factor, getattr(inner, f"{own}logit_bias", None))
    return *(getattr(output, name) for name in features), *(_whole(one) for one in scalars if one is not None)


def _whole(scalar: Any) -> Tensor:
    if hasattr(scalar, "full_tensor"):  # FSDP2 averages gradients over ranks, but not of what is used outside
        from torch.distributed.tensor import Partial

        scalar = scalar.full_tensor(grad_placements=[Partial("avg")] * scalar.device_mesh.ndim)
    return torch.reshape(scalar, ())
