"""An adapter on the terminal: what it holds, what it does not, and where it is."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from abliterate.publish.adapter_card import adapter_rows
from abliterate.publish.figures import sizes
from abliterate.publish.plan_view import simple_table
from abliterate.publish.summary import fact_table

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
        "evaluation": Text("not measured"),
    }
    if not edit["plain"]:
        facts["loads in"] = Text("PEFT; it has biases or experts, which servers may refuse: merge it for these")
    if manifest["warnings"]:
        facts["warnings"] = Text("\n".join(manifest["warnings"]), "yellow")
    facts["written"] = Text(f"{folder}, {size}")
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(Group(_held(edit), *([_left_out(edit)] if edit["left_out"] else []), Text(), fact_table(facts)))


def _held(edit: Record) -> RenderableType:
    table = simple_table(Text("share along the direction, by the factors as stored", "dim"))
    table.add_column("tensors", overflow="fold")
    for name in ("#", "as", "before", "after"):
        table.add_column(name, justify="right")
    for row in adapter_rows(edit["tensors"]):
        table.add_row(*map(Text, row))
    return table


def _left_out(edit: Record) -> RenderableType:
    table = simple_table(Text("not in the adapter", "dim"))
    for name in ("tensor", "why"):
        table.add_column(name, overflow="fold")
    for each in edit["left_out"]:
        table.add_row(Text(each["tensor"]), Text(each["why"], "" if each["faithful"] else "yellow"))
    return table
