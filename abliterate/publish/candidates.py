"""The candidates of a selection in the order in which people want to see them, and what became of each in words."""

import math
from collections.abc import Mapping
from typing import Any

Record = Mapping[str, Any]
SHOWN = 8
"""How many a table shows; the manifest has all."""
_ORDER = ("picked", "passed", "kl", "induce", "nan", "screened", "layer")


def ranked(selection: Record, most: int = SHOWN) -> list[Record]:
    """The first of the manifest's `selection.candidates`: the pick, what passes by bypass, then what a filter drops."""
    return sorted(selection["candidates"], key=_rank)[:most]


def spares(selection: Record) -> bool:
    """Whether the direction is one of false refusals: then scores are of look-alikes and of harmful prompts."""
    return bool(selection["method"] == "sparing")


def score_names(selection: Record) -> tuple[str, str, str]:
    """What the scores `bypass`, `induce` and `kl` are called."""
    return ("look-alikes", "harmful", "KL") if spares(selection) else ("bypass", "induce", "KL")


def _rank(row: Record) -> tuple[int, float, int, int]:
    bypass = row["bypass"] if row["bypass"] is not None and math.isfinite(row["bypass"]) else math.inf
    return _ORDER.index(row["status"]), bypass, row["layer"], -row["position"]


def verdict(row: Record, selection: Record) -> str:
    """Picked, passed, or the filter that drops the candidate."""
    limits, status = selection["thresholds"], str(row["status"])
    if status == "picked":
        return "picked (KL bound relaxed)" if selection["relaxed"] else "picked"
    reasons = {
        "kl": f"KL above {limits['max_kl']:g}",
        "induce": "fewer harmful refused" if spares(selection) else f"induce below {limits['min_induce']:g}",
        "nan": "not a number",
        "screened": "dropped early",
        "layer": "layer too late",
    }
    return reasons.get(status, status)
