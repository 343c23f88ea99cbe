"""The audit for people: charts, one page, and a table on the terminal, all from what `audit.json` says."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from abliterate.publish.audit_charts import audit_charts
from abliterate.publish.charts import png
from abliterate.publish.figures import percent, significant, visible
from abliterate.publish.html import Grid, Page, Section, render_page
from abliterate.publish.plan_view import simple_table

PAGE_NAME = "audit.html"
Record = Mapping[str, Any]


def audit_plots(record: Record) -> dict[str, bytes]:
    """PNG files by name."""
    return {f"{name}.png": png(chart.figure) for name, chart in audit_charts(record).items()}


def audit_page(record: Record) -> str:
    """The page."""
    charts, model = audit_charts(record), record["model"]
    same = [charts[name] for name in ("similarity", "categories") if name in charts]
    sections = [
        Section("How many directions", charts=[charts["directions"]], tables=[_steps(record)], folded=True),
        Section("How much of one", charts=[charts["strength"]], tables=[_doses(record)], folded=True),
        Section("In which layers", charts=[charts["windows"]], tables=[_tried(record)], folded=True),
        Section("Where it can be read", charts=[charts["map"], charts["layers"]]),
        Section("Is it the same direction everywhere", charts=same, tables=_by_category(record)),
        Section("What was measured", record["notes"], _facts(record)),
    ]
    title = f"How concentrated is refusal in {model['id']}?"
    subtitle = f"{model['type']}, {model['layers']} layers, hidden size {model['hidden_size']}"
    versions = ", ".join(f"{name} {version}" for name, version in record["tool"].items())
    return render_page(Page(title, subtitle, record["verdict"], sections, [record["reproduce"], versions]))


def print_audit(record: Record, folder: str) -> None:
    """The end of `abliterate audit`."""
    Console(highlight=False, markup=False, emoji=False).print(closing(record, folder))


def closing(record: Record, folder: str) -> RenderableType:
    """The verdict, what each edit leaves and costs, and where the report is."""
    table = simple_table()
    table.add_column("removed")
    for name in ("refused", "95 %", "score", "KL"):
        table.add_column(name, justify="right")
    for name, effect in _edits(record):
        table.add_row(*map(Text, [name, *_cells(effect)]))
    sentences = [Text(sentence, "bold" if i == 0 else "") for i, sentence in enumerate(record["verdict"])]
    return Group(*sentences, Text(), table, Text(), Text(f"wrote {folder}"))


def _edits(record: Record) -> list[tuple[str, Record]]:
    steps, pick = record["directions"]["steps"], record["pick"]
    dose, window = record["strengths"]["halving"], record["windows"]["halving"]
    rows = [
        ("nothing", record["base"]),
        (f"the direction at position {pick['position']}, layer {pick['layer']}", steps[0]),
    ]
    rows += [(f"{step['directions']} directions", step) for step in _few(steps[1:], record["directions"]["enough"])]
    rows += [(f"{percent(dose['strength'])} of the direction", dose)] if dose else []
    rows += [(f"the direction in {_layers(window)}", window)] if window else []
    return rows


def _few(steps: Sequence[Record], enough: int) -> list[Record]:
    """Two directions, those after which refusals stop falling, and all of them."""
    wanted = {2, enough, steps[-1]["directions"]} if steps else set()
    return [step for step in steps if step["directions"] in wanted]


def _layers(window: Record) -> str:
    first, last = window["first"], window["last"]
    return f"layer {first} alone" if first == last else f"layers {first} to {last} alone"


def _cells(effect: Record) -> list[str]:
    interval = f"{100 * effect['low']:.0f} to {100 * effect['high']:.0f} %"
    return [percent(effect["refusal_rate"]), interval, significant(effect["score"]), significant(effect["kl"])]


_HEADER = ("refused", "95 % interval", "mean score, nats", "KL, nats")


def _steps(record: Record) -> Grid:
    rows = [["0", "", *_cells(record["base"])]]
    for step in record["directions"]["steps"]:
        rows.append([str(step["directions"]), f"position {step['position']}, layer {step['layer']}", *_cells(step)])
    return Grid(("directions", "the last of them from", *_HEADER), rows, right=4)


def _doses(record: Record) -> Grid:
    rows = [["0 %", *_cells(record["base"])]]
    rows += [[percent(dose["strength"]), *_cells(dose)] for dose in record["strengths"]["doses"]]
    return Grid(("share removed", *_HEADER), rows, right=5)


def _tried(record: Record) -> Grid:
    windows = record["windows"]
    best = sorted(windows["tried"], key=lambda w: (w["refusal_rate"], w["last"] - w["first"], w["score"]))[:20]
    rows = [[_layers(window).removesuffix(" alone"), *_cells(window)[:3]] for window in best]
    caption = (
        f"The {len(best)} best of {len(windows['tried'])} windows, on {windows['base']['prompts']} harmful prompts."
    )
    return Grid(("removed in", *_HEADER[:3]), rows, caption, right=3)


def _by_category(record: Record) -> list[Grid]:
    found = record["categories"]
    if found is None:
        return []
    rows = zip(found["names"], found["prompts"], found["cosine_to_pick"], strict=True)
    cells = [[name, str(count), f"{cosine:.2f}".replace("-", "−")] for name, count, cosine in rows]
    caption = "Each category's own direction and the picked one."
    return [Grid(("category", "refused train prompts", "cosine with the picked direction"), cells, caption, right=2)]


def _facts(record: Record) -> list[tuple[str, str]]:
    harmful, harmless, pick = record["prompts"]["harmful"], record["prompts"]["harmless"], record["pick"]
    token = visible(record["tokens"][pick["position"]])
    return [
        ("Direction", f"position {pick['position']} {token}, layer {pick['layer']}: {pick['reason']}"),
        ("Means over", f"{harmful['kept']} of {harmful['train']} harmful and {harmless['kept']} of "
         f"{harmless['train']} harmless prompts"),
        ("Rates, KL on", f"{harmful['validation']} harmful and {harmless['validation']} harmless validation prompts"),
        ("Map, windows on", f"{harmful['grid']} harmful, refused ones first, and {harmless['grid']} harmless ones"),
        ("Prompts from", f"{harmful['source']}, {harmless['source']}"),
        ("Refusals start with", ", ".join(map(visible, record["refusal_tokens"]))),
        ("Computed in", record["dtype"]),
    ]  # fmt: skip
