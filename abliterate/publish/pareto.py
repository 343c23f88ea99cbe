"""The trade-off between refusals and the distance from the base as a chart: one point a recipe, and the front."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import text as mtext
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from abliterate.publish.charts import COLOURS, INK, MUTED, PAPER, bars, halo, new_figure, style

_DECADES_FOR_ZERO = 0.5
"""A KL of 0 has no place on a log scale: it stands this far left of the smallest other one, under a tick of its own."""
_LOW, _HIGH = 0.1, 0.4
_OFFSETS = tuple(
    (radius * math.cos(angle), radius * math.sin(angle))
    for radius in (11, 18, 28, 40)
    for angle in (0.6, -0.6, 2.5, -2.5, 0.0, 3.14, 1.57, -1.57)
)


@dataclass(frozen=True)
class Point:
    """A recipe: value, low and high of its refusal rate (shares in 0..1) and of its KL (nats)."""

    name: str
    refusals: tuple[float, float, float]
    kl: tuple[float, float, float]
    on_front: bool
    best: bool
    aside: bool = False
    """It aims at something else than refusals."""


def pareto_chart(points: Sequence[Point]) -> Figure:
    """Refusals of harmful prompts against KL: down and to the left is better."""
    figure = new_figure(6.2)
    axes = figure.add_subplot()
    style(axes)
    scale = _scale(axes, points)
    _front(axes, points, scale)
    for kind in _KINDS:
        _points(axes, [point for point in points if _kind(point) == kind.name], kind, scale)
    axes.set_xlabel("KL from the base at the first token, harmless prompts (nats, log scale)", fontsize=11)
    _upright(axes, points)
    if points:
        _legend(figure)
    _label(figure, axes, points, scale)
    return figure


def _legend(figure: Figure) -> None:
    legend = figure.legend(
        loc="outside lower center", ncols=4, fontsize=10, frameon=False, labelcolor=INK, title_fontsize=10,
        title="bars: 95 % intervals; down and to the left is better",
    )  # fmt: skip
    legend.get_title().set_color(INK)


@dataclass(frozen=True)
class _Kind:
    name: str
    colour: str
    marker: str
    size: float


_KINDS = (
    _Kind("best", COLOURS[5], "*", 17.0),
    _Kind("on the front", COLOURS[0], "o", 8.0),
    _Kind("dominated", COLOURS[1], "s", 7.0),
    _Kind("aims at something else", COLOURS[6], "D", 6.5),
)


def _kind(point: Point) -> str:
    names = [kind.name for kind in _KINDS]
    return names[3 if point.aside else 0 if point.best else 1 if point.on_front else 2]


@dataclass(frozen=True)
class _Scale:
    """Where KLs are drawn: 0, and what is too small for the scale, at `zero`."""

    zero: float

    def at(self, kl: float) -> float:
        """The place of a KL."""
        return max(kl, self.zero)


def _scale(axes: Axes, points: Sequence[Point]) -> _Scale:
    """A log axis over the values, with a tick "0" left of the smallest where something is 0."""
    values = [point.kl[0] for point in points if point.kl[0] > 0]
    least, most = min(values, default=1e-3), max((point.kl[2] for point in points), default=1.0)
    has_zero = any(point.kl[0] <= 0 for point in points)
    scale = _Scale(least / 10 ** (_DECADES_FOR_ZERO if has_zero else 0.25))
    axes.set_xscale("log")
    axes.set_xlim(scale.zero / 1.25, max(most, least * 1.5) * 1.5)
    decades = LogLocator(subs=(1, 2, 5)).tick_values(least, max(most, least * 10))
    ticks = [tick for tick in decades if least / 1.3 <= tick <= max(most, least * 1.5) * 1.5]
    axes.xaxis.set_major_locator(FixedLocator([scale.zero, *ticks] if has_zero else ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: "0" if has_zero and x == scale.zero else f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(FixedLocator([]))
    if has_zero:
        axes.axvline(math.sqrt(scale.zero * least), color=MUTED, linewidth=1.0, linestyle=(0, (1, 3)))
    return scale


def _upright(axes: Axes, points: Sequence[Point]) -> None:
    """0 to 100 %; with its root as height where points stand both at the foot and high up, so that all can be seen."""
    rates = [point.refusals[0] for point in points]
    if rates and min(rates) < _LOW and max(rates) > _HIGH:
        axes.set_yscale("function", functions=(_root, _square))
        axes.yaxis.set_major_locator(FixedLocator([0, 1, 5, 10, 20, 40, 60, 80, 100]))
        axes.set_ylim(-0.25, 106)
        axes.set_ylabel("harmful prompts refused (%, square-root scale)", fontsize=11)
        return
    axes.set_ylim(-4, 104)
    axes.set_ylabel("harmful prompts refused (%)", fontsize=11)


def _root(rate: Any) -> Any:
    return np.sign(rate) * np.sqrt(np.abs(rate))


def _square(height: Any) -> Any:
    return np.sign(height) * np.square(height)


def _front(axes: Axes, points: Sequence[Point], scale: _Scale) -> None:
    """What the points of the front reach, as steps: between two of them refusals are those of the left one."""
    front = sorted((scale.at(p.kl[0]), 100 * p.refusals[0]) for p in points if p.on_front)
    step: dict[str, Any] = {"drawstyle": "steps-post", "linewidth": 1.6, "alpha": 0.55, "zorder": 2}
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), color=COLOURS[0], **step)


def _points(axes: Axes, points: Sequence[Point], kind: _Kind, scale: _Scale) -> None:
    if not points:
        return
    x, y = [scale.at(p.kl[0]) for p in points], [100 * p.refusals[0] for p in points]
    sideways = bars(x, [scale.at(p.kl[1]) for p in points], [scale.at(p.kl[2]) for p in points])
    upright = bars(y, [100 * p.refusals[1] for p in points], [100 * p.refusals[2] for p in points])
    axes.errorbar(
        x, y, yerr=upright, xerr=sideways, fmt="none", ecolor=kind.colour, elinewidth=1.1, capsize=2.5, alpha=0.5
    )
    axes.plot(
        x, y, linestyle="none", marker=kind.marker, color=kind.colour, markersize=kind.size, markeredgecolor=PAPER,
        markeredgewidth=0.8, label=kind.name, zorder=4,
    )  # fmt: skip


def _label(figure: Figure, axes: Axes, points: Sequence[Point], scale: _Scale) -> None:
    """Names beside their points, each where it covers least of points, bars and other names."""
    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    places = [(scale.at(p.kl[0]), 100 * p.refusals[0]) for p in points]
    taken = [box for point, place in zip(points, places, strict=True) for box in _boxes(axes, point, place, scale)]
    renderer: Any = canvas.get_renderer()
    for point, place in sorted(zip(points, places, strict=True), key=lambda pair: pair[1]):
        text = axes.annotate(
            point.name, place, xytext=(0, 0), textcoords="offset points", fontsize=10, color=INK, zorder=6,
            fontweight="bold" if point.best else "normal", path_effects=[halo()], va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 5},
        )  # fmt: skip
        text.set_parse_math(False)
        taken.append(_settle(text, axes, renderer, taken))


def _settle(text: Any, axes: Axes, renderer: Any, taken: Sequence[Bbox]) -> Bbox:
    """Moves a name to the first of the best places; returns what it covers there."""
    inside, best = axes.get_window_extent(), None
    for offset in _OFFSETS:
        text.set_ha("left" if offset[0] > 3 else "right" if offset[0] < -3 else "center")
        text.set_position(offset)
        text.arrow_patch.set_visible(math.hypot(*offset) > 20)
        text.update_positions(renderer)
        box = mtext.Text.get_window_extent(text, renderer)
        cost = sum(_overlap(box, other) for other in taken) + 4 * (box.width * box.height - _overlap(box, inside))
        if best is None or cost < best[0] - 1e-6:
            best = (cost, offset, box)
    assert best is not None
    offset = best[1]
    text.set_ha("left" if offset[0] > 3 else "right" if offset[0] < -3 else "center")
    text.set_position(offset)
    text.arrow_patch.set_visible(math.hypot(*offset) > 20)
    return best[2]


def _boxes(axes: Axes, point: Point, place: tuple[float, float], scale: _Scale) -> Iterator[Bbox]:
    """What a point and its bars cover, in pixels."""
    x, y = axes.transData.transform(place)
    left, right = (axes.transData.transform((scale.at(kl), 0))[0] for kl in point.kl[1:])
    low, high = (axes.transData.transform((place[0], 100 * rate))[1] for rate in point.refusals[1:])
    yield Bbox.from_extents(x - 9, y - 9, x + 9, y + 9)
    yield Bbox.from_extents(left, y - 2, right, y + 2)
    yield Bbox.from_extents(x - 2, low, x + 2, high)


def _overlap(a: Bbox, b: Bbox) -> float:
    both = Bbox.intersection(a, b)
    return 0.0 if both is None else float(np.prod(both.size))
