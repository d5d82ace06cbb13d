"""What does each method of the paper gain, and what does it pay?
==============================================================

``python examples/shift_table.py --seeds 0 1 2`` pre-trains a small CLIP, fine-tunes it on handwritten digits by every
method of the paper, and judges it on the test set and on five shifted sets. That takes minutes, so the table is not
made again here: it is read from the README, where it is committed as it was printed.
"""

import re
from pathlib import Path

import matplotlib.pyplot as plt

readme = Path("../../README.md").read_text(encoding="utf-8")
results = readme.split("<!-- results -->")[1].split("<!-- end results -->")[0]
header, _, *rows = re.findall(r"^\| (.*) \|$", results, re.MULTILINE)
columns = header.split(" | ")[1:]
table = {}
for row in rows:
    method, *cells = row.split(" | ")
    values = [tuple(map(float, cell.split(" ± "))) for cell in cells]  # mean, standard deviation
    table[method] = dict(zip(columns, values, strict=True))
print(f"{'':16}" + "".join(f"{column:>14}" for column in columns[:4]))
for method, cells in table.items():
    shown = [f"{mean:8.1f} ± {std:3.1f}" for mean, std in cells.values()]
    print(f"{method:16}" + "".join(shown[:4]))

# %%
# Each row is a method, each marker the mean of three seeds, with one standard deviation.

panels = {
    "accuracy (%)": ("ID accuracy", "OOD accuracy"),
    "ID ECE (%)": ("ID ECE", "ID ECE + TS"),
    "OOD ECE (%)": ("OOD ECE", "OOD ECE + TS"),
}
names = {"accuracy (%)": ("ID", "OOD"), "ID ECE (%)": ("as trained", "divided by T")}
figure, axes = plt.subplots(1, 3, figsize=(7.2, 3.2), sharey=True, width_ratios=[1.3, 1, 1.3])
places = range(len(table))
for ax, (label, pair) in zip(axes, panels.items(), strict=True):
    first, second = ([cells[column] for cells in table.values()] for column in pair)
    ends = [[mean for mean, _ in values] for values in (first, second)]
    ax.hlines(places, *ends, color="0.8", linewidth=2)
    for i, values in enumerate((first, second)):
        means, stds = zip(*values, strict=True)
        style = {"fmt": "os"[i], "color": f"C{i}", "elinewidth": 0.8, "markersize": 4.5}
        ax.errorbar(means, places, xerr=stds, label=names.get(label, ("", ""))[i] or None, **style)
    ax.set_xlabel(label)
    ax.grid(axis="y", color="0.92")
for ax in axes[1:]:
    ax.set_xlim(left=0)
axes[0].set_yticks(places, table)
axes[0].invert_yaxis()
for ax in axes[:2]:
    above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1)}
    ax.legend(**above, ncols=2, columnspacing=1, handletextpad=0.3)
plt.show()

# %%
# Fine-tuning buys ID accuracy with OOD accuracy (left). It leaves an OOD ECE that a temperature fitted on ID data
# does not mend (right); where labels were smoothed, as in CaRot, that temperature sharpens, and makes it worse. CaRot
# pays in raw ID ECE, which the temperature repairs. :doc:`/guides/shift` makes such a table from your own logits.
