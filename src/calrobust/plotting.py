"""Reliability diagrams, and calibration against accuracy under shift.

matplotlib is imported on use, and neither its pyplot interface nor its settings are touched: a figure made here is
nobody's current figure. Save it with ``figure.savefig``; in a notebook, a figure that ends a cell is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from calrobust._checks import check_bins, check_choice, check_instance
from calrobust.functional.calibration import Bins, binned_error
from calrobust.report import ShiftReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

__all__ = ["reliability_diagram", "reliability_grid", "shift_scatter"]

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers and hatching differ as well.
COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"  # in the order in which methods take them
BLUE, VERMILION, *_ = COLOURS
GREY = "#767676"
MARKERS = "osD^v<>"  # more than the colours, so that the pair of the two repeats after 42 methods
FONT = 7.5  # points
COLUMN = 3.3  # inches, the width of a column in most journals
BARS: dict[str, dict[str, Any]] = {
    "accuracy": {"facecolor": BLUE},
    "overconfident by": {"facecolor": "#F6CDB4", "edgecolor": VERMILION, "linewidth": 0.6, "hatch": "//////"},
    "underconfident by": {"facecolor": "#C4DFF0", "edgecolor": BLUE, "linewidth": 0.6, "hatch": "......"},
}
FAINTEST = 0.15  # opacity of a bin with hardly a sample
STRIP = 0.2  # height of the histogram under a reliability diagram, in units of its accuracy axis
ABOVE: dict[str, Any] = {"loc": "lower left", "frameon": False, "fontsize": FONT - 1, "columnspacing": 1}  # of legends


def reliability_diagram(bins: Bins, ax: Axes | None = None) -> Axes:
    """Accuracy against confidence, bin by bin, with the gap between the two and, below, where the samples lie.

    A bar is a bin's accuracy. Hatched is what lies between it and the bin's mean confidence. The fewer samples a bin
    has, the fainter are its bars, because a tall gap over few samples is little evidence. The grey strip under the axis
    is the histogram of confidences. ECE and number of samples stand above, as the title at the right.

    Args:
        bins: sums of shape ``[n_bins]`` over bins of equal width, as :func:`~calrobust.functional.bin_confidences` or
            :meth:`ShiftReport.bins <calrobust.ShiftReport.bins>` gives them.
        ax: axes to draw into; None makes a figure of its own, ``reliability_diagram(bins).figure``.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: ``bins`` are not three floating tensors, or ``ax`` is not axes.
        ValueError: their shapes are not ``[n_bins]``.

    Example:
        >>> import torch
        >>> from calrobust.functional import bin_confidences
        >>> from calrobust.plotting import reliability_diagram
        >>> bins = bin_confidences(torch.tensor([0.6, 0.7, 0.9]), torch.tensor([True, False, True]), n_bins=2)
        >>> ax = reliability_diagram(bins)
        >>> [round(float(bar.get_height()), 4) for bar in ax.containers[0]]  # 2 of 3 correct, all of them in [0.5, 1]
        [0.6667]

    Reference: Guo et al., 2017, :arxiv:`1706.04599`, figure 1.
    """
    check_bins(bins)
    if bins[0].ndim != 1:
        raise ValueError(
            f"bins must be sums of shape [n_bins], got {list(bins[0].shape)}; take one class or one set at a time"
        )
    _check_axes(ax)
    if ax is None:
        ax = _figure(COLUMN, COLUMN).add_subplot()
        ax.set_xlabel("Confidence", fontsize=FONT)
        ax.set_ylabel("Accuracy", fontsize=FONT)
        ax.legend(handles=_legend(), bbox_to_anchor=(-0.15, 1.05), ncols=3, **ABOVE)
    _draw_bins(ax, Bins(*bins))
    return ax


def reliability_grid(report: ShiftReport, methods: Sequence[str] | None = None) -> Figure:
    r"""Reliability diagrams of some methods, in distribution (left) and of all OOD samples together (right).

    Pooling weighs OOD samples, not domains, alike, and lets the gaps of domains cancel, so the ECE of the pooled bins,
    which each panel names, is not the report's mean OOD ECE, and usually below it.

    Args:
        report: with data of ``id_domain`` for every method.
        methods: the rows; None takes the first method of the report and its last two.

    Returns:
        A figure of one row for each method; without OOD domains it has the left column only.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: ``report`` is not a :class:`~calrobust.ShiftReport`, or ``methods`` not a sequence.
        ValueError: as :meth:`ShiftReport.summary <calrobust.ShiftReport.summary>`; or ``methods`` is empty or holds a
            method that is not in the report.

    Example:
        >>> import torch
        >>> from calrobust import ShiftReport
        >>> from calrobust.plotting import reliability_grid
        >>> report = ShiftReport(id_domain="photo")
        >>> for domain in ("photo", "sketch"):
        ...     report.add("FT", domain, 2 * torch.eye(3), torch.tensor([0, 1, 2]))
        >>> figure = reliability_grid(report)
        >>> [ax.get_title(loc="right") for ax in figure.axes]  # always right, as sure as e**2 / (e**2 + 2)
        ['ID\nECE 21.3 %, n = 3', 'OOD, pooled\nECE 21.3 %, n = 3']
    """
    check_instance(ShiftReport, "make it with ShiftReport(id_domain=...)", report=report)
    report.summary()  # raises for a report that is incomplete
    if methods is None:
        methods = list(dict.fromkeys([*report.methods[:1], *report.methods[-2:]]))
    check_instance(Sequence, "pass a list of names", methods=methods)
    if not methods:
        raise ValueError(f"methods must hold at least one name, got {methods!r}; None takes up to three")
    for i, method in enumerate(methods):
        check_choice(tuple(report.methods), **{f"methods[{i}]": method})
    groups = {"ID": [report.id_domain], "OOD, pooled": report.domains[1:]}
    columns = {title: domains for title, domains in groups.items() if domains}
    figure = _figure(COLUMN * (0.1 + 0.45 * len(columns)), 0.7 + 1.3 * len(methods))
    axes = figure.subplots(len(methods), len(columns), sharex=True, sharey=True, squeeze=False)
    for method, row in zip(methods, axes, strict=True):
        for domains, ax in zip(columns.values(), row, strict=True):
            first, *others = (report.bins(method, domain) for domain in domains)
            _draw_bins(ax, sum(others, start=first))
        row[0].set_ylabel(method, fontsize=FONT, fontweight="bold")
    for title, ax in zip(columns, axes[0], strict=True):
        ax.set_title(f"{title}\n{ax.get_title(loc='right')}", loc="right", fontsize=FONT - 1, pad=3)
    figure.supxlabel("Confidence", fontsize=FONT)
    figure.supylabel("Accuracy", fontsize=FONT)
    figure.legend(handles=_legend(), ncols=3, **(ABOVE | {"loc": "outside upper center"}))
    return figure


def shift_scatter(report: ShiftReport, ax: Axes | None = None) -> Axes:
    """OOD ECE against OOD accuracy, one marker for each method; good is at the lower right.

    Horizontal lines are 95 % intervals of the accuracy, vertical ones of the ECE, where the report has them. A dash
    under a marker is the method's noise floor: a marker at its dash is as good as perfectly calibrated.

    Args:
        report: with data of ``id_domain`` and at least one other domain for every method.
        ax: axes to draw into; None makes a figure of its own, ``shift_scatter(report).figure``.

    Returns:
        The axes, in per cent.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: ``report`` is not a :class:`~calrobust.ShiftReport`, or ``ax`` is not axes.
        ValueError: as :meth:`ShiftReport.summary <calrobust.ShiftReport.summary>`.

    Example:
        >>> import torch
        >>> from calrobust import ShiftReport
        >>> from calrobust.plotting import shift_scatter
        >>> report = ShiftReport(id_domain="photo")
        >>> logits = torch.tensor([[0.9, 0.1]]).log().expand(10, 2)  # always 90 % sure of class 0
        >>> for domain in ("photo", "sketch"):
        ...     report.add("FT", domain, logits, torch.tensor([0] * 7 + [1] * 3))
        >>> ax = shift_scatter(report)
        >>> [round(float(value)) for value in ax.lines[0].get_xydata()[0]]  # accuracy 70 %, ECE |70 - 90|
        [70, 20]
    """
    check_instance(ShiftReport, "make it with ShiftReport(id_domain=...)", report=report)
    _check_axes(ax)
    rows = report.summary()
    if ax is None:
        ax = _figure(COLUMN, 0.8 * COLUMN).add_subplot()
    ax.set_xlabel("OOD accuracy (%)", fontsize=FONT)
    ax.set_ylabel("OOD ECE (%)", fontsize=FONT)
    for i, row in enumerate(rows):
        x, left, right = (100 * row[f"ood_accuracy{end}"] for end in ("", "_low", "_high"))
        y, bottom, top, floor = (100 * row[f"ood_ece{end}"] for end in ("", "_low", "_high", "_floor"))
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "clip_on": False}
        ax.plot(x, y, MARKERS[i % len(MARKERS)], label=row["method"], markersize=5, zorder=3, **style)
        ax.plot(x, floor, "_", markersize=7, **style)
        ax.hlines(y, left, right, linewidth=0.8, alpha=0.6, **style)
        ax.vlines(x, bottom, top, linewidth=0.8, alpha=0.6, **style)
    ax.margins(0.12)
    ax.set_ylim(bottom=0)
    ax.legend(bbox_to_anchor=(-0.15, 1), ncols=3, handletextpad=0.2, **ABOVE)
    _style(ax)
    return ax


def _figure(width: float, height: float) -> Figure:
    """Of the given size in inches, unknown to pyplot."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("calrobust.plotting needs matplotlib: pip install 'calrobust[plot]'") from error
    return Figure(figsize=(width, height), dpi=200, layout="constrained")


def _check_axes(ax: object) -> None:
    if ax is not None:
        from matplotlib.axes import Axes

        check_instance(Axes, "make them with figure.add_subplot()", ax=ax)


def _style(ax: Axes) -> None:
    ax.tick_params(labelsize=FONT - 1, length=2)
    ax.spines[["top", "right"]].set_visible(False)


def _legend() -> list[Patch]:
    from matplotlib.patches import Patch

    return [Patch(label=label, **style) for label, style in BARS.items()]


def _draw_bins(ax: Axes, bins: Bins) -> None:
    n_bins, n = len(bins.counts), int(bins.counts.sum())
    width = 1 / n_bins
    filled = bins.counts.nonzero()[:, 0]
    counts = bins.counts[filled]
    confidences, accuracies = ((sums[filled] / counts).tolist() for sums in bins[1:])
    shares = (counts / counts.max()).tolist() if n else []
    centres = [(i + 0.5) * width for i in filled.tolist()]
    spans = ([0.0] * len(centres), accuracies), (accuracies, confidences), (confidences, accuracies)
    for style, span in zip(BARS.values(), spans, strict=True):
        bars = ax.bar(centres, [max(0.0, top - low) for low, top in zip(*span, strict=True)], 0.92 * width, span[0])
        for bar, share in zip(bars, shares, strict=True):
            bar.set(**style, alpha=max(FAINTEST, share**0.5), visible=bar.get_height() > 0)
    ax.plot([0, 1], [0, 1], color="black", linewidth=0.7, linestyle=(0, (4, 3)))
    ax.bar(centres, [0.8 * STRIP * share for share in shares], 0.92 * width, bottom=-STRIP, color=GREY)
    ax.axhline(0, color="black", linewidth=0.6)
    shown = f"ECE {100 * float(binned_error(bins)):.1f} %, n = {n:,}" if n else "no samples"
    ax.set_title(shown, loc="right", fontsize=FONT - 1, pad=3)
    ax.set(xlim=(0, 1), ylim=(-STRIP, 1))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks([0, 0.5, 1], ["0", "0.5", "1"])
    _style(ax)
