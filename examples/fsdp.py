"""Sharded weights and a sharded teacher: ``torchrun --nproc-per-node 2 examples/fsdp.py``, on CPUs or on GPUs.

FSDP2 keeps a part of every parameter on each process. The teacher is made first and sharded like its student, so that
each process averages its own parts. It prints the loss and the share of the weights that a process holds.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import normalize

import calrobust as cr


class TwoTowers(nn.Module):
    """Stands in for CLIP."""

    def __init__(self) -> None:
        """Two small networks into one space."""
        super().__init__()
        self.visual = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32))
        self.textual = nn.Sequential(nn.Linear(48, 128), nn.GELU(), nn.Linear(128, 32))
        self.log_scale = nn.Parameter(torch.tensor([2.0]))  # FSDP2 shards no scalar

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit-norm features and the exponentiated logit scale."""
        return normalize(self.visual(images), dim=1), normalize(self.textual(texts), dim=1), self.log_scale.exp()


def main() -> None:
    """Twenty steps on made-up pairs."""
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if on_gpu:
        torch.cuda.set_device(rank)
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    mesh = init_device_mesh(device.type, (world_size,))

    torch.manual_seed(0)
    model = TwoTowers().to(device)
    teacher = cr.EMATeacher(model, decay=0.9)  # before sharding, which forbids copies
    for module in (model, teacher.module):
        for tower in (module.visual, module.textual):
            fully_shard(tower, mesh=mesh)
        fully_shard(module, mesh=mesh)
    criterion = cr.CaRotLoss(label_smoothing=0.1, distillation_weight=0.5, gather=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)  # a logit scale should never decay

    images, texts = torch.randn(64, 64, device=device), torch.randn(64, 48, device=device)
    own = torch.arange(64)[rank::world_size]
    for step in range(20):
        batch = images[own], texts[own]
        loss = criterion(*model(*batch), *teacher(*batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teacher.update(model)
        if rank == 0 and step % 19 == 0:
            held = sum(p.to_local().numel() for p in model.parameters()) / sum(p.numel() for p in model.parameters())
            print(f"step {step:2}  loss {loss.item():.3f}  share of the weights on this process {held:.2f}")
    dist.barrier()  # a rank that leaves first would close the connections of the others
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
