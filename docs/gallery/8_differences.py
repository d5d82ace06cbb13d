"""Is the difference between two models real?
==========================================

Four models see the same pictures. One is only too sure, one is unsure at random, and one is a little better than the
base. Their own 95 % intervals overlap. :meth:`ShiftReport.compare <calrobust.ShiftReport.compare>` compares what two
models say of each picture. That tells them apart far better, because a picture that is hard for one is hard for the
other.
"""

import matplotlib.pyplot as plt
import torch

import calrobust as cr
from calrobust.plotting import differences

torch.manual_seed(0)
n, classes = 2000, 10
report = cr.ShiftReport(id_domain="photo")
for domain, distance in {"photo": 2.5, "painting": 2.0, "sketch": 1.5}.items():
    target = torch.randint(classes, (n,))
    truth = torch.nn.functional.one_hot(target, classes)
    logits = distance * (distance * truth + torch.randn(n, classes))
    report.add("base", domain, logits, target)
    noise, factor = torch.randn(n, classes), 0.5 + torch.rand(n, 1)
    report.add("too sure", domain, 2 * (logits + 0.1 * noise), target)
    report.add("unsure at random", domain, factor * (logits - 0.1 * noise), target)
    report.add("better", domain, logits + 0.1 * truth, target)
columns = ["ood_accuracy", "ood_nll", "ood_nll_own_t", "ood_aurc"]
print(report.to_markdown(columns=columns))

# %%
# The intervals of "base" and "better" overlap in every column. The interval of their difference is much shorter, and
# it excludes 0.


def shown(name, row, factor=100):
    value, low, high = (factor * row[f"{name}{end}"] for end in ("", "_low", "_high"))
    return f"{value:5.2f}, 95 % interval {low:5.2f} to {high:5.2f}"


base, *_, better = report.summary()
print("OOD accuracy in per cent")
print(f"base             {shown('ood_accuracy', base)}")
print(f"better           {shown('ood_accuracy', better)}")
print(f"better - base    {shown('ood_accuracy', report.compare('better', 'base'))}")

# %%
# :func:`~calrobust.plotting.differences` draws all models against one. A marker is filled if the interval of its
# difference excludes 0. A difference is good at the right of 0 for the accuracy, and at the left for the others.

plt.figure(differences(report, "base", columns))
plt.show()

# %%
# The model that is too sure is right as often as the base, and has a high NLL. At each domain's own temperature the two
# have nearly the same NLL: its confidence is wrong, not its knowledge. No temperature mends the model that is unsure at
# random. It is right as often as the base, and yet it knows less: its confidence says less of which pictures it gets
# wrong. :doc:`9_risk_coverage` looks at that, and :doc:`/guides/shift` tells how to read these figures in words.
