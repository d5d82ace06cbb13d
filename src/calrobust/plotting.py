"""Reliability diagrams, and calibration against accuracy under shift.

matplotlib is imported on use, and neither its pyplot interface nor its settings are touched: a figure made here is
nobody's current figure. Save it with ``figure.savefig``; in a notebook, a figure that ends a cell is shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from calrobust._checks import check_bins, check_instance, check_one_row
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
DISTANCES = (7, 12, 18, 26, 36, 48, 62)  # of a label from its marker, in points
FAR = 12  # from here on a line joins the two
BARS: dict[str, dict[str, Any]] = {
    "accuracy": {"facecolor": BLUE},
    "overconfident by": {"facecolor": "#F6CDB4", "edgecolor": VERMILION, "linewidth": 0.6, "hatch": "//////"},
    "underconfident by": {"facecolor": "#C4DFF0", "edgecolor": BLUE, "linewidth": 0.6, "hatch": "......"},
}
STRIP = 0.2  # height of the histogram under a reliability diagram, in units of its accuracy axis


def reliability_diagram(bins: Bins, ax: Axes | None = None) -> Axes:
    """Accuracy against confidence, bin by bin, with the gap between the two and, below, where the samples lie.

    A bar is a bin's accuracy. Hatched is what lies between it and the bin's mean confidence. The grey strip under the
    axis is the histogram of confidences: a tall gap over few samples is little evidence.

    Args:
        bins: sums of shape ``[n_bins]`` over bins of equal width, as :func:`~calrobust.functional.bin_confidences` or
            :meth:`ShiftReport.bins <calrobust.ShiftReport.bins>` gives them.
        ax: axes to draw into; None makes a figure of its own, ``reliability_diagram(bins).figure``.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: ``bins`` is no triple of floating tensors, or ``ax`` no axes.
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
    check_one_row(bins=bins)
    _check_axes(ax)
    bins = Bins(*bins)
    if ax is None:
        ax = _figure(COLUMN, COLUMN).add_subplot()
        ax.set_xlabel("Confidence", fontsize=FONT)
        ax.set_ylabel("Accuracy", fontsize=FONT)
        _draw_bins(ax, bins)
        ax.legend(handles=_legend(), fontsize=FONT - 1, loc="upper left", bbox_to_anchor=(0, 0.88), frameon=False)
    else:
        _draw_bins(ax, bins)
    return ax


def reliability_grid(report: ShiftReport) -> Figure:
    """A reliability diagram of every method, in distribution (left) and of all OOD samples together (right).

    Pooling weighs OOD samples, not domains, alike, and lets the gaps of domains cancel, so the ECE of the pooled bins,
    which each panel names, is not the report's mean OOD ECE, and usually below it.

    Args:
        report: with data of ``id_domain`` for every method.

    Returns:
        A figure of one row a method; without OOD domains it has the left column only.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: ``report`` is no :class:`~calrobust.ShiftReport`.
        ValueError: as :meth:`ShiftReport.summary <calrobust.ShiftReport.summary>`.

    Example:
        >>> import torch
        >>> from calrobust import ShiftReport
        >>> from calrobust.plotting import reliability_grid
        >>> report = ShiftReport(id_domain="photo")
        >>> for domain in ("photo", "sketch"):
        ...     report.add("FT", domain, torch.eye(3), torch.tensor([0, 1, 2]))
        >>> figure = reliability_grid(report)
        >>> [ax.get_title() for ax in figure.axes]
        ['ID', 'OOD, pooled']
    """
    check_instance(ShiftReport, "make it with ShiftReport(id_domain=...)", report=report)
    methods = [row["method"] for row in report.summary()]
    groups = {"ID": [report.id_domain], "OOD, pooled": report.domains[1:]}
    columns = {title: domains for title, domains in groups.items() if domains}
    figure = _figure(COLUMN * (0.1 + 0.45 * len(columns)), 0.7 + 1.15 * len(methods))
    axes = figure.subplots(len(methods), len(columns), sharex=True, sharey=True, squeeze=False)
    for title, ax in zip(columns, axes[0], strict=True):
        ax.set_title(title, fontsize=FONT + 0.5)
    for method, row in zip(methods, axes, strict=True):
        for domains, ax in zip(columns.values(), row, strict=True):
            first, *others = (report.bins(method, domain) for domain in domains)
            _draw_bins(ax, sum(others, start=first))
        row[0].set_ylabel(method, fontsize=FONT, fontweight="bold")
    figure.supxlabel("Confidence", fontsize=FONT)
    figure.supylabel("Accuracy", fontsize=FONT)
    style: dict[str, Any] = {"fontsize": FONT - 1, "frameon": False, "ncols": 3, "columnspacing": 1}
    figure.legend(handles=_legend(), loc="outside upper center", **style)
    return figure


def shift_scatter(report: ShiftReport, ax: Axes | None = None) -> Axes:
    """OOD ECE against OOD accuracy, one marker a method, with 95 % bootstrap intervals; good is at the lower right.

    Args:
        report: with data of ``id_domain`` and at least one other domain for every method.
        ax: axes to draw into; None makes a figure of its own, ``shift_scatter(report).figure``. Labels are placed for
            the size that the axes have.

    Returns:
        The axes, in per cent.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: ``report`` is no :class:`~calrobust.ShiftReport`, or ``ax`` no axes.
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
    points = []
    for i, row in enumerate(rows):
        x, left, right = (100 * row[f"ood_accuracy{end}"] for end in ("", "_low", "_high"))
        y, bottom, top = (100 * row[f"ood_ece{end}"] for end in ("", "_low", "_high"))
        colour = COLOURS[i % len(COLOURS)]
        ax.plot(x, y, MARKERS[i % len(MARKERS)], color=colour, markersize=5, clip_on=False, zorder=3)
        ax.hlines(y, left, right, color=colour, linewidth=0.8, alpha=0.6)
        ax.vlines(x, bottom, top, color=colour, linewidth=0.8, alpha=0.6)
        points.append(_Point(row["method"], colour, (x, y), ((left, y), (right, y)), ((x, bottom), (x, top))))
    ax.set_ylim(bottom=0)
    ax.margins(0.12)
    _style(ax)
    _label(ax, points)
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
    filled = [i for i, count in enumerate(bins.counts.tolist()) if count]
    counts, confidences, accuracies = (
        values[filled].tolist()
        for values in (bins.counts, bins.confidence_sums / bins.counts, bins.correct_sums / bins.counts)
    )
    centres = [(i + 0.5) * width for i in filled]
    spans = ([0.0] * len(filled), accuracies), (accuracies, confidences), (confidences, accuracies)
    for style, span in zip(BARS.values(), spans, strict=True):
        shown = [(centre, low, high - low) for centre, low, high in zip(centres, *span, strict=True) if high > low]
        places, bottoms, heights = zip(*shown, strict=True) if shown else ((), (), ())
        ax.bar(places, heights, 0.92 * width, bottoms, **style)
    ax.plot([0, 1], [0, 1], color="black", linewidth=0.7, linestyle=(0, (4, 3)))
    tallest = max(counts, default=1)
    ax.bar(centres, [0.8 * STRIP * c / tallest for c in counts], 0.92 * width, bottom=-STRIP, color=GREY)
    ax.axhline(0, color="black", linewidth=0.6)
    ax.text(
        0.03,
        0.97,
        f"ECE {100 * float(binned_error(bins)):.1f} %\nn = {n:,}" if n else "no samples",
        transform=ax.transAxes,
        va="top",
        fontsize=FONT - 1,
        bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1},
    )
    ax.set(xlim=(0, 1), ylim=(-STRIP, 1))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks([0, 0.5, 1], ["0", "0.5", "1"])
    _style(ax)


class _Point(NamedTuple):
    """What is drawn of a method, in the axes' data coordinates."""

    label: str
    colour: str
    place: tuple[float, float]
    across: tuple[tuple[float, float], tuple[float, float]]  # the ends of its intervals
    along: tuple[tuple[float, float], tuple[float, float]]


def _label(ax: Axes, points: Sequence[_Point]) -> None:
    """Writes each label near its point, where it hides least of the markers, intervals and labels that are there."""
    figure = ax.figure.figure  # the whole one, also of axes in a subfigure
    figure.draw_without_rendering()  # the layout, hence where points are, is decided only now
    unit = figure.dpi / 72  # pixels a point
    frame = _Box(*ax.get_window_extent().extents)

    def box_around(ends: Sequence[tuple[float, float]], margin: float) -> _Box:
        (x0, y0), (x1, y1) = ax.transData.transform(ends).tolist()
        return _Box(x0 - margin * unit, y0 - margin * unit, x1 + margin * unit, y1 + margin * unit)

    intervals = [box_around(ends, 1) for point in points for ends in (point.across, point.along)]
    markers = [box_around([point.place] * 2, 4) for point in points]
    labels: list[_Box] = []
    for i, point in enumerate(points):
        text = ax.annotate(
            point.label, point.place, (0, 0), textcoords="offset points", va="center", fontsize=FONT - 0.5
        )
        width, height = text.get_window_extent().size
        x, y = ax.transData.transform(point.place).tolist()
        others = markers[:i] + markers[i + 1 :] + labels
        boxes = {}
        for distance in DISTANCES:
            for angle in range(0, 360, 15):
                right, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
                # It is the nearest edge of the text that keeps this distance, not its centre.
                left = x + distance * unit * right + width * (right - 1) / 2
                bottom = y + distance * unit * up + height * (up - 1) / 2
                box = _Box(left, bottom, left + width, bottom + height)
                hidden = width * height - _overlap(box, frame)
                hidden += sum(_overlap(box, other) for other in [*others, markers[i]])
                hidden += sum(_overlap(box, interval) for interval in intervals) / 2  # thin lines: less of a loss
                boxes[hidden + distance * unit, -right] = box, distance  # to the right, if nothing else matters
        box, distance = boxes[min(boxes)]
        labels.append(_Box(box.x0 - unit, box.y0 - unit, box.x1 + unit, box.y1 + unit))
        text.set_position(((box.x0 - x) / unit, ((box.y0 + box.y1) / 2 - y) / unit))
        if distance > FAR:
            line = {"arrowstyle": "-", "linewidth": 0.6, "color": point.colour, "shrinkA": 0, "shrinkB": 0}
            nearest = min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1)
            offset = (nearest[0] - x) / unit, (nearest[1] - y) / unit
            ax.annotate("", point.place, offset, textcoords="offset points", arrowprops=line)


class _Box(NamedTuple):
    """In pixels; matplotlib's own boxes are too slow to try hundreds of places."""

    x0: float
    y0: float
    x1: float
    y1: float


def _overlap(a: _Box, b: _Box) -> float:
    """Area in common."""
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(0.0, width) * max(0.0, height)
