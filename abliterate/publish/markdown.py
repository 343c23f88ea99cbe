"""Values from outside as Markdown: nothing in them can become markup, a link or a second line."""

import re
from collections.abc import Sequence

_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~$])")


def plain(text: str) -> str:
    """One line of text with every character that Markdown, HTML or TeX would act on escaped."""
    return _MARKUP.sub(r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """An inline code span on one line."""
    line = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}" if line else "` `"


def block(text: str, language: str = "") -> str:
    """A fenced code block."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def link(text: str, url: str) -> str:
    """A link; the address is of our own making or was checked."""
    return f"[{plain(text)}]({url})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: int = 0) -> str:
    """A table whose last `right` columns are aligned right; cells are Markdown already, pipes in code are escaped."""
    marks = ["---"] * (len(header) - right) + ["---:"] * right
    lines = [header, marks, *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", text)


def bullets(lines: Sequence[str]) -> str:
    """A list."""
    return "\n".join(f"- {line}" for line in lines)
