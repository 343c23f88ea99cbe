"""JSON files written again in the manner in which they were written."""

import json
import re
from typing import Any


def dump_like(original: bytes, content: Any) -> bytes:
    """`content` as JSON with the original's indent, escapes and last line; keys keep the order of `content`."""
    text = original.decode("utf-8-sig")
    found = re.match(r"\s*[{\[]\r?\n([ \t]+)\S", text)
    written = json.dumps(content, indent=found[1] if found else None, ensure_ascii=text.isascii())
    ending = text[len(text.rstrip()) :]
    return (written + ending).encode()
