from __future__ import annotations

import ast
import functools
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
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.colors import same_color
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Annotation, Text
from strategies import classifier

from calrobust.functional.calibration import Bins, bin_confidences, binned_error
from calrobust.plotting import BLUE, GREY, reliability_diagram, reliability_grid, shift_scatter
from calrobust.report import ShiftReport

TOLERANCE = 0.5  # root mean square of the differences between two pictures, of 255
METHODS = ("ZS", "FT", "FT w/ LS", "WiSE-FT", "WiSE-FT w/ LS", "FLYP", "FLYP w/ LS", "CaRot", "CaRot (NeurIPS)")


def make_report(methods: tuple[str, ...] = METHODS[:3], domains: tuple[str, ...] = ("photo", "sketch")) -> ShiftReport:
    """Of methods that differ, in domains that differ."""
    report = ShiftReport(id_domain="photo")
    for (i, method), (j, domain) in itertools.product(enumerate(methods), enumerate(domains)):
        report.add(method, domain, *classifier(200, 5, 10 * i + j, sharpness=0.4 + 0.1 * i))
    return report


def toy_bins() -> Bins:
    """Of four bins: one empty, one overconfident by 1/4, one underconfident by 0.1, one exact."""
    counts, confidences, correct = [0.0, 4.0, 2.0, 1.0], [0.0, 2.0, 0.8, 1.0], [0.0, 1.0, 1.0, 1.0]
    return Bins(*torch.tensor([counts, confidences, correct], dtype=torch.float64))


def bars(ax: Axes, index: int) -> list[tuple[float, float, float]]:
    """Of one container: centre, lower and upper end."""
    container = cast(BarContainer, ax.containers[index])
    return [(p.get_x() + p.get_width() / 2, p.get_y(), p.get_y() + p.get_height()) for p in container]


def method_labels(ax: Axes) -> list[Annotation]:
    """The names in a scatter, without the lines that join them to markers."""
    return [text for text in ax.texts if isinstance(text, Annotation) and text.get_text()]


PLOTS: dict[str, Callable[[], Figure]] = {
    "diagram": lambda: cast(Figure, reliability_diagram(toy_bins()).figure),
    "grid": lambda: reliability_grid(make_report(METHODS[:2])),
    "scatter": lambda: cast(Figure, shift_scatter(make_report()).figure),
}


def picture(draw: Callable[[], Figure]) -> Callable[[], Figure]:
    """A test that what is drawn looks as it did: as the picture in ``tests/baseline``, to which pytest-mpl compares it.

    Without text and legends and in fixed places, so that the fonts of another matplotlib change nothing: other tests
    read them. To draw the baselines anew, after a change that is meant: ``pytest tests/test_plotting.py
    --mpl-generate-path=tests/baseline``.
    """

    @pytest.mark.mpl_image_compare(style="default", tolerance=TOLERANCE, savefig_kwargs={"dpi": 100})
    @functools.wraps(draw)
    def test() -> Figure:
        figure = draw()
        figure.set_layout_engine("none")
        figure.subplotpars.update(left=0.17, bottom=0.17, right=0.97, top=0.83)
        for ax in figure.axes:
            ax.set_position(cast(Any, ax.get_subplotspec()).get_position(figure))
        for label in [*figure.findobj(Text), *figure.findobj(Legend)]:
            label.set_visible(False)
        return figure

    return cast("Callable[[], Figure]", test)


def test_pictures_are_compared(pytestconfig: pytest.Config) -> None:
    """Without ``--mpl`` the three tests below would draw and look at nothing."""
    assert pytestconfig.getoption("mpl")


@picture
def test_a_diagram_looks_as_it_did() -> Figure:
    """Bars, both kinds of gap, histogram, diagonal."""
    return PLOTS["diagram"]()


@picture
def test_a_grid_looks_as_it_did() -> Figure:
    """The same for each method, in rows, in and out of distribution."""
    return PLOTS["grid"]()


@picture
def test_a_scatter_looks_as_it_did() -> Figure:
    """Markers, intervals, axes from zero."""
    return PLOTS["scatter"]()


@pytest.mark.parametrize("draw", PLOTS.values(), ids=PLOTS)
def test_a_plot_can_be_read_at_the_width_of_a_column(draw: Callable[[], Figure]) -> None:
    """It is 3.3 inches wide, and no text is below 6 points."""
    figure = draw()
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_text()]
    assert figure.get_figwidth() == pytest.approx(3.3)
    assert texts
    assert min(float(text.get_fontsize()) for text in texts) >= 6


def test_a_diagram_shows_accuracy_and_the_gap_to_confidence_of_each_bin_that_has_samples() -> None:
    """Bars end at the accuracy; what is too confident lies beyond, what is not confident enough at their end."""
    ax = reliability_diagram(toy_bins())
    assert bars(ax, 0) == [pytest.approx(bar) for bar in ((0.375, 0, 0.25), (0.625, 0, 0.5), (0.875, 0, 1))]
    assert bars(ax, 1) == [pytest.approx((0.375, 0.25, 0.5))]
    assert bars(ax, 2) == [pytest.approx((0.625, 0.4, 0.5))]
    assert same_color(cast(BarContainer, ax.containers[0])[0].get_facecolor(), BLUE)


def test_a_legend_names_what_bars_and_hatching_are() -> None:
    """Its keys are painted as the bars of the same name, in a diagram of its own and once over a grid."""
    ax = reliability_diagram(toy_bins())
    for legend in (cast(Legend, ax.get_legend()), *reliability_grid(make_report()).legends):
        assert [text.get_text() for text in legend.get_texts()] == [
            "accuracy",
            "overconfident by",
            "underconfident by",
        ]
        for key, drawn in zip(legend.get_patches(), ax.containers, strict=False):
            bar = cast(BarContainer, drawn)[0]
            assert (key.get_facecolor(), key.get_hatch()) == (bar.get_facecolor(), bar.get_hatch())


def test_a_diagram_shows_where_the_samples_are() -> None:
    """A histogram below the axis, its bars in proportion to the counts, and the number of samples."""
    ax = reliability_diagram(toy_bins())
    heights = [upper - lower for _, lower, upper in bars(ax, 3)]
    assert [height / heights[2] for height in heights] == pytest.approx([4, 2, 1])
    assert all(upper < 0 for _, _, upper in bars(ax, 3))
    assert same_color(cast(BarContainer, ax.containers[3])[0].get_facecolor(), GREY)
    assert ax.texts[0].get_text() == f"ECE {100 * float(binned_error(toy_bins())):.1f} %\nn = 7"


def test_bins_without_samples_give_an_empty_diagram() -> None:
    """Which says so; no division by zero on the way."""
    ax = reliability_diagram(bin_confidences(torch.empty(0), torch.empty(0, dtype=torch.bool)))
    assert ax.texts[0].get_text() == "no samples"
    assert all(bars(ax, index) == [] for index in range(4))


@pytest.mark.parametrize(
    "draw", [lambda ax: reliability_diagram(toy_bins(), ax), lambda ax: shift_scatter(make_report(), ax)]
)
def test_given_axes_are_drawn_into_and_returned(draw: Callable[[Axes], Axes]) -> None:
    """One panel of somebody's own figure, a subfigure included; nothing else is created."""
    figure = Figure()
    ax = cast(Any, figure.subfigures(1, 2))[1].subplots()
    assert draw(ax) is ax
    assert figure.axes == [ax]
    assert ax.containers or ax.lines


def test_a_grid_has_a_row_for_each_method_and_a_column_for_id_and_ood() -> None:
    """Rows named by method in the report's order; the right column pools every OOD domain."""
    report = make_report(domains=("photo", "sketch", "clipart"))
    axes = reliability_grid(report).axes
    assert [ax.get_ylabel() for ax in axes[::2]] == report.methods
    assert [ax.get_title() for ax in axes[:2]] == ["ID", "OOD, pooled"]
    for method, left, right in zip(report.methods, axes[::2], axes[1::2], strict=True):
        pooled = report.bins(method, "sketch") + report.bins(method, "clipart")
        for ax, bins in ((left, report.bins(method, "photo")), (right, pooled)):
            filled = bins.counts > 0
            assert [upper for _, _, upper in bars(ax, 0) if upper] == pytest.approx(
                [a for a in (bins.correct_sums[filled] / bins.counts[filled]).tolist() if a]
            )
            assert ax.texts[0].get_text().endswith(f"n = {int(bins.counts.sum())}")


def test_a_grid_without_ood_domains_has_one_column() -> None:
    """There is nothing to pool."""
    assert [ax.get_title() for ax in reliability_grid(make_report(METHODS[:2], ("photo",))).axes] == ["ID", ""]


def test_a_scatter_has_one_labelled_marker_for_each_method() -> None:
    """At its OOD accuracy and ECE in per cent, with lines as long as the intervals."""
    report = make_report()
    ax = shift_scatter(report)
    for row, line, label in zip(report.summary(), ax.lines, method_labels(ax), strict=True):
        place = pytest.approx((100 * row["ood_accuracy"], 100 * row["ood_ece"]))
        assert (cast(Any, line.get_xdata())[0], cast(Any, line.get_ydata())[0]) == place
        assert label.get_text() == row["method"]
        assert tuple(label.xy) == place
    spans = [cast(Any, c).get_segments()[0] for c in ax.collections]
    for row, across, along in zip(report.summary(), spans[::2], spans[1::2], strict=True):
        assert across[:, 0].tolist() == pytest.approx([100 * row[f"ood_accuracy_{end}"] for end in ("low", "high")])
        assert along[:, 1].tolist() == pytest.approx([100 * row[f"ood_ece_{end}"] for end in ("low", "high")])


@settings(max_examples=10)
@given(same=st.integers(1, 4), seed=st.integers(0, 1000))
def test_labels_do_not_overlap(same: int, seed: int) -> None:
    """Neither each other nor a marker, and all lie inside the axes, though nine methods share ``same`` places."""
    report = ShiftReport(id_domain="photo")
    for (i, method), domain in itertools.product(enumerate(METHODS), ("photo", "sketch")):
        report.add(method, domain, *classifier(200, 5, seed + i % same, sharpness=0.6))
    ax = shift_scatter(report)
    figure = cast(Figure, ax.figure)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(label) for label in method_labels(ax)]
    for a, b in itertools.combinations(boxes, 2):
        assert not a.overlaps(b)
    for box, line in itertools.product(boxes, ax.lines):
        assert not box.contains(*ax.transData.transform(line.get_xydata())[0])
    frame = ax.get_window_extent().padded(1)
    assert all(frame.containsx(box.x0) and frame.containsx(box.x1) for box in boxes)


@pytest.mark.parametrize("draw", PLOTS.values(), ids=PLOTS)
def test_every_plot_renders_and_leaves_settings_alone(draw: Callable[[], Figure]) -> None:
    """As a PNG without a warning; rcParams are the user's."""
    before = dict(mpl.rcParams)
    picture = io.BytesIO()
    draw().savefig(picture, format="png")
    assert picture.getvalue().startswith(b"\x89PNG")
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("draw", PLOTS.values(), ids=PLOTS)
def test_text_stays_text_in_files_saved_as_the_guide_says(draw: Callable[[], Figure]) -> None:
    """Words in an SVG, TrueType in a PDF, where matplotlib's defaults have outlines and Type 3."""
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
    """So there is no current figure to disturb, and none to close."""
    program = (
        "import sys, torch; from calrobust.report import ShiftReport; from calrobust import plotting\n"
        "assert 'matplotlib' not in sys.modules\n"
        "report = ShiftReport(id_domain='a')\n"
        "for d in 'ab': report.add('FT', d, torch.eye(3), torch.tensor([0, 1, 1]))\n"
        "plotting.reliability_grid(report); plotting.shift_scatter(report)\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


@pytest.mark.parametrize("draw", PLOTS.values(), ids=PLOTS)
def test_without_matplotlib_the_error_names_the_extra(draw: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As one would paste it."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'calrobust\[plot\]'"):
        draw()
