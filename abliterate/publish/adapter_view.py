"""An adapter on the terminal: what it holds, what it does not, and where it is."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from abliterate.adapter.outline import Outline
from abliterate.publish.adapter_card import adapter_rows
from abliterate.publish.figures import fold, sizes
from abliterate.publish.plan_view import note, simple_table
from abliterate.publish.summary import certificate_facts, compare_table, fact_table

Record = Mapping[str, Any]


def print_adapter(manifest: Record, folder: str) -> None:
    """The end of `abliterate convert --adapter`."""
    edit, output = manifest["edit"], manifest["output"]
    size = sizes(sum(record["bytes"] for record in output.values()))
    facts: dict[str, RenderableType] = {
        "adapter": Text(f"LoRA of rank {edit['rank']} in float32, {len(edit['tensors'])} tensors"),
        "head": Text(
            "shares the embedding: unedited beside the base, edited when merged"
            if edit["head"] == "shared"
            else "separate, untouched"
        ),
        **certificate_facts(manifest["certificate"], "merged"),
    }
    evaluation = manifest["evaluation"]
    if evaluation is None:
        facts["evaluation"] = Text("not measured")
    if not edit["plain"]:
        facts["loads in"] = Text("PEFT; it has biases or experts, which servers may refuse: merge it for these")
    if manifest["warnings"]:
        facts["warnings"] = Text("\n".join(manifest["warnings"]), "yellow")
    facts["written"] = Text(f"{folder}, {size}")
    parts: list[RenderableType] = [_held(edit), *([_left_out(edit["left_out"])] if edit["left_out"] else []), Text()]
    if evaluation is not None:
        parts += [compare_table({"before": evaluation["base"], "merged": evaluation["edited"]}), Text()]
    Console(highlight=False, markup=False, emoji=False).print(Group(*parts, fact_table(facts)))


def _held(edit: Record) -> RenderableType:
    table = simple_table(
        Text("share along the direction: of the base, by the factors as stored, and merged as PEFT does", "dim")
    )
    table.add_column("tensors", overflow="fold")
    for name in ("#", "before", "after", "merged"):
        table.add_column(name, justify="right")
    for name, count, kind, *shares in adapter_rows(edit["tensors"]):
        label = Text(name)
        note(label, "" if kind == "linear" else kind)
        table.add_row(label, *map(Text, (count, *shares)))
    return table


def _left_out(left_out: Sequence[Record]) -> RenderableType:
    table = simple_table(Text("not in the adapter", "dim"))
    for name in ("tensor", "why"):
        table.add_column(name, overflow="fold")
    for each in left_out:
        table.add_row(Text(each["tensor"]), Text(each["why"], "" if each["faithful"] else "yellow"))
    return table


def print_adapter_plan(outline: Outline, summary: str) -> None:
    """`abliterate convert --adapter --dry-run`: where factors go, what is left out, and one line of words."""
    table = simple_table()
    table.add_column("tensors", overflow="fold")
    for name in ("#", "as", "size"):
        table.add_column(name, justify="right")
    groups: dict[tuple[str, str], list[int]] = {}
    for part in outline.parts:
        groups.setdefault((fold(part.tensor), part.kind), []).append(part.bytes)
    for (name, kind), each in groups.items():
        table.add_row(*map(Text, (name, str(len(each)), kind, sizes(sum(each)))))
    left_out = [asdict(each) for each in outline.left_out]
    parts = [table, *([_left_out(left_out)] if left_out else []), Text()]
    Console(highlight=False, markup=False, emoji=False).print(Group(*parts), f"dry run: {summary}; nothing was written")
