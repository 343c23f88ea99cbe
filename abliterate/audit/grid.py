"""Where the direction can be read: bypass, induce and KL of the candidate at every position and layer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from abliterate.direction.means import Directions
from abliterate.direction.score import refusal_score
from abliterate.direction.scoring import Key, Scores, ScoreSheet
from abliterate.progress import Progress
from abliterate.stages import NO_STAGES, Stages

Row = tuple[float | None, ...]
_NOTHING = 1e-6
"""Of the mean state's length: a difference that small is rounding, as of the template's own tokens at layer 0."""


@dataclass(frozen=True)
class Grid:
    """The map, [positions][layers], the last position last; None where both sets have the same mean state.

    Attributes:
        prompts: of each set.
        bypass: mean refusal score on harmful prompts with the direction ablated. induce: on harmless prompts with it
            added at its layer. kl: nats on harmless prompts with it ablated.
        base_harmful, base_harmless: mean refusal scores of the untouched model on the same prompts.
    """

    prompts: int
    bypass: tuple[Row, ...]
    induce: tuple[Row, ...]
    kl: tuple[Row, ...]
    base_harmful: float
    base_harmless: float

    def at(self, scores: Sequence[Row], key: Key) -> float | None:
        """A score of the candidate at (position, layer)."""
        return scores[len(scores) + key[0]][key[1]]


def has_direction(directions: Directions, key: Key) -> bool:
    """Whether the two means differ there at all."""
    place = directions.grid.shape[0] + key[0], key[1]
    vector, size = directions.vector(*key), float(directions.harmful.value[place].norm())
    return bool(vector.isfinite().all()) and float(vector.double().norm()) > _NOTHING * size


def usable_keys(directions: Directions) -> list[Key]:
    """Every (position, layer) with a direction."""
    positions, layers = directions.grid.shape[:2]
    keys = [(position, layer) for position in range(-positions, 0) for layer in range(layers)]
    return [key for key in keys if has_direction(directions, key)]


def measure_grid(sheet: ScoreSheet, prompts: int, progress: Progress, stages: Stages = NO_STAGES) -> Grid:
    """Measures every candidate on the first `prompts` of each validation set.

    Weights in memory: position by position, so that an interrupted run keeps what it has. Streamed: all at once, since
    every run reads all weights.
    """
    keys, streamed = usable_keys(sheet.directions), sheet.model.runner.streamed
    by_position = [(str(p), [key for key in keys if key[0] == p]) for p in sorted({key[0] for key in keys})]
    groups = [("all", keys)] if streamed else by_position
    for name, group in groups:

        def measured(group: list[Key] = group) -> Scores:
            sheet.measure(group, prompts, progress)
            return sheet.scores()

        sheet.restore(stages.stage(f"grid at {name}", Scores, measured))
    return _grid(sheet, prompts)


def _grid(sheet: ScoreSheet, prompts: int) -> Grid:
    positions, layers = sheet.directions.grid.shape[:2]
    measured = sheet.scores().base
    assert measured is not None
    harmful = measured[1][:prompts]
    harmless = refusal_score(measured[0][:prompts], sheet.data.refusal_tokens)
    base = sum(harmful) / len(harmful), float(harmless.mean())
    empty = Grid(len(harmful), (), (), (), *base)

    def rows(name: str) -> tuple[Row, ...]:
        found = [[getattr(sheet.candidate((p, layer)), name) for layer in range(layers)] for p in range(-positions, 0)]
        return tuple(tuple(row) for row in found)

    return replace(empty, bypass=rows("bypass"), induce=rows("induce"), kl=rows("kl"))
