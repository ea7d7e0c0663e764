"""Plots of the experiments as inline SVG: one style, told apart by colour, marker and dash alike.

Every function is pure: data in, a matplotlib figure out, drawn without a display. `svg` gives it as text to
put into a page (where it takes the page's own ink, so that it reads on light and on dark), `svg_file` as a
file of its own. The same figure gives the same text, byte for byte. Sizes are chosen for 700 pixels.

Needs matplotlib, which comes with the extra `experiments`.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c8c8c")
"""Okabe and Ito's colours, which people with any kind of colour vision tell apart, and a grey."""

_INK = "#1f2933"
_GRID = "#8c8c8c40"
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("solid", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))
_WIDTH_IN, _HEIGHT_IN = 7.0, 3.5
_MANY_BARS = 6
_LINE_CHARACTERS = 105
_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": _INK,
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": _INK,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "axes.titleweight": "bold",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "albireo",
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A named series; None in `y` leaves a gap.

    `low` and `high`, if given, draw the spread of each point, such as the least and the most of its repeats.
    A `reference` is drawn dashed, grey and without points: a bound or a prediction, not a measurement.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    reference: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A point that is set off by a ring and named, such as t_e."""

    x: float
    y: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BarSegment:
    """One value for each category; None where there is none. `hatched` tells apart what has the same colour.

    `color` is by default the next of `COLORS`.
    """

    name: str
    values: Sequence[float | None]
    color: str | None = None
    hatched: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneSegment:
    """Something that went on from `begin` to `end`; spans of one `kind` share a colour, the first one's.

    That is by default the next of `COLORS`.
    """

    begin: float
    end: float
    kind: str
    color: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """A row of a timing diagram: what one actor did, without overlap."""

    name: str
    spans: Sequence[LaneSegment]


def line_figure(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    log2_x: bool = False,
    log_y: bool = False,
    marks: Sequence[Mark] = (),
) -> Figure:
    """Series over a number. The y axis begins at 0 unless it is logarithmic.

    `log2_x` is for powers of two, such as degrees of parallelism: each of them gets a tick.
    """
    with _styled():
        figure, axes = _canvas(title=title, x_label=x_label, y_label=y_label)
        looks = zip(cycle(COLORS), cycle(_MARKERS), cycle(_DASHES))
        for line in lines:
            if line.reference:
                axes.plot(line.x, _floats(line.y), label=line.name, color=COLORS[-1], linestyle=(0, (4, 3)))
                continue
            color, marker, dash = next(looks)
            axes.plot(line.x, _floats(line.y), label=line.name, color=color, marker=marker, linestyle=dash)
            if line.low is not None and line.high is not None:
                axes.vlines(
                    line.x, _floats(line.low), _floats(line.high), color=color, linewidth=3, alpha=0.35
                )
        for mark in marks:
            _draw_mark(axes, mark)
        if log2_x:
            ticks = sorted({x for line in lines for x in line.x})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.xaxis.set_minor_formatter(NullFormatter())
        if log_y:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.margins(y=0.12)
            axes.set_ylim(bottom=0)
        _legend(axes, len(lines))
        return _laid_out(figure)


def stacked_bars(
    categories: Sequence[str],
    parts: Sequence[BarSegment],
    *,
    y_label: str,
    x_label: str = "",
    title: str = "",
) -> Figure:
    """A bar for each category, of the parts one upon the other in their order, the first at the bottom."""
    with _styled():
        figure, axes = _canvas(title=title, x_label=x_label, y_label=y_label)
        bottom = np.zeros(len(categories))
        places = np.arange(len(categories))
        for part, color in zip(parts, cycle(COLORS)):
            heights = np.nan_to_num(_floats(part.values))
            axes.bar(places, heights, 0.62, bottom=bottom, label=part.name, **_fill(part, color))
            bottom += heights
        axes.set_ylim(0, 1.05 * float(bottom.max(initial=0)) or 1)
        _category_ticks(axes, categories)
        if len(categories) > _MANY_BARS:
            _legend_above(figure, [*axes.get_legend_handles_labels()[0]])
        else:
            _legend(axes, len(parts), upside_down=True)
        return _laid_out(figure)


def grouped_bars(
    categories: Sequence[str],
    groups: Sequence[BarSegment],
    *,
    y_label: str,
    x_label: str = "",
    title: str = "",
) -> Figure:
    """Beside each other in each category, a bar of each group."""
    with _styled():
        figure, axes = _canvas(title=title, x_label=x_label, y_label=y_label)
        width = 0.8 / max(len(groups), 1)
        places = np.arange(len(categories))
        for index, (group, color) in enumerate(zip(groups, cycle(COLORS))):
            offset = (index - (len(groups) - 1) / 2) * width
            axes.bar(
                places + offset, _floats(group.values), width * 0.92, label=group.name, **_fill(group, color)
            )
        _category_ticks(axes, categories)
        _legend(axes, len(groups))
        return _laid_out(figure)


def lane_figure(lanes: Sequence[Lane], *, x_label: str, title: str = "") -> Figure:
    """A timing diagram: a row for each lane, the first on top, time from left to right."""
    with _styled():
        figure, axes = _canvas(title=title, x_label=x_label, y_label="")
        figure.set_figheight(0.9 + 0.45 * len(lanes))
        firsts: dict[str, LaneSegment] = {}
        for span in (span for lane in lanes for span in lane.spans):
            firsts.setdefault(span.kind, span)
        colors = {kind: span.color or color for (kind, span), color in zip(firsts.items(), cycle(COLORS))}
        for row, lane in enumerate(lanes):
            axes.broken_barh(
                [(span.begin, span.end - span.begin) for span in lane.spans],
                (row - 0.32, 0.64),
                facecolors=[colors[span.kind] for span in lane.spans],
            )
        axes.set_yticks(range(len(lanes)), [lane.name for lane in lanes])
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        _legend_above(figure, [Patch(color=color, label=kind) for kind, color in colors.items()])
        return _laid_out(figure)


def svg(figure: Figure) -> str:
    """The figure as an `<svg>` element for a page, in the colour of the text around it."""
    return _element(figure).replace(_INK, "currentColor")


def svg_file(figure: Figure) -> str:
    """The figure as the text of an SVG file, on white."""
    opening, rest = _element(figure).split(">", 1)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{opening} style="background: #ffffff">{rest}\n'


def _styled() -> Any:
    """The style, whatever the user's own settings of matplotlib are, until the block ends."""
    return style.context(_STYLE, after_reset=True)


def _element(figure: Figure) -> str:
    text = io.StringIO()
    with _styled():
        canvas = FigureCanvasSVG(figure)
        canvas.print_svg(text, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    element = text.getvalue().partition("<svg")[2]
    return "<svg" + re.sub(r"[ \t]+\n", "\n", element).rstrip()


def _canvas(*, title: str, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH_IN, _HEIGHT_IN), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize="large", fontweight="bold", color=_INK)
    return figure, axes


def _laid_out(figure: Figure) -> Figure:
    """The figure with its parts where they stay: each further layout would move them by a hair."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def _draw_mark(axes: Axes, mark: Mark) -> None:
    axes.plot([mark.x], [mark.y], marker="o", markersize=12, markerfacecolor="none", color=_INK, linestyle="")
    axes.annotate(
        mark.label, (mark.x, mark.y), xytext=(0, 10), textcoords="offset points", ha="center", color=_INK
    )


def _category_ticks(axes: Axes, categories: Sequence[str]) -> None:
    axes.set_xticks(range(len(categories)), list(categories))
    axes.tick_params(axis="x", length=0)
    axes.grid(visible=False, axis="x")


def _fill(part: BarSegment, color: str) -> dict[str, Any]:
    face = part.color or color
    if part.hatched:
        return {"facecolor": f"{face}55", "edgecolor": face, "hatch": "////", "linewidth": 0.6}
    return {"facecolor": face, "linewidth": 0}  # an edge would hide thin parts beside it


def _legend(axes: Axes, entries: int, *, upside_down: bool = False) -> None:
    """Beside the plot, so that it hides nothing; a single series needs none but its axis."""
    if entries > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, reverse=upside_down)


def _legend_above(figure: Figure, handles: Sequence[Artist]) -> None:
    """In columns over the plot, which needs its whole width."""
    longest = max((len(str(handle.get_label())) for handle in handles), default=1)
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=max(1, _LINE_CHARACTERS // (longest + 6)),
        columnspacing=1.2,
        handlelength=1.2,
        title=figure.get_suptitle() or None,
        title_fontproperties={"size": "large", "weight": "bold"},
        alignment="left",
    )
    figure.suptitle("")  # the legend has it: the layout would put both in the same place


def _floats(values: Sequence[float | None]) -> Any:
    return np.array([np.nan if value is None else value for value in values], float)
