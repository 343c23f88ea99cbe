"""Rates with their intervals, and effects of steers against one prompt at a time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abliterate.audit.effects import effects, rate_of
from abliterate.calibration.hooks import NOTHING, Steer
from abliterate.calibration.model import LanguageModel
from abliterate.direction.score import kl_divergence, refusal_score
from abliterate.direction.scoring import Validation
from tests.resident import llama, random_prompts, random_units, resident

TOKENS = list(range(10, 60))


@pytest.mark.parametrize(
    ("refused", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (1, 32, 0.0055, 0.1574)],
)
def test_wilsons_interval(refused: int, count: int, low: float, high: float) -> None:
    """Figures of statsmodels' proportion_confint(method="wilson")."""
    rate = rate_of(refused, count)
    assert (rate.low, rate.high) == pytest.approx((low, high), abs=1e-4)
    assert (rate.share, rate.count) == (refused / count, count)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_an_interval_holds_its_rate_and_mirrors(pair: tuple[int, int]) -> None:
    rate, mirrored = rate_of(*pair), rate_of(pair[1] - pair[0], pair[1])
    assert 0 <= rate.low <= rate.share <= rate.high <= 1
    assert (rate.low, rate.high) == pytest.approx((1 - mirrored.high, 1 - mirrored.low))


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return resident(llama(), 7)


def last(model: LanguageModel, prompt: list[int], steer: Steer) -> torch.Tensor:
    return next(iter(model.forward([prompt], [steer]))).logits[0]


def test_effects_are_those_of_prompts_alone(model: LanguageModel) -> None:
    harmful, harmless, units = random_prompts(5), random_prompts(4, seed=9), random_units(2)
    steers = [Steer(ablate=units[0]), NOTHING, Steer(ablate=units[1], strength=0.5)]
    base = torch.stack([last(model, prompt, NOTHING) for prompt in harmless])
    found = effects(model, steers, Validation(harmful, harmless, TOKENS), base)
    for steer, effect in zip(steers, found, strict=True):
        scores = [float(refusal_score(last(model, prompt, steer), TOKENS)) for prompt in harmful]
        after = torch.stack([last(model, prompt, steer) for prompt in harmless])
        assert effect.score == pytest.approx(sum(scores) / 5, abs=1e-4)
        assert effect.refusals == rate_of(sum(score > 0 for score in scores), 5)
        assert effect.kl == pytest.approx(float(kl_divergence(base, after).mean()), abs=1e-5)
    assert found[1].kl == pytest.approx(0, abs=1e-5) and found[0].kl != pytest.approx(0, abs=1e-3)


def test_without_harmless_prompts_there_is_no_kl(model: LanguageModel) -> None:
    (effect,) = effects(model, [NOTHING], Validation(random_prompts(3), [], TOKENS), None)
    assert effect.kl is None and effect.refusals.count == 3
