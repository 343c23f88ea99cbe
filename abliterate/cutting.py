"""From a recipe and what was found in a model to what is removed from its weights."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from abliterate.calibration.model import LanguageModel, Tokens
from abliterate.direction.means import Directions
from abliterate.direction.points import Point, SearchSettings
from abliterate.direction.selection import Candidate
from abliterate.edit.cut import Cut, orthonormal
from abliterate.errors import SelectionError
from abliterate.progress import Progress
from abliterate.recipe import CurveRecipe, EditRecipe, SearchRecipe


def uniform(basis: Tensor, layers: int, recipe: EditRecipe) -> Cut:
    """The same directions everywhere, with the recipe's strengths. `basis`: [hidden] or [k, hidden]."""
    basis = basis.reshape(1, -1, basis.shape[-1]).float()
    return Cut(basis, (0,) * layers, strengths_of(recipe, layers), _stem(recipe), recipe.norms == "kept")


def per_layer(directions: Directions, pick: Candidate, recipe: EditRecipe) -> Cut:
    """Each layer's writers lose the direction that the next layer's input has, at the picked position.

    The first basis is the pick's own: it stands for the edit, and embeddings lose it where they are edited.
    """
    layers = directions.grid.shape[1]
    own = [directions.unit(pick.position, min(layer + 1, layers - 1)) for layer in range(layers)]
    bases = torch.stack([directions.unit(pick.position, pick.layer), *own])[:, None]
    numbers = tuple(range(1, layers + 1))
    return Cut(bases, numbers, strengths_of(recipe, layers), _stem(recipe), recipe.norms == "kept")


def found_by_search(start: Cut, point: Point) -> Cut:
    """The strengths and directions of a point of a search. `start`: what it began with, see `per_layer`."""
    own = point.directions / point.directions.norm(dim=-1, keepdim=True)
    bases = torch.cat((start.bases[:1], own.float()[:, None]))
    return replace(start, bases=bases, strengths=point.strengths.double())


def search_settings(recipe: SearchRecipe) -> SearchSettings:
    """How the recipe has strengths searched for."""
    return SearchSettings(
        method=recipe.method,
        steps=recipe.steps,
        further_steps=recipe.further_steps,
        kl_weights=recipe.kl_weights,
        margin=recipe.margin,
        max_strength=recipe.max_strength,
        optimise_directions=recipe.directions,
        trials=recipe.trials,
        most_refused=recipe.refusals,
    )


def candidates_span(directions: Directions, candidates: Sequence[Candidate], pick: Candidate, count: int) -> Tensor:
    """The pick and the candidates with the lowest bypass beside it, orthonormal [count, hidden].

    Raises:
        SelectionError: there are not so many that differ.
    """
    scored = [c for c in candidates if c.bypass is not None and c.bypass == c.bypass and c.status != "layer"]
    ranked = sorted(scored, key=lambda c: (c.status == "screened", c.bypass, c.layer, -c.position))
    keys = dict.fromkeys([(pick.position, pick.layer), *((c.position, c.layer) for c in ranked)])
    return _first(torch.stack([directions.unit(*key) for key in keys]), count, "candidates")


def pairs_span(
    model: LanguageModel, directions: Directions, pick: Candidate, prompts: tuple[Sequence[Tokens], Sequence[Tokens]],
    count: int, progress: Progress,
) -> Tensor:  # fmt: skip
    """The pick, and the principal directions of what single harmful prompts have beyond the harmless mean.

    Args:
        prompts: harmful and harmless ones; pair i is harmful prompt i and harmless prompt i.

    Returns:
        [count, hidden], orthonormal.
    """
    harmful, harmless = (hidden_at(model, texts, pick, progress) for texts in prompts)
    pairs = min(len(harmful), len(harmless))
    differences = harmful[:pairs] - harmless[:pairs]
    axes = torch.linalg.svd(differences, full_matrices=False).Vh
    if directions.transport is not None:
        axes = torch.stack([directions.transport.at_end(pick.layer, axis) for axis in axes[: 2 * count]])
    return _first(torch.cat((directions.unit(pick.position, pick.layer)[None].double(), axes)), count, "pairs")


def hidden_at(model: LanguageModel, prompts: Sequence[Tokens], pick: Candidate, progress: Progress) -> Tensor:
    """The input of the picked layer at the picked position, [prompts, hidden] fp64."""
    found: dict[int, Tensor] = {}
    for batch in model.forward(prompts, positions=-pick.position, progress=progress, description="pairs"):
        assert batch.hidden is not None
        found.update(zip(batch.rows, batch.hidden[:, 0, pick.layer].double(), strict=True))
    return torch.stack([found[i] for i in range(len(prompts))])


def strengths_of(recipe: EditRecipe, layers: int) -> Tensor:
    """[layers, 2] fp64: attention, MLP."""
    columns = [[recipe.strength * strength_at(curve, i, layers) for i in range(layers)] for curve in _curves(recipe)]
    return torch.tensor(columns, dtype=torch.float64).T.contiguous()


def strength_at(curve: CurveRecipe, layer: int, layers: int) -> float:
    """The curve at a layer: its peak at a share of the depth, falling to its floor in a straight line."""
    away = abs(layer / max(1, layers - 1) - curve.at) / curve.reach
    return curve.peak + (curve.floor - curve.peak) * min(1.0, away)


def _curves(recipe: EditRecipe) -> tuple[CurveRecipe, CurveRecipe]:
    return recipe.attention, recipe.mlp


def _stem(recipe: EditRecipe) -> float:
    return recipe.strength if recipe.embeddings == "edited" else 0.0


def _first(vectors: Tensor, count: int, what: str) -> Tensor:
    basis = orthonormal(vectors)[:count]
    if len(basis) < count:
        raise SelectionError(f"the {what} span {len(basis)} directions, not {count}; lower edit.count in the recipe")
    return basis
