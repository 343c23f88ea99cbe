"""The charts of an audit, from what `audit.json` says."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from abliterate.publish.charts import Panel, Rule, Series, line_chart
from abliterate.publish.figures import visible
from abliterate.publish.heatmaps import Heat, heat_maps, similarity_matrix
from abliterate.publish.html import Chart

Record = Mapping[str, Any]
_BYPASS = "refusal score, harmful,\ndirection ablated (nats)"
_INDUCE = "refusal score, harmless,\ndirection added (nats)"
_KL = "KL from the base,\nharmless (nats)"


def audit_charts(record: Record) -> dict[str, Chart]:
    """Charts by the names of their files."""
    charts = {
        "directions": Chart(
            _directions(record),
            "The first direction is the picked one; each further one removes most refusal by itself of those that are "
            "not in the span of the ones before it. Bars: 95 % intervals.",
        ),
        "strength": Chart(
            _strength(record), "A share of the picked direction is taken off at every writer. Bars: 95 % intervals."
        ),
        "windows": Chart(
            _windows(record),
            "Each line: all windows of so many neighbouring layers that were tried, on "
            f"{record['windows']['base']['prompts']} harmful prompts, refused ones first. The direction is removed "
            "from what these layers write, and nowhere else.",
        ),
        "map": Chart(
            _map(record), "Every candidate direction, removed (top and bottom) or added at its layer (middle). The "
            "frame is the picked one; grey: no direction, since both sets have the same state there."
        ),
        "layers": Chart(
            _by_layer(record), "The same as lines. The dotted lines are the untouched model."
        ),
        "similarity": Chart(
            similarity_matrix(record["layers"]["cosines"], None, "cosine", "layer"),
            f"Cosines between the directions of all layers, at position {record['layers']['position']}.",
        ),
    }  # fmt: skip
    found = record["categories"]
    if found is not None:
        names = [f"{name} ({count})" for name, count in zip(found["names"], found["prompts"], strict=True)]
        charts["categories"] = Chart(
            similarity_matrix([*found["cosines"]], names, "cosine", "category (refused train prompts)"),
            f"Cosines between the directions of categories of harmful prompts. Their mean is {found['mean']:.2f}; "
            f"between groups of as many prompts drawn at random it is {found['chance']:.2f}.",
        )
    return charts


def _effect_panels(x: Sequence[float], effects: Sequence[Record], mark: tuple[float, str] | None) -> list[Panel]:
    def one(key: str, low: str = "", high: str = "") -> list[Series]:
        ends = ([effect[end] for effect in effects] if end else [] for end in (low, high))
        return [Series("", x, [effect[key] for effect in effects], *ends)]

    return [
        Panel("harmful prompts\nrefused (%)", one("refusal_rate", "low", "high"), percent=True, mark=mark),
        Panel("mean refusal\nscore (nats)", one("score"), [Rule(0.0, "as likely\nas not")]),
        Panel(_KL, one("kl")),
    ]


def _directions(record: Record) -> Figure:
    steps = [record["base"], *record["directions"]["steps"]]
    enough = record["directions"]["enough"]
    mark = (float(enough), "refusals stop falling")
    return line_chart(_effect_panels(range(len(steps)), steps, mark), "directions removed (number)")


def _strength(record: Record) -> Figure:
    doses, least = record["strengths"]["doses"], record["strengths"]["halving"]
    mark = (100 * least["strength"], "halves refusals") if least else None
    x = [0.0, *(100 * dose["strength"] for dose in doses)]
    panels = _effect_panels(x, [record["base"], *doses], mark)
    return line_chart(panels, "share of the direction removed (%)", whole=False)


def _windows(record: Record) -> Figure:
    by_width: dict[int, list[Record]] = {}
    for window in record["windows"]["tried"]:
        by_width.setdefault(window["last"] - window["first"] + 1, []).append(window)
    series = []
    for width, found in sorted(by_width.items()):
        found.sort(key=lambda window: window["first"])
        middles = [(window["first"] + window["last"]) / 2 for window in found]
        series.append(Series(f"{width}", middles, [window["score"] for window in found]))
    rules = [Rule(record["windows"]["base"]["score"], "untouched\nmodel"), Rule(0.0, "as likely\nas not")]
    panel = Panel("mean refusal score (nats)", series, rules)
    return line_chart([panel], "middle of the window (layer)", "width of the window, layers")


def _map(record: Record) -> Figure:
    grid, pick = record["grid"], record["pick"]
    heats = [
        Heat(grid["bypass"], f"bypass: {_BYPASS}".replace("\n", " "), signed=True),
        Heat(grid["induce"], f"induce: {_INDUCE}".replace("\n", " "), signed=True),
        Heat(grid["kl"], "KL from the base, harmless, direction ablated (nats, log scale)", log=True),
    ]
    rows = [_named(record, position) for position in grid["positions"]]
    mark = (len(rows) + pick["position"], pick["layer"])
    return heat_maps(heats, rows, "layer", "position", mark)


def _by_layer(record: Record) -> Figure:
    grid = record["grid"]

    def series(name: str) -> list[Series]:
        rows = zip(grid["positions"], grid[name], strict=True)
        lines = [Series(_named(record, position), range(len(row)), row) for position, row in rows]
        return lines[::-1]

    base, pick = grid["baseline"], record["pick"]
    mark = (pick["layer"], "picked")
    panels = [
        Panel(_BYPASS, series("bypass"), [Rule(base["harmful"], "untouched\nmodel")], mark=mark),
        Panel(_INDUCE, series("induce"), [Rule(base["harmless"], "untouched\nmodel")], mark=mark),
        Panel(f"{_KL[:-1]}, log)", series("kl"), mark=mark, log=True),
    ]
    return line_chart(panels, "layer", "position")


def _named(record: Record, position: int) -> str:
    """A position with its token."""
    tokens = record["tokens"]
    sign = f"−{-position}"
    if -position > len(tokens):
        return sign
    token = visible(tokens[position])
    return f"{sign}  {token if len(token) <= 16 else token[:14] + '…'}"
