"""Other middles than the mean, directions apart from others, strengths by depth, spans of several."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abliterate import cutting
from abliterate.cutting import candidates_span, found_by_search, per_layer, strength_at, strengths_of, uniform
from abliterate.direction.means import Directions, Mean, difference, geometric_median, winsorized
from abliterate.direction.points import Point
from abliterate.direction.selection import Candidate, Thresholds
from abliterate.direction.sparing import Before, Spared, _choose, apart
from abliterate.errors import SelectionError
from abliterate.progress import SILENT
from abliterate.recipe import CurveRecipe, EditRecipe

SEEDS = st.integers(0, 10_000)
quick = settings(deadline=None, max_examples=30)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean(seed: int) -> Mean:
    return Mean(normal(seed, 2, 5, 16) + 3.0, 9, 9)


@quick
@given(seed=SEEDS)
def test_winsorising_cuts_large_entries_alone(seed: int) -> None:
    hidden = normal(seed, 4, 101)
    hidden[:, 7] = 1000.0
    cut = winsorized(hidden, 0.9)
    most = torch.quantile(hidden.abs(), 0.9, dim=-1, keepdim=True)
    small = hidden.abs() <= most
    assert torch.equal(cut[small], hidden[small]) and int((~small).sum()) == 4 * 10
    assert torch.allclose(cut.abs(), torch.minimum(hidden.abs(), most)) and bool((cut.sign() == hidden.sign()).all())
    assert winsorized(hidden, 1.0) is hidden


@quick
@given(seed=SEEDS, count=st.integers(3, 20))
def test_the_geometric_median_has_the_least_sum_of_distances(seed: int, count: int) -> None:
    points = normal(seed, count, 8)
    middle = geometric_median(points)

    def total(at: Tensor) -> float:
        return float((points - at).norm(dim=-1).sum())

    best = total(middle)
    assert all(total(middle + 0.05 * normal(i, 8)) >= best - 1e-6 for i in range(8))
    assert best <= total(points.mean(0)) + 1e-9


def test_one_point_far_away_moves_the_mean_and_not_the_median() -> None:
    points = normal(0, 21, 8)
    far = points.clone()
    far[0] = 1e4
    assert float((far.mean(0) - points.mean(0)).norm()) > 100
    assert float((geometric_median(far) - geometric_median(points)).norm()) < 1
    assert torch.equal(geometric_median(torch.ones(4, 3).double()), torch.ones(3).double())


def test_each_place_has_a_median_of_its_own() -> None:
    points = normal(1, 9, 2, 3, 8)
    whole = geometric_median(points)
    for p in range(2):
        for layer in range(3):
            assert torch.allclose(whole[p, layer], geometric_median(points[:, p, layer]), atol=1e-5)


@quick
@given(seed=SEEDS)
def test_without_the_harmless_part_nothing_is_left_along_the_harmless_mean(seed: int) -> None:
    harmful, harmless = mean(seed), mean(seed + 1)
    kept, removed = (difference(harmful, harmless, harmless_part=part) for part in (True, False))
    along = (removed.grid.double() * harmless.value).sum(-1) / harmless.value.norm(dim=-1)
    assert float(along.abs().max()) < 1e-5 < float((kept.grid.double() * harmless.value).sum(-1).abs().max())
    assert torch.equal(kept.grid, (harmful.value - harmless.value).float())


@quick
@given(seed=SEEDS)
def test_directions_apart_from_refusal_are_orthogonal_to_it_and_else_the_same(seed: int) -> None:
    first, refusal = (Directions(normal(seed + i, 2, 5, 16).float(), mean(1), mean(2)) for i in range(2))
    found = apart(first, refusal)
    assert float((found.grid * refusal.grid).sum(-1).abs().max()) < 1e-4
    moved = first.grid - found.grid
    unit = refusal.grid / refusal.grid.norm(dim=-1, keepdim=True)
    assert torch.allclose(moved, (moved * unit).sum(-1, keepdim=True) * unit, atol=1e-5)


GRID = [(p, layer) for p in (-2, -1) for layer in range(3)]


def chosen(*measured: Spared, harmful: float = 0.9, look_alike: float = 0.6, **limits: Any) -> Any:
    return _choose(GRID, measured, Before(look_alike, harmful), Thresholds(**limits), 12)[1]


def test_the_fewest_refusals_of_look_alikes_among_those_that_spare_true_ones() -> None:
    careless = Spared((-1, 0), 0.0, -9.0, 0.84, 1.0, 0.01)
    costly = Spared((-1, 1), 0.05, -8.0, 0.9, 1.0, 0.5)
    good, better = Spared((-2, 1), 0.3, -2.0, 0.86, 1.0, 0.01), Spared((-2, 2), 0.2, -3.0, 0.9, 1.0, 0.02)
    choice = chosen(careless, costly, good, better)
    assert (choice.pick.position, choice.pick.layer, choice.pick.status) == (-2, 2, "picked") and not choice.relaxed
    status = {(c.position, c.layer): c.status for c in choice.candidates}
    measured = {(-1, 0): "induce", (-1, 1): "kl", (-2, 1): "passed", (-2, 2): "picked"}
    assert status == dict.fromkeys(GRID, "screened") | measured
    assert "from 60% to 20%" in choice.reason and "from 90% to 90%" in choice.reason
    assert chosen(careless, costly).relaxed and chosen(careless, costly).pick.layer == 1


def test_what_halves_refusals_of_look_alikes_goes_before_what_keeps_to_the_kl() -> None:
    idle, costly = Spared((-1, 0), 0.5, -1.0, 0.9, 1.0, 0.01), Spared((-1, 1), 0.3, -2.0, 0.9, 1.0, 0.3)
    choice = chosen(idle, costly)
    assert (choice.pick.layer, choice.relaxed) == (1, True)
    assert chosen(idle, costly, strict=True).pick.layer == 0 and not chosen(idle, costly, strict=True).relaxed
    assert chosen(idle, replace(costly, refused=0.4)).pick.layer == 0


def test_a_refined_direction_has_its_figures_in_the_candidate_it_came_from() -> None:
    start, after = Spared((-1, 1), 0.55, -0.5, 0.9, 1.0, 0.01), Spared((-1, 1), 0.1, -3.0, 0.9, 1.0, 0.02, step=8)
    pick, choice = _choose(GRID, [start, after], Before(0.6, 0.9), Thresholds(), 12)
    assert pick is after and choice.pick.bypass == -3.0 and "after 8 steps of refining" in choice.reason
    assert [c.bypass for c in choice.candidates if (c.position, c.layer) == (-1, 1)] == [-3.0]
    kept, choice = _choose(GRID, [start, replace(after, kept=0.8)], Before(0.6, 0.9), Thresholds(), 12)
    assert kept is start and choice.pick.bypass == -0.5 and "steps" not in choice.reason


def test_nothing_spares() -> None:
    careless, idle = Spared((-1, 0), 0.0, -9.0, 0.84, 1.0, 0.01), Spared((-1, 1), 0.6, 0.0, 0.9, 1.0, 0.0)
    with pytest.raises(SelectionError, match=r"takes refusals of look-alikes \(60%\).*nearest: \(-1, 0\) 0% and 84%"):
        chosen(careless, idle)
    with pytest.raises(SelectionError, match="no direction"):
        chosen(Spared((-1, 1), 0.05, -8.0, 0.9, 1.0, 0.5), strict=True)


def test_strength_by_depth() -> None:
    curve = CurveRecipe(peak=1.0, at=0.5, floor=0.2, reach=0.25)
    assert [round(strength_at(curve, i, 9), 3) for i in range(9)] == [0.2, 0.2, 0.2, 0.6, 1.0, 0.6, 0.2, 0.2, 0.2]
    assert strength_at(CurveRecipe(), 0, 1) == 1.0
    strengths = strengths_of(EditRecipe(strength=0.5, mlp=curve), 9)
    assert strengths[:, 0].tolist() == [0.5] * 9 and strengths[4, 1] == 0.5 and strengths[0, 1] == pytest.approx(0.1)
    cut = uniform(normal(0, 16), 9, EditRecipe(strength=0.5, embeddings="kept"))
    assert cut.stem == 0.0 and cut.uniform_strength is None


def test_a_span_starts_with_the_pick_and_goes_on_with_the_lowest_bypass() -> None:
    directions = Directions(normal(3, 2, 3, 16).float(), mean(1), mean(2))
    candidates = [
        Candidate(-1, 0, -1.0, 1.0, 0.1, 4, "passed"),
        Candidate(-1, 1, -5.0, 1.0, 0.1, 4, "picked"),
        Candidate(-2, 1, -9.0, None, None, 2, "screened"),
        Candidate(-2, 2, -99.0, 1.0, 0.1, 4, "layer"),
        Candidate(-2, 0, float("nan"), 1.0, 0.1, 4, "nan"),
    ]
    assert torch.allclose(candidates_span(directions, candidates[:2], candidates[1], 1)[0], directions.unit(-1, 1))
    basis = candidates_span(directions, candidates, candidates[1], 3)
    assert torch.allclose(basis @ basis.T, torch.eye(3), atol=1e-5)
    units = [directions.unit(*key) for key in ((-1, 1), (-1, 0), (-2, 1))]
    assert torch.allclose(basis[0], units[0], atol=1e-6)
    for unit in units:
        assert float((unit - basis.T @ (basis @ unit)).norm()) < 1e-5
    with pytest.raises(SelectionError, match="the candidates span 3 directions, not 4"):
        candidates_span(directions, candidates, candidates[1], 4)


def test_of_the_measured_candidates_the_lowest_bypass_comes_next() -> None:
    directions = Directions(normal(3, 2, 3, 16).float(), mean(1), mean(2))
    places = {(-1, 1): -3.0, (-1, 0): -1.0, (-2, 1): -5.0}
    candidates = [Candidate(*place, bypass, 1.0, 0.1, 4, "passed") for place, bypass in places.items()]
    basis = candidates_span(directions, candidates, candidates[0], 2)
    unit = directions.unit(-2, 1)
    assert float((unit - basis.T @ (basis @ unit)).norm()) < 1e-5


def test_layers_lose_what_the_next_layer_reads() -> None:
    directions = Directions(normal(4, 2, 3, 16).float(), mean(1), mean(2))
    cut = per_layer(directions, Candidate(-2, 0), EditRecipe(directions="per-layer"))
    wanted = [directions.unit(-2, layer) for layer in (0, 1, 2, 2)]
    assert cut.layers == (1, 2, 3) and torch.equal(cut.bases[:, 0], torch.stack(wanted))


def test_what_a_search_found_takes_the_place_of_what_it_started_with() -> None:
    directions = Directions(normal(4, 2, 3, 16).float(), mean(1), mean(2))
    start = per_layer(directions, Candidate(-2, 0), EditRecipe(directions="per-layer", embeddings="kept"))
    point = Point(normal(5, 3, 2).float(), 3 * normal(6, 3, 16).float(), 0.0, 0.0, 0.1, 4, 20.0)
    cut = found_by_search(start, point)
    assert torch.equal(cut.strengths, point.strengths.double()) and (cut.stem, cut.layers) == (0.0, start.layers)
    assert torch.equal(cut.bases[0], start.bases[0])
    units = point.directions / point.directions.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(cut.bases[1:, 0], units)


def test_pairs_span_what_harmful_prompts_have_beyond_their_harmless_partners(monkeypatch: pytest.MonkeyPatch) -> None:
    axes = torch.eye(16, dtype=torch.float64)
    harmless = normal(1, 9, 1) * 100 * axes[3] + normal(2, 9, 1) * 50 * axes[4]
    harmful = harmless + normal(3, 9, 1) * 5 * axes[6] + normal(4, 9, 1) * axes[7]
    texts = {"harmful": harmful, "harmless": harmless}
    monkeypatch.setattr(cutting, "hidden_at", lambda model, prompts, pick, progress: texts[prompts])
    directions = Directions(axes[None, :1].expand(1, 3, 16).float(), mean(1), mean(2))
    model: Any = None
    prompts: Any = ("harmful", "harmless")
    basis = cutting.pairs_span(model, directions, Candidate(-1, 0), prompts, 3, SILENT)
    plane = axes[[0, 6, 7]].float()
    assert torch.allclose(basis[0], plane[0])
    assert float((plane - plane @ basis.T @ basis).norm()) < 1e-3
