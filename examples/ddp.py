"""A loss over several processes: ``torchrun --nproc-per-node 2 examples/ddp.py``, on CPUs or on GPUs.

Each process holds some of a batch's pairs and contrasts them against all. It prints how far the gradients that
DistributedDataParallel averages lie from those of one process on the whole batch, with ``gather=True`` and without.
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

import calrobust as cr


class TwoTowers(nn.Module):
    """Stands in for CLIP."""

    def __init__(self) -> None:
        """Two linear maps into one space."""
        super().__init__()
        self.visual, self.textual = nn.Linear(64, 32, bias=False), nn.Linear(48, 32, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit-norm features and the exponentiated logit scale."""
        return normalize(self.visual(images), dim=1), normalize(self.textual(texts), dim=1), self.log_scale.exp()


def gradients(model: nn.Module, criterion: nn.Module, teacher: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The gradients of all parameters in one vector, after one backward pass."""
    model.zero_grad()
    criterion(*model(*batch), *teacher(*batch)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def main() -> None:
    """One step on every rank, compared with one step on the whole batch."""
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)

    torch.manual_seed(0)  # the same weights and the same whole batch on every rank
    model, teacher_model = TwoTowers().double().to(device), TwoTowers().double().to(device)
    images, texts = torch.randn(13, 64).double().to(device), torch.randn(13, 48).double().to(device)
    teacher = cr.EMATeacher(teacher_model, decay=0.99)
    alone, wrapped = copy.deepcopy(model), DistributedDataParallel(model)
    own = torch.arange(13)[rank::world_size]  # 13 pairs do not divide evenly: the ranks' batches differ in size

    whole = gradients(alone, cr.CaRotLoss(label_smoothing=0.1, distillation_weight=1.5), teacher, (images, texts))
    for gather in (True, False):
        criterion = cr.CaRotLoss(label_smoothing=0.1, distillation_weight=1.5, gather=gather)
        averaged = gradients(wrapped, criterion, teacher, (images[own], texts[own]))
        if rank == 0:
            error = ((averaged - whole).norm() / whole.norm()).item()
            print(f"gather={gather!s:5}  relative distance from the gradient of one process: {error:.1e}")
    dist.barrier()  # a rank that leaves first would close the connections of the others
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
