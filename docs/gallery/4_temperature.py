"""Where is the best temperature, and is it the same under shift?
==============================================================

Temperature scaling picks the T with the lowest negative log-likelihood (NLL) on held-out data. Features here are
Gaussian around a direction for each class, so that the right logits are known. The model's are twice too large; under
shift the classes lie closer together, and the model does not know.
"""

import matplotlib.pyplot as plt
import torch

import calrobust as cr
from calrobust.functional import calibration_error, negative_log_likelihood

torch.manual_seed(0)
n, classes = 4000, 10
target = torch.randint(classes, (n,))


def logits(distance):
    """A model that was made for a distance of 2.5, and is twice too sure."""
    features = distance * torch.nn.functional.one_hot(target, classes) + torch.randn(n, classes)
    return 2 * 2.5 * features


domains = {"ID": logits(2.5), "OOD": logits(1.5)}
fitted = {
    name: cr.TemperatureScaler().fit(scores, target).temperature.item()
    for name, scores in domains.items()
}
for name, T in fitted.items():
    print(f"best T on {name:4} {T:.2f}")

# %%
# :class:`~calrobust.TemperatureScaler` finds the minimum by Newton's method; the curves are there to look at.

temperatures = torch.logspace(-0.3, 1.3, 60)
measures = {"NLL (nats)": negative_log_likelihood, "ECE": calibration_error}
figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.8))
for ax, (label, measure) in zip(axes, measures.items(), strict=True):
    for i, (name, scores) in enumerate(domains.items()):
        ax.plot(temperatures, [measure(scores / T, target) for T in temperatures], label=name)
        ax.plot(fitted[name], measure(scores / fitted[name], target), "os"[i], color=f"C{i}")
        print(f"{label:10} on {name:4}", end="")
        for T in (1.0, fitted["ID"], fitted["OOD"]):
            print(f"  T = {T:.2f}: {measure(scores / T, target):.3f}", end="")
        print()
    ax.axvline(fitted["ID"], color="C0", linestyle=":")
    ax.set(xscale="log", xlabel="temperature T", ylabel=label)
    ax.set_xticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"], minor=False)
    ax.minorticks_off()
    ax.set_ylim(bottom=0)
axes[0].legend()
plt.show()

# %%
# Markers are the fits, the dotted line is the T that one would use, fitted in distribution. It takes the factor of
# two out again, but for noise. Under shift it helps, and not enough: the best T there is larger, but finding it takes
# labels from there. :doc:`/guides/temperature` tells when it harms.
