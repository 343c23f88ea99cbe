"""Whether it is one direction: cosines across layers, and across categories of harmful prompts."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abliterate.audit.grid import has_direction
from abliterate.calibration.model import LanguageModel, Tokens
from abliterate.direction.means import Directions
from abliterate.direction.score import refusal_score
from abliterate.direction.scoring import Key
from abliterate.progress import Progress

LEAST_OF_A_CATEGORY = 4
_SHUFFLES = 20
Matrix = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Categories:
    """Directions of categories: the mean over each one's refused train prompts less the mean over all harmless ones.

    Attributes:
        names, counts: of the categories with at least 4 refused prompts, sorted by name.
        cosines: between their directions. to_pick: of each with the picked direction.
        chance: the mean cosine between groups of the same sizes drawn at random, the figure to hold `cosines` against:
            few prompts make noisy means, whatever they are about.
        left_out: categories with fewer prompts.
    """

    names: tuple[str, ...]
    counts: tuple[int, ...]
    cosines: Matrix
    to_pick: tuple[float, ...]
    chance: float
    left_out: tuple[str, ...]

    @property
    def mean(self) -> float:
        """The mean cosine between two categories."""
        return _mean_pair(torch.tensor(self.cosines, dtype=torch.float64))


def across_layers(directions: Directions, position: int) -> Matrix:
    """Cosines [layers][layers] of the directions at one position; None where a layer has none."""
    layers = directions.grid.shape[1]
    known = [has_direction(directions, (position, layer)) for layer in range(layers)]
    units = [directions.unit(position, layer).double() if there else None for layer, there in enumerate(known)]
    return tuple(tuple(None if a is None or b is None else float(a @ b) for b in units) for a in units)


def across_categories(
    model: LanguageModel,
    prompts: Sequence[Tokens],
    categories: Sequence[str],
    directions: Directions,
    pick: Key,
    refusal_tokens: Sequence[int],
    keep_refused: bool,
    progress: Progress,
) -> Categories | None:
    """Measures the state of every harmful train prompt at the pick; None with fewer than two categories to compare.

    Args:
        categories: of each prompt.
        keep_refused: only prompts whose refusal score is above 0, as in the means.
    """
    states, kept = _states(model, prompts, pick, refusal_tokens, progress)
    place = directions.harmless.value.shape[0] + pick[0], pick[1]
    apart = states.double() - directions.harmless.value[place]
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(categories):
        groups.setdefault(name, []).extend([i] if kept[i] or not keep_refused else [])
    names = sorted(name for name, rows in groups.items() if len(rows) >= LEAST_OF_A_CATEGORY)
    if len(names) < 2:
        return None
    rows = [groups[name] for name in names]
    units, picked = _units(apart, rows), directions.vector(*pick).double()
    return Categories(
        tuple(names),
        tuple(map(len, rows)),
        tuple(tuple(row) for row in (units @ units.T).tolist()),
        tuple((units @ (picked / picked.norm())).tolist()),
        _chance(apart, rows),
        tuple(sorted(set(groups) - set(names))),
    )


def _states(
    model: LanguageModel, prompts: Sequence[Tokens], pick: Key, refusal_tokens: Sequence[int], progress: Progress
) -> tuple[Tensor, list[bool]]:
    """[prompts, hidden] at the pick, and whether each prompt is refused by score."""
    states = torch.zeros(len(prompts), model.stream.hidden_size)
    refused = [False] * len(prompts)
    for batch in model.forward(prompts, positions=-pick[0], progress=progress, description="categories"):
        assert batch.hidden is not None
        states[batch.rows] = batch.hidden[:, 0, pick[1]].cpu()
        for row, score in zip(batch.rows, refusal_score(batch.logits, refusal_tokens).tolist(), strict=True):
            refused[row] = score > 0
    return states, refused


def _units(apart: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    means = torch.stack([apart[list(rows)].mean(0) for rows in groups])
    units: Tensor = means / means.norm(dim=-1, keepdim=True)
    return units


def _chance(apart: Tensor, groups: Sequence[Sequence[int]]) -> float:
    drawn, everyone = random.Random(0), [row for rows in groups for row in rows]
    cosines = []
    for _ in range(_SHUFFLES):
        drawn.shuffle(everyone)
        left = iter(everyone)
        units = _units(apart, [[next(left) for _ in rows] for rows in groups])
        cosines.append(_mean_pair(units @ units.T))
    return sum(cosines) / len(cosines)


def _mean_pair(cosines: Tensor) -> float:
    """Over the pairs of two different ones."""
    count = len(cosines)
    return float((cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1)))
