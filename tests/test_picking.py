"""From what a selection and a search gave to what is removed."""

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from abliterate import picking
from abliterate.cutting import search_settings
from abliterate.direction.means import Directions, Mean
from abliterate.direction.points import Point, SearchResult, SearchSettings
from abliterate.direction.refusal_tokens import RefusalTokens
from abliterate.direction.screening import Selection
from abliterate.direction.selection import Candidate, Choice
from abliterate.picking import Picking
from abliterate.progress import SILENT
from abliterate.recipe import SearchRecipe, load_recipe
from abliterate.stages import NO_STAGES
from tests import pico

HIDDEN, LAYERS = 64, 3
PICK = Candidate(-1, 1, -3.0, 1.0, 0.1, 4, "picked")
MEAN = Mean(torch.ones(2, LAYERS, HIDDEN, dtype=torch.float64), 4, 4)


@pytest.fixture
def directions() -> Directions:
    grid = torch.stack([pico.unit(seed=number, hidden=HIDDEN) for number in range(2 * LAYERS)])
    return Directions(grid.reshape(2, LAYERS, HIDDEN), MEAN, MEAN)


def picking_of(recipe: str, monkeypatch: pytest.MonkeyPatch, refined: torch.Tensor | None = None) -> Picking:
    selection = Selection(Choice(PICK, (PICK,), False, "why"), "sparing", 9, 99, 0.0, 0.0, refined)
    monkeypatch.setattr(Picking, "_sparing", lambda *_: selection)
    monkeypatch.setattr(Picking, "_refusing", lambda *_: selection)
    monkeypatch.setattr(Picking, "_validation", lambda self, part: part)
    nothing: Any = None
    tokens = RefusalTokens((7,), ("No",), "completions")
    return Picking(nothing, nothing, tokens, load_recipe(recipe), SILENT, NO_STAGES)


MODEL: Any = SimpleNamespace(stream=SimpleNamespace(unreached=()))


def test_a_refined_direction_is_what_is_removed(directions: Directions, monkeypatch: pytest.MonkeyPatch) -> None:
    refined = pico.unit(seed=77, hidden=HIDDEN)
    found = picking_of("false-refusal", monkeypatch, refined).pick(MODEL, directions)
    assert torch.equal(found.unit, refined) and torch.equal(found.cut.bases[0, 0], refined)
    plain = picking_of("false-refusal", monkeypatch).pick(MODEL, directions)
    assert torch.equal(plain.unit, directions.unit(-1, 1)) and torch.equal(plain.cut.bases[0, 0], plain.unit)


def test_a_search_knows_what_refusals_fall_back_on(directions: Directions, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    point = Point(torch.full((LAYERS, 2), 0.3), torch.eye(HIDDEN)[:LAYERS], 0.0, -5.0, 0.01, 4, 20.0)

    def search(*arguments: Any) -> SearchResult:
        given.extend(arguments)
        return SearchResult((point,), (0,), 0, "why", 9)

    monkeypatch.setattr(picking, "search", search)
    monkeypatch.setattr(picking, "other_starts", lambda model, known: (40, 41, *known.ids))
    found = picking_of("search", monkeypatch).pick(MODEL, directions)
    assert given[2:4] == ["train", "validation"] and given[-1] == (40, 41, 7)
    torch.testing.assert_close(given[1], torch.stack([directions.unit(-1, layer) for layer in (1, 2, 2)]))
    assert found.search is not None and found.search.points[0].kl == 0.01
    assert torch.equal(found.cut.bases[1:, 0], point.directions) and found.cut.strengths.unique().numel() == 1


def test_every_key_of_the_search_reaches_it() -> None:
    assert search_settings(SearchRecipe()) == SearchSettings(), "both have the same defaults"
    told = SearchRecipe("optuna", 3, 2, (1.5, 2.0), 0.5, 5, 0.7, False, 0.1)
    renamed = {"directions": "optimise_directions", "refusals": "most_refused"}
    wanted = {renamed.get(key, key): value for key, value in asdict(told).items()}
    found = asdict(search_settings(told))
    assert {key: found[key] for key in wanted} == wanted
