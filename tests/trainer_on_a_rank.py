"""Transformers' ``Trainer`` with a teacher on one of two CPUs, under DDP; run by tests/integrations."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from leaving import leave_together
from torch.testing import assert_close
from transformers import CLIPConfig, CLIPModel, Trainer, TrainingArguments

from calrobust import CaRotLoss, EMATeacher
from calrobust.integrations.transformers import EMATeacherCallback, clip_features

folder = Path(sys.argv[1])
TOWER = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
CONFIG = CLIPConfig(
    text_config={**TOWER, "vocab_size": 9, "bos_token_id": 1, "eos_token_id": 8},
    vision_config={**TOWER, "image_size": 4, "patch_size": 2},
    projection_dim=4,
)
torch.manual_seed(0)
DATA = [{"input_ids": torch.tensor([1, 2 + i % 6, 8]), "pixel_values": torch.rand(3, 4, 4)} for i in range(24)]


class CaRotTrainer(Trainer):
    """As ``examples/transformers_trainer.py`` writes it, with pairs of all ranks."""

    teacher: EMATeacher

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The criterion on what student and teacher return."""
        criterion = CaRotLoss(label_smoothing=0.1, distillation_weight=1.0, gather=True)
        return criterion(*clip_features(model(**inputs), model), *clip_features(self.teacher(**inputs), self.teacher))


def train(name: str, epochs: int, **options: Any) -> tuple[CLIPModel, EMATeacher]:
    """Two steps an epoch, each of two batches a rank; goes on from a checkpoint if there is one."""
    torch.manual_seed(0)
    model = CLIPModel(CONFIG)
    arguments = TrainingArguments(
        str(folder / name),
        num_train_epochs=epochs,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        save_strategy="epoch",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **options,
    )
    trainer = CaRotTrainer(model, arguments, train_dataset=DATA)
    trainer.teacher = teacher = EMATeacher(model, 0.5)
    trainer.add_callback(EMATeacherCallback(teacher, model))
    dist.barrier()
    trainer.train(resume_from_checkpoint=any((folder / name).glob("checkpoint-*")))
    dist.barrier()
    return model, teacher


whole, averaged = train("whole", 2)
assert averaged.step == 4
for value in (
    *whole.state_dict().values(),
    *averaged.state_dict().values(),
):  # one on both ranks
    values = [torch.empty_like(value.contiguous()) for _ in range(2)]
    dist.all_gather(values, value.contiguous())
    assert torch.equal(*values)
assert not torch.equal(averaged.module.get_parameter("visual_projection.weight"), whole.visual_projection.weight)
train("parts", 1)
_, resumed = train("parts", 2)
assert_close(dict(resumed.state_dict()), dict(averaged.state_dict()), rtol=0, atol=0)
leave_together()
