"""A patch on the terminal: what it is for, and what came of it."""

from collections.abc import Mapping, Sequence

from rich.console import Console, RenderableType
from rich.text import Text

from abliterate.checkpoint.listing import FileRecord
from abliterate.errors import one_line
from abliterate.patch.file import Description
from abliterate.publish.figures import sizes
from abliterate.publish.summary import fact_table


def print_patch(about: Description, file: str, size: int) -> None:
    """The end of `abliterate patch`."""
    left = "all files to the byte"
    if not about.whole:
        drawn = f"; {', '.join(about.redrawn)} drawn again" if about.redrawn else ""
        left = f"all files to the byte but the direction's candidate grid, left out (--whole keeps it){drawn}"
    _print({**_facts(about), "rebuilds": Text(left), "written": Text(f"{file}, {sizes(size)}")})


def print_applied(about: Description, folder: str, files: Mapping[str, FileRecord], redrawn: Sequence[str]) -> None:
    """The end of `abliterate apply`."""
    total = sum(record.bytes for record in files.values())
    same = f"{len(files) - len(redrawn)} of {len(files)} files, {sizes(total)}, as the patch names them"
    others = f"; drawn anew: {', '.join(redrawn)}" if redrawn else ""
    _print({**_facts(about), "hashes": Text(same + others, "green"), "written": Text(folder)})


def _facts(about: Description) -> dict[str, RenderableType]:
    base, edit = about.base, about.edit
    name = one_line(f"{base.id}@{base.commit}" if base.commit else base.id)
    return {
        "base": Text(f"{name}, {len(base.files)} files, {sizes(sum(f.bytes for f in base.files.values()))}"),
        "edit": Text(one_line(f"{edit.recipe}: {edit.tensors} tensors, head {edit.head}")),
        "made by": Text(one_line(", ".join(f"{tool} {version}" for tool, version in about.tool.items()))),
    }


def _print(facts: Mapping[str, RenderableType]) -> None:
    Console(highlight=False, markup=False, emoji=False).print(fact_table(facts))
