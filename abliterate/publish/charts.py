"""Charts that say by themselves what they show: titled axes with units, colours that everybody can tell apart.

A chart is a matplotlib figure; `png` and `svg` turn it into bytes and text, the same ones every time.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#666666")
"""Okabe and Ito's, told apart by people with any common colour vision; their yellow is left out on white."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
INK, PAPER, GRID, MUTED = "#222221", "#fffffe", "#dddddc", "#6b6b6a"
"""Used for nothing else, so that `html` can put the page's own colours in their place."""
_WIDTH = 9.0
LEAST_KL = 1e-4
"""On log scales; less is no difference."""


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        y: None leaves a gap.
        low, high: ends of the 95 % intervals, drawn as bars; empty where there are none.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Rule:
    """A level to hold the lines against."""

    y: float
    name: str


@dataclass(frozen=True)
class Panel:
    """One of several charts above one another that share the horizontal axis.

    Attributes:
        ylabel: what is measured, with its unit.
        percent: values are shares in 0..1, shown from 0 to 100 %.
        mark: an x to point out, with its name.
        log: the vertical axis is logarithmic; values below 1e-4 are drawn there.
    """

    ylabel: str
    series: Sequence[Series]
    rules: Sequence[Rule] = ()
    percent: bool = False
    mark: tuple[float, str] | None = None
    log: bool = False


def png(figure: Figure) -> bytes:
    """The chart as a PNG without texts or times in it."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140, metadata={"Software": None})
    return buffer.getvalue()


def svg(figure: Figure) -> str:
    """The chart as an `<svg>` element, its ground transparent, its texts as paths."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "abliterate", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", facecolor="none", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL).strip()


def new_figure(height: float, width: float = _WIDTH) -> Figure:
    """An empty figure, inches."""
    return Figure(figsize=(width, height), facecolor=PAPER, layout="constrained")


def line_chart(panels: Sequence[Panel], xlabel: str, legend: str = "", whole: bool = True) -> Figure:
    """Lines over a shared horizontal axis, a panel a quantity, with one legend below.

    Args:
        legend: title of the legend, which is left out where there is a single series.
        whole: x are whole numbers.
    """
    figure = new_figure(2.6 * len(panels) + 0.9)
    axes = [figure.add_subplot(len(panels), 1, i + 1) for i in range(len(panels))]
    for each, panel in zip(axes, panels, strict=True):
        _lines(each, panel)
        each.sharex(axes[0])
        each.tick_params(labelbottom=each is axes[-1])
        if whole:
            each.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
    axes[-1].set_xlabel(xlabel, fontsize=11)
    figure.align_ylabels(axes)
    if max(len(panel.series) for panel in panels) > 1:
        _legend(figure, axes[0], legend)
    return figure


def _lines(axes: Axes, panel: Panel) -> None:
    style(axes)
    for order, series in enumerate(panel.series):
        _line(axes, series, order, panel)
    for rule in panel.rules:
        highest = rule.y >= max(other.y for other in panel.rules)
        _rule(axes, rule, "bottom" if highest and len(panel.rules) > 1 else "top" if len(panel.rules) > 1 else "center")
    if panel.mark is not None:
        axes.axvline(panel.mark[0], color=MUTED, linewidth=1.0, linestyle="--", zorder=1)
        _note(axes, panel.mark[1], (panel.mark[0], 1.0), ("data", "axes fraction"), (4, -4), va="top")
    axes.set_ylabel(panel.ylabel, fontsize=10.5)
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1,), numticks=8))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if panel.percent:
        axes.set_ylim(-4, 104)
    axes.margins(x=0.03, y=0.12)


def _line(axes: Axes, series: Series, order: int, panel: Panel) -> None:
    factor, least = 100 if panel.percent else 1, LEAST_KL if panel.log else -math.inf
    heights = [math.nan if y is None else max(y * factor, least) for y in series.y]
    colour, marker = COLOURS[order % len(COLOURS)], MARKERS[order % len(MARKERS)]
    edge: dict[str, Any] = {"markeredgecolor": PAPER, "markeredgewidth": 0.6, "zorder": 3 + order / 100}
    axes.plot(series.x, heights, color=colour, marker=marker, markersize=5.5, linewidth=1.5, label=series.name, **edge)
    if series.low:
        ends = bars(heights, [v * factor for v in series.low], [v * factor for v in series.high])
        axes.errorbar(series.x, heights, yerr=ends, fmt="none", ecolor=colour, elinewidth=1.1, capsize=3, alpha=0.6)


def bars(values: Sequence[float], low: Sequence[float], high: Sequence[float]) -> Any:
    """Lengths of error bars, [2, n]."""
    return np.maximum(0.0, np.array([np.subtract(values, low), np.subtract(high, values)]))


def style(axes: Axes) -> None:
    """Light grid, no frame, ink for texts."""
    axes.set_facecolor("none")
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=10, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(MUTED)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)


def _rule(axes: Axes, rule: Rule, place: str) -> None:
    """A dotted level, its name outside at the right, where no data are."""
    axes.axhline(rule.y, color=MUTED, linestyle=":", linewidth=1.3, zorder=1)
    _note(axes, rule.name, (1.0, rule.y), ("axes fraction", "data"), (5, 0), va=place)


def _note(
    axes: Axes, text: str, at: tuple[float, float], coordinates: Any, offset: tuple[float, float], **place: Any
) -> None:
    note = axes.annotate(
        text, at, xycoords=coordinates, xytext=offset, textcoords="offset points", fontsize=9.5, color=MUTED, zorder=6,
        path_effects=[halo()], **place,
    )  # fmt: skip
    note.set_parse_math(False)


def halo() -> withStroke:
    """Keeps text readable on lines."""
    return withStroke(linewidth=3, foreground=PAPER)


def _legend(figure: Figure, axes: Axes, title: str) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(len(labels), 110 // (6 + max(map(len, labels)))))
    legend = figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, fontsize=10, frameon=False, title=title or None,
        title_fontsize=10, labelcolor=INK,
    )  # fmt: skip
    legend.get_title().set_color(INK)
    for text in (*legend.get_texts(), legend.get_title()):
        text.set_parse_math(False)
