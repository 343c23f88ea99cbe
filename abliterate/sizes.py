"""Sizes as people write them."""

import re

from abliterate.errors import AbliterateError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?", re.IGNORECASE)
MODES = ("auto", "resident", "streamed")


def parse_memory(text: str) -> str | int:
    """`auto`, `resident`, `streamed`, or a size in bytes (`16GB`, `500MB`, `8GiB`).

    Raises:
        AbliterateError: it is none of them.
    """
    if text in MODES:
        return text
    found = _SIZE.fullmatch(text.strip())
    size = int(float(found[1]) * _UNITS[found[2].lower()]) if found else 0
    if size <= 0:
        raise AbliterateError(f"{text[:40]!a} is not {', '.join(MODES)}, or a size such as 16GB")
    return size


def shown(size: int) -> str:
    """Bytes in gigabytes."""
    return f"{size / 10**9:.1f} GB"
