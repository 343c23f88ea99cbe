"""Charts: the same bytes every time, every value drawn, nothing of matplotlib's settings changed."""

import copy
from collections.abc import Callable

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from abliterate.publish.audit_charts import audit_charts
from abliterate.publish.charts import COLOURS, Panel, Rule, Series, line_chart, png, svg
from abliterate.publish.comparison_view import comparison_chart
from abliterate.publish.heatmaps import Heat, heat_maps, similarity_matrix
from abliterate.publish.pareto import Point, pareto_chart
from tests.audit.made import categories
from tests.publish.made_charts import comparison, record

MAKERS: dict[str, Callable[[], Figure]] = {
    "pareto": lambda: comparison_chart(comparison()),
    **{
        name: lambda name=name: audit_charts(record(categories()))[name].figure  # type: ignore[misc]
        for name in ("directions", "strength", "windows", "map", "layers", "similarity", "categories")
    },
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", MAKERS)
def test_same_values_same_bytes(name: str) -> None:
    before = copy.deepcopy(dict(matplotlib.rcParams))
    make = MAKERS[name]
    first, again = make(), make()
    assert png(first) == png(again)
    assert svg(make()) == svg(make())
    assert dict(matplotlib.rcParams) == before
    text = svg(make())
    assert text.startswith("<svg") and text.endswith("</svg>") and "<metadata" not in text


@pytest.mark.parametrize("name", MAKERS)
def test_every_axis_has_a_title_with_its_unit(name: str) -> None:
    figure = MAKERS[name]()
    plots = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    assert any(axes.get_xlabel() for axes in plots)
    for axes in plots:
        title = axes.get_title(loc="left") or axes.get_ylabel()
        assert title or name == "categories"
        if name not in ("map", "similarity", "categories"):
            assert "(" in axes.get_ylabel(), axes.get_ylabel()


def test_colours_stay_apart_for_the_colour_blind() -> None:
    """As seen with protanopia, deuteranopia and tritanopia (Viénot et al. 1999), and in their lightness or hue."""
    see = {
        "none": np.eye(3),
        "protan": [[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]],
        "deutan": [[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]],
        "tritan": [[1.0, 0.1461, -0.1461], [0.0, 0.8595, 0.1405], [0.0, 0.8595, 0.1405]],
    }
    linear = np.array([[((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)] for colour in COLOURS])
    for kind, matrix in see.items():
        seen = np.clip(linear @ np.array(matrix).T, 0, 1) ** (1 / 2.4)
        apart = np.linalg.norm(seen[:, None] - seen[None], axis=-1) + np.eye(len(COLOURS))
        assert apart.min() > 0.1, (kind, apart.min())


def test_lines_show_values_gaps_and_intervals() -> None:
    series = [
        Series("a", [0, 1, 2], [0.1, None, 0.3], [0.0, 0.0, 0.2], [0.2, 0.0, 0.5]),
        Series("b", [0, 1], [0.5, 0.6]),
    ]
    figure = line_chart([Panel("rate (%)", series, [Rule(0.25, "limit $x_1$")], percent=True)], "layer", "which")
    axes = figure.axes[0]
    drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
    np.testing.assert_allclose(drawn["a"], [10, np.nan, 30])
    np.testing.assert_allclose(drawn["b"], [50, 60])
    (bars,) = [c for c in axes.collections if len(c.get_segments()) == 3]
    np.testing.assert_allclose(np.array(bars.get_segments()[2])[:, 1], [20, 50])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert "limit $x_1$" in [text.get_text() for text in axes.texts] and png(figure)


def test_one_series_needs_no_legend() -> None:
    assert not line_chart([Panel("y (nats)", [Series("", [0, 1], [1, 2])])], "x").legends


def test_maps_show_what_is_known() -> None:
    heats = [Heat([[1.0, None, -3.0]], "score (nats)", signed=True), Heat([[0.1, 0.2, None]], "KL (nats)")]
    figure = heat_maps(heats, ["−1  '日本'"], "layer", "position", (0, 2))
    score, kl = (axes.collections[0] for axes in figure.axes if axes.get_label() != "<colorbar>")
    assert score.get_array().tolist() == [[1.0, None, -3.0]] and kl.get_array().tolist() == [[0.1, 0.2, None]]
    assert (score.norm.vmin, score.norm.vmax) == (-3, 3), "0 is white"
    assert r"−1  '\u65e5\u672c'" in [text.get_text() for text in figure.axes[0].get_yticklabels()]
    frame = figure.axes[0].lines[0].get_xydata()
    assert frame.min(0).tolist() == [1.5, -0.5] and frame.max(0).tolist() == [2.5, 0.5]


def test_unknown_cells_are_grey_on_the_page_and_the_ground_is_its_own() -> None:
    text = svg(heat_maps([Heat([[1.0, None]], "score (nats)")], ["−1"], "layer", "position"))
    assert "#bfbfbe" in text and "#fffffe" not in text
    assert "#ffffff" not in svg(MAKERS["directions"]())


def test_a_map_of_nothing_is_drawn_all_the_same() -> None:
    assert png(heat_maps([Heat([[None]], "x (nats)", signed=True), Heat([[None]], "y (nats)")], ["-1"], "layer", "p"))


def test_cosines_are_written_into_small_matrices_alone() -> None:
    small = similarity_matrix([[1.0, -0.25], [-0.25, None]], ["a $x_1$", "b"], "cosine", "category")
    assert [t.get_text() for t in small.axes[0].texts] == ["1", "−.25", "−.25"]
    assert small.axes[0].collections[0].get_clim() == (-1, 1)
    large = similarity_matrix([[1.0] * 20] * 20, None, "cosine", "layer")
    assert not large.axes[0].texts and large.axes[0].get_ylabel() == "layer"


def points(*places: tuple[float, float], front: bool = False) -> list[Point]:
    return [
        Point(f"recipe {i}", (rate, max(0, rate - 0.05), rate + 0.05), (kl, kl / 2, kl * 2), front, False)
        for i, (rate, kl) in enumerate(places)
    ]


def test_a_kl_of_zero_has_a_place_of_its_own() -> None:
    figure = pareto_chart(points((0.9, 0.0), (0.05, 0.1), (0.2, 0.01)))
    axes = figure.axes[0]
    figure.draw_without_rendering()
    ticks = dict(zip((t.get_text() for t in axes.get_xticklabels()), axes.get_xticks(), strict=True))
    drawn = sorted(float(x) for line in axes.lines if line.get_marker() == "s" for x in line.get_xdata())
    assert drawn == pytest.approx([ticks["0"], 0.01, 0.1])
    assert axes.get_xlim()[0] < ticks["0"] < 0.005 and "0.01" in ticks
    without = pareto_chart(points((0.05, 0.1), (0.2, 0.01))).axes[0]
    assert "0" not in [text.get_text() for text in without.get_xticklabels()]


def test_the_front_is_a_line_of_steps() -> None:
    rows = [*points((0.0, 0.4), (0.1, 0.1), (0.5, 0.01), front=True), *points((0.6, 0.3))]
    (line,) = [line for line in pareto_chart(rows).axes[0].lines if line.get_drawstyle() == "steps-post"]
    np.testing.assert_allclose(line.get_xydata(), [[0.01, 50], [0.1, 10], [0.4, 0]])


@pytest.mark.parametrize("rates", [(0.9, 0.02, 0.0), (0.9, 0.5), (0.02, 0.05)])
def test_points_at_the_foot_stand_apart(rates: tuple[float, ...]) -> None:
    axes = pareto_chart(points(*((rate, 0.1) for rate in rates))).axes[0]
    assert ("square-root" in axes.get_ylabel()) == (min(rates) < 0.1 and max(rates) > 0.4)


@pytest.mark.parametrize("seed", range(4))
def test_names_do_not_cover_one_another(seed: int) -> None:
    drawn = np.random.default_rng(seed)
    rows = points(
        *((float(r), float(k)) for r, k in zip(drawn.uniform(0, 0.3, 9), 10 ** drawn.uniform(-2, 0, 9), strict=True))
    )
    figure = pareto_chart(rows)

    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [Text.get_window_extent(text, renderer) for text in figure.axes[0].texts]
    assert [text.get_text() for text in figure.axes[0].texts].count("recipe 3") == 1 and len(boxes) == 9
    for i, a in enumerate(boxes):
        assert not any(a.overlaps(b) for b in boxes[:i])
