"""`abliterate diff` on the terminal: the kind of edit with its evidence first, then what differs, group by group."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from abliterate.difference.coverage import layer_of
from abliterate.errors import some
from abliterate.publish.figures import MISSING, fold, percent, ranges, significant, sizes
from abliterate.publish.plan_view import note, simple_table
from abliterate.publish.summary import fact_table

Record = Mapping[str, Any]
SHOWN_KEYS, SHOWN_NAMES = 12, 6
FITS = 0.5
"""Below this cosine a strength means nothing."""
_FORMS = {"plain": "", "gain": " behind the norm that follows", "rows": " with rows of length 1"}
_STYLES = {"identical": "green", "unknown": "yellow"}


def print_difference(record: Record) -> None:
    """The table of a difference's record."""
    Console(highlight=False, markup=False, emoji=False).print(difference_view(record))


def difference_view(record: Record) -> RenderableType:
    """Verdict, facts, changed tensors, what was removed, other files."""
    parts: list[RenderableType] = [fact_table(_facts(record))]
    if record["tensors"]["changed"]:
        parts += [Text(), changed_table(record["tensors"]["changed"])]
    along, what = _along(record)
    if along:
        parts += [Text(), removed_table(along, what)]
    files = _files(record["files"])
    if files:
        parts += [Text(), fact_table(files)]
    return Group(*parts)


def _facts(record: Record) -> dict[str, RenderableType]:
    verdict = record["verdict"]
    title = Text(verdict["title"], _STYLES.get(verdict["kind"], "bold"))
    facts: dict[str, RenderableType] = {
        "base": Text(_checkpoint(record["base"])),
        "edited": Text(_checkpoint(record["edited"])),
        "kind": title,
        "evidence": Text("\n".join(verdict["evidence"]) or MISSING),
    }
    if record["claims"] is not None:
        facts["manifest"] = Text(_claims(record["claims"]))
    facts["tensors"] = Text(_tensors(record["tensors"]))
    if (shared := record["shared"]) is not None:
        facts["stream"] = Text(_span(shared, record["stream"]["hidden_size"]))
    if (file := record["file"]) is not None:
        facts["direction"] = Text(_likeness(file))
    if record["stream"]["why_not"] is not None:
        facts["note"] = Text(f"writers told by shape and name: {record['stream']['why_not']}", "yellow")
    return facts


def _checkpoint(side: Record) -> str:
    return f"{side['name']} ({sizes(side['bytes'])}, {', '.join(side['dtypes'])})"


def _claims(claims: Record) -> str:
    if claims.get("error"):
        return f"there, but not readable: {claims['error']}"
    return f"says recipe {claims['recipe']}, base {claims['base']}; `abliterate inspect` checks it"


def _tensors(tensors: Record) -> str:
    changed = len(tensors["changed"])
    said = [f"{tensors['compared']} compared, {tensors['same']} the same, {changed} not"]
    for key in ("missing", "extra"):
        if tensors[key]:
            said.append(f"{len(tensors[key])} {key}: {some(tensors[key], SHOWN_NAMES)}")
    if tensors["reshaped"]:
        said.append(
            f"{len(tensors['reshaped'])} of another shape: {some(map(_reshaped, tensors['reshaped']), SHOWN_NAMES)}"
        )
    if tensors["renamed"]:
        said.append("names start with {1!r} instead of {0!r}".format(*tensors["renamed"]))
    if tensors["head"]:
        words = {"untied": "the head, tied in the base, is stored", "tied": "the base's own head is tied"}
        said.append(words[tensors["head"]])
    return "; ".join(said)


def _reshaped(tensor: Record) -> str:
    return f"{tensor['name']} {list(tensor['base'])} to {list(tensor['edited'])}"


def _span(shared: Record, hidden: int | None) -> str:
    least = "at least " if shared["is_least"] else ""
    return (
        f"{shared['tensors']} changed writers span {least}{shared['dimensions']} of {hidden} directions"
        f"{_FORMS[shared['form']]} (99 %); the first holds {percent(shared['shares'][0])}, cosine with it "
        f"{shared['least_cosine']:.4f} at least, {shared['median_cosine']:.4f} median"
    )


def _likeness(file: Record) -> str:
    if file["least"] is None:
        return f"{file['file']}: no writer changed"
    many = f"{file['directions']} directions of " if file["directions"] > 1 else ""
    return (
        f"{many}{file['file']}: cosine with the recovered one {_cosine(file['shared'])}; of single writers "
        f"{_cosine(file['least'])} at least, {_cosine(file['median'])} median"
    )


def _cosine(value: float | None) -> str:
    return MISSING if value is None else f"{value:.5f}"


def changed_table(tensors: Sequence[Record]) -> Table:
    """Tensors that differ, those that differ by layer alone in one row: of each figure the range, or the median."""
    table = simple_table()
    table.add_column("changed", overflow="fold")
    for name in ("#", "rank", "size", "σ1", "edge", "strength", "cosine"):
        table.add_column(name, justify="right")
    groups: dict[tuple[str, str, str, str], list[Record]] = {}
    for tensor in tensors:
        key = (fold(tensor["name"]), fold(tensor["other"]), tensor["state"], tensor["role"])
        groups.setdefault(key, []).append(tensor)
    for (pattern, other, state, _), members in groups.items():
        label = Text(pattern)
        note(label, "; ".join(filter(None, (state, _as(pattern, other), _layers(members), _dtypes(members)))))
        table.add_row(label, *map(Text, _cells(members)))
    return table


def _as(pattern: str, other: str) -> str:
    return "" if pattern == other else f"as {other}"


def _cells(members: Sequence[Record]) -> list[str]:
    seen = [tensor for tensor in members if tensor["spectrum"]]
    fits = [tensor["fit"] for tensor in seen if tensor["fit"] is not None]
    relative = [percent(_middle([tensor["relative"] for tensor in members]))]
    if not seen:
        return [str(len(members)), MISSING, *relative, *[MISSING] * 4]
    strengths = [fit["strength"] for fit in fits]
    projecting = _middle([fit["cosine"] for fit in fits])
    fitted = [_strengths(strengths) if abs(projecting) > FITS else MISSING, f"{projecting:.4f}"]
    return [
        str(len(members)),
        _ranks(seen),
        *relative,
        significant(_middle([tensor["spectrum"][0] for tensor in seen])),
        significant(_middle([tensor["edge"] for tensor in seen])),
        *(fitted if members[0]["state"] != "vector" else [MISSING] * 2),
    ]


def _ranks(members: Sequence[Record]) -> str:
    found = sorted(tensor["rank"] for tensor in members)
    if any(tensor["rank_is_least"] for tensor in members):
        return f"≥{found[0]}"
    return str(found[0]) if found[0] == found[-1] else f"{found[0]}–{found[-1]}"


def _strengths(values: Sequence[float]) -> str:
    low, high = (f"{value:.2f}" for value in (min(values), max(values)))
    return low if low == high else f"{low}–{high}"


def _middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _layers(members: Sequence[Record]) -> str:
    numbers = [number for tensor in members if (number := layer_of(tensor["name"])) is not None]
    return f"layers {ranges(numbers)}" if numbers else ""


def _dtypes(members: Sequence[Record]) -> str:
    pairs = sorted({f"{a} to {b}" for a, b in (tensor["dtypes"] for tensor in members) if a != b})
    return ", ".join(pairs)


def _along(record: Record) -> tuple[Sequence[Record], str]:
    """What was removed along the file's directions where there is a file, else along those that were found."""
    if record["file"] is not None:
        return record["file"]["removed"], f"what {record['file']['file']} names"
    return record["removed"], "the recovered directions"


def removed_table(writers: Sequence[Record], what: str) -> Table:
    """The share of every writer along the directions, by groups; the largest of each."""
    table = simple_table(Text(f"largest share of a writer along {what}, of its norm", "dim"))
    table.add_column("writers", overflow="fold")
    for name in ("#", "changed", "before", "after"):
        table.add_column(name, justify="right")
    groups: dict[str, list[Record]] = {}
    for writer in writers:
        groups.setdefault(fold(writer["tensor"]), []).append(writer)
    for pattern, members in groups.items():
        changed = sum(writer["changed"] for writer in members)
        shares = [significant(max(writer[key] for writer in members)) for key in ("before", "after")]
        table.add_row(Text(pattern), str(len(members)), str(changed), *shares)
    return table


def _files(files: Record) -> dict[str, RenderableType]:
    found: dict[str, RenderableType] = {}
    if files["config"]:
        found["config.json"] = Text(_keys(files["config"]))
    for file in files["changed"]:
        found[file["name"]] = Text(_keys(file["keys"]) if file["keys"] else "differs")
    if files["missing"]:
        found["missing files"] = Text(some(files["missing"], SHOWN_NAMES))
    if files["added"]:
        found["added files"] = Text(some(files["added"], SHOWN_NAMES))
    return found


def _keys(keys: Sequence[Record]) -> str:
    lines = [f"{k['key']}: {_value(k['base'])} → {_value(k['edited'])}" for k in keys[:SHOWN_KEYS]]
    return "\n".join(lines + [f"and {len(keys) - SHOWN_KEYS} more keys"] * (len(keys) > SHOWN_KEYS))


def _value(text: str | None) -> str:
    return MISSING if text is None else text
