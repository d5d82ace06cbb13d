"""How often is my model wrong where it is sure?
=============================================

A model that may leave its less certain predictions to a person needs a good order of its confidences, whatever their
size. The risk-coverage curve shows it: keep only the most confident predictions, and count how many of them are wrong.
Three models are made up here that give the same answers with different confidences.
"""

import matplotlib.pyplot as plt
import torch

import calrobust as cr
from calrobust.functional import risk_coverage_curve
from calrobust.plotting import risk_coverage

torch.manual_seed(0)
n, classes, distance = 4000, 10, 1.8
target = torch.randint(classes, (n,))
signal = distance * torch.nn.functional.one_hot(target, classes) + torch.randn(n, classes)
logits = distance * signal  # right as often as they say
report = cr.ShiftReport(id_domain="sketch")
report.add("calibrated", "sketch", logits, target)
report.add("too sure", "sketch", 2 * logits, target)
report.add("unsure at random", "sketch", logits * torch.rand(n, 1), target)
columns = ["id_accuracy", "id_ece", "id_aurc"]
print(report.to_markdown(columns=columns, intervals=False))

# %%
# At full coverage, at the right, every curve ends at the error rate of all predictions, which is the same here. A good
# order of confidences makes a curve low at the left. AURC is the mean height of a curve. Lower is better.

plt.figure(risk_coverage(report).figure)
plt.show()

# %%
# :func:`~calrobust.functional.risk_coverage_curve` has the numbers: how many of the surest predictions are wrong.

for method in report.methods:
    curve = risk_coverage_curve(*report.confidences(method, "sketch"))
    found = [f"{100 * curve[n * kept // 100 - 1]:4.1f} % of {kept} %" for kept in (25, 50, 100)]
    print(f"{method:17} wrong: {', '.join(found)}")

# %%
# The model that is too sure has a high ECE and nearly the same curve as the calibrated one: all its confidences are too
# high, but what it is surest of is right. A threshold on its confidence works, once the threshold is chosen on held-out
# data, and a temperature would mend its ECE. The model that is unsure at random is often wrong where it is sure, and
# no temperature mends an order.
#
# Predictions of equal confidence have no order. The curve is then the mean over all their orders, so that the order of
# the data set does not matter. :class:`~calrobust.metrics.SelectiveRisk` has the area as a metric, over batches and
# ranks.
