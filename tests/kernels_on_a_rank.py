"""One rank of the tests of kernels in two processes: ``python kernels_on_a_rank.py rank folder backend``.

With gloo the kernels are interpreted on the CPU, with nccl each rank has a CUDA device of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from leaving import leave_together
from strategies import unit_rows
from torch.nn import functional as F

from calrobust.functional import multimodal_contrastive_loss

SIZES = [13, 20]


def main(rank: int, folder: Path, backend: str) -> None:
    """A batch of which p of the own pair is 0.99: its gradient on this rank, within 2e-3 of that of the whole batch."""
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    dist.init_process_group(backend, init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    images, noise = unit_rows(33, 64, 0), unit_rows(33, 64, 1)
    features = [F.normalize(rows, dim=1).bfloat16().to(device) for rows in (images, images + 0.5 * noise)]
    own = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    ours = [rows[own].clone().requires_grad_() for rows in features]
    exact = [rows.double().requires_grad_() for rows in features]
    multimodal_contrastive_loss(ours[0], ours[1], 12.0, impl="triton", gather=True).backward()
    multimodal_contrastive_loss(exact[0], exact[1], 12.0, impl="dense").backward()
    for a, b in zip(ours, exact, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        expected = 2 * b.grad[own]  # averaging over two ranks halves it
        error = (a.grad.double() - expected).norm() / expected.norm()
        assert error <= 2e-3, error.item()
    leave_together()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
