"""One HTML page that stands alone: sections of text, facts, tables and charts; nothing is fetched, nothing can run."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from abliterate.publish.charts import GRID, INK, MUTED, PAPER, svg

_PAGE_COLOURS = {INK: "var(--ink)", PAPER: "var(--paper)", GRID: "var(--line)", MUTED: "var(--muted)"}
"""Of charts: what the page puts in their place, so that a chart is dark where the page is."""


@dataclass(frozen=True)
class Chart:
    """A chart with what it shows, in a sentence or two: below it, and for those who do not see it."""

    figure: Figure
    caption: str


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        right: so many of the last columns hold figures, and are aligned right.
        strong: numbers of rows to be set off.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    right: int = 0
    strong: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Section:
    """A part of the page, in this order: text, facts, charts, tables. An empty title goes without a heading.

    Attributes:
        facts: names and what there is to say.
        folded: what of it is a table is behind a line that opens it.
    """

    title: str
    paragraphs: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Grid] = ()
    folded: bool = False


@dataclass(frozen=True)
class Page:
    """The whole page. `lead`: the result, the most important sentence first; `footer`: how it was made."""

    title: str
    subtitle: str
    lead: Sequence[str]
    sections: Sequence[Section]
    footer: Sequence[str] = ()


def render_page(page: Page) -> str:
    """The page; every text in it is escaped. Equal pages give equal texts."""
    template = resources.files("abliterate.publish").joinpath("page.html.jinja").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    numbers = iter(range(1, 1000))
    environment.filters["drawn"] = lambda chart: _drawn(chart, next(numbers))
    return environment.from_string(template).render(page=page) + "\n"


def _drawn(chart: Chart, number: int) -> Markup:
    """The chart as an element of the page, its ids unlike those of the others', its colours those of the page."""
    text = svg(chart.figure)
    text = re.sub(r'(\bid="|href="#|url\(#)', lambda found: f"{found[1]}c{number}-", text)
    for colour, name in _PAGE_COLOURS.items():
        text = text.replace(colour, name)
    label = Markup.escape(chart.caption).replace("\n", " ")
    return Markup(re.sub(r"<svg ", f'<svg role="img" aria-label="{label}" ', text, count=1))
