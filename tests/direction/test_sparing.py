"""False refusals on a model: what is picked is what was measured, refined or not."""

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from abliterate.calibration.hooks import Steer
from abliterate.calibration.model import LanguageModel, Tokens
from abliterate.checkpoint.locate import Source
from abliterate.direction import sparing
from abliterate.direction.means import Directions, difference, mean_hidden
from abliterate.direction.refining import Descent, refined
from abliterate.direction.score import kl_divergence, refusal_score
from abliterate.direction.selection import Thresholds
from abliterate.direction.sparing import FINALISTS, SCREENED, Refining, Sets, _screen, apart, choose_sparing
from abliterate.errors import SelectionError
from abliterate.evaluation.metrics import first_logits
from abliterate.progress import SILENT
from abliterate.subject import RunOptions, load_model, subject_at
from tests import pico

TOKENS = list(range(60))


def prompts(seed: int, count: int) -> list[Tokens]:
    made = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 100, (5 + i % 3,), generator=made).tolist() for i in range(count)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = pico.save(tmp_path_factory.mktemp("sparing") / "m", "llama")
    return load_model(subject_at(Source(folder, None, None, None)), RunOptions(dtype="float32"))


@pytest.fixture(scope="module")
def directions(model: LanguageModel) -> Directions:
    look_alike, harmful, harmless = (mean_hidden(model, prompts(seed, 8), 4, 0, TOKENS) for seed in (1, 2, 3))
    return apart(difference(look_alike, harmless), difference(harmful, harmless))


@pytest.fixture(autouse=True)
def careless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without training has no refusals that could be spared."""
    monkeypatch.setattr(sparing, "SPARED", 1.0)


def sets(seed: int, tokens: Sequence[int] = tuple(TOKENS)) -> Sets:
    return Sets(prompts(seed, 12), prompts(seed + 1, 12), prompts(seed + 2, 6), tokens)


def ablated(model: LanguageModel, texts: Sequence[Tokens], r: Tensor) -> Tensor:
    found: dict[int, Tensor] = {}
    for batch in model.forward(texts, [Steer(ablate=r)] * len(texts)):
        found.update(zip(batch.rows, batch.logits, strict=True))
    return torch.stack([found[i] for i in range(len(texts))])


@pytest.mark.parametrize("steps", [0, 6])
def test_the_figures_of_the_pick_are_those_of_its_direction(
    model: LanguageModel, directions: Directions, steps: int
) -> None:
    data, limits = sets(10), Thresholds(max_layer_fraction=1.0, max_kl=1e6)
    refining = Refining(sets(20), steps) if steps else None
    chosen = choose_sparing(model, directions, data, limits, refining=refining)
    pick = chosen.choice.pick
    unit = directions.unit(pick.position, pick.layer) if chosen.refined is None else chosen.refined
    parts = (data.look_alike, data.harmful, data.harmless)
    look_alike, harmful, harmless = (ablated(model, part, unit) for part in parts)
    assert pick.bypass == pytest.approx(float(refusal_score(look_alike, TOKENS).mean()), abs=1e-4)
    assert pick.induce == pytest.approx(float(refusal_score(harmful, TOKENS).mean()), abs=1e-4)
    base = first_logits(model, data.harmless, SILENT, "base")
    answered = refusal_score(base, TOKENS) <= 0
    assert pick.kl == pytest.approx(float(kl_divergence(base, harmless)[answered].mean()), abs=1e-4)
    assert ("steps of refining" in chosen.choice.reason) == (chosen.refined is not None)
    measured = [c for c in chosen.choice.candidates if c.prompts]
    assert len(measured) == FINALISTS and len(chosen.choice.candidates) > FINALISTS


def test_refining_is_picked_where_it_is_better(
    model: LanguageModel, directions: Directions, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, limits = sets(10), Thresholds(max_layer_fraction=1.0, max_kl=1e6)
    monkeypatch.setattr(sparing, "refined", partial(refined, descent=Descent(prompts=12, kl_weight=0.0)))
    plain, better = (
        choose_sparing(model, directions, data, limits, refining=refining) for refining in (None, Refining(data, 12))
    )
    assert better.refined is not None and better.passes > plain.passes
    assert plain.choice.pick.bypass is not None and better.choice.pick.bypass is not None
    assert better.choice.pick.bypass < plain.choice.pick.bypass


def test_no_false_refusal(model: LanguageModel, directions: Directions) -> None:
    with pytest.raises(SelectionError, match="refuses none of the look-alikes"):
        choose_sparing(model, directions, sets(10, (0,)), Thresholds())


def test_what_takes_true_refusals_is_screened_out(model: LanguageModel, directions: Directions) -> None:
    """The order is that of scores left on look-alikes and lost on harmful prompts, measured one by one."""
    data = sets(10)
    keys = [(p, layer) for p in range(-4, 0) for layer in range(directions.grid.shape[1])]
    base = torch.cat([first_logits(model, part, SILENT, "base") for part in (data.look_alike, data.harmful)])
    scores = refusal_score(base, TOKENS)
    few = [(part > 0).nonzero().flatten()[:SCREENED].tolist() for part in scores.split(len(data.look_alike))]
    texts = [[data.look_alike[i] for i in few[0]], [data.harmful[i] for i in few[1]]]
    assert texts[0] and texts[1]
    before = scores[len(data.look_alike) :][few[1]]

    def cost(key: tuple[int, int]) -> float:
        left, kept = (refusal_score(ablated(model, part, directions.unit(*key)), TOKENS).clamp_min(0) for part in texts)
        return float(left.mean() + (before - kept).clamp_min(0).mean())

    whole = torch.cat([base, first_logits(model, data.harmless, SILENT, "base")])
    assert _screen(model, directions, data, whole, keys, SILENT) == sorted(keys, key=cost)[:FINALISTS]
