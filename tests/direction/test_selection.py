"""The selection rule on scores made to exercise every filter, with the picks that the paper's authors publish."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abliterate.direction.selection import Candidate, Thresholds, layer_allowed, select
from abliterate.errors import SelectionError

# Arditi et al. 2024, appendix C: model, post-instruction positions, layers, published pick (position, layer).
PUBLISHED = (
    ("gemma-2b-it", 5, 18, (-2, 10)),
    ("llama-2-7b-chat", 6, 32, (-1, 14)),
    ("llama-3-8b-instruct", 5, 32, (-5, 12)),
    ("qwen-1.8b-chat", 4, 24, (-2, 15)),
    ("yi-6b-chat", 5, 32, (-5, 20)),
)


def scores_around(pick: tuple[int, int], positions: int, layers: int, seed: int) -> list[Candidate]:
    """A grid in which the pick is the best that passes, and each filter alone holds back something better."""
    rng = random.Random(seed)
    grid = {
        (p, layer): Candidate(p, layer, rng.uniform(-4, 4), rng.uniform(0.5, 9), rng.uniform(0.0, 0.09), 32)
        for p in range(-positions, 0)
        for layer in range(layers)
    }
    grid[pick] = Candidate(*pick, bypass=-6.0, induce=3.0, kl=0.05, prompts=32)
    others = [key for key in grid if key != pick and layer_allowed(key[1], layers, Thresholds())]
    late, kl, induce, nan = (-1, layers - 1), *rng.sample(others, 3)
    grid[late] = replace(grid[late], bypass=-12.0)
    grid[kl] = replace(grid[kl], bypass=-11.0, kl=0.1001)
    grid[induce] = replace(grid[induce], bypass=-10.0, induce=-0.001)
    grid[nan] = replace(grid[nan], bypass=math.nan)
    return list(grid.values())


@pytest.mark.parametrize(("model", "positions", "layers", "pick"), PUBLISHED)
@pytest.mark.parametrize("seed", range(5))
def test_published_picks(model: str, positions: int, layers: int, pick: tuple[int, int], seed: int) -> None:
    choice = select(scores_around(pick, positions, layers, seed), layers, Thresholds())
    assert (choice.pick.position, choice.pick.layer) == pick, model
    assert not choice.relaxed
    found = {c.status for c in choice.candidates}
    assert {"picked", "passed", "layer", "kl", "induce", "nan"} <= found


@pytest.mark.parametrize(
    ("changes", "better"),
    [
        ({"max_layer_fraction": 1.0}, -12.0),
        ({"max_kl": 0.2}, -11.0),
        ({"min_induce": -1.0}, -10.0),
    ],
)
def test_each_filter_alone_changes_the_pick(changes: dict[str, float], better: float) -> None:
    scores = scores_around((-2, 10), 5, 18, 0)
    choice = select(scores, 18, replace(Thresholds(), **changes))
    assert choice.pick.bypass == better


def test_the_layer_filter_is_a_share_of_the_depth() -> None:
    assert layer_allowed(23, 30, Thresholds())
    assert not layer_allowed(24, 30, Thresholds())
    assert layer_allowed(14, 18, Thresholds())
    assert not layer_allowed(15, 18, Thresholds())


def test_scores_on_the_bounds_pass() -> None:
    # dropped are l >= 0.8 L, KL > 0.1, induce < 0
    scores = [Candidate(-1, 23, -5.0, 0.0, 0.1, 32), Candidate(-1, 24, -9.0, 1.0, 0.0, 32)]
    choice = select(scores, 30, Thresholds())
    assert choice.pick.layer == 23 and not choice.relaxed
    assert [c.status for c in choice.candidates] == ["picked", "layer"]


@pytest.mark.parametrize("score", ["bypass", "induce", "kl"])
@pytest.mark.parametrize(("value", "status"), [(math.nan, "nan"), (None, "screened")])
def test_a_score_that_is_missing_or_no_number(score: str, value: float | None, status: str) -> None:
    better = replace(Candidate(-1, 3, -9.0, 5.0, 0.0, 32), **{score: value})
    choice = select([better, Candidate(-1, 4, -1.0, 1.0, 0.01, 32)], 30, Thresholds())
    assert choice.pick.layer == 4 and choice.candidates[0].status == status
    with pytest.raises(SelectionError) as caught:
        select([better], 30, Thresholds())
    assert "\n" not in str(caught.value)


def test_equals_are_told_apart_the_same_way_every_time() -> None:
    scores = [Candidate(p, layer, -2.0, 1.0, 0.01, 32) for p in (-3, -2, -1) for layer in (5, 4, 6)]
    for order in (scores, scores[::-1]):
        pick = select(order, 30, Thresholds()).pick
        assert (pick.position, pick.layer) == (-1, 4)


def too_costly(kls: Sequence[float], bypass: Sequence[float]) -> list[Candidate]:
    return [Candidate(-1, i, b, 1.0, k, 32) for i, (k, b) in enumerate(zip(kls, bypass, strict=True))]


def test_relaxed_takes_the_lowest_kl_that_still_bypasses() -> None:
    choice = select(too_costly([0.9, 0.3, 0.2, 0.5], [-9.0, -1.0, 0.5, -7.0]), 30, Thresholds())
    assert choice.relaxed
    assert choice.pick.layer == 1
    assert "KL bound" in choice.reason


def test_relaxed_keeps_the_other_filters() -> None:
    scores = too_costly([0.2, 0.3, 0.9], [-9.0, -8.0, -1.0])
    scores[0] = replace(scores[0], induce=-1.0)
    scores[1] = replace(scores[1], layer=29)
    assert select(scores, 30, Thresholds()).pick.layer == 2


def test_strict_stops_and_names_the_nearest() -> None:
    with pytest.raises(SelectionError, match=r"\(-1, 1\) bypass -1\.00 induce 1\.00 KL 0\.300"):
        select(too_costly([0.9, 0.3], [-9.0, -1.0]), 30, Thresholds(strict=True))


def test_nothing_bypasses() -> None:
    with pytest.raises(SelectionError, match="no direction passes"):
        select(too_costly([0.9, 0.3], [1.0, 2.0]), 30, Thresholds())


def test_unfinished_candidates_never_win() -> None:
    scores = [Candidate(-1, 3, -50.0, None, 0.0, 4), Candidate(-1, 4, -1.0, 1.0, 0.01, 32)]
    choice = select(scores, 30, Thresholds())
    assert choice.pick.layer == 4
    assert choice.candidates[0].status == "screened"


numbers = st.floats(-20, 20) | st.just(math.nan)
grids = st.lists(st.tuples(numbers, numbers, st.floats(0, 2) | st.just(math.nan)), min_size=1, max_size=25)


@given(grids)
def test_the_pick_passes_every_filter_and_none_that_passes_is_better(grid: list[tuple[float, float, float]]) -> None:
    scores = [Candidate(-1, i, b, n, k, 32) for i, (b, n, k) in enumerate(grid)]
    passing = [c for c in scores if c.layer < 24 and (c.induce or 0) >= 0 and (c.kl or 0) <= 0.1]
    passing = [c for c in passing if not any(map(math.isnan, (c.bypass or 0, c.induce or 0, c.kl or 0)))]
    try:
        choice = select(scores, 30, Thresholds())
    except SelectionError:
        assert not passing
        return
    if passing:
        assert choice.pick.bypass == min(c.bypass or 0 for c in passing)
    else:
        assert choice.relaxed
        assert (choice.pick.bypass or 0) < 0
