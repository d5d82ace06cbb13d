"""Lightning: the teacher beside its ``Trainer``."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import nn

from calrobust import EMATeacher
from calrobust._checks import check_instance, check_module

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("calrobust.integrations.lightning needs lightning: pip install 'calrobust[lightning]'") from error

__all__ = ["EMATeacherCallback"]


class EMATeacherCallback(Callback):
    """Lets a teacher follow the student that a ``Trainer`` trains, and keeps it in the trainer's checkpoints.

    :meth:`EMATeacher.update <calrobust.EMATeacher.update>` is called after each batch in which an optimiser stepped,
    not after those that accumulate towards a step. The teacher is saved and restored with the callbacks' states, so
    the module's own ``state_dict`` is free of it; if the module holds the teacher, as in ``self.teacher = teacher``,
    the module saves it and the callback does not.

    Args:
        teacher: the teacher, which the callback moves to the module's device.
        student: what it follows: the ``LightningModule``, or the part of it that the teacher copied.
        evaluate_teacher: whether validation and test run with the averaged weights in the student. Checkpoints hold the
            student's own in any case, and the teacher beside them.

    Raises:
        TypeError: ``teacher`` is no :class:`~calrobust.EMATeacher`, or ``student`` no module.

    Example:
        >>> import warnings
        >>> import torch
        >>> from lightning.pytorch import LightningModule, Trainer
        >>> from calrobust import EMATeacher
        >>> from calrobust.integrations.lightning import EMATeacherCallback
        >>> class Mean(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.guess = torch.nn.Parameter(torch.zeros(()))
        ...     def training_step(self, value):
        ...         return ((self.guess - value) ** 2).mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> student, batches = Mean(), torch.ones(12, 2)
        >>> teacher = EMATeacher(student)
        >>> trainer = Trainer(
        ...     max_epochs=1, accumulate_grad_batches=4, accelerator="cpu", logger=False, enable_checkpointing=False,
        ...     enable_progress_bar=False, enable_model_summary=False,
        ...     callbacks=[EMATeacherCallback(teacher, student)])
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")  # its advice on the number of workers
        ...     trainer.fit(student, torch.utils.data.DataLoader(batches))
        >>> teacher.step  # 12 batches, 4 to a step
        3
    """

    def __init__(self, teacher: EMATeacher, student: nn.Module, *, evaluate_teacher: bool = False) -> None:
        check_instance(EMATeacher, "make it with EMATeacher(student)", teacher=teacher)
        check_module(student=student)
        self.teacher = teacher
        self.student = student
        self.evaluate_teacher = evaluate_teacher
        self._saved_by_module = False
        self._optimizer_steps = 0
        self._swap = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Sees whether the module saves the teacher."""
        self._saved_by_module = any(module is self.teacher for module in pl_module.modules())

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves the teacher to the module's device."""
        self.teacher.to(pl_module.device)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts to count from where training resumes."""
        self._optimizer_steps = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the teacher towards the student if an optimiser stepped."""
        if trainer.global_step > self._optimizer_steps:
            self._optimizer_steps = trainer.global_step
            self.teacher.update(self.student)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lends the averaged weights to the student."""
        if self.evaluate_teacher:
            self._swap.enter_context(self.teacher.swapped_into(self.student))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the student its own back; checkpoints, which Lightning writes after this, hold those."""
        self._swap.close()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As for validation."""
        self.on_validation_start(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As for validation."""
        self._swap.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As after validation."""
        self._swap.close()

    def state_dict(self) -> dict[str, Any]:
        """The teacher, unless the module saves it."""
        return {} if self._saved_by_module else {"teacher": self.teacher.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The teacher, as it was saved."""
        self.teacher.load_state_dict(state_dict["teacher"])
