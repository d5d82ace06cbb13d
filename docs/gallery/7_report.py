"""Which model can I trust under shift?
=====================================

A :class:`~calrobust.ShiftReport` collects the logits of several models on several data sets, and two functions draw it.
Three models are made up here, so that the answer is known: features are Gaussian around a direction for each class, and
the nearer the classes, the harder the data. One model is too sure, one not sure enough, one feels less of the shift.
"""

import matplotlib.pyplot as plt
import torch

import calrobust as cr
from calrobust.plotting import reliability_grid, shift_scatter

torch.manual_seed(0)
n, classes, distance = 2000, 10, 2.5
shifts = {"photo": 0.0, "painting": 0.7, "sketch": 1.2}  # how much nearer the classes are
sharpness = {"sharp": 2.0, "smooth": 0.5, "robust": 1.1}  # 1 is right
felt = {"sharp": 1.0, "smooth": 1.0, "robust": 0.4}  # share of the shift


def predictions(model, shift):
    """Logits and classes; the logits would be right for a sharpness of 1 and no shift."""
    target = torch.randint(classes, (n,))
    centres = (distance - felt[model] * shift) * torch.eye(classes)[target]
    features = centres + torch.randn(n, classes)
    return sharpness[model] * distance * features, target


report = cr.ShiftReport(id_domain="photo")
for model in sharpness:
    report.fit_temperature(model, *predictions(model, 0.0))  # held-out photos
    for domain, shift in shifts.items():
        report.add(model, domain, *predictions(model, shift))
print(report.to_markdown(intervals=False))

# %%
# Good is at the lower right: often right, and right as often as it says. Dashes are noise floors: what a perfectly
# calibrated model would show. Lines are 95 % intervals of the accuracy.

plt.figure(shift_scatter(report).figure)  # pyplot did not make it, and shows it all the same
plt.show()

# %%
# Why a model lies where it does is in its reliability diagrams. Hatched is confidence that accuracy does not bear out,
# dotted is accuracy that confidence does not claim, faint are bins of few samples.

plt.figure(reliability_grid(report))
plt.show()

# %%
# Under shift the smooth model owes its low error to two that cancel: not sure enough in distribution, and too sure
# elsewhere. The temperature that mends the one brings out the other, as the last column of the table says.
# :doc:`/guides/shift` tells how to make such a report of your own models, and how to save its pictures for a paper.
