"""The searches, on models whose refusals are a formula; every steer that is measured is written down."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from abliterate.audit import halving
from abliterate.audit.effects import Effect
from abliterate.audit.halving import search_windows, smallest_dose, sweep_strengths
from abliterate.calibration.hooks import Steer
from abliterate.direction.scoring import Validation
from abliterate.progress import SILENT
from tests.audit.made import effect

DATA = Validation([[5]] * 32, [[6]] * 16, [1])
BASE, UNIT = effect(30, 0.0), torch.ones(4) / 2


class Formula:
    """Stands in for `effects`: `left` gives how many of 32 prompts are still refused."""

    def __init__(self, left: Callable[[Steer], int]) -> None:
        self.left, self.measured = left, list[tuple[Steer, int, int]]()
        self.runs, self.all_prompts = 0, False

    def __call__(self, _model: Any, steers: Sequence[Steer], data: Validation, *_: Any) -> list[Effect]:
        self.runs += 1
        self.measured += [(steer, len(data.harmful), len(data.harmless)) for steer in steers]
        count, self.all_prompts = len(data.harmful), bool(data.harmless)
        return [effect(round(self.left(steer) * count / 32), 0.1 if data.harmless else None, count) for steer in steers]


@pytest.fixture
def patch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Steer], int]], Formula]:
    def patched(left: Callable[[Steer], int]) -> Formula:
        formula = Formula(left)
        monkeypatch.setattr(halving, "effects", formula)
        return formula

    return patched


@pytest.mark.parametrize(
    ("half_at", "found"), [(0.3, 0.3125), (0.01, 0.03125), (0.875, 0.875), (0.97, 0.96875 + 0.03125)]
)
def test_the_least_share_is_found_to_a_32nd(patch: Any, half_at: float, found: float) -> None:
    formula = patch(lambda steer: 15 if steer.strength >= half_at else 16)
    doses = sweep_strengths(None, UNIT, DATA, torch.zeros(16, 3), BASE, SILENT)  # type: ignore[arg-type]
    least = smallest_dose(doses, BASE)
    assert least is not None and least.strength == pytest.approx(found)
    strengths = [dose.strength for dose in doses]
    assert strengths == sorted(set(strengths)) and len(strengths) == 11
    assert formula.runs == 2 and all(steer.ablate is UNIT for steer, _, _ in formula.measured)


def test_a_direction_that_does_not_halve(patch: Any) -> None:
    formula = patch(lambda steer: 20)
    doses = sweep_strengths(None, UNIT, DATA, torch.zeros(16, 3), BASE, SILENT)  # type: ignore[arg-type]
    assert smallest_dose(doses, BASE) is None
    assert formula.runs == 1 and len(doses) == 8


def windows(layers: int, prompts: int = 8) -> halving.Windows:
    model = SimpleNamespace(stream=SimpleNamespace(layers=range(layers)))
    return search_windows(model, UNIT, DATA, torch.zeros(16, 3), BASE, effect(prompts, 0.0, prompts), SILENT)  # type: ignore[arg-type]


@pytest.mark.parametrize(("first", "last"), [(12, 16), (5, 5), (0, 1), (20, 23), (7, 13), (0, 23)])
def test_the_smallest_window_is_found(patch: Any, first: int, last: int) -> None:
    formula = patch(lambda s: 2 if s.layers is None or (s.layers.start <= first and last < s.layers.stop) else 30)
    found = windows(24)
    assert found.smallest is not None
    assert (found.smallest.first, found.smallest.last) == (first, last)
    assert found.smallest.effect.refusals.count == 32 and found.smallest.effect.kl is not None
    assert {(w.first, w.last) for w in found.tried} >= {(0, 0), (23, 23), (0, 23), (8, 11)}
    assert len({(w.first, w.last) for w in found.tried}) == len(found.tried) < 24 * 25 / 2
    assert {count for _, count, harmless in formula.measured if not harmless} == {8}


def test_a_window_that_works_on_the_first_prompts_alone_is_not_given_out(patch: Any) -> None:
    """On all prompts it takes a layer more than on the first ones."""
    formula = patch(lambda s: 2)

    def left(steer: Steer) -> int:
        assert steer.layers is not None
        needed = {3, 4} if formula.all_prompts else {3}
        return 2 if needed <= set(steer.layers) else 30

    formula.left = left
    found = windows(8)
    assert (3, 3) in {(w.first, w.last) for w in found.tried if w.effect.refusals.share < 0.5}
    assert found.smallest is not None
    assert {3, 4} <= set(range(found.smallest.first, found.smallest.last + 1)) and found.smallest.width <= 4


def test_of_windows_of_one_width_the_cheapest_is_given_out(monkeypatch: pytest.MonkeyPatch) -> None:
    formula = Formula(lambda s: 30 if s.layers is None or not {2, 5, 6} & set(s.layers) else 5 + s.layers.start)

    def priced(model: Any, steers: Sequence[Steer], data: Validation, *rest: Any) -> list[Effect]:
        costs = {2: 0.3, 5: 0.02, 6: 0.2}
        found = formula(model, steers, data, *rest)
        return [
            replace(e, kl=costs.get(s.layers.start, 0.01) if data.harmless and s.layers else e.kl)
            for s, e in zip(steers, found, strict=True)
        ]

    monkeypatch.setattr(halving, "effects", priced)
    found = windows(8).smallest
    assert found is not None and (found.first, found.last, found.effect.kl) == (5, 5, 0.02)


def test_no_window_works(patch: Any) -> None:
    patch(lambda steer: 25)
    found = windows(5)
    assert found.smallest is None and (0, 4) in {(w.first, w.last) for w in found.tried}
