"""Means of hidden states: those of a plain loop in fp64, over the prompts whose refusal score has the right sign."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from abliterate.calibration.model import Batch, LanguageModel, Tokens
from abliterate.direction.means import Directions, Mean, difference, mean_hidden
from abliterate.direction.score import refusal_score
from abliterate.errors import CalibrationError
from tests.resident import HIDDEN, llama, random_prompts, resident

POSITIONS, LAYERS = 4, 3
TOKENS = list(range(50))


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return resident(llama(layers=LAYERS), batch_size=7)


def alone(model: LanguageModel, tokens: Sequence[int]) -> tuple[Tensor, float]:
    """[positions, layers, hidden] fp64 and the refusal score of one prompt."""
    with torch.no_grad():
        output = model.model(torch.tensor([list(tokens)]), output_hidden_states=True, use_cache=False)
    hidden = torch.cat(output.hidden_states[:LAYERS])[:, -POSITIONS:].transpose(0, 1).double()
    return hidden, float(refusal_score(output.logits[0, -1], TOKENS))


def made_mean(value: Tensor) -> Mean:
    return Mean(value, 10, 10)


@pytest.fixture(scope="module")
def measured(model: LanguageModel) -> list[tuple[list[int], Tensor, float]]:
    """Prompts with their hidden states and refusal scores, one by one."""
    return [(tokens, *alone(model, tokens)) for tokens in random_prompts(40, seed=1)]


@pytest.mark.parametrize("sign", [1, -1, 0])
def test_means_are_those_of_a_plain_loop(
    model: LanguageModel, measured: list[tuple[list[int], Tensor, float]], sign: int
) -> None:
    kept = [hidden for _, hidden, score in measured if sign == 0 or score * sign > 0]
    assert sign == 0 or 8 <= len(kept) <= 32
    mean = mean_hidden(model, [tokens for tokens, *_ in measured], POSITIONS, sign, TOKENS)
    assert (mean.kept, mean.total) == (len(kept), 40)
    assert mean.value.dtype == torch.float64 and mean.value.shape == (POSITIONS, LAYERS, HIDDEN)
    torch.testing.assert_close(mean.value, torch.stack(kept).mean(0), atol=1e-6, rtol=1e-6)


class Alternating(LanguageModel):
    """Every other hidden state is larger by less than fp32 can add up."""

    def forward(self, prompts: Sequence[Tokens], *_: Any, **__: Any) -> Iterator[Batch]:
        for row in range(len(prompts)):
            yield Batch([row], torch.zeros(1, 9), torch.full((1, 1, 1, 1), 1e6 + (row % 2) * 0.0625))


def test_sums_are_in_fp64() -> None:
    scripted = Alternating(None, None, None, None, 1)  # type: ignore[arg-type]
    mean = mean_hidden(scripted, [[5]] * 4000, 1, 0, [1])
    assert float(mean.value) == pytest.approx(1e6 + 0.03125, abs=1e-6)


def test_a_score_of_zero_is_of_neither_sign() -> None:
    # with all logits equal, half of the vocabulary has log-odds of 0
    even = resident(llama(layers=1, vocabulary=96))
    even.model.lm_head.weight.zero_()
    prompts = [[token % 96 for token in tokens] for tokens in random_prompts(10)]
    for sign in (1, -1):
        with pytest.raises(CalibrationError, match="0 of 10"):
            mean_hidden(even, prompts, 2, sign, range(48))


@pytest.mark.parametrize(("sign", "word"), [(1, "refused"), (-1, "answered")])
def test_too_few_of_the_right_sign(
    model: LanguageModel, measured: list[tuple[list[int], Tensor, float]], sign: int, word: str
) -> None:
    right, wrong = ([tokens for tokens, _, score in measured if score * s > 0] for s in (sign, -sign))
    assert mean_hidden(model, right[:8] + wrong[:5], POSITIONS, sign, TOKENS).kept == 8
    with pytest.raises(CalibrationError, match=f"the model {word} 7 of 12, and at least 8 are needed; give more"):
        mean_hidden(model, right[:7] + wrong[:5], POSITIONS, sign, TOKENS)


def test_positions_count_from_the_end() -> None:
    grid = torch.arange(3 * 2 * 4).view(3, 2, 4).double() + 1
    directions = difference(made_mean(3 * grid), made_mean(2 * grid))
    assert directions.grid.dtype == torch.float32
    for position in (-3, -2, -1):
        for layer in range(2):
            assert torch.equal(directions.vector(position, layer), grid[3 + position, layer].float())
            unit = directions.unit(position, layer)
            assert unit.dtype == torch.float32 and float(unit.norm()) == pytest.approx(1, abs=1e-6)
            assert float(unit @ directions.vector(position, layer)) == pytest.approx(
                float(grid[3 + position, layer].norm()), rel=1e-6
            )


def test_harmful_minus_harmless() -> None:
    one, two = torch.ones(1, 1, 3).double(), torch.full((1, 1, 3), 3.0).double()
    assert difference(made_mean(two), made_mean(one)).grid.tolist() == [[[2, 2, 2]]]


def test_the_difference_is_taken_in_fp64() -> None:
    large = torch.full((1, 1, 2), 1e3, dtype=torch.float64)
    found = difference(made_mean(large + 0.01), made_mean(large - 0.01))
    torch.testing.assert_close(found.grid, torch.full((1, 1, 2), 0.02), rtol=1e-6, atol=0)


def test_the_same_prompts_have_no_difference(model: LanguageModel) -> None:
    prompts = random_prompts(12)
    harmful = mean_hidden(model, prompts, POSITIONS, 0, TOKENS)
    harmless = mean_hidden(resident(model.model, 3), prompts[::-1], POSITIONS, 0, TOKENS)
    with pytest.raises(CalibrationError, match="the two sets must differ"):
        difference(harmful, harmless)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_hidden_states_that_are_not_finite(bad: float) -> None:
    value = torch.ones(2, 2, 3).double()
    value[1, 0, 2] = bad
    with pytest.raises(CalibrationError, match=r"not finite.*--dtype float32"):
        difference(made_mean(value), made_mean(torch.zeros(2, 2, 3).double()))


def test_one_candidate_without_difference_is_no_direction() -> None:
    grid = torch.ones(1, 2, 3)
    grid[0, 0] = 0
    found = Directions(grid, made_mean(grid), made_mean(grid))
    assert found.unit(-1, 0).isnan().all() and not found.unit(-1, 1).isnan().any()
