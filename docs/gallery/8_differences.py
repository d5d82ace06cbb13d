"""Is the difference real, and can I trust the top of the ranking?
================================================================

Four models see the same pictures. One is only too sure, one ranks its predictions badly, and one is a little better
than the base. Their accuracies are close. :meth:`ShiftReport.compare <calrobust.ShiftReport.compare>` compares what
they say of each picture, which tells them apart far better than two intervals side by side.
"""

import matplotlib.pyplot as plt
import torch

import calrobust as cr
from calrobust.plotting import differences, risk_coverage

torch.manual_seed(0)
n, classes = 2000, 10
report = cr.ShiftReport(id_domain="photo")
for domain, distance in {"photo": 2.5, "painting": 2.0, "sketch": 1.5}.items():
    target = torch.randint(classes, (n,))
    logits = distance * (distance * torch.eye(classes)[target] + torch.randn(n, classes))
    noise = torch.randn(n, classes)
    report.add("base", domain, logits, target)
    report.add("too sure", domain, 2 * logits + 0.2 * noise, target)
    report.add("badly ranked", domain, logits * torch.rand(n, 1).add(0.5), target)
    report.add("better", domain, logits + 0.1 * torch.eye(classes)[target], target)
columns = ["ood_accuracy", "ood_nll", "ood_nll_own_t", "ood_aurc"]
print(report.to_markdown(columns=columns, intervals=False))

# %%
# A filled marker is a difference that is no chance: its 95 % interval excludes 0. The model that is too sure has a high
# NLL, and at each domain's own temperature nearly the same as the base: its confidence is wrong, not its knowledge.

plt.figure(differences(report, "base", columns))
plt.show()

# %%
# The curve of a good ranking is low at the left: the predictions that it is surest of are right. The badly ranked
# model is as often right as the base at full coverage, and more often wrong where it is sure.

plt.figure(risk_coverage(report, domain="sketch").figure)
plt.show()

# %%
# :doc:`/guides/shift` tells how to read these figures in words.
