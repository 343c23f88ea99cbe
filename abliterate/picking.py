"""From the candidate directions of a model to the one that is picked, and to what is removed from its weights."""

import logging
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from abliterate.calibration.chat import ChatFormat
from abliterate.calibration.model import LanguageModel
from abliterate.cutting import candidates_span, found_by_search, pairs_span, per_layer, search_settings, uniform
from abliterate.direction.means import Directions
from abliterate.direction.refusal_tokens import RefusalTokens, other_starts
from abliterate.direction.scoring import ScoreSheet, Validation
from abliterate.direction.screening import Selection, choose_direction
from abliterate.direction.search import search
from abliterate.direction.selection import Thresholds
from abliterate.direction.sparing import Refining, Sets, choose_sparing
from abliterate.edit.cut import Cut
from abliterate.progress import Progress
from abliterate.prompting import Prompts, encode
from abliterate.recipe import Recipe, SelectionRecipe
from abliterate.stages import Stages

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """One point of a search, without its strengths; see `Point`."""

    refusal: float
    bypass: float
    kl: float
    step: int
    weight: float


@dataclass(frozen=True)
class Search:
    """What a search for strengths found; see `SearchResult`."""

    points: tuple[Trial, ...]
    front: tuple[int, ...]
    pick: int
    reason: str
    passes: int


@dataclass(frozen=True)
class Picked:
    """What the selection gave: the direction is that at the end of the stream, which takes the model to tell."""

    selection: Selection
    unit: Tensor
    cut: Cut
    search: Search | None = None


def thresholds_of(recipe: SelectionRecipe) -> Thresholds:
    """The rule's thresholds as the recipe sets them."""
    return Thresholds(recipe.max_layer_fraction, recipe.max_kl, recipe.min_induce, recipe.strict)


@dataclass(frozen=True)
class Picking:
    """What the candidates of a model are measured with."""

    chat: ChatFormat
    prompts: Prompts
    tokens: RefusalTokens
    recipe: Recipe
    progress: Progress
    stages: Stages

    def pick(self, model: LanguageModel, directions: Directions) -> Picked:
        """Measures the candidates, picks one, and says what is removed."""
        if model.stream.unreached:
            log.warning("scores leave out %s, whose output no hook reaches", ", ".join(model.stream.unreached[:3]))
        spares = self.recipe.direction.contrast == "false-refusal"
        selection = self._sparing(model, directions) if spares else self._refusing(model, directions)
        cut, found = self._cut(model, directions, selection), None
        if self.recipe.edit.strengths == "search":
            cut, found = self._searched(model, cut)
        return Picked(selection, _unit(directions, selection), cut, found)

    def _searched(self, model: LanguageModel, start: Cut) -> tuple[Cut, Search]:
        """Strengths for the layers' own directions, found by optimisation."""
        settings = search_settings(self.recipe.search)
        sets = self._validation("train"), self._validation("validation")
        others = other_starts(model, self.tokens)
        result = search(model, start.bases[1:, 0], *sets, settings, self.progress, self.stages, others)
        trials = tuple(Trial(p.refusal, p.bypass, p.kl, p.step, p.weight) for p in result.points)
        log.info("search: %s", result.reason)
        found = Search(trials, result.front, result.pick, result.reason, result.passes)
        return found_by_search(start, result.points[result.pick]), found

    def _refusing(self, model: LanguageModel, directions: Directions) -> Selection:
        rule, sheet = self.recipe.selection, ScoreSheet(model, directions, self._validation("validation"))
        return choose_direction(sheet, thresholds_of(rule), rule.exhaustive, self.progress, self.stages)

    def _sparing(self, model: LanguageModel, directions: Directions) -> Selection:
        thresholds, refining = thresholds_of(self.recipe.selection), None
        if self.recipe.direction.refine:
            refining = Refining(self._sets("train"), self.recipe.direction.refine)
        return choose_sparing(model, directions, self._sets("validation"), thresholds, self.progress, refining)

    def _sets(self, part: Literal["train", "validation"]) -> Sets:
        data, look_alike = self._validation(part), getattr(self.prompts.look_alike, part)
        return Sets(encode(self.chat, look_alike), data.harmful, data.harmless, data.refusal_tokens)

    def _validation(self, part: Literal["train", "validation"]) -> Validation:
        sets = (getattr(split, part) for split in (self.prompts.harmful, self.prompts.harmless))
        harmful, harmless = (encode(self.chat, prompts) for prompts in sets)
        return Validation(harmful, harmless, self.tokens.ids)

    def _cut(self, model: LanguageModel, directions: Directions, selection: Selection) -> Cut:
        """What the recipe removes."""
        choice, recipe = selection.choice, self.recipe.edit
        pick, layers = choice.pick, directions.grid.shape[1]
        if recipe.directions == "per-layer":
            return per_layer(directions, pick, recipe)
        if recipe.directions == "one":
            return uniform(_unit(directions, selection), layers, recipe)
        if recipe.span == "candidates":
            return uniform(candidates_span(directions, choice.candidates, pick, recipe.count), layers, recipe)
        train = self._validation("train")
        prompts = (train.harmful, train.harmless)
        return uniform(pairs_span(model, directions, pick, prompts, recipe.count, self.progress), layers, recipe)


def _unit(directions: Directions, selection: Selection) -> Tensor:
    """The direction that was picked, [hidden]."""
    pick = selection.choice.pick
    return directions.unit(pick.position, pick.layer) if selection.refined is None else selection.refined
