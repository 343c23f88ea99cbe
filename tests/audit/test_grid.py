import dataclasses
from typing import Any

import pytest
import torch

from abliterate.audit.grid import measure_grid, usable_keys
from abliterate.calibration.hooks import Steer
from abliterate.calibration.runner import Resident
from abliterate.codec import decode, encode
from abliterate.direction.means import Directions, difference, mean_hidden
from abliterate.direction.score import refusal_score
from abliterate.direction.scoring import ScoreSheet, Validation
from abliterate.progress import SILENT
from tests.resident import llama, random_prompts, resident

TOKENS = list(range(10, 60))
HARMFUL, HARMLESS = random_prompts(12), random_prompts(12, seed=4)


@pytest.fixture
def sheet() -> ScoreSheet:
    model = resident(llama(), 4)
    found = difference(*(mean_hidden(model, prompts, 2, 0, TOKENS) for prompts in (HARMFUL, HARMLESS)))
    grid = found.grid.clone()
    grid[0, 0] = 0.0
    return ScoreSheet(
        model, Directions(grid, found.harmful, found.harmless), Validation(HARMFUL[:5], HARMLESS[:5], TOKENS)
    )


class Kept:
    """Stages that keep what an earlier run has made."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}
        self.made: list[str] = []

    def stage(self, name: str, kind: Any, make: Any) -> Any:
        if name not in self.kept:
            self.made.append(name)
            self.kept[name] = encode(make())
        return decode(kind, self.kept[name])


def test_every_candidate_is_measured_on_the_first_prompts(sheet: ScoreSheet) -> None:
    grid = measure_grid(sheet, 3, SILENT)
    assert (-2, 0) not in usable_keys(sheet.directions) and len(usable_keys(sheet.directions)) == 5
    assert grid.bypass[0][0] is grid.induce[0][0] is grid.kl[0][0] is None and grid.prompts == 3
    for row, position in enumerate((-2, -1)):
        for layer in range(3):
            if (position, layer) == (-2, 0):
                continue
            steer = Steer(ablate=sheet.directions.unit(position, layer))
            alone = [next(iter(sheet.model.forward([p], [steer]))).logits[0] for p in HARMFUL[:3]]
            expected = sum(float(refusal_score(logits, TOKENS)) for logits in alone) / 3
            assert grid.bypass[row][layer] == pytest.approx(expected, abs=1e-4)
            assert grid.at(grid.bypass, (position, layer)) == grid.bypass[row][layer]
    harmful = torch.stack([next(iter(sheet.model.forward([p]))).logits[0] for p in HARMFUL[:3]])
    assert grid.base_harmful == pytest.approx(float(refusal_score(harmful, TOKENS).mean()), abs=1e-4)


def test_weights_in_memory_take_a_stage_a_position_and_streamed_ones_a_single_run(sheet: ScoreSheet) -> None:
    kept = Kept()
    first = measure_grid(sheet, 3, SILENT, kept)
    assert kept.made == ["grid at -2", "grid at -1"]
    again = dataclasses.replace(sheet, bypass={}, induce={}, kl={}, passes=0)
    assert measure_grid(again, 3, SILENT, kept) == first and len(kept.made) == 2

    class Streamed(Resident):
        streamed = True
        runs = 0

        def run(self, calls: Any, bar: Any) -> Any:
            Streamed.runs += 1
            return super().run(calls, bar)

    model = dataclasses.replace(sheet.model, runner=Streamed())
    streamed = ScoreSheet(model, sheet.directions, sheet.data)
    streamed.baseline()
    Streamed.runs = 0
    found = measure_grid(streamed, 3, SILENT, other := Kept())
    assert other.made == ["grid at all"] and Streamed.runs == 1
    for name in ("bypass", "induce", "kl"):
        for mine, theirs in zip(getattr(found, name), getattr(first, name), strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)
