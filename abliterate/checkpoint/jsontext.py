"""JSON files: nested no deeper than can be handled, and written again in the manner in which they were written."""

import json
import re
from typing import Any

MAX_DEPTH = 64
"""Of nested JSON. What is read is walked and written again by functions that go a few calls deeper at each level."""


def dump_like(original: bytes, content: Any) -> bytes:
    """`content` as JSON with the original's indent, escapes and last line; keys keep the order of `content`."""
    text = original.decode("utf-8-sig")
    found = re.match(r"\s*[{\[]\r?\n([ \t]+)\S", text)
    written = json.dumps(content, indent=found[1] if found else None, ensure_ascii=text.isascii())
    ending = text[len(text.rstrip()) :]
    return (written + ending).encode(errors="backslashreplace")  # half a character becomes its JSON escape


def is_shallow(value: object) -> bool:
    """Whether lists and objects are nested at most `MAX_DEPTH` deep."""
    level = [value]
    for _ in range(MAX_DEPTH):
        parts = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list))
        level = [inner for part in parts for inner in part if isinstance(inner, dict | list)]
        if not level:
            return True
    return False
