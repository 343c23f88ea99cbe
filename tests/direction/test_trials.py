"""Curves of strengths, and the search by trials, with Optuna and without."""

import math
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abliterate.architecture.plan import plan_architecture
from abliterate.calibration.load import load_resident
from abliterate.calibration.model import LanguageModel
from abliterate.checkpoint.files import open_checkpoint
from abliterate.codec import decode, encode
from abliterate.direction.points import Point, SearchResult, SearchSettings
from abliterate.direction.scoring import Validation
from abliterate.direction.search import search
from abliterate.direction.trials import Tried, _suggested, bounds, curve, strengths_of
from abliterate.errors import SelectionError
from tests import pico
from tests.resident import random_prompts

HELD_OUT = Validation(random_prompts(4, seed=3), random_prompts(5, seed=4), (5, 9, 17))
SETTINGS = SearchSettings(method="optuna", trials=14, new_tokens=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = pico.save(tmp_path_factory.mktemp("trials") / "m", "llama")
    plan = plan_architecture(open_checkpoint(folder))
    return load_resident(folder, plan, device=torch.device("cpu"), dtype=torch.float32)


def run(model: LanguageModel, settings: SearchSettings = SETTINGS, **more: Any) -> SearchResult:
    directions = torch.stack([pico.unit(seed=layer) for layer in range(3)])
    return search(model, directions, HELD_OUT, HELD_OUT, settings, **more)


def test_a_curve_by_hand() -> None:
    assert curve(1.0, 2.0, 0.5, 2.0, 6).tolist() == [0.5, 0.75, 1.0, 0.75, 0.5, 0.0]


@given(st.floats(0, 1.5), st.floats(0, 11), st.floats(0, 1), st.floats(1, 12))
def test_a_curve_stays_in_its_bounds(height: float, at: float, low: float, reach: float) -> None:
    strengths = curve(height, at, low, reach, 12)
    away = (torch.arange(12) - at).abs()
    assert bool((strengths >= 0).all()) and bool((strengths <= height + 1e-6).all())
    assert bool((strengths[away > reach] == 0).all())
    assert bool((strengths[away <= reach] >= low * height - 1e-6).all())


def test_each_kind_has_a_curve_of_its_own() -> None:
    parameters = {name: high for name, (_, high) in bounds(4, SETTINGS).items()} | {"attention height": 0.0}
    strengths = strengths_of(parameters, 4)
    assert strengths.shape == (4, 2) and not strengths[:, 0].any() and bool((strengths[:, 1] == 1.5).all())


def test_without_optuna_one_line_says_what_to_install(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SelectionError, match=r"pip install 'abliterate\[search\]'"):
        run(model)


def test_trials_are_measured_and_the_same_again(model: LanguageModel) -> None:
    pytest.importorskip("optuna")
    first = run(model)
    assert len(first.points) == 14 and len({tuple(p.strengths.flatten().tolist()) for p in first.points}) == 14
    assert all(bool((p.strengths <= 1.5).all()) and bool((p.strengths >= 0).all()) for p in first.points)
    assert first.passes == 14 * 9 + 5 and first.pick in first.front
    assert encode(first) == encode(run(model))


def test_interrupted_trials_go_on_the_same(model: LanguageModel) -> None:
    """Also past the random ones that a sampler starts with."""
    pytest.importorskip("optuna")
    kept: dict[str, bytes] = {}

    class Stages:
        most = 12

        def stage(self, name: str, kind: Any, make: Any) -> Any:
            if name not in kept:
                if len(kept) == self.most:
                    raise KeyboardInterrupt
                kept[name] = encode(make())
            return decode(kind, kept[name])

    with pytest.raises(KeyboardInterrupt):
        run(model, stages=Stages())
    again = Stages()
    again.most = 99
    assert encode(run(model, stages=again)) == encode(run(model)) and len(kept) == 14


def test_what_was_tried_is_learnt_from() -> None:
    """High curves that cost much and low ones that cost nothing: of what is tried next, more are low."""
    optuna = pytest.importorskip("optuna")
    limits = {"height": (0.0, 1.5)}

    def tried(height: float, refusal: float, kl: float) -> Tried:
        point = Point(torch.zeros(1, 2), torch.ones(1, 1), refusal, 0.0, kl, 1, 0.0)
        return Tried({"height": height}, point)

    low = [tried(0.02 * i, 0.0, 0.0) for i in range(6)]
    before = [*low, *(tried(1.0 + 0.02 * i, 1.0, math.nan) for i in range(20))]
    found = [_suggested(optuna, before, limits, seed)["height"] for seed in range(20)]
    unlearnt = [_suggested(optuna, [], limits, seed)["height"] for seed in range(20)]
    assert sorted(found)[10] < 0.4 < sorted(unlearnt)[10]
