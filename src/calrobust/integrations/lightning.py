"""Lightning: the teacher beside its ``Trainer``."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import nn

from calrobust import EMATeacher
from calrobust._checks import check_instance, check_module
from calrobust.integrations._shards import load_whole_state, whole_state

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(f"{__name__} needs lightning: pip install 'lightning>=2.6'") from error

__all__ = ["EMATeacherCallback"]


class EMATeacherCallback(Callback):
    """Lets a teacher follow the student that a ``Trainer`` trains, and keeps it in the trainer's checkpoints.

    :meth:`EMATeacher.update <calrobust.EMATeacher.update>` is called after each batch in which an optimiser stepped,
    not after those that accumulate towards a step. The teacher gets the device and the precision that the trainer
    gives the student. It is saved and restored with the callbacks' states, whole where it is sharded, so the module's
    own ``state_dict`` is free of it. If the module holds the teacher, as in ``self.teacher = teacher``, the module
    saves it and the callback does not.

    Args:
        teacher: the teacher.
        student: what it follows: the ``LightningModule``, or the part of it that the teacher copied.
        evaluate_teacher: whether validation, test and prediction run with the averaged weights in the student.
            Checkpoints hold the student's own in any case, and the teacher beside them.
        name: tells the callbacks of one trainer apart in its checkpoints, where there are several.

    Raises:
        TypeError: ``teacher`` is not an :class:`~calrobust.EMATeacher`, or ``student`` not a module.
        ValueError: two callbacks would lend averaged weights to one student, or the trainer's ``ckpt_path`` holds no
            teacher.

    Example:
        >>> import warnings
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from calrobust import EMATeacher
        >>> from calrobust.integrations.lightning import EMATeacherCallback
        >>> student = BoringModel()
        >>> teacher = EMATeacher(student)
        >>> options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
        >>> callback = EMATeacherCallback(teacher, student)
        >>> trainer = Trainer(fast_dev_run=6, accumulate_grad_batches=2, callbacks=[callback], **options)
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")  # its advice on the number of workers
        ...     trainer.fit(student)
        >>> teacher.step  # 6 batches, 2 to a step
        3
    """

    def __init__(
        self, teacher: EMATeacher, student: nn.Module, *, evaluate_teacher: bool = False, name: str = ""
    ) -> None:
        check_instance(EMATeacher, "make it with EMATeacher(student)", teacher=teacher)
        check_module(student=student)
        self.teacher = teacher
        self.student = student
        self.evaluate_teacher = evaluate_teacher
        self.name = name
        self._saved_by_module = self._restored = False
        self._optimizer_steps = 0
        self._swap = ExitStack()

    @property
    def state_key(self) -> str:
        """The place of the teacher in checkpoints, one for each ``name``."""
        return self._generate_state_key(name=self.name) if self.name else super().state_key

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the teacher the trainer's precision, before a checkpoint is restored, and sees who saves it."""
        self._saved_by_module = any(module is self.teacher for module in pl_module.modules())
        self._restored = self._saved_by_module
        trainer.precision_plugin.convert_module(self.teacher)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        lenders = [c for c in callbacks if isinstance(c, EMATeacherCallback) and c.evaluate_teacher]
        lent = [parameter for lender in lenders for parameter in set(lender.student.parameters())]
        if len(lent) > len(set(lent)):
            raise ValueError(
                "evaluate_teacher must be True in one callback of a student, got two; "
                "pass evaluate_teacher=False to one of them"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves the teacher to the module's device."""
        self.teacher.to(pl_module.device)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts to count from where training resumes."""
        self._check_restored(trainer)
        self._optimizer_steps = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Moves the teacher towards the student if an optimiser stepped."""
        if trainer.global_step > self._optimizer_steps:
            self._optimizer_steps = trainer.global_step
            self.teacher.update(self.student)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lends the averaged weights to the student."""
        if self.evaluate_teacher:
            self._check_restored(trainer)
            self._swap.enter_context(self.teacher.swapped_into(self.student))

    def on_validation_end(self, *_: Any, **__: Any) -> None:
        """Gives the student its own back; checkpoints, which Lightning writes after this, hold those."""
        self._swap.close()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_exception = on_validation_end

    def state_dict(self) -> dict[str, Any]:
        """The teacher, unless the module saves it."""
        return {} if self._saved_by_module else {"teacher": whole_state(self.teacher)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The teacher, as it was saved."""
        load_whole_state(self.teacher, state_dict["teacher"])
        self._restored = True

    def _check_restored(self, trainer: Trainer) -> None:
        if trainer.ckpt_path is not None and not self._restored:
            raise ValueError(
                f"ckpt_path must be a checkpoint with a teacher in it, got {trainer.ckpt_path}, which has none under "
                f"{self.state_key!r}; pass one that was saved with this callback, or load the student's weights before "
                "EMATeacher(student) and leave ckpt_path out"
            )
