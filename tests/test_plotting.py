from __future__ import annotations

import ast
import io
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree

import matplotlib as mpl
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import same_color
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text
from strategies import classifier

from calrobust.functional.calibration import bin_confidences, binned_error
from calrobust.functional.scoring import Bins
from calrobust.plotting import (
    BLUE,
    FAINTEST,
    GREY,
    differences,
    reliability_diagram,
    reliability_grid,
    risk_coverage,
    shift_scatter,
)
from calrobust.report import ShiftReport

METHODS = ("ZS", "FT", "FT w/ LS", "WiSE-FT", "WiSE-FT w/ LS", "FLYP", "FLYP w/ LS", "CaRot", "CaRot (NeurIPS)")


def make_report(
    methods: tuple[str, ...] = METHODS[:3], domains: tuple[str, ...] = ("photo", "sketch"), n: int = 200
) -> ShiftReport:
    """Makes a report of methods that differ, in domains that differ."""
    report = ShiftReport(id_domain="photo")
    for (i, method), (j, domain) in itertools.product(enumerate(methods), enumerate(domains)):
        report.add(method, domain, *classifier(n, 5, 10 * i + j, sharpness=0.4 + 0.1 * i))
    return report


def toy_bins() -> Bins:
    """Makes four bins: one empty, one overconfident by 1/4, one underconfident by 0.1, one exact."""
    counts, confidences, correct = [0.0, 4.0, 2.0, 1.0], [0.0, 2.0, 0.8, 1.0], [0.0, 1.0, 1.0, 1.0]
    return Bins(*torch.tensor([counts, confidences, correct], dtype=torch.float64))


def bars(ax: Axes, index: int) -> list[tuple[float, float, float]]:
    """Returns centre, lower and upper end of each bar of a container."""
    container = cast(BarContainer, ax.containers[index])
    return [(p.get_x() + p.get_width() / 2, p.get_y(), p.get_y() + p.get_height()) for p in container]


PLOTS: dict[str, Callable[[], Figure]] = {
    "diagram": lambda: cast(Figure, reliability_diagram(toy_bins()).figure),
    "grid": lambda: reliability_grid(make_report(METHODS[:2])),
    "risk": lambda: cast(Figure, risk_coverage(make_report()).figure),
    "scatter": lambda: cast(Figure, shift_scatter(make_report()).figure),
}


@pytest.mark.parametrize("draw", PLOTS.values(), ids=PLOTS)
def test_a_plot_can_be_read_at_the_width_of_a_column(draw: Callable[[], Figure]) -> None:
    """It is 3.3 inches wide, and no text is below 6 points."""
    figure = draw()
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_text()]
    assert figure.get_figwidth() == pytest.approx(3.3)
    assert texts
    assert min(float(text.get_fontsize()) for text in texts) >= 6


def test_a_curve_of_risk_ends_at_the_error_rate() -> None:
    """One for each method, in per cent over coverages up to 100, with its AURC in the legend."""
    report = make_report()
    ax = risk_coverage(report, domain="sketch", ax=Figure().add_subplot())
    rows = {row["method"]: row for row in report.per_domain() if row["domain"] == "sketch"}
    for line, (method, row) in zip(ax.lines, rows.items(), strict=True):
        x, y = (torch.as_tensor(data) for data in line.get_data())
        assert len(x) == row["n"]
        assert (float(x[-1]), float(y[-1])) == pytest.approx((100, 100 * (1 - row["accuracy"])))
        assert line.get_label() == f"{method} ({100 * row['aurc']:.2f})"
    assert [str(line.get_label())[:3] for line in risk_coverage(report).lines] == ["ZS ", "FT ", "FT "]


def test_the_legend_of_the_curves_fits_into_the_figure() -> None:
    """It would narrow the axes and be cut: names of three methods with their AURC take two columns."""
    report = ShiftReport(id_domain="photo")
    for name in ("calibrated", "overconfident", "unsure at random"):
        report.add(name, "photo", *classifier(50, 5, 0))
    ax = risk_coverage(report)
    figure = cast(Figure, ax.figure)
    figure.canvas.draw()
    legend = cast(Legend, ax.get_legend()).get_window_extent()
    assert legend.x0 >= 0
    assert legend.x1 <= figure.bbox.width
    assert ax.get_window_extent().width > 0.7 * figure.bbox.width


def test_differences_are_those_of_the_comparison() -> None:
    """A row for each other method, a column for each figure; filled where the interval excludes 0."""
    report, columns = ShiftReport(id_domain="photo"), ["id_nll", "ood_accuracy", "ood_ece"]
    for (i, method), domain in itertools.product(enumerate(METHODS[:3]), ("photo", "sketch")):
        logits, target = classifier(500, 5, 0, sharpness=0.5)
        report.add(method, domain, logits * (1 + i) + i * 0.1 * logits.flip(1), target)
    figure = differences(report, "FT", columns)
    assert [ax.get_title() for ax in figure.axes] == ["ID NLL", "OOD accuracy (%)", "OOD ECE (%)"]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["ZS", "FT w/ LS"]
    for ax, column in zip(figure.axes, columns, strict=True):
        factor = 1 if column == "id_nll" else 100
        for line, other in zip(ax.lines[1:], ("ZS", "FT w/ LS"), strict=True):
            found = report.compare(other, "FT")
            assert cast(Any, line).get_xdata()[0] == pytest.approx(factor * found[column])
            excludes_0 = found[column + "_low"] * found[column + "_high"] > 0
            assert (line.get_fillstyle() == "full") == excludes_0
    assert len(differences(make_shared(), "ZS").axes) == 4


def make_shared() -> ShiftReport:
    """Makes a report whose methods share their samples."""
    report = ShiftReport(id_domain="photo")
    for (i, method), domain in itertools.product(enumerate(METHODS[:2]), ("photo", "sketch")):
        report.add(
            method, domain, *((1 + i) * part if part.is_floating_point() else part for part in classifier(50, 5, 0))
        )
    return report


def shown(ax: Axes, index: int) -> list[tuple[float, float, float]]:
    """Returns the visible bars of a container."""
    container = cast(BarContainer, ax.containers[index])
    return [bar for bar, patch in zip(bars(ax, index), container, strict=True) if patch.get_visible()]


def test_a_diagram_shows_accuracy_and_the_gap_to_confidence_of_each_bin_that_has_samples() -> None:
    """Bars end at the accuracy. Overconfidence is hatched beyond the end, and underconfidence below it."""
    ax = reliability_diagram(toy_bins())
    assert shown(ax, 0) == [pytest.approx(bar) for bar in ((0.375, 0, 0.25), (0.625, 0, 0.5), (0.875, 0, 1))]
    assert shown(ax, 1) == [pytest.approx((0.375, 0.25, 0.5))]
    assert shown(ax, 2) == [pytest.approx((0.625, 0.4, 0.5))]
    assert same_color(cast(BarContainer, ax.containers[0])[0].get_facecolor()[:3], BLUE)


def test_bins_of_few_samples_are_faint() -> None:
    """Opacity is the root of the count over the largest count, and never so low that a bar is lost."""
    ax = reliability_diagram(Bins(*(sums * torch.tensor([1, 1, 1, 1e-4]) for sums in toy_bins())))
    for index in range(3):
        alphas = [bar.get_alpha() for bar in cast(BarContainer, ax.containers[index])]
        assert alphas == pytest.approx([1, (2 / 4) ** 0.5, FAINTEST])


@pytest.mark.parametrize(
    "draw", [lambda: reliability_diagram(toy_bins()).figure, lambda: reliability_grid(make_report())]
)
def test_no_word_lies_over_the_bars(draw: Callable[[], Any]) -> None:
    """Legends and titles are above the axes and do not overlap, also for an underconfident model."""
    figure = cast(Figure, draw())
    figure.draw_without_rendering()
    words = [legend.get_window_extent() for ax in figure.axes if (legend := ax.get_legend())]
    words += [legend.get_window_extent() for legend in figure.legends]
    words += [ax.title.get_window_extent() for ax in figure.axes if ax.get_title()]
    words += [cast(Any, ax)._right_title.get_window_extent() for ax in figure.axes]
    assert len(words) > 1
    for ax, box in itertools.product(figure.axes, words):
        assert not box.overlaps(ax.get_window_extent())
    for a, b in itertools.combinations(words, 2):
        assert not a.overlaps(b)


def test_a_legend_names_what_bars_and_hatching_are() -> None:
    """Its keys look like the bars of the same name, in a single diagram and over a grid."""
    ax = reliability_diagram(toy_bins())
    for legend in (cast(Legend, ax.get_legend()), *reliability_grid(make_report()).legends):
        assert [text.get_text() for text in legend.get_texts()] == [
            "accuracy",
            "overconfident by",
            "underconfident by",
        ]
        for key, drawn in zip(legend.get_patches(), ax.containers, strict=False):
            bar = cast(BarContainer, drawn)[0]
            assert (key.get_facecolor()[:3], key.get_hatch()) == (bar.get_facecolor()[:3], bar.get_hatch())


def test_a_diagram_shows_where_the_samples_are() -> None:
    """A histogram below the axis has bars in proportion to the counts, and the title has their number."""
    ax = reliability_diagram(toy_bins())
    heights = [upper - lower for _, lower, upper in bars(ax, 3)]
    assert [height / heights[0] for height in heights] == pytest.approx([1, 2 / 4, 1 / 4])
    assert all(upper < 0 for _, _, upper in bars(ax, 3))
    assert same_color(cast(BarContainer, ax.containers[3])[0].get_facecolor(), GREY)
    assert ax.get_title(loc="right") == f"ECE {100 * float(binned_error(toy_bins())):.1f} %, n = 7"


def test_the_diagonal_is_where_confidence_is_accuracy() -> None:
    """It runs from corner to corner."""
    ax = reliability_diagram(toy_bins())
    assert cast(Any, ax.lines[0].get_xydata()).tolist() == [[0, 0], [1, 1]]
    assert ax.get_xlim() == (0, 1)
    assert ax.get_ylim()[1] == 1


def test_bins_without_samples_give_an_empty_diagram() -> None:
    """The diagram says so, and nothing is divided by zero."""
    ax = reliability_diagram(bin_confidences(torch.empty(0), torch.empty(0, dtype=torch.bool)))
    assert ax.get_title(loc="right") == "no samples"
    assert all(bars(ax, index) == [] for index in range(4))


@pytest.mark.parametrize(
    "draw", [lambda ax: reliability_diagram(toy_bins(), ax), lambda ax: shift_scatter(make_report(), ax)]
)
def test_given_axes_are_drawn_into_and_returned(draw: Callable[[Axes], Axes]) -> None:
    """They may be a panel of the user's own figure or subfigure. Nothing else is created."""
    figure = Figure()
    ax = cast(Any, figure.subfigures(1, 2))[1].subplots()
    assert draw(ax) is ax
    assert figure.axes == [ax]
    assert ax.containers or ax.lines


def test_a_grid_has_a_row_for_each_method_and_a_column_for_id_and_ood() -> None:
    """Rows are named by method, in the order asked for. The right column pools all OOD domains."""
    report, methods = make_report(domains=("photo", "sketch", "clipart")), ["FT w/ LS", "ZS"]
    axes = reliability_grid(report, methods).axes
    assert [ax.get_ylabel() for ax in axes[::2]] == methods
    assert [ax.get_title(loc="right").split("\n")[0] for ax in axes[:2]] == ["ID", "OOD, pooled"]
    for method, left, right in zip(methods, axes[::2], axes[1::2], strict=True):
        pooled = report.bins(method, "sketch") + report.bins(method, "clipart")
        for ax, bins in ((left, report.bins(method, "photo")), (right, pooled)):
            filled = bins.counts > 0
            assert [upper for _, _, upper in bars(ax, 0)] == pytest.approx(
                (bins.correct_sums[filled] / bins.counts[filled]).tolist()
            )
            assert ax.get_title(loc="right").endswith(f"n = {int(bins.counts.sum())}")


@pytest.mark.parametrize("n", [1, 2, 3, 4, 9])
def test_a_grid_has_three_rows_at_most_unless_asked(n: int) -> None:
    """They are the first method, with which others are compared, and the last two."""
    shown = [ax.get_ylabel() for ax in reliability_grid(make_report(METHODS[:n])).axes[::2]]
    assert shown == list(METHODS[:n] if n <= 3 else (METHODS[0], *METHODS[n - 2 : n]))


def test_a_grid_without_ood_domains_has_one_column() -> None:
    """There is nothing to pool."""
    axes = reliability_grid(make_report(METHODS[:2], ("photo",))).axes
    assert axes[0].get_title(loc="right").startswith("ID\n")
    assert len(axes) == 2


@pytest.mark.parametrize("domains", [("photo", "sketch"), ("photo", "sketch", "clipart")])
def test_a_scatter_has_a_marker_in_the_legend_for_each_method(domains: tuple[str, ...]) -> None:
    """It is at OOD accuracy and ECE in per cent. Lines are as long as the intervals, and a dash is the noise floor."""
    report = make_report(METHODS, domains, 400)  # fewer would have no interval
    ax = shift_scatter(report)
    handles, labels = ax.get_legend_handles_labels()
    assert labels == report.methods
    assert len({(line.get_marker(), line.get_color()) for line in cast(Any, handles)}) == len(METHODS)
    spans = [cast(Any, c).get_segments()[0] for c in ax.collections]
    for i, row in enumerate(report.summary()):
        marker, floor = (cast(Any, line.get_xydata())[0] for line in ax.lines[2 * i : 2 * i + 2])
        assert marker.tolist() == pytest.approx([100 * row["ood_accuracy"], 100 * row["ood_ece"]])
        assert floor.tolist() == pytest.approx([100 * row["ood_accuracy"], 100 * row["ood_ece_floor"]])
        across, along = spans[2 * i : 2 * i + 2]
        assert across[:, 0].tolist() == pytest.approx([100 * row[f"ood_accuracy_{end}"] for end in ("low", "high")])
        if len(domains) == 2:  # the mean of several OOD domains has no interval
            ends = [100 * row[f"ood_ece_{end}"] for end in ("low", "high")]
            assert along[:, 1].tolist() == pytest.approx(ends)
    assert ax.get_ylim()[0] == 0


def test_the_legend_of_a_scatter_is_above_its_axes() -> None:
    """No name hides a marker, even of nine methods at nearly the same place."""
    ax = shift_scatter(make_report(METHODS))
    cast(Figure, ax.figure).draw_without_rendering()
    assert not cast(Legend, ax.get_legend()).get_window_extent().overlaps(ax.get_window_extent())


@pytest.mark.parametrize("draw", PLOTS.values(), ids=PLOTS)
def test_every_plot_renders_and_leaves_settings_alone(draw: Callable[[], Figure]) -> None:
    """It makes a PNG without a warning, and rcParams stay the user's."""
    before = dict(mpl.rcParams)
    picture = io.BytesIO()
    draw().savefig(picture, format="png")
    assert picture.getvalue().startswith(b"\x89PNG")
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("draw", [shift_scatter, risk_coverage])
def test_a_name_with_an_underscore_first_is_in_the_legend(draw: Callable[[ShiftReport], Axes]) -> None:
    """Matplotlib leaves out such labels."""
    ax = draw(make_report(("_base", "FT")))
    cast(Figure, ax.figure).savefig(io.BytesIO(), format="png")  # a missing glyph would warn
    names = [text.get_text() for text in cast(Legend, ax.get_legend()).get_texts()]
    assert [name.split()[0].strip("\N{ZERO WIDTH SPACE}") for name in names] == ["_base", "FT"]


def test_a_dollar_in_a_name_is_a_dollar() -> None:
    """And no formula, which might not even be one."""
    report = ShiftReport(id_domain="photo")
    for method, domain in itertools.product(("a$x_$", "b$"), ("photo", "sketch")):
        report.add(method, domain, *classifier(200, 5, 0))
    figures = [reliability_grid(report), differences(report, "b$"), differences(report, "a$x_$")]
    figures += [cast(Figure, draw(report).figure) for draw in (shift_scatter, risk_coverage)]
    for figure in figures:
        figure.savefig(picture := io.BytesIO(), format="svg", metadata={"Date": None})
        assert b"$" in picture.getvalue()


@pytest.mark.parametrize("draw", PLOTS.values(), ids=PLOTS)
def test_text_stays_text_in_files_saved_as_the_guide_says(draw: Callable[[], Figure]) -> None:
    """An SVG holds words and a PDF holds TrueType. By default matplotlib writes outlines and Type 3."""
    guide = (Path(__file__).parent.parent / "docs" / "guides" / "shift.md").read_text(encoding="utf-8")
    recommended = ast.literal_eval(guide.split("rc_context(")[1].split(")")[0])
    svg, pdf = io.StringIO(), io.BytesIO()
    with mpl.rc_context(recommended):
        figure = draw()
        figure.savefig(svg, format="svg")
        figure.savefig(pdf, format="pdf")
    shown = {line for text in figure.findobj(Text) if text.get_visible() for line in text.get_text().split("\n")}
    texts = ElementTree.fromstring(svg.getvalue()).iter("{http://www.w3.org/2000/svg}text")
    written = {"".join(text.itertext()).strip() for text in texts}
    assert written <= shown
    assert [line for line in shown - written if not line.isdigit()] == [""]  # a tick may lie outside the axes
    assert b"/CIDFontType2" in pdf.getvalue()
    assert b"/Type3" not in pdf.getvalue()


def test_pyplot_is_never_imported() -> None:
    """So there is no current figure to change and none to close."""
    program = (
        "import sys, torch; from calrobust.report import ShiftReport; from calrobust import plotting\n"
        "assert 'matplotlib' not in sys.modules\n"
        "report = ShiftReport(id_domain='a')\n"
        "for d in 'ab': report.add('FT', d, 2 * torch.eye(3), torch.tensor([0, 1, 1]))\n"
        "plotting.reliability_grid(report); plotting.shift_scatter(report)\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


@pytest.mark.parametrize("draw", PLOTS.values(), ids=PLOTS)
def test_without_matplotlib_the_error_names_the_extra(draw: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It can be pasted into a shell."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'calrobust\[plot\]'"):
        draw()
