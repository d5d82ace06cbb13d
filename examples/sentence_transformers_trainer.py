"""sentence-transformers' trainer with our loss and teacher: ``python examples/sentence_transformers_trainer.py``.

A tiny CLIP with random weights, made-up pictures and texts; CPU, seconds; ``pip install sentence-transformers[train]``
in a clone. Its losses take the model and the inputs of each column, so ours needs a class of its own. The teacher
follows by the callback for Transformers, whose ``Trainer`` this one is.
"""

import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

import calrobust as cr
from calrobust.integrations.transformers import EMATeacherCallback

COLORS = ("black", "red", "green", "blue", "yellow", "white")
WORDS = ("<pad>", "<end>", "a", "square", *COLORS)
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


class PairLoss(nn.Module):
    """A criterion on pairs as a loss of sentence-transformers, with a teacher of the model or without."""

    def __init__(
        self,
        model: SentenceTransformer,
        criterion: cr.losses.PairLoss,
        teacher: cr.EMATeacher | None = None,
        scale: float = 20.0,
    ) -> None:
        """The trainer replaces ``self.model`` by what DDP or ``torch.compile`` makes of it."""
        super().__init__()
        self.model, self.criterion, self.teacher, self.scale = model, criterion, teacher, scale

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> dict[str, Tensor]:
        """The terms, which the trainer logs by name and adds up."""
        columns = list(sentence_features)
        values: list[Any] = []
        for model in (self.model, self.teacher):
            if model is not None:
                values += [normalize(model(dict(column))["sentence_embedding"], dim=1) for column in columns]
                values.append(self.scale)
        return self.criterion.terms(*values)


def make_model(folder: Path) -> SentenceTransformer:
    """A tiny CLIP, saved to a folder and loaded from it, as one from the hub."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    text = {**TOWER, "vocab_size": len(WORDS), "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**TOWER, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config={**text, "pad_token_id": 0}, vision_config=vision, projection_dim=16)
    size = {"height": 16, "width": 16}
    marks = {"pad_token": "<pad>", "eos_token": "<end>", "model_max_length": 8}
    fast: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks)  # type: ignore[no-untyped-call]
    processor: Any = CLIPProcessor(CLIPImageProcessor(size=size, crop_size=size), fast)  # type: ignore[no-untyped-call]
    processor.save_pretrained(folder)
    CLIPModel(config).save_pretrained(folder)
    return SentenceTransformer(modules=[Transformer(str(folder))], device="cpu")


def make_data(pairs: int) -> Dataset:
    """Squares and their captions."""
    names = [COLORS[index % len(COLORS)] for index in range(pairs)]
    images = [Image.new("RGB", (16, 16), name) for name in names]
    return Dataset.from_dict({"image": images, "caption": [f"a {name} square" for name in names]})


def main(folder: Path) -> None:
    """Five epochs, and then which caption the averaged weights find for each picture."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as made:
        model = make_model(Path(made))
    teacher = cr.EMATeacher(model, decay=0.9)
    criterion = cr.MultimodalContrastiveLoss(label_smoothing=0.05) + 1.5 * cr.MultimodalDistillationLoss()
    trainer = SentenceTransformerTrainer(
        model,
        SentenceTransformerTrainingArguments(
            str(folder),
            num_train_epochs=5,
            per_device_train_batch_size=len(COLORS),
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            logging_steps=40,
            save_strategy="epoch",
            save_total_limit=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=make_data(16 * len(COLORS)),
        loss=PairLoss(model, criterion, teacher),
        callbacks=[EMATeacherCallback(teacher, model)],
    )
    trainer.train()

    data = make_data(len(COLORS))
    with teacher.swapped_into(model):
        found = model.similarity(model.encode(data["image"]), model.encode(data["caption"])).argmax(1)
    right = (found == torch.arange(len(COLORS))).sum().item()
    print(f"after {teacher.step} steps the averaged weights name {right} of {len(COLORS)} squares")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "sentence_transformers_run"))
