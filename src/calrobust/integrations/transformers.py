"""Hugging Face Transformers: the teacher beside its ``Trainer``, and what our losses take out of its CLIP models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calrobust import EMATeacher
from calrobust._checks import check_attributes, check_instance, check_module

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        "calrobust.integrations.transformers needs transformers: pip install 'calrobust[transformers]'"
    ) from error

__all__ = ["EMATeacherCallback", "clip_features"]


class EMATeacherCallback(TrainerCallback):
    """Lets a teacher follow the student that a ``Trainer`` trains, and keeps it in the trainer's checkpoints.

    :meth:`EMATeacher.update <calrobust.EMATeacher.update>` is called after each step of the optimiser, not after the
    batches that accumulate towards it. Each ``checkpoint-<step>`` gets a file ``teacher.pt``, and a trainer that
    resumes finds it in its ``output_dir``.

    A ``Trainer`` tells callbacks when it has evaluated, not when it will, so the averaged weights are evaluated by an
    override of ``evaluation_loop`` around ``with teacher.swapped_into(self.model)``, as in
    ``examples/transformers_trainer.py``.

    Args:
        teacher: the teacher, which the callback moves to the trainer's device.
        student: what it follows: the trainer's model, or the part of it that the teacher copied.

    Raises:
        TypeError: ``teacher`` is no :class:`~calrobust.EMATeacher`, or ``student`` no module.
        FileNotFoundError: training resumes, and ``output_dir`` holds no teacher for that step.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from transformers import PrinterCallback, Trainer, TrainingArguments
        >>> from calrobust import EMATeacher
        >>> from calrobust.integrations.transformers import EMATeacherCallback
        >>> class Mean(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.guess = torch.nn.Parameter(torch.zeros(()))
        ...     def forward(self, value):
        ...         return {"loss": ((self.guess - value) ** 2).mean()}
        >>> student, data = Mean(), [{"value": 1.0}] * 24
        >>> teacher = EMATeacher(student)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     arguments = TrainingArguments(
        ...         folder, num_train_epochs=1, per_device_train_batch_size=2, gradient_accumulation_steps=4,
        ...         use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False)
        ...     callback = EMATeacherCallback(teacher, student)
        ...     trainer = Trainer(student, arguments, train_dataset=data, callbacks=[callback])
        ...     trainer.remove_callback(PrinterCallback)
        ...     _ = trainer.train()
        >>> teacher.step  # 24 samples, 8 to a step
        3
    """

    def __init__(self, teacher: EMATeacher, student: nn.Module) -> None:
        check_instance(EMATeacher, "make it with EMATeacher(student)", teacher=teacher)
        check_module(student=student)
        self.teacher = teacher
        self.student = student

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Moves the teacher to the device, and loads it if training resumes."""
        self.teacher.to(args.device)
        if state.global_step > 0:
            path = _file(args, state)
            if not path.exists():
                raise FileNotFoundError(
                    f"training resumes at step {state.global_step}, and {path} has no teacher for it; "
                    "copy the checkpoint that is resumed into output_dir, with the teacher.pt in it"
                )
            self.teacher.load_state_dict(torch.load(path, map_location=args.device, weights_only=True))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Moves the teacher towards the student."""
        self.teacher.update(self.student)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Puts the teacher into the checkpoint just written."""
        if state.is_world_process_zero:
            torch.save(self.teacher.state_dict(), _file(args, state))


def _file(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / "teacher.pt"


def clip_features(output: Any, model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    r"""The arguments of a loss on pairs, from what a ``CLIPModel`` or a ``SiglipModel`` returns.

    The models normalise their features but keep the scale to themselves, as a logarithm:

    .. math:: \text{logit\_scale} = e^{\text{model.logit\_scale}}

    SigLIP's logit bias is left out: it shifts all logits alike, and so changes no softmax.

    Args:
        output: with ``image_embeds`` and ``text_embeds``, each ``[N, D]`` and of unit norm.
        model: that gave the output; also inside ``DistributedDataParallel`` or an :class:`~calrobust.EMATeacher`.

    Returns:
        ``image_features``, ``text_features`` and the exponentiated ``logit_scale``, a scalar.

    Raises:
        TypeError: the output lacks features of images or texts, or the model a ``logit_scale``.

    Example:
        >>> import torch
        >>> from transformers import CLIPConfig, CLIPModel
        >>> from calrobust.integrations.transformers import clip_features
        >>> tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> config = CLIPConfig(
        ...     text_config={**tiny, "vocab_size": 9, "eos_token_id": 8},
        ...     vision_config={**tiny, "image_size": 4, "patch_size": 2},
        ...     projection_dim=4, logit_scale_init_value=0.0)
        >>> model = CLIPModel(config)
        >>> output = model(input_ids=torch.tensor([[1, 8]] * 3), pixel_values=torch.rand(3, 3, 4, 4))
        >>> image_features, text_features, logit_scale = clip_features(output, model)
        >>> image_features.shape, logit_scale.item()
        (torch.Size([3, 4]), 1.0)
    """
    fix = "call the model with input_ids, pixel_values and return_dict=True"
    check_attributes(("image_embeds", "text_embeds"), fix, output=output)
    inner: Any = getattr(model, "module", model)
    check_attributes(("logit_scale",), "pass the CLIPModel or SiglipModel that gave the output", model=inner)
    return output.image_embeds, output.text_embeds, inner.logit_scale.exp().reshape(())
