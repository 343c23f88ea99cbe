"""Intervals: against published values, against simulation, and their laws."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from abliterate.evaluation.statistics import Mean, Rate, bootstrap, paired

VALUES = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20)


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [
        (0, 48, 0.0, 0.0741), (24, 48, 0.3639, 0.6361), (48, 48, 0.9259, 1.0), (1, 1, 0.2065, 1.0),
        # Newcombe 1998, table I, method 3
        (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718),
    ],
)  # fmt: skip
def test_wilson_against_published_values(hits: int, total: int, low: float, high: float) -> None:
    rate = Rate(hits, total)
    assert (rate.value, rate.low, rate.high) == pytest.approx((hits / total, low, high), abs=5e-5)


@given(st.integers(1, 400).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_wilson_solves_its_equation_and_is_symmetric(case: tuple[int, int]) -> None:
    hits, total = case
    rate, mirror = Rate(hits, total), Rate(total - hits, total)
    assert 0 <= rate.low <= rate.value <= rate.high <= 1
    assert (rate.low, rate.high) == pytest.approx((1 - mirror.high, 1 - mirror.low), abs=1e-12)
    for end in (rate.low, rate.high):
        if 0 < end < 1:
            assert (rate.value - end) ** 2 == pytest.approx(1.959963984540054**2 * end * (1 - end) / total, rel=1e-6)


@pytest.mark.parametrize(("hits", "total"), [(0, 0), (2, 1), (-1, 3)])
def test_what_is_no_rate(hits: int, total: int) -> None:
    with pytest.raises(ValueError, match="is no rate"):
        Rate(hits, total)


def test_a_bootstrap_covers_the_mean_nineteen_times_in_twenty() -> None:
    drawn = np.random.default_rng(1).exponential(size=(300, 64))
    found = [bootstrap(list(row)) for row in drawn]
    covered = sum(each.low <= 1 <= each.high for each in found) / len(found)
    assert 0.89 <= covered <= 0.98
    widths = np.mean([each.high - each.low for each in found])
    assert widths == pytest.approx(2 * 1.96 / math.sqrt(64), rel=0.1)


@given(VALUES, st.floats(-50, 50))
def test_laws_of_a_bootstrap(values: list[float], shift: float) -> None:
    found = bootstrap(values)
    assert found == bootstrap(values) and found.low <= found.value <= found.high
    assert found.value == pytest.approx(sum(values) / len(values), abs=1e-9)
    moved = bootstrap([value + shift for value in values])
    for one, two in ((found.low, moved.low), (found.high, moved.high)):
        assert two - one == pytest.approx(shift, abs=1e-9)


def test_the_seed_matters_and_a_constant_is_certain() -> None:
    values = [0.1, 0.5, 0.2, 0.9, 0.4]
    assert bootstrap(values, seed=1) != bootstrap(values, seed=2)
    assert bootstrap([0.3] * 7, weights=[1, 2, 3, 4, 5, 6, 7]) == Mean(0.3, 0.3, 0.3)


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(1, 4)), min_size=1, max_size=8))
def test_a_weighted_mean_is_the_mean_over_tokens(units: list[tuple[int, int]]) -> None:
    values, weights = zip(*units, strict=True)
    spelled = [value for value, weight in units for _ in range(weight)]
    assert bootstrap(values, weights).value == pytest.approx(sum(spelled) / len(spelled), abs=1e-12)


def test_units_are_drawn_and_not_tokens() -> None:
    """One window of a thousand tokens is one piece of evidence."""
    few = bootstrap([1.0, 2.0, 4.0], [1000, 1000, 1000])
    assert few == bootstrap([1.0, 2.0, 4.0]) and few.high - few.low > 2


@pytest.mark.parametrize("values", [[math.nan, 1.0], [math.inf], [1.0, -math.inf]])
def test_what_is_not_finite_has_no_mean(values: list[float]) -> None:
    assert all(map(math.isnan, vars(bootstrap(values)).values()))


def test_wrong_numbers_of_values() -> None:
    with pytest.raises(ValueError, match="3 values, and 2 weights"):
        bootstrap([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="zip"):
        paired([1.0], [1.0, 2.0])


def test_pairs_are_narrower_than_what_they_are_the_difference_of() -> None:
    before = [float(i) for i in range(40)]
    after = [value + 0.5 + 0.1 * (i % 3) for i, value in enumerate(before)]
    change = paired(before, after)
    alone = bootstrap(before)
    assert change.value == pytest.approx(0.6, abs=0.01) and 0.5 <= change.low < change.high <= 0.7
    assert alone.high - alone.low > 20 * (change.high - change.low)
