"""An EMA teacher."""

from contextlib import ExitStack
from typing import Any

from torch import nn

from calrobust.teacher import EMATeacher, Following, load_whole_state, share_first_rank, whole_state

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(f"{__name__} needs lightning: pip install 'lightning>=2.6'") from error

__all__ = ["EMATeacherCallback"]


class EMATeacherCallback(Following, Callback):
    """Lets a teacher follow the student of a ``Trainer``, and keeps it in checkpoints.

    The teacher gets the trainer's device and precision, and is updated after each batch with an optimiser's step,
    unless a ``GradScaler`` skips it. A module that holds the teacher saves it. See also :doc:`/guides/lightning`.

    Args:
        teacher: the :class:`~calrobust.EMATeacher`.
        student: the ``LightningModule`` or its copied part.
        evaluate_teacher: whether validation, test and prediction run with the averaged weights.
        name: tells several callbacks apart in checkpoints.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: in a run, if ``student`` is another model's, two callbacks evaluate it, or a checkpoint holds no
            teacher.

    Example:
        >>> from types import SimpleNamespace
        >>> import torch
        >>> from calrobust import EMATeacher
        >>> from calrobust.integrations.lightning import EMATeacherCallback
        >>> teacher = EMATeacher(student := torch.nn.Linear(1, 1))
        >>> callback = EMATeacherCallback(teacher, student)  # for Trainer(..., callbacks=[callback])
        >>> callback.on_train_batch_end(SimpleNamespace(global_step=1))  # which the trainer calls
        >>> teacher.step
        1
    """

    def __init__(
        self, teacher: EMATeacher, student: nn.Module, *, evaluate_teacher: bool = False, name: str = ""
    ) -> None:
        super().__init__(teacher, student)
        self.evaluate_teacher = evaluate_teacher
        self.name = name
        self._saved_by_module = self._restored = False
        self._optimizer_steps = 0
        self._swap = ExitStack()

    @property
    def state_key(self) -> str:
        """Where checkpoints hold the teacher."""
        return self._generate_state_key(name=self.name) if self.name else super().state_key

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Casts the teacher."""
        self._saved_by_module = self._restored = self.teacher in pl_module.modules()
        trainer.precision_plugin.convert_module(self.teacher)
        lent = [
            parameter
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, EMATeacherCallback) and callback.evaluate_teacher
            for parameter in callback.student.parameters()
        ]
        if len(lent) > len(set(lent)):
            raise ValueError(
                "evaluate_teacher must be True in one callback of a student, got two; "
                "pass evaluate_teacher=False to one of them"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves the teacher."""
        self.teacher.to(pl_module.device)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives every rank one teacher."""
        self._check(trainer, pl_module)
        share_first_rank(self.teacher)
        self._optimizer_steps = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Updates the teacher."""
        if trainer.global_step > self._optimizer_steps:
            self._optimizer_steps = trainer.global_step
            self._update()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lends the averaged weights."""
        if self.evaluate_teacher:
            self._check(trainer, pl_module)
            self._swap.enter_context(self.teacher.swapped_into(self.student))

    def on_validation_end(self, *_: Any, **__: Any) -> None:
        """Takes them back."""
        self._swap.close()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_exception = on_validation_end

    def state_dict(self) -> dict[str, Any]:
        """The teacher."""
        return {} if self._saved_by_module else {"teacher": whole_state(self.teacher)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the teacher."""
        load_whole_state(self.teacher, state_dict["teacher"])
        self._restored = True

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(pl_module, trainer.precision_plugin)
        if trainer.ckpt_path is not None and not self._restored:
            raise ValueError(
                f"ckpt_path must be a checkpoint with a teacher, got {trainer.ckpt_path}, which has none under "
                f"{self.state_key!r}; pass one saved with this callback, or load the student's weights before "
                "EMATeacher(student) and leave ckpt_path out"
            )
