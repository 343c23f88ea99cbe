"""The plan on the terminal: every tensor accounted for, those that differ by layer alone in one row."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from abliterate.architecture.writer import Path, Plan, Writer
from abliterate.publish.figures import fold, ranges, sizes

_COUNTED = ("writer", "reader", "norm", "head")
"""Roles that have a plural."""


class _Stored(Protocol):
    @property
    def nbytes(self) -> int:
        """On disk."""


class Sized(Protocol):
    """A checkpoint, as far as the table needs it."""

    @property
    def tensors(self) -> Mapping[str, _Stored]:
        """By name."""


def simple_table(caption: Text | None = None) -> Table:
    """An empty table with a line below its header, two spaces between columns and nothing around them."""
    return Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        header_style="bold",
        caption=caption,
        caption_justify="left",
    )


def tensor_sizes(checkpoint: Sized) -> dict[str, int]:
    """Bytes of every tensor on disk."""
    return {name: info.nbytes for name, info in checkpoint.tensors.items()}


def plan_table(plan: Plan, sizes_of: Mapping[str, int] | None = None) -> RenderableType:
    """What is edited and how, then what is kept and why, then the sum.

    Args:
        sizes_of: bytes of every tensor by name, for a column with them.
    """
    head = "shares the embedding" if plan.tied else "a tensor of its own"
    title = f"{plan.family} ({plan.model_type}): {plan.num_layers} layers, hidden size {plan.hidden_size}, head {head}"
    space = Text()
    kept: list[RenderableType] = (
        [_kept(plan, sizes_of), space] if any(tensor.role != "writer" for tensor in plan.roles) else []
    )
    parts = [Text(title, "bold"), *_notices(plan), space, _edited(plan, sizes_of), space, *kept, _total(plan, sizes_of)]
    return Group(*parts)


def _notices(plan: Plan) -> list[Text]:
    """What has to be known before the tables are read."""
    notices = []
    if plan.inexact:
        notices.append(Text(f"not exact: {plan.inexact}", "bold red"))
    if plan.probed:
        notices.append(Text("not in the table: its writers were found by gradients on a tiny twin", "yellow"))
    if plan.boundaries:
        notices.append(Text("the stream passes gains: the direction is pulled back layer by layer"))
    if plan.sometimes:
        notices.append(Text(f"layers {ranges(plan.sometimes)} only run when there is an image"))
    if plan.shared:
        notices.append(Text(f"one tensor under two names: {', '.join(_same(a, b) for a, b in plan.shared)}"))
    unknown = [tensor.name for tensor in plan.roles if tensor.role == "unknown"]
    if unknown:
        notices.append(Text(f"not in the table, kept as they are: {', '.join(unknown)}", "yellow"))
    return notices


def _same(alias: str, first: str) -> str:
    return f"{alias} in several layers" if alias == first else f"{alias} = {first}"


def _edited(plan: Plan, sizes_of: Mapping[str, int] | None) -> Table:
    table = _table("edited", ("kind", "axis"), sizes_of)
    groups: dict[tuple[str, str, int, str], list[Writer]] = {}
    for writer in plan.writers:
        groups.setdefault((fold(writer.tensor), writer.kind, writer.axis, _gain(writer.gain)), []).append(writer)
    for (pattern, kind, axis, gain), writers in groups.items():
        label = Text(pattern)
        note(label, _missing_layers(writers, plan.num_layers))
        note(label, gain and f"gain {gain}")
        cells = [kind, str(axis), str(len(writers)), *_size([w.tensor for w in writers], sizes_of)]
        table.add_row(label, *map(Text, cells))
    return table


def _kept(plan: Plan, sizes_of: Mapping[str, int] | None) -> Table:
    table = _table("kept", ("role",), sizes_of)
    groups: dict[tuple[str, str, str], list[str]] = {}
    for tensor in plan.roles:
        if tensor.role != "writer":
            groups.setdefault((tensor.role, fold(tensor.name), fold(tensor.reason)), []).append(tensor.name)
    for (role, pattern, reason), names in groups.items():
        label = Text(pattern)
        note(label, reason)
        table.add_row(label, *map(Text, [role, str(len(names)), *_size(names, sizes_of)]))
    return table


def _table(first: str, others: Iterable[str], sizes_of: Mapping[str, int] | None) -> Table:
    table = simple_table()
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name)
    table.add_column("#", justify="right")
    if sizes_of is not None:
        table.add_column("size", justify="right", no_wrap=True)
    return table


def note(label: Text, text: str) -> None:
    """A second line below a label, when there is something to say."""
    if text:
        label.append(f"\n  {text}", "dim")


def _gain(gain: Path) -> str:
    """Of the norms that follow, named within their layer."""
    named = [(step, fold(step.tensor).rpartition(".N.")[2]) for step in gain if step.tensor]
    product = " * ".join(f"({step.offset:g} + {name})" if step.offset else name for step, name in named)
    return product + (", less the mean over channels" if any(step.kind == "center" for step in gain) else "")


def _missing_layers(writers: Sequence[Writer], layers: int) -> str:
    """Which layers, where it is not all of them."""
    numbers = [writer.layer for writer in writers if writer.layer is not None]
    return f"layers {ranges(numbers)}" if numbers and len(set(numbers)) < layers else ""


def _size(names: Sequence[str], sizes_of: Mapping[str, int] | None) -> list[str]:
    return [] if sizes_of is None else [sizes(sum(sizes_of[name] for name in names))]


def _total(plan: Plan, sizes_of: Mapping[str, int] | None) -> Text:
    counts = Counter(tensor.role for tensor in plan.roles)
    parts = ", ".join(
        f"{count} {role}{'s' if count > 1 and role in _COUNTED else ''}" for role, count in counts.items()
    )
    size = "" if sizes_of is None else f", {sizes(sum(sizes_of.values()))}"
    return Text(f"{len(plan.roles)} tensors{size}: {parts}")
