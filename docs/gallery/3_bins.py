"""Why does my ECE change when my model does not?
==============================================

The ECE of a sample depends on how it was computed: on the number of bins, on the number of samples, and on whether
batches were averaged. Here the truth is known: one model is right as often as it says, the other five points less
often.
"""

import matplotlib.pyplot as plt
import torch

from calrobust.functional import bin_confidences, binned_error

torch.manual_seed(0)
truths = {"calibrated": 0.0, "5 points overconfident": 0.05}


def draw(n, truth):
    """``n`` confidences between 0.5 and 1, and whether each prediction is right."""
    confidences = 0.5 + 0.5 * torch.rand(n).sqrt()
    return confidences, torch.rand(n) < confidences - truth


def ece(confidences, correct, n_bins=15):
    return binned_error(bin_confidences(confidences, correct, n_bins=n_bins))


def mean_of_batches(confidences, correct, size):
    """The ECE of each batch, averaged: what a loop that logs a mean reports."""
    batches = zip(confidences.split(size), correct.split(size), strict=True)
    return torch.stack([ece(*batch) for batch in batches]).mean()


# %%
# Each measurement is repeated on 40 fresh samples; lines are means, bands hold nine tenths of the repetitions.

measurements = {
    "number of bins (n = 2,000)": (
        [2, 5, 10, 20, 50, 100, 200],
        lambda truth, b: ece(*draw(2000, truth), n_bins=b),
    ),
    "number of samples (15 bins)": (
        [100, 300, 1000, 3000, 10_000, 30_000],
        lambda truth, n: ece(*draw(n, truth)),
    ),
    "batch size, averaged (n = 8,192)": (
        [64, 128, 256, 512, 1024, 2048, 8192],
        lambda truth, size: mean_of_batches(*draw(8192, truth), size),
    ),
}

figure, axes = plt.subplots(1, 3, figsize=(7.2, 2.8), sharey=True)
for ax, (name, (values, measure)) in zip(axes, measurements.items(), strict=True):
    print(f"{name:32}" + "".join(f"{value:>7,}" for value in values))
    for i, (model, truth) in enumerate(truths.items()):
        found = [torch.stack([measure(truth, value) for _ in range(40)]) for value in values]
        found = torch.stack(found)
        low, high = (found.quantile(q, dim=1) for q in (0.05, 0.95))
        ax.plot(values, 100 * found.mean(1), "os"[i] + "-", markersize=3, label=model)
        ax.fill_between(values, 100 * low, 100 * high, color=f"C{i}", alpha=0.25, linewidth=0)
        ax.axhline(100 * truth, color=f"C{i}", linestyle=":")
        print(f"  {model:30}" + "".join(f"{100 * value:7.1f}" for value in found.mean(1)))
    ax.set(xscale="log", xlabel=name, ylim=(-0.5, 15))
axes[0].set_ylabel("ECE (%)")
axes[0].legend(loc="upper left")
plt.show()

# %%
# Dotted is the truth. The noise of each bin's accuracy counts as error, so that more bins, fewer samples, or smaller
# batches read as worse calibration. Averaging batches gives the error of one batch, however large the data set:
# :class:`~calrobust.metrics.CalibrationError` adds sums instead, so that batches do not matter.
