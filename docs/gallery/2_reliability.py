"""Is my model overconfident, or is it noise?
==========================================

A reliability diagram shows, bin by bin, how often a prediction is right beside how sure it was. A bin of few samples
is noisy, and so is the gap in it. Drawing the samples anew, with replacement, shows by how much: the bootstrap band.
"""

import matplotlib.pyplot as plt
import torch

import calrobust as cr
from calrobust.functional import bin_confidences, binned_error, bootstrap_interval, top_label
from calrobust.plotting import reliability_diagram

torch.manual_seed(0)
n, classes, n_bins = 4000, 10, 10
target = torch.randint(classes, (2 * n,))
signal = 2.5 * torch.nn.functional.one_hot(target, classes) + torch.randn(2 * n, classes)
logits = 2.0 * 2.5 * signal  # twice too sharp: the right ones are 2.5 * signal
held_out, test = slice(0, n), slice(n, 2 * n)

# %%
# :func:`~calrobust.functional.bin_confidences` sums over the bins, and
# :func:`~calrobust.plotting.reliability_diagram` draws the sums: bars are accuracy, hatched is the gap to the
# confidence, grey the histogram of confidences. Black is the bootstrap band: the accuracies of 95 % of 500 resamples.

scaler = cr.TemperatureScaler().fit(logits[held_out], target[held_out])
versions = {
    "as trained": logits[test],
    f"divided by T = {scaler.temperature:.2f}": scaler(logits[test]),
}

figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.7), sharey=True)
for ax, (name, scores) in zip(axes, versions.items(), strict=True):
    confidences, correct = top_label(scores, target[test])
    bins = bin_confidences(confidences, correct, n_bins=n_bins)
    low, high = bootstrap_interval(confidences, correct, n_bins=n_bins)
    interval = f"95 % interval {100 * low:.1f} to {100 * high:.1f} %"
    print(f"{name:20}  ECE {100 * binned_error(bins):4.1f} %, {interval}")

    resamples = torch.randint(n, (500, n))
    draws = [bin_confidences(confidences[i], correct[i], n_bins=n_bins) for i in resamples]
    accuracies = torch.stack([drawn.correct_sums / drawn.counts for drawn in draws])
    bottom, top = (accuracies.nanquantile(q, dim=0) for q in (0.025, 0.975))

    reliability_diagram(bins, ax)
    centres = (torch.arange(n_bins) + 0.5) / n_bins
    middle, half = (bottom + top) / 2, (top - bottom) / 2
    ax.errorbar(centres, middle, half, fmt="none", color="black", capsize=2.5)
    ax.set(title=name, xlabel="confidence")
axes[0].set_ylabel("accuracy")
plt.show()

# %%
# As trained, the bands lie below the diagonal where most samples are: the model is overconfident. Divided by T they
# cross it, and the gaps that are left are as large as noise makes them.
