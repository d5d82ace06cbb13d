"""Is my model overconfident, or is it noise?
==========================================

A reliability diagram shows, bin by bin, how often a prediction is right beside how sure it was. A bin of few samples
is noisy, and so is the gap in it. The noise floor says what a perfectly calibrated model would show, and black bands
say where the accuracy of each bin would then lie.
"""

import matplotlib.pyplot as plt
import torch

import calrobust as cr
from calrobust.functional import bin_confidences, calibration_interval, top_label
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
# confidence, faint are bins of few samples, grey is the histogram of confidences. A black band holds the accuracy of a
# calibrated model in 95 % of data sets: 1.96 standard deviations of a binomial around the confidence.

scaler = cr.TemperatureScaler().fit(logits[held_out], target[held_out])
versions = {
    "as trained": logits[test],
    f"divided by T = {scaler.temperature:.2f}": scaler(logits[test]),
}

figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.7), sharey=True)
for ax, (name, scores) in zip(axes, versions.items(), strict=True):
    confidences, correct = top_label(scores, target[test])
    bins = bin_confidences(confidences, correct, n_bins=n_bins)
    value, debiased, low, high, floor, p_value = calibration_interval(
        confidences, correct, n_bins=n_bins
    )
    shown = f"ECE {100 * value:4.1f} %, 95 % interval {100 * low:.1f} to {100 * high:.1f} %"
    print(f"{name:20}  {shown}, noise floor {100 * floor:.1f} %, p = {p_value:.2g}")

    reliability_diagram(bins, ax)
    means = bins.confidence_sums / bins.counts
    band = 1.96 * (means * (1 - means) / bins.counts).sqrt()
    centres = (torch.arange(n_bins) + 0.5) / n_bins
    ax.errorbar(centres, means, band, fmt="none", color="black", capsize=2.5)
    ax.set_title(name, loc="left")
    ax.set_xlabel("confidence")
axes[0].set_ylabel("accuracy")
plt.show()

# %%
# As trained, the bars end below the bands where most samples are: the model is overconfident. Divided by T they end
# within them, the ECE is near its floor, and the gaps that are left are as large as noise makes them.
