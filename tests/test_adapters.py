"""The ways to train a small part of a CLIP: adapters of low rank, a locked tower, a probe, prompt vectors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.distributed as dist
from leaving import leave_together
from open_clip.transformer import text_global_pool
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from transformers import CLIPConfig, CLIPModel

from calrobust import EMATeacher, MultimodalContrastiveLoss, MultimodalDistillationLoss, zero_shot_classifier
from calrobust.integrations.transformers import clip_features

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # which peft reads

IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))  # as on every rank
TOKENS = torch.tensor([[1, word, 8, 0] for word in (2, 3, 4, 5, 6, 7)])
TARGET = torch.tensor([0, 1, 2, 0, 1, 2])
Features = tuple[Tensor, Tensor, Tensor]


def open_clips() -> Any:
    """A tiny CLIP of open_clip."""
    vision = {"image_size": 8, "patch_size": 4, "layers": 1, "width": 16, "head_width": 8}
    text = {"context_length": 4, "vocab_size": 9, "layers": 1, "width": 16, "heads": 2}
    model = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text)
    nn.init.normal_(model.text_projection)  # which open_clip leaves as memory was
    return model


class Transformers(nn.Module):
    """A CLIP of Transformers with adapters on both towers, called as open_clip's are."""

    def __init__(self) -> None:
        super().__init__()
        tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        text = {**tower, "vocab_size": 9, "eos_token_id": 8, "bos_token_id": 1, "max_position_embeddings": 4}
        vision = {**tower, "image_size": 8, "patch_size": 4}
        clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=4))
        self.clip: Any = get_peft_model(clip, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        scale: Any = self.clip.logit_scale
        scale.requires_grad_(True)

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """Features and scale."""
        return clip_features(self.clip(input_ids=tokens, pixel_values=images), self.clip)


class Probe(nn.Module):
    """A linear classifier on a frozen image tower: images against the weights of three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.clip = open_clips().requires_grad_(False)
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, images: Tensor, tokens: Tensor) -> Features:
        """Features of images and classes."""
        features = self.clip.encode_image(images, normalize=True)
        return features, normalize(self.head.weight, dim=1), self.clip.logit_scale.exp()


class Prompts(nn.Module):
    """Vectors that a frozen text tower reads before the words."""

    def __init__(self) -> None:
        super().__init__()
        self.clip = open_clips().requires_grad_(False)
        self.vectors = nn.Parameter(torch.randn(1, 16))

    def forward(self, images: Tensor, tokens: Tensor) -> Features:
        """Image features, and features of the prompts with their words."""
        clip = self.clip
        first, *rest = clip.token_embedding(tokens[:, :3]).unbind(1)
        words = torch.stack((first, self.vectors.expand(len(tokens), -1), *rest), 1)
        hidden = clip.ln_final(clip.transformer(words + clip.positional_embedding, attn_mask=clip.attn_mask))
        texts = normalize(text_global_pool(hidden, pool_type="last") @ clip.text_projection, dim=1)
        return clip.encode_image(images, normalize=True), texts, clip.logit_scale.exp()


def locked() -> nn.Module:
    """LiT: the image tower stays, and the text tower learns to read it."""
    model: nn.Module = open_clips()
    model.lock_image_tower()  # type: ignore[operator]
    return model


def adapted() -> Any:
    """Adapters of peft on the layers of both of open_clip's towers, except attention, and a scale that learns."""
    model: Any = get_peft_model(open_clips(), LoraConfig(r=2, target_modules=["c_fc", "c_proj"]))
    model.base_model.model.logit_scale.requires_grad_(True)
    return model


KINDS: dict[str, Callable[[], nn.Module]] = {
    "LoRA of Transformers": Transformers,
    "LoRA of open_clip": adapted,
    "LiT": locked,
    "probe": Probe,
    "prompts": Prompts,
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def made(kind: str, seed: int = 0) -> nn.Module:
    """A student of this kind."""
    torch.manual_seed(seed)
    return KINDS[kind]().train()


def trained(student: nn.Module) -> list[nn.Parameter]:
    """What its optimiser gets."""
    return [parameter for parameter in student.parameters() if parameter.requires_grad]


def options(student: nn.Module, part: slice = slice(6)) -> tuple[dict[str, Any], Any]:
    """Options of the losses, and the labels: a probe has classes in place of texts, the same on all ranks."""
    if isinstance(student, Probe):
        return {"direction": "image_to_text"}, (TARGET[part], torch.arange(3))
    return {"gather": len(IMAGES[part]) < 6}, None


def steps(student: nn.Module, teacher: EMATeacher, optimizer: torch.optim.Optimizer, number: int) -> list[float]:
    """A loop as a user writes it; gives the losses."""
    chosen, labels = options(student)
    criterion = MultimodalContrastiveLoss(**chosen) + MultimodalDistillationLoss(**chosen)
    losses = []
    for _ in range(number):
        images = IMAGES.to(trained(student)[0].dtype)
        loss = criterion(*student(images, TOKENS), *teacher(images, TOKENS), labels=labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        teacher.update(student)
        losses.append(loss.item())
    return losses


@every_kind
def test_the_teacher_of_what_trains_is_the_teacher_of_all(kind: str) -> None:
    """Losses, outputs and averages are equal to the bit, and what is frozen is as it was, in one copy."""
    runs = []
    for share_frozen in (False, True):
        student = made(kind)
        frozen = {name: p.clone() for name, p in student.named_parameters() if not p.requires_grad}
        assert 0 < sum(p.numel() for p in trained(student)) < sum(p.numel() for p in frozen.values()) or kind == "LiT"
        teacher = EMATeacher(student, 0.5, share_frozen=share_frozen)
        losses = steps(student, teacher, torch.optim.AdamW(trained(student), 0.01), 4)
        assert losses[0] > losses[-1]
        runs.append((losses, teacher(IMAGES, TOKENS)))
        assert_close({n: p for n, p in student.named_parameters() if n in frozen}, frozen, rtol=0, atol=0)
        held = {id(p) for p in student.parameters()} & {id(p) for p in teacher.module.parameters()}
        assert held == ({id(p) for p in student.parameters() if not p.requires_grad} if share_frozen else set())
    assert runs[0][0] == runs[1][0]
    assert_close(runs[0][1], runs[1][1], rtol=0, atol=0)


@every_kind
@pytest.mark.parametrize("share_frozen", [False, True])
def test_a_run_that_is_resumed_ends_as_one_that_is_not(kind: str, share_frozen: bool, tmp_path: Path) -> None:
    """From a file; with ``share_frozen`` it holds of the teacher what trains, and buffers, and no more."""

    def start(seed: int) -> tuple[nn.Module, EMATeacher, torch.optim.Optimizer]:
        student = made(kind, seed=0)
        teacher, optimizer = EMATeacher(student, 0.5, share_frozen=share_frozen), torch.optim.AdamW(trained(student))
        return student, teacher, optimizer

    student, teacher, optimizer = start(0)
    steps(student, teacher, optimizer, 2)
    torch.save([part.state_dict() for part in (student, teacher, optimizer)], tmp_path / "run.pt")
    losses = steps(student, teacher, optimizer, 2)
    again: Any = start(1)
    kept = torch.load(tmp_path / "run.pt", weights_only=True)
    for part, state in zip(again, kept, strict=True):
        part.load_state_dict(state)
    student_again, teacher_again, optimizer_again = again
    assert steps(student_again, teacher_again, optimizer_again, 2) == losses
    for ours, theirs in zip(again[:2], (student, teacher), strict=True):
        assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    if share_frozen:
        own = sum(p.numel() for p in trained(student)) + sum(b.numel() for b in student.state_dict().values())
        own -= sum(p.numel() for p in student.parameters())
        assert sum(value.numel() for value in kept[1].values()) == own + 2  # and two counters


@every_kind
@pytest.mark.parametrize("share_frozen", [False, True])
def test_the_averaged_weights_are_lent_and_given_back(kind: str, share_frozen: bool) -> None:
    """Inside, the student answers as its teacher; also the classifier of its captions is the teacher's."""
    student = made(kind)
    teacher = EMATeacher(student, 0.5, share_frozen=share_frozen)
    steps(student, teacher, torch.optim.AdamW(trained(student), 0.1), 3)
    own = copy.deepcopy(student.state_dict())
    expected, before = teacher(IMAGES, TOKENS), student(IMAGES, TOKENS)
    with teacher.swapped_into(student):
        assert_close(student.eval()(IMAGES, TOKENS), expected, rtol=0, atol=0)
        if hasattr(student, "encode_text"):
            weights = [zero_shot_classifier(m, lambda texts: TOKENS[:1], ["a"]) for m in (student, teacher.module)]
            assert_close(weights[0], weights[1], rtol=0, atol=0)
    assert_close(student.state_dict(), own, rtol=0, atol=0)
    assert any(not torch.equal(a, b) for a, b in zip(before, expected, strict=True))


@every_kind
def test_masters_are_of_what_trains_alone(kind: str) -> None:
    """A bfloat16 student moves its teacher at a decay that bfloat16 cannot resolve."""
    student = made(kind).bfloat16()
    teacher = EMATeacher(student, 0.999, share_frozen=True)
    assert teacher.masters is not None
    masters = [p for p in teacher.masters.parameters() if p.dtype == torch.float32]
    assert sum(p.numel() for p in masters) == sum(p.numel() for p in trained(student))
    before = [p.clone() for p in masters]
    with torch.no_grad():
        for parameter in trained(student):
            parameter.add_(1)
    teacher.update(student)
    for old, new in zip(before, masters, strict=True):
        assert_close(new - old, torch.full_like(old, 0.001), rtol=0.05, atol=0)


def test_attention_of_open_clip_needs_a_teacher_of_its_own() -> None:
    """There peft puts new tensors in place of frozen ones in each forward pass, which ``share_frozen`` refuses."""
    config = LoraConfig(r=2, target_modules=["attn"])
    student = get_peft_model(open_clips(), config)
    teacher = EMATeacher(student, 0.5)
    losses = steps(student, teacher, torch.optim.AdamW(trained(student), 0.01), 4)
    assert losses[0] > losses[-1]
    sharing = EMATeacher(student, 0.5, share_frozen=True)
    with pytest.raises(ValueError, match=r"attn\..*weight must stay the frozen tensor .*, got another; .*_frozen=F"):
        steps(student, sharing, torch.optim.AdamW(trained(student), 0.01), 1)


def on_a_rank(rank: int, store: str) -> None:
    """What trains under DDP, and under FSDP2, ends where it ends in one process."""
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))

    def run(student: nn.Module, model: nn.Module, teacher: EMATeacher, part: slice) -> dict[str, Tensor]:
        chosen, labels = options(student, part)
        criterion = MultimodalContrastiveLoss(**chosen) + MultimodalDistillationLoss(**chosen)
        optimizer = torch.optim.SGD(trained(student), 0.1)
        batch = IMAGES[part].double(), TOKENS[part]
        for _ in range(3):
            criterion(*model(*batch), *teacher(*batch), labels=labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            teacher.update(model)
        followed = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
        states = {name: p for name, p in teacher.module.named_parameters() if name in followed}
        whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in states.items()}
        return {name: p.reshape(()) if p.numel() == 1 else p for name, p in whole.items()}

    part = slice(3 * rank, 3 * rank + 3)
    for kind in KINDS:
        student = made(kind).double()
        expected = run(student, student, EMATeacher(student, 0.5, share_frozen=True), slice(6))
        assert expected
        for share_frozen in (False, True):
            student = made(kind, seed=rank).double()  # DDP gives all ranks the first one's
            wrapped = DistributedDataParallel(student)
            teacher = EMATeacher(wrapped, 0.5, share_frozen=share_frozen)
            assert_close(run(student, wrapped, teacher, part), expected)
        student = made(kind).double()
        for module in student.modules():
            if isinstance(scale := module._parameters.get("logit_scale"), nn.Parameter):  # FSDP2 shards no scalar
                module.logit_scale = nn.Parameter(scale.detach()[None], scale.requires_grad)
        teacher = EMATeacher(student, 0.5)
        for module in (student, teacher.module):  # outside forward, also the scale is a shard
            fully_shard(module, mesh=mesh, reshard_after_forward=kind == "LoRA of Transformers")
        assert_close(run(student, student, teacher, part), expected)
        if kind == "LoRA of Transformers":  # a gradient that differs by rank is averaged, as FSDP2 averages the others
            images, texts, scale = student(IMAGES.double(), TOKENS)
            (scale * (rank + 1) + 0 * images.sum() + 0 * texts.sum()).backward()
            gradient: Any = student.get_parameter("clip.base_model.model.logit_scale").grad
            assert_close(gradient.full_tensor(), 1.5 * scale.detach()[None])
        with teacher.swapped_into(student):
            assert_close(student(IMAGES.double(), TOKENS), teacher(IMAGES.double(), TOKENS))
    leave_together()


@pytest.mark.slow
def test_every_kind_on_two_ranks_is_that_of_one_process(tmp_path: Path) -> None:
    """With DDP, whose teacher may share what is frozen, and with FSDP2, whose teacher is sharded likewise."""
    spawn(on_a_rank, ((tmp_path / "store").as_uri(),), nprocs=2)
