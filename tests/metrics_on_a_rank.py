"""One rank of the test of metrics in two processes: ``python metrics_on_a_rank.py rank folder``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from leaving import leave_together
from strategies import classifier
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from calrobust import metrics


def every_metric(**options: Any) -> dict[str, Metric]:
    """Over five classes."""
    return {
        "l1": metrics.CalibrationError(**options),
        "max": metrics.CalibrationError(n_bins=7, norm="max", **options),
        "adaptive": metrics.AdaptiveCalibrationError(**options),
        "classwise": metrics.ClasswiseCalibrationError(num_classes=5, **options),
        "brier": metrics.BrierScore(**options),
        "aurc": metrics.SelectiveRisk(**options),
        "nll": metrics.NegativeLogLikelihood(**options),
        "summary": metrics.CalibrationSummary(**options),
    }


def main(rank: int, folder: Path) -> None:
    """Uneven shares, one of them empty; then in two steps, read after each; by forward, synced; and in a collection."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    logits, target = classifier(100, 5, 0)

    def own(first_share: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """This rank's part of some rows: those before ``first_share``, or those after it."""
        part = slice(first_share) if rank == 0 else slice(first_share, None)
        return logits[rows][part], target[rows][part]

    values: dict[str, Any] = {}
    for first_share in (30, 100):
        share = own(first_share)
        for name, metric in every_metric().items():
            if len(share[1]):  # a rank without samples never calls update
                metric.update(*share)
            values[f"{name}, first {first_share}"] = metric.compute()
    steps = [own(15, slice(40)), own(35, slice(40, None))]
    for name, metric in every_metric().items():
        for step, share in enumerate(steps):
            metric.update(*share)
            values[f"{name}, read after step {step}"] = metric.compute()
    for name, metric in every_metric(dist_sync_on_step=True).items():
        for step, share in enumerate(steps):
            values[f"{name}, synced in step {step}"] = metric(*share)
        values[f"{name}, synced in each step"] = metric.compute()
    collection = MetricCollection({name: m for name, m in every_metric().items() if name != "summary"})
    for share in steps:
        collection.update(*share)
    values |= {f"{name}, in a collection": value for name, value in collection.compute().items()}
    torch.save(values, folder / f"{rank}.pt")
    leave_together()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
