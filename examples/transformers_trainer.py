"""Transformers' ``Trainer`` with calrobust's loss and teacher: ``python examples/transformers_trainer.py``.

A tiny CLIP with random weights, made-up pictures and texts; CPU, seconds; ``pip install '.[transformers]'`` in a clone.
Three pieces: ``compute_loss`` calls the criterion, a callback moves and saves the teacher, and ``evaluation_loop``
evaluates the averaged weights.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, Trainer, TrainingArguments

import calrobust as cr
from calrobust.integrations.transformers import EMATeacherCallback, clip_features

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIG = CLIPConfig(
    text_config={**TOWER, "vocab_size": 100, "max_position_embeddings": 8, "eos_token_id": 99},
    vision_config={**TOWER, "image_size": 16, "patch_size": 8},
    projection_dim=16,
)


def make_data(pairs: int, seed: int) -> list[dict[str, Tensor]]:
    """Pictures of ten brightnesses, and texts that name them."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(10, (pairs,), generator=generator)
    images = words.view(-1, 1, 1, 1) / 10 + 0.1 * torch.randn(pairs, 3, 16, 16, generator=generator)
    return [
        {"input_ids": torch.tensor([1, word, 99]), "pixel_values": x} for word, x in zip(words, images, strict=True)
    ]


class CaRotTrainer(Trainer):
    """A ``Trainer`` of CLIP models with a criterion on pairs and a teacher."""

    def __init__(
        self, model: nn.Module, *args: Any, criterion: cr.losses.PairLoss, teacher: cr.EMATeacher, **kwargs: Any
    ) -> None:
        """The callback takes care of the teacher."""
        super().__init__(model, *args, **kwargs)
        self.student, self.criterion, self.teacher = model, criterion, teacher
        self.can_return_loss = True  # also in evaluation, where there are no labels to tell it from
        self.add_callback(EMATeacherCallback(teacher, model))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The criterion on what student and teacher return."""
        output = model(**inputs)
        with self.accelerator.autocast():  # bf16=True, which the trainer applies to the student alone
            distilled = self.teacher(**inputs)
        loss = self.criterion(*clip_features(output, model), *clip_features(distilled, self.teacher))
        return (loss, output) if return_outputs else loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates the averaged weights."""
        with self.teacher.swapped_into(self.student):
            return super().evaluation_loop(*args, **kwargs)


def main(folder: Path) -> None:
    """Trains for three epochs, two batches to a step."""
    torch.manual_seed(0)
    model = CLIPModel(CONFIG)
    trainer = CaRotTrainer(
        model,
        TrainingArguments(
            str(folder),
            num_train_epochs=3,
            per_device_train_batch_size=16,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            eval_strategy="epoch",
            save_strategy="epoch",
            logging_strategy="epoch",
            report_to="none",
            disable_tqdm=True,
            prediction_loss_only=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=make_data(128, seed=0),
        eval_dataset=make_data(32, seed=1),
        criterion=cr.MultimodalContrastiveLoss(label_smoothing=0.05) + 1.5 * cr.MultimodalDistillationLoss(),
        teacher=cr.EMATeacher(model, decay=0.9),
    )
    trainer.train()
    print(f"the teacher followed {trainer.teacher.step} steps of the optimiser")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "transformers_run"))
