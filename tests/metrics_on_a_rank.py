"""One rank of the test of metrics in two processes: ``python metrics_on_a_rank.py rank folder``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from strategies import classifier
from torchmetrics import Metric

from calrobust import metrics


def every_metric() -> dict[str, Metric]:
    """Over five classes."""
    return {
        "l1": metrics.CalibrationError(),
        "max": metrics.CalibrationError(n_bins=7, norm="max"),
        "adaptive": metrics.AdaptiveCalibrationError(),
        "classwise": metrics.ClasswiseCalibrationError(num_classes=5),
        "brier": metrics.BrierScore(),
        "nll": metrics.NegativeLogLikelihood(),
        "summary": metrics.CalibrationSummary(),
    }


def main(rank: int, folder: Path) -> None:
    """Two uneven shares of the samples, then all of them on the first rank and none on the second."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    logits, target = classifier(100, 5, 0)
    values = []
    for first_share in (30, 100):
        rows = slice(first_share) if rank == 0 else slice(first_share, None)
        share = {}
        for name, metric in every_metric().items():
            if len(target[rows]):  # a rank without samples never calls update
                metric.update(logits[rows], target[rows])
            share[name] = metric.compute()
        values.append(share)
    torch.save(values, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
