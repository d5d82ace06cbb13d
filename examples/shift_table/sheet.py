"""A contact sheet: what a row of the table was trained on and tested on, at a glance."""

from __future__ import annotations

from matplotlib.figure import Figure
from torch import Tensor

from shift_table.data import DIGIT_WORDS, ID_DOMAIN, OOD_STYLES, Data, Split

SCANS = 6  # pictures of real scans in a line


def contact_sheet(data: Data) -> Figure:
    """One line per data set; in the OOD sets the last four digits are in fonts that no model was trained on."""
    lines = [("fine-tuning (ID)", data.train), ("test, ID", data.test[ID_DOMAIN])]
    lines += [(f"test, OOD: {style}", data.test[style]) for style in OOD_STYLES]
    figure = Figure(figsize=(9.2, 5.9), dpi=130, layout="compressed")
    grid = figure.subplots(len(lines), len(DIGIT_WORDS))
    for axes, (title, split) in zip(grid, lines, strict=True):
        for ax, image in zip(axes, _one_of_each_digit(split), strict=True):
            ax.imshow(image.permute(1, 2, 0).numpy(), vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        axes[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9, labelpad=6)
    for ax, name in zip(grid[0], DIGIT_WORDS, strict=True):
        ax.set_title(name, fontsize=8)
    return figure


def _one_of_each_digit(split: Split) -> Tensor:
    """The first six digits from the split's first half, where an OOD set has its scans, the others from its second."""
    half = len(split.target) // 2
    scans = [int((split.target[:half] == digit).nonzero()[0]) for digit in range(SCANS)]
    others = [half + int((split.target[half:] == digit).nonzero()[0]) for digit in range(SCANS, len(DIGIT_WORDS))]
    return split.images[scans + others]
