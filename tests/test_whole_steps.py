"""Whole steps of training, as loops write them: under a GradScaler, and compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.testing import assert_close

from calrobust import CaRotLoss, EMATeacher, schedules

IMAGES, TEXTS = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0))


class Towers(nn.Module):
    """Two linear maps, frozen in part, and a scale."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.visual, self.textual = nn.Linear(5, 4), nn.Linear(5, 4)
        self.log_scale = nn.Parameter(torch.tensor(2.0))
        self.textual.bias.requires_grad_(False)

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features and scale."""
        return normalize(self.visual(images), dim=1), normalize(self.textual(texts), dim=1), self.log_scale.exp()


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_moves_no_teacher(fused: bool) -> None:
    """A loop compares scales; a hook, which a fused optimiser calls for such a step too, asks ``found_inf``.

    The teacher is asked under the same autocast.
    """
    student = Towers()
    teacher, hooked = EMATeacher(student, 0.5), EMATeacher(student, 0.5)
    criterion = CaRotLoss(label_smoothing=0.1, distillation_weight=1.0)
    optimizer = torch.optim.SGD([one for one in student.parameters() if one.requires_grad], fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def update(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not getattr(optimizer, "found_inf", False):
            hooked.update(student)

    optimizer.register_step_post_hook(update)
    made = 0
    for step in range(6):
        images = IMAGES * (torch.inf if step in (1, 4) else 1.0)  # of which the gradient is not finite
        with torch.autocast("cpu", torch.float16):
            taught = teacher(images, TEXTS)
            loss = criterion(*student(images, TEXTS), *taught)
        assert taught[0].dtype == torch.float16
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= before:
            teacher.update(student)
        optimizer.zero_grad()
        made += step not in (1, 4)
        assert teacher.step == teacher.updates == hooked.updates == made
    assert all(parameter.isfinite().all() for parameter in teacher.module.parameters())
    assert scaler.get_scale() == 2.0**8


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's, behind a backward
@pytest.mark.parametrize("share_frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_step_is_the_plain_one(share_frozen: bool, dtype: torch.dtype) -> None:
    """Loss, backward, optimiser and the teacher's update in one compiled function, over a schedule and an interval."""
    torch._dynamo.reset()
    results = []
    for compiles in (False, True):
        student = Towers().to(dtype)
        decay = schedules.linear_warmup(0.1, 0.9, updates=3)
        teacher = EMATeacher(student, decay, update_every=2, share_frozen=share_frozen)
        criterion = CaRotLoss(label_smoothing=0.1, distillation_weight=1.0)
        optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], 0.1)

        def step(
            images: Tensor,
            texts: Tensor,
            student: nn.Module = student,
            teacher: EMATeacher = teacher,
            criterion: CaRotLoss = criterion,
            optimizer: torch.optim.Optimizer = optimizer,
        ) -> Tensor:
            loss: Tensor = criterion(*student(images, texts), *teacher(images, texts))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            teacher.update(student)
            return loss.detach()

        run = torch.compile(step, backend="aot_eager") if compiles else step
        losses = [run(IMAGES.to(dtype), TEXTS.to(dtype)) for _ in range(7)]
        results.append((losses, teacher.step, teacher.updates, dict(teacher.state_dict())))
    plain, compiled = results
    assert plain[1:3] == compiled[1:3] == (7, 3)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert_close(compiled[0], plain[0], rtol=tolerance, atol=tolerance)
    assert_close(compiled[3], plain[3], rtol=tolerance, atol=tolerance)
