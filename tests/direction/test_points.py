"""The front and the pick, on scores alone."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abliterate.direction.points import Point, pareto, result_of
from abliterate.errors import SelectionError

NOTHING = torch.zeros(1, 2), torch.ones(1, 1)
# Few values, so that many are equal.
SCORES = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.02, 0.05, 0.1, 0.5, 1.0, math.nan]),
        st.sampled_from([0.0, 0.01, 0.02, 0.05, 0.3, math.nan, math.inf]),
    ),
    max_size=12,
)


def points(scores: list[tuple[float, float]]) -> list[Point]:
    return [Point(*NOTHING, refusal, 0.0, kl, step, 1.0) for step, (refusal, kl) in enumerate(scores)]


def betters(a: Point, b: Point) -> bool:
    return a.refusal <= b.refusal and a.kl <= b.kl and (a.refusal, a.kl) != (b.refusal, b.kl)


@given(SCORES)
def test_the_front_is_what_nothing_betters(scores: list[tuple[float, float]]) -> None:
    found = points(scores)
    front = pareto(found)
    finite = [p for p in found if math.isfinite(p.kl) and math.isfinite(p.refusal)]
    expected = {(p.refusal, p.kl) for p in finite if not any(betters(q, p) for q in finite)}
    assert [(found[i].refusal, found[i].kl) for i in front] == sorted(expected, key=lambda score: score[1])
    for i in front:
        assert i == next(j for j, p in enumerate(found) if (p.refusal, p.kl) == (found[i].refusal, found[i].kl))


@given(SCORES, st.sampled_from([0.0, 0.05, 1.0]))
def test_the_pick_has_few_refusals_and_then_the_lowest_kl(scores: list[tuple[float, float]], most: float) -> None:
    found = points(scores)
    finite = [p for p in found if math.isfinite(p.kl) and math.isfinite(p.refusal)]
    if not finite:
        with pytest.raises(SelectionError, match="not finite"):
            result_of(found, most, 0)
        return
    result = result_of(found, most, 7)
    pick = result.points[result.pick]
    assert result.pick in result.front and result.passes == 7
    low = [p for p in finite if p.refusal <= most]
    if low:
        assert pick.refusal <= most and pick.kl == min(p.kl for p in low) and "lowest KL" in result.reason
    else:
        assert pick.refusal == min(p.refusal for p in finite) and "no point" in result.reason
