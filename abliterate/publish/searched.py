"""What a search for strengths found: its front as a table and as a plot, and the pick explained."""

from collections.abc import Mapping
from typing import Any

from abliterate.publish.charts import png
from abliterate.publish.figures import percent, significant
from abliterate.publish.markdown import plain, table
from abliterate.publish.pareto import Point, pareto_chart

SEARCH_PLOT = "search.png"
HEADER = ("refused", "refusal score", "KL, nats", "KL weight", "steps", "")

Record = Mapping[str, Any]


def search_rows(search: Record) -> list[list[str]]:
    """The points of the front, the lowest KL first, the pick marked."""
    rows = []
    for number in search["front"]:
        point = search["points"][number]
        rows.append(
            [
                percent(point["refusal"]),
                significant(point["bypass"]),
                significant(point["kl"]),
                f"{point['weight']:g}",
                str(point["step"]),
                "picked" if number == search["pick"] else "",
            ]
        )
    return rows


def search_text(search: Record) -> str:
    """The card's part on it, in Markdown."""
    reason = plain(search["reason"])
    return (
        "**Strengths.** Found by gradients of refusal scores and KL through the strengths, on train prompts; "
        f"{len(search['points'])} points were measured on validation prompts, in {search['passes']:,} forward passes. "
        f"The pick: {reason}. The front of all points:\n\n{table(list(HEADER), search_rows(search), right=5)}\n\n"
        f"![Refusals against KL of the points of the search]({SEARCH_PLOT})"
    )


def search_plot(search: Record) -> bytes:
    """Refusals against KL of every point, the front as a line, as a PNG."""
    points = []
    for number, point in enumerate(search["points"]):
        refusal, kl = (point["refusal"],) * 3, (point["kl"],) * 3
        label = f"step {point['step']}" if number in search["front"] else ""
        points.append(Point(label, refusal, kl, number in search["front"], number == search["pick"], False))
    return png(pareto_chart(points))
