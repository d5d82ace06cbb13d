"""Adapters of low rank (LoRA) on both towers of a CLIP, and what a teacher of them costs: ``python examples/lora.py``.

A small CLIP with random weights, made-up pictures and texts; CPU, seconds; ``pip install peft '.[transformers]'`` in a
clone. Of the model a few per cent train. With ``share_frozen=True`` the teacher holds a copy of these alone, and
uses the student's own tensors for the rest.
"""

import io
import warnings
from time import perf_counter

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

import calrobust as cr
from calrobust.integrations.transformers import clip_features

TOWER = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIG = CLIPConfig(
    text_config={**TOWER, "vocab_size": 100, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 99},
    vision_config={**TOWER, "image_size": 32, "patch_size": 8},
    projection_dim=128,
)
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft 0.21 reads an old name


def make_batch(pairs: int) -> dict[str, Tensor]:
    """Pictures of ten brightnesses, and texts that name them."""
    words = torch.randperm(10).repeat(pairs // 10)
    images = words.view(-1, 1, 1, 1) / 10 + 0.1 * torch.randn(pairs, 3, 32, 32)
    return {"input_ids": torch.stack([torch.tensor([1, word, 99]) for word in words]), "pixel_values": images}


def own_tensors(teacher: cr.EMATeacher, student: nn.Module) -> list[Tensor]:
    """The parameters of the copy that it does not share with the student."""
    shared = {id(parameter) for parameter in student.parameters()}
    return [parameter for parameter in teacher.module.parameters() if id(parameter) not in shared]


def cost(student: nn.Module, *, share_frozen: bool) -> str:
    """What a teacher costs: memory, time of an update, and size of a file."""
    teacher = cr.EMATeacher(student, 0.99, share_frozen=share_frozen)
    memory = sum(one.nbytes for one in own_tensors(teacher, student)) / 2**20
    times = []
    for _ in range(20):
        start = perf_counter()
        teacher.update(student)
        times.append(perf_counter() - start)
    torch.save(teacher.state_dict(), file := io.BytesIO())
    return (
        f"{memory:5.1f} MiB of memory, {1e3 * min(times):4.1f} ms an update, {file.tell() / 2**20:5.1f} MiB in a file"
    )


def main() -> None:
    """Forty steps, and then the costs."""
    torch.manual_seed(0)
    model = get_peft_model(
        CLIPModel(CONFIG),
        LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]),
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    share = sum(p.numel() for p in trained) / sum(p.numel() for p in model.parameters())
    teacher = cr.EMATeacher(model, decay=0.9, share_frozen=True)
    criterion = cr.CaRotLoss(label_smoothing=0.05, distillation_weight=1.5)
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    for step in range(40):
        batch = make_batch(20)
        labels = batch["input_ids"][:, 1]  # a brightness is in the batch twice
        student, taught = clip_features(model(**batch), model), clip_features(teacher(**batch), teacher)
        loss = criterion(*student, *taught, labels=labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        teacher.update(model)
        if step % 39 == 0:
            print(f"step {step:2}  loss {loss.item():.3f}")
    print(f"{share:.1%} of the weights train. A teacher costs")
    print(f"  as it is:                {cost(model, share_frozen=False)}")
    print(f"  with share_frozen=True:  {cost(model, share_frozen=True)}")


if __name__ == "__main__":
    main()
