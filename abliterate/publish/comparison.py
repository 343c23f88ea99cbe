"""Recipes held against one another: which are on the front, and which is best."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

Certified = Literal["exact", "holds", "not exact", "failed"]
Aim = Literal["refusal", "over-refusal", "induce"]
MOST_REFUSALS = 0.05
"""Of a recipe that has done its work: among these the one that costs least is best."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ComparisonRow:
    """What one recipe did to one model, measured with the edit in the weights.

    Attributes:
        recipe: its name.
        refusals: share of harmful prompts refused, 0..1, by phrase in the answer. over_refusals: of harmless ones.
            look_alike: of harmless ones in the words of harmful ones. None where not measured.
        refusals_score: share of harmful prompts refused by the refusal score.
        kl: KL(base || edited) in nats at the first token, on harmless prompts.
        kl_answered: the same where the base does not refuse the prompt.
        kl_answers: the same over the first tokens of the base's own answers.
        cross_entropy: nats a token, on neutral text.
        degenerate: share of completions that loop or are empty.
        seconds: wall time, from the activations to the edited weights.
        certificate: "exact"; "holds" (as the recipe states it); "not exact" (nothing certified); "failed".
        claim: what is left, in words.
        aim: what the recipe is for; one that does not aim at refusals is never the best.
        on_front: no other recipe with the same aim has fewer refusals at no more KL, or less KL at no more refusals.
        best: the one to take. note: why, or what else there is to know.
    """

    recipe: str
    refusals: Estimate | None
    over_refusals: Estimate | None
    look_alike: Estimate | None
    kl: Estimate | None
    cross_entropy: float | None
    degenerate: float | None
    seconds: float
    certificate: Certified
    claim: str = ""
    aim: Aim = "refusal"
    on_front: bool = False
    best: bool = False
    note: str = ""
    kl_answered: Estimate | None = None
    refusals_score: Estimate | None = None
    kl_answers: Estimate | None = None


@dataclass(frozen=True)
class Comparison:
    """All recipes on one model.

    Attributes:
        model: its Hub id or name. `base`: the untouched model as a row of its own, if it was measured.
        rows: in the order in which they are shown.
        facts: what was measured on, and how: names and texts.
        reproduce: the command.
    """

    model: str
    rows: tuple[ComparisonRow, ...]
    base: ComparisonRow | None = None
    facts: tuple[tuple[str, str], ...] = ()
    reproduce: str = ""

    @property
    def best(self) -> ComparisonRow | None:
        """The recipe to take."""
        return next((row for row in self.rows if row.best), None)


def mark_front(rows: Sequence[ComparisonRow]) -> tuple[ComparisonRow, ...]:
    """The rows with `on_front` and `best` set, and in the best one's `note` the reason.

    The front: rows that aim at refusals, have both figures, and that no other such row dominates. Best: of these, those
    whose certificate did not fail; the lowest KL among rows with at most 5 % refusals, else the fewest refusals, then
    the lowest KL. A note that the best row has stays, after the reason.
    """
    measured = [row for row in rows if row.aim == "refusal" and _point(row) is not None]
    front = {row.recipe for row in measured if not any(_dominates(other, row) for other in measured)}
    best, reason = _best([row for row in measured if row.certificate != "failed"])
    return tuple(
        replace(
            row,
            on_front=row.recipe in front,
            best=row is best,
            note="; ".join(filter(None, (reason, row.note))) if row is best else row.note,
        )
        for row in rows
    )


def _point(row: ComparisonRow) -> tuple[float, float] | None:
    if row.refusals is None or row.kl is None:
        return None
    point = (row.refusals.value, row.kl.value)
    return point if all(map(math.isfinite, point)) else None


def _dominates(other: ComparisonRow, row: ComparisonRow) -> bool:
    a, b = _point(other), _point(row)
    assert a is not None and b is not None
    return a[0] <= b[0] and a[1] <= b[1] and a != b


def _best(rows: Sequence[ComparisonRow]) -> tuple[ComparisonRow | None, str]:
    points = {id(row): point for row in rows if (point := _point(row)) is not None}
    done = [row for row in rows if points[id(row)][0] <= MOST_REFUSALS]
    if done:
        many = f"of {len(done)} recipes" if len(done) > 1 else "and the only recipe"
        return min(done, key=lambda row: points[id(row)][::-1]), f"lowest KL {many} with at most 5 % refusals"
    if not rows:
        return None, ""
    return min(rows, key=lambda row: points[id(row)]), "fewest refusals; no recipe brings them to 5 %"


def to_record(comparison: Comparison) -> dict[str, Any]:
    """In JSON types alone."""
    record = asdict(comparison)
    return record | {"schema": "abliteration-comparison/1", "facts": [list(fact) for fact in comparison.facts]}


def from_record(record: dict[str, Any]) -> Comparison:
    """The comparison that a record was made from.

    Raises:
        ValueError: it is not one.
    """
    try:
        base = record["base"]
        return Comparison(
            record["model"],
            tuple(row_from(row) for row in record["rows"]),
            row_from(base) if base is not None else None,
            tuple((str(name), str(text)) for name, text in record["facts"]),
            record["reproduce"],
        )
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"not a comparison: {error}") from error


def row_from(record: dict[str, Any]) -> ComparisonRow:
    """The row that a record was made from.

    Raises:
        ValueError: it is not one.
    """
    known = {field.name for field in fields(ComparisonRow)}
    if set(record) != known or record["certificate"] not in get_args(Certified) or record["aim"] not in get_args(Aim):
        raise ValueError(f"row {record.get('recipe')!r} has other fields")
    kls = ("kl", "kl_answered", "kl_answers")
    estimates = ("refusals", "refusals_score", "over_refusals", "look_alike", *kls)
    return ComparisonRow(**record | {key: record[key] and Estimate(**record[key]) for key in estimates})
