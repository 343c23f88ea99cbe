"""Screening finds what measuring everything finds, at a fraction of the passes; scores are those of a plain loop."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from abliterate.calibration.hooks import Steer
from abliterate.calibration.model import LanguageModel
from abliterate.direction.means import Directions, Mean, difference, mean_hidden
from abliterate.direction.score import refusal_score
from abliterate.direction.scoring import Key, ScoreSheet, Validation
from abliterate.direction.screening import Selection, choose_direction
from abliterate.direction.selection import Thresholds, layer_allowed
from abliterate.errors import SelectionError
from abliterate.progress import SILENT, Progress
from tests.resident import llama, random_prompts, resident

POSITIONS, LAYERS, PROMPTS = 5, 30, 32
PEAK = (-2, 14)
ELIGIBLE = POSITIONS * 24


@dataclass
class Table:
    """Scores [positions, layers, prompts], and the estimates of the first-order screen [positions, layers]."""

    bypass: Tensor
    induce: Tensor
    kl: Tensor
    estimate: Tensor

    def put(self, key: Key, *, bypass: float, induce: float, kl: float) -> None:
        """Sets the means of one candidate; the spread over prompts stays."""
        for scores, value in ((self.bypass, bypass), (self.induce, induce), (self.kl, kl)):
            scores[key] += value - scores[key].mean()
        self.estimate[key] = bypass


def made_table(seed: int) -> Table:
    """As in real models: smooth over layers, best around one of them; prompts differ more than candidates do."""
    made = torch.Generator().manual_seed(seed)
    layer = torch.arange(LAYERS).float()
    position = torch.arange(-POSITIONS, 0).float()[:, None]
    near = torch.exp(-(((layer - PEAK[1]) / 5) ** 2) - ((position - PEAK[0]) / 2) ** 2)
    kl = 0.03 + 0.4 * torch.exp(-(((layer - 22) / 4) ** 2)) + 0.0 * position
    shape = (POSITIONS, LAYERS, PROMPTS)
    each = torch.randn(PROMPTS, generator=made)
    bypass = 6 - 12 * near[..., None] + 2 * each + 0.3 * torch.randn(shape, generator=made)
    induce = -4 + 9 * near[..., None] + each + 0.3 * torch.randn(shape, generator=made)
    spread = kl[..., None] * (0.5 + torch.rand(shape, generator=made))
    estimate = bypass.mean(-1) + 1.0 * torch.randn(POSITIONS, LAYERS, generator=made)
    return Table(bypass.double(), induce.double(), spread.double(), estimate.double())


class TableSheet(ScoreSheet):
    """Scores out of a table; every one that is looked up counts as a pass."""

    table: Table

    def measure(self, keys: Sequence[Key], count: int, progress: Progress = SILENT) -> None:
        for name in ("bypass", "kl", "induce"):
            for key in keys:
                known = getattr(self, name).setdefault(key, [])
                more = getattr(self.table, name)[key][len(known) : min(count, PROMPTS)].tolist()
                self.passes += len(more)
                known += more

    def baseline_scores(self) -> tuple[float, float]:
        return 6.0, -4.0


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Selection]:
    """Chooses out of a table. Direction n of the grid is the n-th axis, so that estimates can be told apart."""
    axes = torch.eye(POSITIONS * LAYERS).view(POSITIONS, LAYERS, -1)
    mean = Mean(axes.double(), 9, 9)

    def call(table: Table, exhaustive: bool = False, thresholds: Thresholds | None = None) -> Selection:
        def estimated(_model: Any, prompts: Any, _tokens: Any, units: Tensor, *_: Any) -> Tensor:
            assert len(prompts) == PROMPTS
            return table.estimate.flatten()[units.argmax(-1)]

        monkeypatch.setattr("abliterate.direction.screening.first_order_bypass", estimated)
        data = Validation([[5]] * PROMPTS, [[6]] * PROMPTS, [1])
        sheet = TableSheet(None, Directions(axes, mean, mean), data)  # type: ignore[arg-type]
        sheet.table = table
        return choose_direction(sheet, thresholds or Thresholds(), exhaustive)

    return call


def key_of(selection: Selection) -> Key:
    return selection.choice.pick.position, selection.choice.pick.layer


def same_pick(choose: Callable[..., Selection], table: Table, thresholds: Thresholds | None = None) -> Selection:
    """The screened selection, which must be the exhaustive one."""
    whole = choose(table, exhaustive=True, thresholds=thresholds)
    quick = choose(table, thresholds=thresholds)
    assert (whole.method, quick.method) == ("exhaustive", "screened")
    assert quick.choice.pick == whole.choice.pick and quick.choice.relaxed == whole.choice.relaxed
    assert whole.exhaustive_passes == quick.exhaustive_passes == 3 * PROMPTS * ELIGIBLE == whole.passes
    assert quick.passes <= whole.passes / 5
    return quick


@pytest.mark.parametrize("seed", range(10))
def test_the_exhaustive_pick_at_a_fifth_of_the_passes(choose: Callable[..., Selection], seed: int) -> None:
    table = made_table(seed)
    table.put(PEAK, bypass=-7.0, induce=3.0, kl=0.05)
    found = same_pick(choose, table)
    assert key_of(found) == PEAK and found.choice.pick.prompts == PROMPTS and not found.choice.relaxed


@pytest.mark.parametrize("seed", range(5))
def test_better_ones_that_cost_too_much(choose: Callable[..., Selection], seed: int) -> None:
    table = made_table(seed)
    table.put(PEAK, bypass=-6.9, induce=3.0, kl=0.05)
    for layer in range(8, 20):
        table.put((-1, layer), bypass=-8.0 - layer / 10, induce=3.0, kl=0.4)
    assert key_of(same_pick(choose, table)) == PEAK


def test_better_ones_in_late_layers_are_not_even_measured(choose: Callable[..., Selection]) -> None:
    table = made_table(0)
    table.put(PEAK, bypass=-7.0, induce=3.0, kl=0.05)
    for layer in range(24, 30):
        table.put((-1, layer), bypass=-50.0, induce=9.0, kl=0.001)
    found = same_pick(choose, table)
    late = [c for c in found.choice.candidates if not layer_allowed(c.layer, LAYERS, Thresholds())]
    assert key_of(found) == PEAK and len(late) == 6 * POSITIONS
    assert {(c.status, c.bypass, c.induce, c.kl, c.prompts) for c in late} == {("layer", None, None, None, 0)}


def test_better_ones_that_do_not_induce(choose: Callable[..., Selection]) -> None:
    table = made_table(0)
    table.put(PEAK, bypass=-7.0, induce=3.0, kl=0.05)
    for position, layer in ((-3, 12), (-1, 13), *((-1, layer) for layer in range(6, 12))):
        table.put((position, layer), bypass=-8.0, induce=-0.5, kl=0.05)
    assert key_of(same_pick(choose, table)) == PEAK


@pytest.mark.parametrize("seed", range(5))
def test_relaxed(choose: Callable[..., Selection], seed: int) -> None:
    table = made_table(seed)
    table.kl += 0.5
    table.put((-4, 13), bypass=-3.0, induce=2.0, kl=0.3)
    for layer in range(12):
        table.put((-1, layer), bypass=4.0, induce=2.0, kl=0.15)
    found = same_pick(choose, table)
    assert found.choice.relaxed and key_of(found) == (-4, 13)


def test_strict_stops_with_a_table_either_way(choose: Callable[..., Selection]) -> None:
    table = made_table(0)
    table.kl += 0.5
    for exhaustive in (True, False):
        with pytest.raises(SelectionError, match=r"no direction passes \(KL <= 0\.1.*nearest: \(-"):
            choose(table, exhaustive, Thresholds(strict=True))


def test_no_numbers(choose: Callable[..., Selection]) -> None:
    table = made_table(0)
    table.put(PEAK, bypass=-7.0, induce=3.0, kl=0.05)
    for key, name in (((-3, 10), "bypass"), ((-1, 12), "kl"), ((-2, 13), "induce")):
        table.put(key, bypass=-9.0, induce=3.0, kl=0.01)
        getattr(table, name)[key] = math.nan
    for layer in range(3):
        table.bypass[:, layer] = table.estimate[:, layer] = table.kl[:, layer] = table.induce[:, layer] = math.nan
    assert key_of(same_pick(choose, table)) == PEAK


def test_nothing_but_no_numbers(choose: Callable[..., Selection]) -> None:
    table = made_table(0)
    for scores in (table.bypass, table.induce, table.kl, table.estimate):
        scores.fill_(math.nan)
    for exhaustive in (True, False):
        with pytest.raises(SelectionError, match="no direction passes"):
            choose(table, exhaustive)


def test_an_estimate_that_is_wrong_by_a_little_does_not_lose_the_best(choose: Callable[..., Selection]) -> None:
    table = made_table(0)
    table.put(PEAK, bypass=-7.0, induce=3.0, kl=0.05)
    table.estimate[PEAK] = float(table.estimate[:, :24].median()) - 0.5
    assert key_of(same_pick(choose, table)) == PEAK


def test_every_candidate_is_in_the_table_once(choose: Callable[..., Selection]) -> None:
    table = made_table(0)
    found = choose(table).choice.candidates
    assert sorted((c.position, c.layer) for c in found) == [(p, k) for p in range(-POSITIONS, 0) for k in range(LAYERS)]
    for candidate in found:
        if candidate.bypass is not None:
            measured = table.bypass[candidate.position, candidate.layer, : candidate.prompts]
            assert candidate.bypass == pytest.approx(float(measured.mean()))
        # what was not measured on every prompt may not pass
        assert candidate.prompts == PROMPTS or candidate.status in ("screened", "layer")
    assert sum(c.status == "picked" for c in found) == 1


# With a model: scores one by one, and the whole way.

TOKENS = [5, 9, 17, 40]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return resident(llama(layers=6), batch_size=8)


@pytest.fixture
def sheet(model: LanguageModel) -> ScoreSheet:
    harmful, harmless = (mean_hidden(model, random_prompts(12, seed=s), 3, 0, TOKENS) for s in (1, 2))
    data = Validation(random_prompts(9, seed=3), random_prompts(7, seed=4), TOKENS)
    return ScoreSheet(model, difference(harmful, harmless), data)


@pytest.fixture
def seen(model: LanguageModel) -> Iterator[list[int]]:
    """How many prompts went through the model, call by call."""
    sizes: list[int] = []

    def count(_module: Any, _args: Any, kwargs: Any) -> None:
        sizes.append(len(kwargs["input_ids"]))

    handle = model.model.register_forward_pre_hook(count, with_kwargs=True)
    yield sizes
    handle.remove()


def alone(model: LanguageModel, tokens: Sequence[int], steer: Steer) -> Tensor:
    return next(iter(model.forward([tokens], [steer]))).logits[0].double()


KEYS: list[Key] = [(-1, 0), (-3, 4), (-2, 2)]


def test_scores_are_means_over_single_prompts(model: LanguageModel, sheet: ScoreSheet) -> None:
    sheet.measure(KEYS, 100)
    for key in KEYS:
        ablated = Steer(ablate=sheet.directions.unit(*key))
        added = Steer(add=sheet.directions.vector(*key), layer=key[1])
        bypass = [float(refusal_score(alone(model, tokens, ablated), TOKENS)) for tokens in sheet.data.harmful]
        induce = [float(refusal_score(alone(model, tokens, added), TOKENS)) for tokens in sheet.data.harmless]
        kl = []
        for tokens in sheet.data.harmless:
            p, q = (alone(model, tokens, steer).log_softmax(-1) for steer in (Steer(), ablated))
            kl.append(float((p.exp() * (p - q)).sum()))
        found = sheet.candidate(key)
        for value, expected in ((found.bypass, bypass), (found.induce, induce), (found.kl, kl)):
            assert value == pytest.approx(sum(expected) / len(expected), rel=1e-4, abs=1e-5)
        assert found.prompts == 9
    base = [float(refusal_score(alone(model, t, Steer()), TOKENS)) for t in sheet.data.harmful]
    assert sheet.baseline_scores()[0] == pytest.approx(sum(base) / len(base), rel=1e-4)


def test_no_prompt_goes_through_twice(sheet: ScoreSheet, seen: list[int]) -> None:
    harmful, harmless = len(sheet.data.harmful), len(sheet.data.harmless)
    known = 0
    for count in (4, 4, 6, 8, 100, 100):
        before = sum(seen), sheet.passes
        sheet.measure(KEYS, count)
        now = min(count, harmful) + 2 * min(count, harmless)
        # once, the untouched model on all prompts
        expected = (now - known) * len(KEYS) + (0 if known else harmful + harmless)
        assert sum(seen) - before[0] == sheet.passes - before[1] == expected
        known = now
    fresh = ScoreSheet(sheet.model, sheet.directions, sheet.data)
    fresh.measure(KEYS, 100)
    for name in ("bypass", "kl", "induce"):
        rounds, at_once = ([getattr(s.candidate(key), name) for key in KEYS] for s in (sheet, fresh))
        assert rounds == pytest.approx(at_once, rel=1e-4, abs=1e-6)


def test_a_round_is_one_run(sheet: ScoreSheet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streamed, every run reads all the weights."""
    runs: list[str] = []
    forward = LanguageModel.forward

    def counted(self: LanguageModel, *args: Any, **kwargs: Any) -> Iterator[Any]:
        runs.append(kwargs["description"])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LanguageModel, "forward", counted)
    sheet.measure(KEYS, 4)
    sheet.measure(KEYS[:2], 9)
    sheet.baseline_scores()
    assert runs == ["baseline", "candidates", "candidates"]


def test_a_model_the_whole_way(sheet: ScoreSheet, seen: list[int]) -> None:
    anything = Thresholds(max_layer_fraction=1.0, max_kl=1e6, min_induce=-1e6)
    quick = choose_direction(sheet, anything)
    # forward passes, and the screen's backward ones as two more each
    assert quick.passes == sum(seen) + 2 * 9
    seen.clear()
    whole = choose_direction(ScoreSheet(sheet.model, sheet.directions, sheet.data), anything, exhaustive=True)
    assert whole.passes == sum(seen) == whole.exhaustive_passes + 16 == 18 * (9 + 7 + 7) + 16
    assert key_of(quick) == key_of(whole)
    assert quick.choice.pick.bypass == pytest.approx(whole.choice.pick.bypass, rel=1e-5)
    best = min(c.bypass for c in whole.choice.candidates if c.bypass is not None)
    assert whole.choice.pick.bypass == best < whole.baseline_harmful
