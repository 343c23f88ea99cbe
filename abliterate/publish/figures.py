"""How figures are written in the card and on the terminal: what is measured, under which name, to which precision."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MISSING = "–"


def significant(value: float | None, digits: int = 3) -> str:
    """Three significant digits: 0.0413, 12.3, 6.9e-6; a dash for what was not measured."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    power = int(exponent)
    if -4 < power < 6:
        return f"{value:.{max(0, digits - 1 - power)}f}"
    return f"{mantissa}e{power}"


def percent(rate: float | None, count: int | None = None) -> str:
    """A share as `98.4 %`, with the number it stands for when the whole is known: `98.4 % (63/64)`."""
    if rate is None or not math.isfinite(rate):
        return MISSING
    text = f"{100 * rate:.3g} %" if rate < 0.9995 else f"{100 * rate:.4g} %"
    return f"{text} ({round(rate * count)}/{count})" if count else text


def claim_of(certificate: Mapping[str, Any]) -> str:
    """The certificate's claim without its verdict and full stop, which the sentences around it bring."""
    claim: str = certificate["claim"]
    return claim.removeprefix("does not hold: ").removeprefix("not exact: ").rstrip(".")


def fold(name: str) -> str:
    """A tensor's name with its numbers replaced: `model.layers.7.mlp.down_proj.weight` -> `model.layers.N.mlp…`."""
    return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "N", name)


def ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers, runs joined: `0–12, 14`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}–{high}" for low, high in runs)


def visible(token: str) -> str:
    """A token's text on one line, in quotes, with control characters and odd spaces escaped."""
    body = "".join(
        char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode() for char in token
    )
    return f"'{body}'"


def sizes(count: int) -> str:
    """Bytes in binary units: `257 MiB`."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1000 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.3g} {units[0]}"


@dataclass(frozen=True)
class WriterGroup:
    """Tensors of the same name but for layer numbers, of one kind and form.

    Attributes:
        before, after: the largest share along the direction; None where none was measured.
        tolerance: the strictest of the group.
    """

    pattern: str
    kind: str
    form: str
    gain: str | None
    count: int
    before: float | None
    after: float | None
    tolerance: float
    holds: bool


def writer_groups(writers: Sequence[Mapping[str, Any]]) -> list[WriterGroup]:
    """The manifest's `edit.writers`, grouped in order of first appearance."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for writer in writers:
        groups.setdefault((fold(writer["tensor"]), writer["kind"], writer["form"]), []).append(writer)
    return [
        WriterGroup(
            *key,
            fold(members[0]["gain"]) if members[0]["gain"] else None,
            len(members),
            _largest(members, "residual_before"),
            _largest(members, "residual_after"),
            min(member["tolerance"] for member in members),
            all(member["holds"] for member in members),
        )
        for key, members in groups.items()
    ]


def _largest(members: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """None also when one of several is missing: the largest is then not known."""
    values = [member[key] for member in members]
    return None if None in values else max(values)
