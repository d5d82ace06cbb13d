"""Plots, without pyplot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from calrobust._checks import check_bins, check_choice, check_instance
from calrobust.functional.calibration import binned_error
from calrobust.functional.scoring import Bins, risk_coverage_curve
from calrobust.report import ShiftReport
from calrobust.report._figures import HEADINGS, check_choices, scale_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

__all__ = ["differences", "reliability_diagram", "reliability_grid", "risk_coverage", "shift_scatter"]

COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"  # Okabe and Ito's
BLUE, VERMILION, *_ = COLOURS
GREY = "#767676"
MARKERS = "osD^v<>"
FONT, COLUMN = 7.5, 3.3  # points, inches
BARS: dict[str, dict[str, Any]] = {
    "accuracy": {"facecolor": BLUE},
    "overconfident by": {"facecolor": "#F6CDB4", "edgecolor": VERMILION, "linewidth": 0.6, "hatch": "//////"},
    "underconfident by": {"facecolor": "#C4DFF0", "edgecolor": BLUE, "linewidth": 0.6, "hatch": "......"},
}
FAINTEST = 0.15
STRIP = 0.2  # height of the histogram
ABOVE: dict[str, Any] = {"loc": "lower left", "frameon": False, "fontsize": FONT - 1, "columnspacing": 1}


def reliability_diagram(bins: Bins, ax: Axes | None = None) -> Axes:
    """Accuracy against confidence of each bin, above a histogram.

    Hatching is the gap to the mean confidence. Bins with fewer samples are fainter.

    Args:
        bins: sums ``[n_bins]`` from :func:`~calrobust.functional.bin_confidences`, a metric or a report.
        ax: axes to draw into; None makes new ones.

    Raises:
        TypeError, ValueError: ``bins`` are not sums ``[n_bins]``, or ``ax`` is not axes.

    Example:
        >>> import torch
        >>> from calrobust.functional import bin_confidences
        >>> from calrobust.plotting import reliability_diagram
        >>> bins = bin_confidences(torch.tensor([0.6, 0.7, 0.9]), torch.tensor([True, False, True]), n_bins=2)
        >>> reliability_diagram(bins).get_title(loc="right")  # |2.2 - 2| / 3
        'ECE 6.7 %, n = 3'

    Reference: Guo et al., 2017, :arxiv:`1706.04599`, figure 1.
    """
    check_bins(bins)
    if bins[0].ndim != 1:
        raise ValueError(
            f"bins must be sums of shape [n_bins], got {list(bins[0].shape)}; take one class or one set at a time"
        )
    drawn = _axes(ax, COLUMN)
    if ax is None:
        _label(drawn, "Confidence", "Accuracy")
        drawn.legend(handles=_legend(), bbox_to_anchor=(-0.15, 1.05), ncols=3, **ABOVE)
    _draw_bins(drawn, Bins(*bins))
    return drawn


def reliability_grid(report: ShiftReport, methods: Sequence[str] | None = None) -> Figure:
    """Reliability diagrams of methods, of ID and of all OOD samples.

    The pooled ECE is usually below the report's, since gaps of opposite sign cancel.

    Args:
        report: with data of ``id_domain`` for every method.
        methods: the rows; None takes the first one and the last two.

    Raises:
        TypeError, ValueError: ``report`` is incomplete, or ``methods`` are not its own.

    Example:
        >>> import torch
        >>> from calrobust import ShiftReport
        >>> from calrobust.plotting import reliability_grid
        >>> report = ShiftReport(id_domain="photo")
        >>> for domain in ("photo", "sketch"):
        ...     report.add("FT", domain, 2 * torch.eye(3), torch.tensor([0, 1, 2]))
        >>> len(reliability_grid(report).axes)  # ID and OOD of one method
        2
    """
    check_instance(ShiftReport, "make it with ShiftReport(id_domain=...)", report=report)
    report._check_complete()
    if methods is None:
        methods = list(dict.fromkeys([*report.methods[:1], *report.methods[-2:]]))
    check_choices(report.methods, methods=methods)
    columns = {"ID": [report.id_domain]}
    if ood := report.domains[1:]:
        columns["OOD, pooled"] = ood
    figure = _figure(COLUMN * (0.1 + 0.45 * len(columns)), 0.7 + 1.3 * len(methods))
    axes = figure.subplots(len(methods), len(columns), sharex=True, sharey=True, squeeze=False)
    for method, row in zip(methods, axes, strict=True):
        for domains, ax in zip(columns.values(), row, strict=True):
            first, *others = (report.bins(method, domain) for domain in domains)
            _draw_bins(ax, sum(others, start=first))
        row[0].set_ylabel(_text(method), fontsize=FONT, fontweight="bold")
    for title, ax in zip(columns, axes[0], strict=True):
        ax.set_title(f"{title}\n{ax.get_title(loc='right')}", loc="right", fontsize=FONT - 1, pad=3)
    figure.supxlabel("Confidence", fontsize=FONT)
    figure.supylabel("Accuracy", fontsize=FONT)
    figure.legend(handles=_legend(), ncols=3, **(ABOVE | {"loc": "outside upper center"}))
    return figure


def shift_scatter(report: ShiftReport, ax: Axes | None = None) -> Axes:
    """OOD ECE against OOD accuracy of each method in per cent; the lower right is best.

    Lines are 95 % intervals, of the ECE only for a single OOD domain. A dash is the noise floor.

    Args:
        report: with data of ``id_domain`` and others for every method.
        ax: as for :func:`reliability_diagram`.

    Raises:
        TypeError, ValueError: ``report`` is incomplete, or ``ax`` is not axes.

    Example:
        >>> import torch
        >>> from calrobust import ShiftReport
        >>> from calrobust.plotting import shift_scatter
        >>> report = ShiftReport(id_domain="photo")
        >>> for domain in ("photo", "sketch"):
        ...     report.add("FT", domain, 2 * torch.eye(3), torch.tensor([0, 1, 2]))
        >>> float(shift_scatter(report).lines[0].get_xdata()[0])  # OOD accuracy
        100.0
    """
    check_instance(ShiftReport, "make it with ShiftReport(id_domain=...)", report=report)
    ax = _axes(ax, 0.8 * COLUMN)
    rows = report.summary()
    _label(ax, "OOD accuracy (%)", "OOD ECE (%)")
    for i, row in enumerate(rows):
        x, left, right = (100 * row[f"ood_accuracy{end}"] for end in ("", "_low", "_high"))
        y, bottom, top, floor = (100 * row[f"ood_ece{end}"] for end in ("", "_low", "_high", "_floor"))
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "clip_on": False}
        ax.plot(x, y, MARKERS[i % len(MARKERS)], label=_text(row["method"]), markersize=5, zorder=3, **style)
        ax.plot(x, floor, "_", markersize=7, **style)
        ax.hlines(y, left, right, linewidth=0.8, alpha=0.6, **style)
        ax.vlines(x, bottom, top, linewidth=0.8, alpha=0.6, **style)
    ax.margins(0.12)
    ax.set_ylim(bottom=0)
    ax.legend(bbox_to_anchor=(-0.15, 1), ncols=3, handletextpad=0.2, **ABOVE)
    _style(ax)
    return ax


def risk_coverage(
    report: ShiftReport | Tensor, correct: Tensor | None = None, domain: str | None = None, ax: Axes | None = None
) -> Axes:
    """Error rate of the most confident predictions against their share, in per cent.

    Args:
        report: a ``ShiftReport``, or confidences as for :func:`~calrobust.functional.risk_coverage_curve`.
        correct: likewise, with confidences.
        domain: of the report; None is ``id_domain``.
        ax: as for :func:`reliability_diagram`.

    Raises:
        TypeError, ValueError: a method lacks the domain, data are invalid, or ``ax`` is not axes.

    Example:
        >>> import torch
        >>> from calrobust.plotting import risk_coverage
        >>> ax = risk_coverage(torch.tensor([0.9, 0.6]), torch.tensor([True, False]))
        >>> ax.lines[0].get_ydata()
        array([ 0., 50.])
    """
    if isinstance(report, ShiftReport):
        if correct is not None:
            raise TypeError(f"correct must be None with a report, got {correct!r}")
        report._check_has_data()
        domain = report.id_domain if domain is None else domain
        samples = {method: report._samples_of(method, domain) for method in report.methods}
        data: dict[str, Any] = {method: (each["certainties"], each["correct"]) for method, each in samples.items()}
    elif domain is not None:
        raise TypeError(f"domain must be None without a report, got {domain!r}")
    else:
        data = {"": (report, correct)}
    curves = {method: 100 * risk_coverage_curve(*each).cpu() for method, each in data.items()}
    ax = _axes(ax, 0.8 * COLUMN)
    for i, (method, curve) in enumerate(curves.items()):
        coverages = 100 * curve.new_ones(len(curve)).cumsum(0) / len(curve)
        label = f"{_text(method)} ({curve.mean():.2f})".strip()
        ax.plot(coverages.numpy(), curve.numpy(), color=COLOURS[i % len(COLOURS)], linewidth=1, label=label)
    ax.set(xlim=(0, 100), ylim=(0, None))
    _label(ax, "Coverage (%)", "Error rate (%)")
    ax.legend(title="AURC in brackets", title_fontsize=FONT - 1, bbox_to_anchor=(-0.15, 1), ncols=2, **ABOVE)
    _style(ax)
    return ax


def differences(
    report: ShiftReport, method: str, columns: Sequence[str] = ("ood_accuracy", "ood_nll", "ood_nll_own_t", "ood_aurc")
) -> Figure:
    """Figures of the other methods minus those of one, with 95 % intervals.

    Values are those of :meth:`~calrobust.ShiftReport.compare`. Filled markers have an interval without 0.

    Args:
        report: with the same samples for every method.
        method: what the others are compared with.
        columns: as for ``report.to_markdown``.

    Raises:
        TypeError, ValueError: as for these two methods.

    Example:
        >>> import torch
        >>> from calrobust import ShiftReport
        >>> from calrobust.plotting import differences
        >>> report = ShiftReport(id_domain="photo")
        >>> for name, logit in ("FT", 1.0), ("CaRot", 3.0):
        ...     report.add(name, "photo", torch.tensor([[0.0, logit]]), torch.tensor([1]))
        >>> figure = differences(report, "FT", ["id_accuracy"])
        >>> float(figure.axes[0].lines[1].get_xdata()[0])
        0.0
    """
    check_instance(ShiftReport, "make it with ShiftReport(id_domain=...)", report=report)
    check_choices([*HEADINGS][1:], columns=columns)  # not the temperature
    check_choice(report.methods, method=method)
    others = [other for other in report.methods if other != method]
    if not others:
        raise ValueError(f"report must hold methods to compare with {method!r}, got none; add another")
    rows = [report.compare(other, method) for other in others]
    figure = _figure(COLUMN * (0.4 + 0.4 * len(columns)), 0.6 + 0.2 * len(rows))
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for column, ax in zip(columns, axes, strict=True):
        factor = scale_of(column)[0]
        ax.axvline(0, color=GREY, linewidth=0.7)
        for i, row in enumerate(rows):
            value, low, high = (factor * row[f"{column}{end}"] for end in ("", "_low", "_high"))
            style = {"color": COLOURS[i % len(COLOURS)], "clip_on": False}
            ax.plot(value, i, "o", markersize=4, fillstyle="full" if low * high > 0 else "none", **style)
            ax.hlines(i, low, high, linewidth=0.8, **style)
        ax.set_title(f"{HEADINGS[column]}{' (%)' if factor > 1 else ''}", fontsize=FONT - 1)
        _style(ax)
    axes[0].set_yticks(range(len(rows)), map(_text, others), fontsize=FONT)
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.supxlabel(f"Difference from {_text(method)}", fontsize=FONT)
    return figure


def _text(name: str) -> str:
    name = name.replace("$", r"\$")  # else a formula
    return f"\N{ZERO WIDTH SPACE}{name}" if name.startswith("_") else name  # else not in legends


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("calrobust.plotting needs matplotlib: pip install 'calrobust[plot]'") from error
    return Figure(figsize=(width, height), dpi=200, layout="constrained")


def _axes(ax: Axes | None, height: float) -> Axes:
    if ax is None:
        return _figure(COLUMN, height).add_subplot()
    from matplotlib.axes import Axes

    check_instance(Axes, "make them with figure.add_subplot()", ax=ax)
    return ax


def _label(ax: Axes, x: str, y: str) -> None:
    ax.set_xlabel(x, fontsize=FONT)
    ax.set_ylabel(y, fontsize=FONT)


def _style(ax: Axes) -> None:
    ax.tick_params(labelsize=FONT - 1, length=2)
    ax.spines[["top", "right"]].set_visible(False)


def _legend() -> list[Patch]:
    from matplotlib.patches import Patch

    return [Patch(label=label, **style) for label, style in BARS.items()]


def _draw_bins(ax: Axes, bins: Bins) -> None:
    filled = bins.counts.nonzero()[:, 0]
    counts, confidence_sums, correct_sums = (sums[filled] for sums in bins)
    accuracies, confidences = correct_sums / counts, confidence_sums / counts
    shares = (counts / bins.counts.max()).tolist()
    width = 1 / len(bins.counts)
    centres = ((filled + 0.5) * width).tolist()
    spans = (0 * accuracies, accuracies), (accuracies, confidences), (confidences, accuracies)
    for style, (low, top) in zip(BARS.values(), spans, strict=True):
        bars = ax.bar(centres, (top - low).clamp(min=0).tolist(), 0.92 * width, low.tolist())
        for bar, share in zip(bars, shares, strict=True):
            bar.set(**style, alpha=max(FAINTEST, share**0.5), visible=bar.get_height() > 0)
    ax.bar(centres, [0.8 * STRIP * share for share in shares], 0.92 * width, bottom=-STRIP, color=GREY)
    ax.plot([0, 1], [0, 1], color="black", linewidth=0.7, linestyle=(0, (4, 3)))
    ax.axhline(0, color="black", linewidth=0.6)
    n = int(bins.counts.sum())
    shown = f"ECE {100 * float(binned_error(bins)):.1f} %, n = {n:,}" if n else "no samples"
    ax.set_title(shown, loc="right", fontsize=FONT - 1, pad=3)
    ax.set(xlim=(0, 1), ylim=(-STRIP, 1))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks([0, 0.5, 1], ["0", "0.5", "1"])
    _style(ax)
