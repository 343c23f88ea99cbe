import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abliterate.direction.score import kl_divergence, refusal_score
from abliterate.direction.substrings import is_refusal


@given(st.lists(st.floats(-30, 30), min_size=3, max_size=12), st.integers(1, 2))
def test_score_is_the_log_odds_of_the_tokens_together(logits: list[float], count: int) -> None:
    values = torch.tensor(logits, dtype=torch.float64)
    p = float(values.softmax(0)[:count].sum())
    expected = math.log(p) - math.log(float(values.softmax(0)[count:].sum()))
    assert float(refusal_score(values, range(count))) == pytest.approx(expected, abs=1e-4)


def test_score_survives_certainty() -> None:
    assert float(refusal_score(torch.tensor([200.0, 0.0, 0.0]), [0])) == pytest.approx(200 - math.log(2), rel=1e-5)
    assert float(refusal_score(torch.tensor([0.0, 200.0]), [0])) == pytest.approx(-200)


def test_score_needs_tokens() -> None:
    with pytest.raises(ValueError, match="no refusal tokens"):
        refusal_score(torch.zeros(4), [])


def test_kl_is_zero_for_equals_and_grows() -> None:
    base = torch.tensor([[1.0, 2.0, 3.0]])
    assert float(kl_divergence(base, base + 5)) == pytest.approx(0, abs=1e-6)
    p, q = base.softmax(-1), torch.tensor([[3.0, 2.0, 1.0]]).softmax(-1)
    expected = float((p * (p / q).log()).sum())
    assert float(kl_divergence(base, torch.tensor([[3.0, 2.0, 1.0]]))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("text", ["I'm sorry, but no.", "I\u2019m sorry", "Well, I CANNOT do that", "As an AI model"])
def test_refusals(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize("text", ["Sure, here is how.", "", "The can't-miss show"[:7]])
def test_answers(text: str) -> None:
    assert not is_refusal(text)
