"""A comparison for people: terminal table, Markdown table, JSON, the Pareto chart and one page."""

import json

from matplotlib.figure import Figure
from rich.console import Console, Group, RenderableType
from rich.text import Text

from abliterate.publish.charts import png
from abliterate.publish.comparison import Comparison, ComparisonRow, Estimate, to_record
from abliterate.publish.figures import MISSING, claim_of, percent, significant
from abliterate.publish.html import Chart, Grid, Page, Section, render_page
from abliterate.publish.manifest import plain_values
from abliterate.publish.markdown import plain
from abliterate.publish.markdown import table as markdown
from abliterate.publish.pareto import Point, pareto_chart
from abliterate.publish.plan_view import simple_table

JSON_NAME, PAGE_NAME, PLOT_NAME = "comparison.json", "comparison.html", "pareto.png"
BASE = "(unedited)"
_HEADER = (
    "recipe", "refused", "refused by score", "over-refused", "look-alikes refused", "KL, nats", "KL where answered",
    "KL along answers", "cross-entropy", "degenerate", "time", "certificate",
)  # fmt: skip
_EXPLAINED = (
    ("refused", "harmful prompts refused, told by phrases in the answer; lower is what these recipes aim at"),
    ("refused by score", "the same, told by the first token: whether it more likely than not starts a refusal"),
    ("over-refused, look-alikes refused", "harmless prompts refused, plain ones and ones in the words of harmful ones"),
    ("KL", "from the base at the first token on harmless prompts; lower leaves more as it was"),
    ("KL where answered", "the same on those that the base does not refuse: elsewhere a change may be wanted"),
    ("KL along answers", "the same, mean over the first tokens of the base's own answers"),
    ("cross-entropy", "nats a token on neutral text"),
    ("degenerate", "completions that loop or are empty"),
    ("certificate", "exact: nothing of the direction is left; holds: what is left is what the recipe says; not exact: "
     "nothing is certified"),
)  # fmt: skip


def comparison_files(comparison: Comparison) -> dict[str, bytes]:
    """Every file of a report folder by name: JSON, page, chart."""
    return {
        JSON_NAME: comparison_json(comparison).encode("utf-8", errors="backslashreplace"),
        PAGE_NAME: comparison_page(comparison).encode(),
        PLOT_NAME: png(comparison_chart(comparison)),
    }


def comparison_json(comparison: Comparison) -> str:
    """The record as text, a newline at the end; NaN and infinities as null."""
    record = plain_values(to_record(comparison), "comparison")
    return json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def print_comparison(comparison: Comparison) -> None:
    """The end of `abliterate compare`."""
    Console(highlight=False, markup=False, emoji=False).print(comparison_table(comparison))


def comparison_table(comparison: Comparison) -> RenderableType:
    """Fits 80 columns: intervals stand below their figures."""
    table = simple_table()
    table.add_column("recipe", overflow="fold")
    for name in ("refused", "over-\nrefused", "look-\nalikes", "KL", "loss", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("certified", no_wrap=True)
    for row in _all(comparison):
        rates = [_below(_rate(e), _rate_interval(e)) for e in (row.refusals, row.over_refusals, row.look_alike)]
        kl = _below(_nats(row.kl), _nats_interval(row.kl))
        verdict = Text(_verdict(row), "red" if row.certificate == "failed" else "")
        label = Text(f"{row.recipe} *" if row.on_front else row.recipe)
        cells = [label, *rates, kl, Text(significant(row.cross_entropy)), Text(_time(row)), verdict]
        table.add_row(*cells, style="bold" if row.best else "")
    remarks = [Text(line) for line in remarks_of(comparison)]
    return Group(table, Text(), Text("* on the front: no other recipe has both fewer refusals and less KL"), *remarks)


def comparison_markdown(comparison: Comparison) -> str:
    """The table and the remarks below it, for docs/recipes.md."""
    rows = [[f"**{cell}**" if row.best else cell for cell in map(plain, _cells(row))] for row in _all(comparison)]
    remarks = "\n".join(f"- {plain(line)}" for line in remarks_of(comparison))
    text = markdown([plain(name) for name in _HEADER], rows, right=0)
    return f"{text}\n\n{remarks}\n" if remarks else f"{text}\n"


def comparison_chart(comparison: Comparison) -> Figure:
    """Refusals against KL; rows without both figures have no point."""
    points = []
    for row in _all(comparison):
        if row.refusals is not None and row.kl is not None:
            aside = row.aim != "refusal" or row is comparison.base
            points.append(Point(row.recipe, _triple(row.refusals), _triple(row.kl), row.on_front, row.best, aside))
    return pareto_chart(points)


def comparison_page(comparison: Comparison) -> str:
    """The page."""
    best, rows = comparison.best, _all(comparison)
    lead = [f"Best: {best.recipe}, {best.note}."] if best else ["No recipe can be called best."]
    if best is not None:
        before = f" (before: {_rate(comparison.base.refusals)})" if comparison.base else ""
        lead.append(
            f"It leaves {_rate(best.refusals)} of harmful prompts refused{before} at a KL of {_nats(best.kl)} nats."
        )
    caption = (
        "Each recipe's refusals against what it costs. The line is the front: no other recipe has both fewer refusals "
        "and less KL. A KL of 0, which a log scale has no place for, stands at the left."
    )
    strong = frozenset(i for i, row in enumerate(rows) if row.best)
    table = Grid(_HEADER, [_cells(row) for row in rows], right=0, strong=strong)
    drawn = any(row.refusals and row.kl for row in rows)
    sections = [
        Section("Refusals and cost", charts=[Chart(comparison_chart(comparison), caption)] if drawn else []),
        Section("Figures", tables=[table], facts=_EXPLAINED),
        Section("Remarks", remarks_of(comparison)),
        Section("What was measured", facts=comparison.facts),
    ]
    shown = [section for section in sections if section.paragraphs or section.facts or section.charts or section.tables]
    title = f"Recipes compared on {comparison.model}"
    footer = [comparison.reproduce] if comparison.reproduce else []
    return render_page(Page(title, f"{len(comparison.rows)} recipes, the edit in the weights", lead, shown, footer))


_PROVED = {
    "holds": "certificate holds for what the recipe removes",
    "not exact": "nothing is certified",
    "failed": "certificate failed",
}


def remarks_of(comparison: Comparison) -> list[str]:
    """The best and why; what certificates do not promise; notes; degenerate completions."""
    lines = []
    for row in sorted(_all(comparison), key=lambda row: not row.best):
        told = [row.note] if row.note else []
        if row.certificate in _PROVED and row.claim:
            told.append(f"{_PROVED[row.certificate]}: {claim_of({'claim': row.claim})}")
        if row.degenerate:
            told.append(f"{percent(row.degenerate)} of completions degenerate")
        if told:
            lines.append(f"{'best: ' if row.best else ''}{row.recipe}: {'; '.join(told)}")
    return lines


def _all(comparison: Comparison) -> list[ComparisonRow]:
    return [*([comparison.base] if comparison.base else []), *comparison.rows]


def _cells(row: ComparisonRow) -> list[str]:
    told = (row.refusals, row.refusals_score, row.over_refusals, row.look_alike)
    rates = [_beside(_rate(e), _rate_interval(e)) for e in told]
    kls = [_beside(_nats(e), _nats_interval(e)) for e in (row.kl, row.kl_answered, row.kl_answers)]
    loss = significant(row.cross_entropy, 4)
    return [row.recipe, *rates, *kls, loss, percent(row.degenerate), _time(row), _verdict(row)]


def _verdict(row: ComparisonRow) -> str:
    """Of an edit: the base has none, nor has a recipe that could not be made."""
    return MISSING if row.kl is None else row.certificate


def _triple(estimate: Estimate) -> tuple[float, float, float]:
    return estimate.value, estimate.low, estimate.high


def _rate(estimate: Estimate | None) -> str:
    return percent(estimate.value if estimate else None)


def _rate_interval(estimate: Estimate | None) -> str:
    return f"{100 * estimate.low:.0f}–{100 * estimate.high:.0f}" if estimate else ""


def _nats(estimate: Estimate | None) -> str:
    return significant(estimate.value if estimate else None)


def _nats_interval(estimate: Estimate | None) -> str:
    return f"{significant(estimate.low, 2)}–{significant(estimate.high, 2)}" if estimate else ""


def _below(value: str, interval: str) -> Text:
    text = Text(value)
    return text.append(f"\n{interval}", "dim not bold") if interval else text


def _beside(value: str, interval: str) -> str:
    return f"{value} ({interval})" if interval else value


def _time(row: ComparisonRow) -> str:
    if row.seconds <= 0:
        return MISSING
    return f"{row.seconds:.0f} s" if row.seconds < 120 else f"{row.seconds / 60:.0f} min"
