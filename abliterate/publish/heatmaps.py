"""Maps in colours: a quantity by row and column, and matrices of cosines."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from abliterate.publish.charts import INK, LEAST_KL, new_figure

_MISSING = "#bfbfbe"
_FIGURES_FIT = 16
_FONT_ENDS = 0x2500
Values = Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class Heat:
    """A map of one quantity.

    Attributes:
        label: what it is, with its unit.
        log: colours stand for orders of magnitude, from 1e-4 on.
        signed: positive and negative values matter, and get two colours that meet in white at 0.
    """

    values: Values
    label: str
    signed: bool = False
    log: bool = False


def heat_maps(
    maps: Sequence[Heat], rows: Sequence[str], xlabel: str, ylabel: str, mark: tuple[int, int] | None = None
) -> Figure:
    """Maps of several quantities over the same rows and columns, above one another.

    Args:
        rows: names of the rows, the first at the top.
        mark: (row, column) to put a frame around.
    """
    figure = new_figure(len(maps) * (0.95 + 0.24 * len(rows)) + 0.5)
    axes = [figure.add_subplot(len(maps), 1, i + 1) for i in range(len(maps))]
    for each, heat in zip(axes, maps, strict=True):
        _heat(figure, each, heat)
        each.set_yticks(range(len(rows)), [_ascii(row) for row in rows], parse_math=False)
        each.set_ylabel(ylabel, fontsize=10.5)
        each.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
        if mark is not None:
            _frame(each, *mark)
    axes[-1].set_xlabel(xlabel, fontsize=11)
    return figure


def _heat(figure: Figure, axes: Axes, heat: Heat) -> None:
    values = np.array([[math.nan if v is None else v for v in row] for row in heat.values], dtype=float)
    known = values[np.isfinite(values)]
    mesh = _mesh(axes, values, cmap="RdBu_r" if heat.signed else "viridis", norm=_norm(known, heat))
    _cells(axes, values.shape)
    bar = figure.colorbar(mesh, ax=axes, pad=0.015, aspect=14)
    bar.ax.tick_params(labelsize=9, colors=INK)
    if heat.log:
        bar.ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    bar.outline.set_visible(False)
    axes.set_title(heat.label, fontsize=10.5, loc="left", color=INK, parse_math=False)


def _mesh(axes: Axes, values: Any, **colours: Any) -> Any:
    """Cell (i, j) around that very point; grey where nothing is known."""
    edges = (np.arange(size + 1) - 0.5 for size in reversed(values.shape))
    axes.set_facecolor(_MISSING)
    return axes.pcolormesh(*edges, np.ma.masked_invalid(values), edgecolors="face", linewidth=0.1, **colours)


def _cells(axes: Axes, shape: tuple[int, ...]) -> None:
    """Row 0 at the top, nothing around."""
    axes.set_xlim(-0.5, shape[1] - 0.5)
    axes.set_ylim(shape[0] - 0.5, -0.5)
    axes.tick_params(labelsize=9.5, colors=INK, length=2)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)


def _norm(known: Any, heat: Heat) -> Normalize:
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    if heat.log:
        low = max(low, LEAST_KL)
        return LogNorm(low, max(high, 2 * low), clip=True)
    if heat.signed:
        reach = max(abs(low), abs(high), 1e-9)
        return TwoSlopeNorm(0.0, -reach, reach)
    return Normalize(low, high if high > low else low + 1.0)


def _frame(axes: Axes, row: int, column: int) -> None:
    x, y = (column - 0.5, column + 0.5), (row - 0.5, row + 0.5)
    corners = [(x[0], y[0]), (x[1], y[0]), (x[1], y[1]), (x[0], y[1]), (x[0], y[0])]
    for colour, width in (("#ffffff", 3.6), ("#000000", 1.8)):
        axes.plot(*zip(*corners, strict=True), color=colour, linewidth=width, clip_on=False, zorder=5)


def similarity_matrix(values: Values, names: Sequence[str] | None, label: str, axis: str) -> Figure:
    """A square matrix of cosines; the colours stand for -1 to 1 whatever is in it.

    Args:
        names: of rows and columns; None numbers them. With names and up to 16 of them the figures are written in.
        axis: what rows and columns are.
    """
    size = len(values)
    figure = new_figure(6.4, 7.6)
    axes = figure.add_subplot()
    table = np.array([[math.nan if v is None else v for v in row] for row in values], dtype=float)
    mesh = _mesh(axes, table, cmap="RdBu_r", vmin=-1, vmax=1)
    _cells(axes, table.shape)
    axes.set_aspect("equal")
    if names is not None:
        axes.set_xticks(
            range(size), map(_ascii, names), rotation=45, ha="right", rotation_mode="anchor", parse_math=False
        )
        axes.set_yticks(range(size), map(_ascii, names), parse_math=False)
        if size <= _FIGURES_FIT:
            _figures(axes, table)
    else:
        for each in (axes.xaxis, axes.yaxis):
            each.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
        axes.set_ylabel(axis, fontsize=11)
    axes.set_xlabel(axis, fontsize=11)
    bar = figure.colorbar(mesh, ax=axes, shrink=0.8, pad=0.02)
    bar.set_label(label, fontsize=10.5, color=INK)
    bar.ax.tick_params(labelsize=9, colors=INK)
    bar.outline.set_visible(False)
    return figure


def _figures(axes: Axes, table: Any) -> None:
    for (row, column), value in np.ndenumerate(table):
        if math.isfinite(value):
            colour = "#ffffff" if abs(value) > 0.6 else "#000000"
            text = f"{value:.2f}".replace("-", "−").replace("0.", ".", 1) if abs(value) < 0.995 else f"{value:.0f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)


def _ascii(text: str) -> str:
    """What the font has; the rest as escapes."""
    return "".join(c if ord(c) < _FONT_ENDS else c.encode("ascii", "backslashreplace").decode() for c in text)
