"""The search on pico models: it goes downhill, goes on where it was interrupted, and gives the same every time."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from abliterate.calibration.dials import Dials
from abliterate.calibration.model import LanguageModel
from abliterate.codec import decode, encode
from abliterate.direction.opening import Opening
from abliterate.direction.points import SearchResult, SearchSettings
from abliterate.direction.pulls import Trial
from abliterate.direction.score import refusal_score
from abliterate.direction.scoring import Validation
from abliterate.direction.search import _untouched, search
from abliterate.errors import SelectionError
from abliterate.evaluation.metrics import first_logits
from abliterate.progress import SILENT
from tests import pico
from tests.resident import Load, random_prompts

TOKENS = (5, 9, 17)
TRAIN = Validation(random_prompts(6, seed=1), random_prompts(6, seed=2), TOKENS)
HELD_OUT = Validation(random_prompts(4, seed=3), random_prompts(5, seed=4), TOKENS)
SETTINGS = SearchSettings(
    steps=4, further_steps=2, kl_weights=(1.0, 5.0), measure_every=2, prompts=4, margin=6.0, new_tokens=0, halvings=0
)


def directions(layers: int = 3) -> Tensor:
    return torch.stack([(layer + 1) * pico.unit(seed=layer) for layer in range(layers)])


def run(model: LanguageModel, settings: SearchSettings = SETTINGS, **more: Any) -> SearchResult:
    return search(model, directions(), TRAIN, HELD_OUT, settings, **more)


class Kept:
    """Stages that forget nothing, and can stop after some."""

    def __init__(self, stop: int | None = None) -> None:
        self.made: list[str] = []
        self._content: dict[str, bytes] = {}
        self.stop = stop

    def stage(self, name: str, kind: Any, make: Callable[[], Any]) -> Any:
        if name not in self._content:
            if len(self.made) == self.stop:
                raise KeyboardInterrupt
            self._content[name] = encode(make())
            self.made.append(name)
        return decode(kind, self._content[name])


def same(first: SearchResult, second: SearchResult) -> bool:
    return encode(first) == encode(second)


def test_it_goes_downhill(load: Load) -> None:
    """On all train prompts the loss ends below where it started, with strengths alone and with directions."""
    model = load()
    trial = Trial(Opening(model, False), TRAIN, first_logits(model, TRAIN.harmless, SILENT, "base"))
    rows = (range(6), range(6))

    def loss(dials: Dials) -> float:
        refusal, kl = trial.pull(dials, rows, 6.0, directions=False).losses
        return refusal + 2.0 * kl

    settings = replace(SETTINGS, steps=12, kl_weights=(2.0,), prompts=6, measure_every=12)
    units = directions() / directions().norm(dim=-1, keepdim=True)
    start = loss(Dials(torch.full((3, 2), settings.start), units))
    alone, both = (run(model, replace(settings, optimise_directions=on)).points[-1] for on in (False, True))
    first, second = loss(Dials(alone.strengths, alone.directions)), loss(Dials(both.strengths, both.directions))
    assert torch.equal(alone.directions, units) and not torch.equal(both.directions, units)
    assert second < first < start


def test_what_it_gives(load: Load) -> None:
    result = run(load())
    assert [(p.step, p.weight) for p in result.points] == [(2, 1.0), (4, 1.0), (6, 5.0)]
    for point in result.points:
        assert point.strengths.shape == (3, 2) and point.directions.shape == (3, pico.HIDDEN)
        assert bool((point.strengths >= 0).all()) and bool((point.strengths <= SETTINGS.max_strength).all())
        torch.testing.assert_close(point.directions.norm(dim=-1), torch.ones(3))
    assert result.pick in result.front and set(result.front) <= {0, 1, 2}
    # steps of 4 and 4 prompts, forward and backward, three measurements and the baselines
    assert result.passes == 6 * 3 * 8 + 3 * 9 + 6 + 5
    assert same(result, decode(SearchResult, encode(result)))


def test_where_too_much_is_refused_kl_weighs_less(load: Load) -> None:
    """Two points at half of the last weight and two at a quarter, unless one before has few enough refusals."""
    never, enough = (replace(SETTINGS, halvings=2, most_refused=most) for most in (-1.0, 1.0))
    result = run(load(), never)
    weights = [(2, 1.0), (4, 1.0), (6, 5.0), (8, 2.5), (10, 2.5), (12, 1.25), (14, 1.25)]
    assert [(p.step, p.weight) for p in result.points] == weights and "no point has" in result.reason
    assert result.passes == 14 * 3 * 8 + 7 * 9 + 6 + 5
    assert same(run(load(), enough), run(load(), replace(enough, halvings=0)))
    for done in (4, 6, 8):
        stages = Kept(stop=done)
        with pytest.raises(KeyboardInterrupt):
            run(load(), never, stages=stages)
        stages.stop = None
        assert same(run(load(), never, stages=stages), result)


def test_bounds_hold(load: Load) -> None:
    point = run(load(), replace(SETTINGS, max_strength=0.25, rate=1.0)).points[-1]
    assert float(point.strengths.max()) == 0.25 and float(point.strengths.min()) == 0.0


def test_the_same_every_time_and_another_with_another_seed(load: Load) -> None:
    first = run(load())
    assert same(first, run(load())) and not same(first, run(load(), replace(SETTINGS, seed=1)))


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_an_interrupted_search_goes_on(load: Load, done: int) -> None:
    stages = Kept(stop=done)
    with pytest.raises(KeyboardInterrupt):
        run(load(), stages=stages)
    assert len(stages.made) == done
    stages.stop = None
    assert same(run(load(), stages=stages), run(load())) and len(stages.made) == 4


def test_a_search_that_is_done_needs_no_model(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Kept()
    first = run(load(), stages=stages)
    monkeypatch.setattr(LanguageModel, "forward", lambda *_a, **_k: pytest.fail("a forward pass"))
    assert same(first, run(load(), stages=stages))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_streamed_it_finds_the_same(load: Load, family: str) -> None:
    held, streamed = run(load(family)), run(load(family, "streamed"))
    for a, b in zip(held.points, streamed.points, strict=True):
        torch.testing.assert_close(a.strengths, b.strengths, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(a.directions, b.directions, rtol=1e-3, atol=1e-3)
        assert (a.refusal, a.step, a.weight) == (b.refusal, b.step, b.weight)


def test_directions_that_cannot_be_used(load: Load) -> None:
    bad = directions()
    for value in (0.0, torch.nan):
        bad[1] = value
        with pytest.raises(SelectionError, match="no direction to start from"):
            search(load(), bad, TRAIN, HELD_OUT, SETTINGS)
    with pytest.raises(ValueError, match="not one for each layer"):
        search(load(), directions(2), TRAIN, HELD_OUT, SETTINGS)


def test_where_the_skip_path_has_gains_only_strengths(load: Load) -> None:
    model = load("minimax")
    with pytest.raises(SelectionError, match="optimise_directions"):
        run(model)
    assert len(run(model, replace(SETTINGS, optimise_directions=False)).points) == 3


def test_every_prompt_has_its_turn(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six prompts in steps of four: after three steps each was taken twice."""
    taken: list[tuple[list[int], list[int]]] = []
    pull = Trial.pull

    def watched(self: Trial, dials: Dials, rows: Any, *more: Any) -> Any:
        taken.append(rows)
        return pull(self, dials, rows, *more)

    monkeypatch.setattr(Trial, "pull", watched)
    run(load(), replace(SETTINGS, steps=3, kl_weights=(1.0,)))
    for kind in (0, 1):
        assert sorted(row for rows in taken for row in rows[kind]) == sorted([*range(6)] * 2)


def test_refusals_of_harmless_prompts_are_not_held(load: Load) -> None:
    base = first_logits(load(), TRAIN.harmless, SILENT, "base")
    likeliest = base[0].argsort(descending=True).tolist()
    several = (tuple(likeliest[:count]) for count in range(1, len(likeliest)))
    tokens = next(some for some in several if len(set((refusal_score(base, some) > 0).tolist())) == 2)
    data = replace(TRAIN, refusal_tokens=tokens)
    kept = (refusal_score(base, tokens) <= 0).nonzero().flatten().tolist()
    trial = _untouched(load(), data, SILENT)
    assert list(trial.data.harmless) == [TRAIN.harmless[i] for i in kept] and trial.data.harmful == TRAIN.harmful
    torch.testing.assert_close(trial.base, base[kept], atol=1e-5, rtol=1e-4)
    everything = replace(TRAIN, refusal_tokens=tuple(range(base.shape[-1] - 1)))
    with pytest.raises(SelectionError, match="refuses every harmless prompt"):
        _untouched(load(), everything, SILENT)
