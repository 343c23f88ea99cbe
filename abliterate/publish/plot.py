"""The selection as a picture: bypass, induce and KL of every measured candidate, by layer and position."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from abliterate.publish.candidates import spares
from abliterate.publish.figures import significant, visible

# Okabe and Ito's colours, told apart by people with any common colour vision; the yellow is left out on white.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_PANELS = (
    ("bypass", "refusal score on harmful,\ndirection ablated (bypass)"),
    ("induce", "refusal score on harmless,\ndirection added (induce)"),
    ("kl", "KL from the base on\nharmless, nats (log)"),
)
_SPARING = (
    ("bypass", "refusal score on look-alikes,\ndirection ablated"),
    ("induce", "refusal score on harmful,\ndirection ablated"),
    _PANELS[2],
)
_KL_FLOOR = 1e-5
_GREY = "#5F5F5F"
_WIDEST_STEP = 3

Row = Mapping[str, Any]


def plot_selection(selection: Mapping[str, Any], path: Path, tokens: Sequence[str] | None = None) -> None:
    """Writes a PNG, 1400 by 1330 pixels; equal selections give equal bytes.

    Args:
        selection: the manifest's `selection`.
        path: where the PNG goes.
        tokens: texts of the post-instruction tokens, first to last, to name the positions with.
    """
    figure = Figure(figsize=(10, 9.5), dpi=140, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(3, 1, sharex=True))
    for axes, (score, label) in zip(panels, _SPARING if spares(selection) else _PANELS, strict=True):
        _panel(axes, selection, score, label)
    figure.align_ylabels(panels)
    panels[-1].set_xlabel("layer", fontsize=12)
    panels[-1].xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
    _headline(figure, selection)
    _legend(figure, panels[0], tokens or ())
    figure.savefig(path, format="png", metadata={"Software": None})


def _panel(axes: Axes, selection: Row, score: str, label: str) -> None:
    rows = [row for row in selection["candidates"] if _known(row[score])]
    if score == "kl":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    for order, position in enumerate(_positions(selection)):
        _curve(axes, [row for row in rows if row["position"] == position], score, order, position)
    _bounds(axes, selection, score)
    _pick(axes, selection["pick"], score)
    axes.set_ylabel(label, fontsize=11)
    axes.margins(y=0.12)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=11)
    axes.spines[["top", "right"]].set_visible(False)


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _height(row: Row, score: str) -> float:
    return max(float(row[score]), _KL_FLOOR) if score == "kl" else float(row[score])


def _positions(selection: Row) -> list[int]:
    """Every position, the last token first."""
    return sorted({row["position"] for row in selection["candidates"]}, reverse=True)


def _layers(selection: Row) -> int:
    return 1 + max(int(row["layer"]) for row in selection["candidates"])


def _curve(axes: Axes, rows: Sequence[Row], score: str, order: int, position: int) -> None:
    """One position: measured on every prompt as filled markers, dropped early as faint hollow ones."""
    colour, marker = _COLOURS[order % len(_COLOURS)], _MARKERS[order % len(_MARKERS)]
    rows = sorted(rows, key=lambda row: row["layer"])
    whole = [row for row in rows if row["status"] not in ("screened", "layer")]
    early = [row for row in rows if row["status"] in ("screened", "layer")]
    axes.plot(*_line(rows, score), color=colour, linewidth=1.2, alpha=0.35, zorder=2)
    style: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": "none"}
    axes.plot(*_points(early, score), **style, markersize=5, markerfacecolor="white", alpha=0.45, zorder=3)
    axes.plot(
        *_points(whole, score),
        **style,
        markersize=8,
        markeredgecolor="white",
        markeredgewidth=0.8,
        zorder=4,
        label=f"{position}",
    )


def _line(rows: Sequence[Row], score: str) -> tuple[list[int], list[float]]:
    """Points with a gap where layers in between were not measured, so that no line suggests a value there."""
    layers, heights = _points(rows, score)
    for i in range(len(layers) - 1, 0, -1):
        if layers[i] - layers[i - 1] > _WIDEST_STEP:
            layers.insert(i, layers[i])
            heights.insert(i, math.nan)
    return layers, heights


def _points(rows: Iterable[Row], score: str) -> tuple[list[int], list[float]]:
    kept = list(rows)
    return [row["layer"] for row in kept], [_height(row, score) for row in kept]


def _bounds(axes: Axes, selection: Row, score: str) -> None:
    """The rule's thresholds, the layers it leaves out, and where the unedited model stands."""
    limits, layers = selection["thresholds"], _layers(selection)
    first_late = math.ceil(limits["max_layer_fraction"] * layers - 1e-9) - 0.5
    axes.axvspan(first_late, max(layers - 0.5, first_late), color="#F0F0F0", zorder=0)
    axes.set_xlim(-0.5, layers - 0.5)
    if score == "bypass":
        _rule(axes, selection["baseline"]["harmful"], "unedited model", ":")
        axes.axhline(0, color=_GREY, linewidth=0.8, zorder=1)
    if score == "induce":
        _rule(axes, selection["baseline"]["harmless"], "unedited model", ":")
    if score == "induce" and not spares(selection):
        _rule(axes, limits["min_induce"], f"at least {limits['min_induce']:g}", "--")
    if score == "kl":
        _rule(axes, limits["max_kl"] if limits["max_kl"] > 0 else None, f"at most {limits['max_kl']:g}", "--")


def _rule(axes: Axes, value: float | None, text: str, style: str) -> None:
    if value is None or not math.isfinite(value):
        return
    axes.axhline(value, color=_GREY, linestyle=style, linewidth=1.4, zorder=1)
    axes.annotate(
        text,
        (1, value),
        xycoords=("axes fraction", "data"),
        xytext=(-6, 4),
        textcoords="offset points",
        ha="right",
        fontsize=10,
        color=_GREY,
        path_effects=[_halo()],
        zorder=6,
    )


def _pick(axes: Axes, pick: Row, score: str) -> None:
    axes.axvline(pick["layer"], color=_GREY, linewidth=0.8, alpha=0.6, zorder=1)
    if not _known(pick[score]):
        return
    height = _height(pick, score)
    axes.plot(
        [pick["layer"]],
        [height],
        marker="o",
        markersize=17,
        markerfacecolor="none",
        markeredgecolor="black",
        markeredgewidth=1.8,
        linestyle="none",
        zorder=5,
    )
    axes.annotate(
        _minus(significant(pick[score])),
        (pick["layer"], height),
        xytext=(14, 9),
        textcoords="offset points",
        fontsize=11,
        fontweight="bold",
        zorder=6,
        path_effects=[_halo()],
    )


def _halo() -> withStroke:
    return withStroke(linewidth=3, foreground="white")


def _minus(text: str) -> str:
    """With the sign that the axes use."""
    return text.replace("-", "−")


def _headline(figure: Figure, selection: Row) -> None:
    pick = selection["pick"]
    title = f"Picked: position {_minus(str(pick['position']))}, layer {pick['layer']}"
    if selection["relaxed"]:
        title += " (no candidate passed the KL bound)"
    figure.suptitle(title, fontsize=14, fontweight="bold", parse_math=False)


def _legend(figure: Figure, axes: Axes, tokens: Sequence[str]) -> None:
    """Positions with their tokens, below the panels."""
    handles, labels = axes.get_legend_handles_labels()
    names = [_named(int(label), tokens) for label in labels]
    fit = max(1, min(len(names), 125 // (8 + max(map(len, names), default=0))))
    columns = math.ceil(len(names) / math.ceil(max(1, len(names)) / fit)) or 1
    legend = figure.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=columns,
        fontsize=11,
        frameon=False,
        title="position   (filled: every validation prompt; faint: dropped early; grey area: layers left out)",
        title_fontsize=10,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _named(position: int, tokens: Sequence[str]) -> str:
    if not 0 < -position <= len(tokens):
        return _minus(str(position))
    token = visible(tokens[position]).encode("ascii", "backslashreplace").decode()  # the font lacks most scripts
    short = token if len(token) <= 24 else f"{token[:22]}…'"
    return f"{_minus(str(position))}  {short}"
