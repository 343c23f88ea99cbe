"""What speaks for a kind of edit, in sentences."""

import statistics
from collections.abc import Iterable, Sequence

from abliterate.difference.coverage import coverage
from abliterate.difference.findings import Findings
from abliterate.difference.tensors import TensorDifference


def projecting(found: Findings, strong: Sequence[TensorDifference]) -> list[str]:
    """How well, how strongly and how the differences project the base's own weights."""
    cosine = statistics.median(t.fit.cosine for t in strong if t.fit)
    strengths = sorted(t.fit.strength for t in strong if t.fit)
    said = [
        f"in {len(strong)} of {len(found.matrices)} changed matrices the difference is -s u (v.W) of the base's own W: "
        f"median cosine {cosine:.4f}, s from {strengths[0]:.3f} to {strengths[-1]:.3f}"
    ]
    forms = {t.fit.form for t in strong if t.fit} - {"plain"}
    words = {
        "gain": "through the gain of the norm behind it",
        "rows": "of rows that were made of length 1 and scaled back",
    }
    return said + [f"some are projections {words[form]}" for form in sorted(forms)] + together(found)


def rank_of(found: Findings) -> int:
    """Of what all writers lose together."""
    return 1 if found.shared is None or found.shared.one else found.shared.dimensions


def directions_of(found: Findings) -> str:
    """How many directions writers lose."""
    shared = found.shared
    if shared is None or not (shared.one or shared.few):
        return "a direction of its own in each matrix"
    return "one direction" if shared.one else f"{shared.dimensions} directions"


def together(found: Findings) -> list[str]:
    """What changed writers have in common."""
    shared = found.shared
    if shared is None:
        return []
    places = {"plain": "", "gain": ", seen behind the norm that follows", "rows": ", seen with rows of length 1"}
    if shared.one:
        return [
            f"{shared.tensors} writers share one output direction{places[shared.form]}: it holds "
            f"{100 * shared.shares[0]:.4g} % of their differences, least cosine {shared.cosines[0]:.4f}"
        ]
    return [
        f"{shared.tensors} writers' differences span {shared.dimensions} directions of the stream"
        f"{places[shared.form]}; the first holds {100 * shared.shares[0]:.3g} %"
    ]


def where(tensors: Sequence[TensorDifference]) -> list[str]:
    """Modules and layers."""
    return [f"changed: {coverage(tensors)}"]


def percent(values: Iterable[float]) -> str:
    """Shares from the least to the largest."""
    found = sorted(values)
    low, high = (f"{100 * value:.2g}" for value in (found[0], found[-1]))
    return f"{low} %" if low == high else f"{low} to {high} %"
