import xml.etree.ElementTree as ET

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

from albireo_jax.measure.figures import (
    BarSegment,
    Lane,
    LaneSegment,
    Line,
    Mark,
    grouped_bars,
    lane_figure,
    line_figure,
    stacked_bars,
    svg,
    svg_file,
)

_LINES = [
    Line(name="synchronous", x=[1, 2, 4, 8], y=[10, 18, 15, 9], low=[9, 17, 14, 8], high=[11, 19, 16, 10]),
    Line(name="overlapped & sharded", x=[1, 2, 4, 8], y=[13, 24, 28, None]),
    Line(name="bound", x=[1, 8], y=[10, 30], reference=True),
]
_PARTS = [BarSegment(name="T1", values=[1.0, 2.0]), BarSegment(name="T2", values=[3.0, None], hatched=True)]
_LANES = [
    Lane(name="host", spans=[LaneSegment(begin=0, end=1, kind="T1"), LaneSegment(begin=4, end=5, kind="T5")]),
    Lane(name="device", spans=[LaneSegment(begin=1, end=4, kind="T3")]),
]


def _lines(**options: bool) -> Figure:
    marks = [Mark(x=4, y=28, label="t_e = 4")]
    return line_figure(_LINES, x_label="t", y_label="tokens/s", title="Throughput", marks=marks, **options)


_FIGURES = {
    "lines": lambda: _lines(log2_x=True),
    "log lines": lambda: _lines(log_y=True),
    "stacked": lambda: stacked_bars(["a", "b"], _PARTS, y_label="ms", x_label="t"),
    "grouped": lambda: grouped_bars(["a", "b"], _PARTS, y_label="ms"),
    "lanes": lambda: lane_figure(_LANES, x_label="time / ms"),
}


def _texts(element: str) -> list[str]:
    return ["".join(node.itertext()) for node in ET.fromstring(element).iter() if node.tag.endswith("text")]


@pytest.mark.parametrize("name", _FIGURES)
def test_a_figure_is_one_svg_element_that_is_the_same_each_time(name: str) -> None:
    figure = _FIGURES[name]()
    first = svg(figure)
    assert ET.fromstring(first).tag.endswith("svg")
    assert first == svg(figure) == svg(_FIGURES[name]())
    assert ET.fromstring(svg_file(figure).encode()).tag.endswith("svg")


@pytest.mark.parametrize("name", _FIGURES)
def test_a_figure_asks_for_nothing_from_elsewhere_and_has_no_date(name: str) -> None:
    element = svg(_FIGURES[name]())
    links = [value for node in ET.fromstring(element).iter() for key, value in node.items() if "href" in key]
    assert all(link.startswith("#") for link in links)
    assert "date" not in element
    assert "matplotlib.org" not in element


def test_all_names_stand_in_the_figure_as_text() -> None:
    texts = _texts(svg(_lines(log2_x=True)))
    for expected in (
        "synchronous",
        "overlapped & sharded",
        "bound",
        "t_e = 4",
        "t",
        "tokens/s",
        "Throughput",
    ):
        assert expected in texts
    assert [text for text in texts if text in {"1", "2", "4", "8"}] == ["1", "2", "4", "8"]
    assert {"T1", "T5", "T3", "host", "device"} <= set(_texts(svg(_FIGURES["lanes"]())))


def test_a_page_lends_its_ink_and_a_file_has_its_own() -> None:
    figure = _lines()
    assert "currentColor" in svg(figure)
    assert "currentColor" not in svg_file(figure)


def test_a_value_that_is_missing_leaves_a_gap_and_the_others_stay() -> None:
    whole, missing = (
        line_figure([Line(name="a", x=[1, 2, 3], y=y)], x_label="x", y_label="y").axes[0].lines[0].get_ydata()
        for y in ([1.0, 2.0, 3.0], [1.0, None, 3.0])
    )
    assert list(whole) == [1, 2, 3]
    assert [value for value in missing if value == value] == [1, 3]


def test_stacked_parts_lie_one_upon_the_other() -> None:
    axes = _FIGURES["stacked"]().axes[0]
    boxes = [(patch.get_y(), patch.get_height()) for patch in axes.patches]
    assert boxes == [(0, 1), (0, 2), (1, 3), (2, 0)]


def test_no_setting_of_matplotlib_is_changed_or_used() -> None:
    before = dict(mpl.rcParams)
    plain = svg(_lines())
    assert dict(mpl.rcParams) == before
    with mpl.rc_context({"font.size": 30.0, "axes.facecolor": "red"}):
        assert svg(_lines()) == plain
