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
    size = text if text in MODES else _bytes(text)
    if not size:
        raise AbliterateError(f"{text[:40]!a} is not {', '.join(MODES)}, or a size such as 16GB")
    return size


def parse_size(text: str) -> int:
    """A size in bytes (`16GB`, `500MB`, `8GiB`).

    Raises:
        AbliterateError: it is none.
    """
    size = _bytes(text)
    if not size:
        raise AbliterateError(f"{text[:40]!a} is not a size such as 100GB")
    return size


def _bytes(text: str) -> int:
    """0 where it is no size."""
    found = _SIZE.fullmatch(text.strip())
    return int(float(found[1]) * _UNITS[found[2].lower()]) if found else 0


def shown(size: int) -> str:
    """Bytes in gigabytes."""
    return f"{size / 10**9:.1f} GB"


def short(size: int) -> str:
    """Bytes in the unit that leaves one to three digits before the point."""
    unit, name = _unit(size)
    return f"{size / unit:.1f} {name}"


def enough(size: int) -> str:
    """A size to ask for, as `parse_size` reads it: no less, and at most two digits behind the point."""
    unit, name = _unit(size)
    step = max(1, unit // 100)
    return f"{-(-size // step) * step / unit:g}{name}"


def _unit(size: int) -> tuple[int, str]:
    units = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "KB"))
    return next(((unit, name) for unit, name in units if size >= unit), (1, "B"))
