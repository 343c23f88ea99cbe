"""Selection at a fraction of the forward passes: a first-order screen, then successive halving on growing subsets.

The survivors are measured on every validation prompt and judged by the exact rule, so the screen can only lose the
exhaustive pick by dropping it early; each round keeps the best by the strict rule and the best by the relaxed one.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abliterate.direction.firstorder import first_order_bypass
from abliterate.direction.scoring import Key, Scores, ScoreSheet
from abliterate.direction.selection import Candidate, Choice, Thresholds, layer_allowed, select
from abliterate.progress import SILENT, Progress
from abliterate.stages import NO_STAGES, Stages

log = logging.getLogger(__name__)
# (share of the validation prompts, share of the eligible candidates that goes into the round)
ROUNDS = ((1 / 8, 0.5), (1 / 4, 0.2), (1 / 2, 0.1))
FINALISTS = 6


@dataclass(frozen=True)
class Selection:
    """A choice with what it cost.

    Attributes:
        method: "screened" or "exhaustive".
        passes: prompts that went through the model; `exhaustive_passes`: how many the exhaustive search takes.
        baseline_harmful, baseline_harmless: the untouched model's mean refusal scores on validation.
        refined: unit direction [hidden] that took the pick's place, see `refining`; None where the pick itself is it.
    """

    choice: Choice
    method: str
    passes: int
    exhaustive_passes: int
    baseline_harmful: float
    baseline_harmless: float
    refined: Tensor | None = None


def choose_direction(
    sheet: ScoreSheet,
    thresholds: Thresholds,
    exhaustive: bool = False,
    progress: Progress = SILENT,
    stages: Stages = NO_STAGES,
) -> Selection:
    """Measures the candidates and applies the rule.

    Args:
        stages: keeps every round that was measured.

    Raises:
        SelectionError: nothing passes and nothing may be relaxed.
    """
    positions, layers = sheet.directions.grid.shape[:2]
    grid = [(p, layer) for p in range(-positions, 0) for layer in range(layers)]
    eligible = [key for key in grid if layer_allowed(key[1], layers, thresholds)]
    each = len(sheet.data.harmful) + 2 * len(sheet.data.harmless)
    finalists = eligible if exhaustive else _screen(sheet, eligible, thresholds, progress, stages)
    _measure(sheet, finalists, _most(sheet), progress, stages, "finalists")
    complete = set(finalists)
    choice = select(
        [sheet.candidate(key) if key in complete else _unfinished(sheet.candidate(key)) for key in grid],
        layers,
        thresholds,
    )
    return Selection(
        choice, "exhaustive" if exhaustive else "screened", sheet.passes, each * len(eligible), *sheet.baseline_scores()
    )


def _most(sheet: ScoreSheet) -> int:
    """Validation prompts of the larger set."""
    return max(len(sheet.data.harmful), len(sheet.data.harmless))


def _measure(sheet: ScoreSheet, keys: Sequence[Key], count: int, progress: Progress, stages: Stages, name: str) -> None:
    """All three scores on the first `count` prompts of each set; `name` is that of the round."""

    def measured() -> Scores:
        sheet.measure(keys, count, progress)
        return sheet.scores()

    sheet.restore(stages.stage(f"scores of {name}", Scores, measured))


def _unfinished(candidate: Candidate) -> Candidate:
    """Means over a subset may not be judged beside means over all: without the induce score nothing passes."""
    return Candidate(candidate.position, candidate.layer, candidate.bypass, None, candidate.kl, candidate.prompts)


def _screen(
    sheet: ScoreSheet, keys: Sequence[Key], thresholds: Thresholds, progress: Progress, stages: Stages
) -> list[Key]:
    """The finalists."""
    if len(keys) <= FINALISTS:
        return list(keys)
    units = torch.stack([sheet.directions.unit(*key) for key in keys])
    estimate = stages.stage(
        "first-order screen",
        torch.Tensor,
        lambda: first_order_bypass(sheet.model, sheet.data.harmful, sheet.data.refusal_tokens, units, progress),
    )
    sheet.passes += 3 * len(sheet.data.harmful)
    ranked = [keys[i] for i in estimate.nan_to_num(math.inf).argsort().tolist()]
    for number, (prompts, share) in enumerate(ROUNDS, 1):
        count = math.ceil(prompts * _most(sheet))
        kept = ranked[: max(FINALISTS, math.ceil(share * len(keys)))]
        _measure(sheet, kept, count, progress, stages, f"round {number}")
        ranked = _rank([sheet.candidate(key) for key in kept], thresholds)
        log.info("%d candidates on %d prompts, best %s", len(kept), count, ranked[0])
    return ranked[:FINALISTS]


def _rank(candidates: Sequence[Candidate], thresholds: Thresholds) -> list[Key]:
    """Best first, taking turns between the strict rule and the relaxed one (which fills in where nothing passes)."""

    def strict(c: Candidate) -> tuple[bool, float]:
        return (_kl(c) > thresholds.max_kl or not induces(c), _bypass(c))

    def relaxed(c: Candidate) -> tuple[bool, float]:
        return (_bypass(c) >= 0 or not induces(c), _kl(c))

    def induces(c: Candidate) -> bool:
        return c.induce is not None and c.induce >= thresholds.min_induce

    by_rule = [sorted(candidates, key=rule) for rule in (strict, relaxed)]
    turns = [c for pair in zip(*by_rule, strict=True) for c in pair]
    return list(dict.fromkeys((c.position, c.layer) for c in turns))


def _bypass(candidate: Candidate) -> float:
    return math.inf if candidate.bypass is None or math.isnan(candidate.bypass) else candidate.bypass


def _kl(candidate: Candidate) -> float:
    return math.inf if candidate.kl is None or math.isnan(candidate.kl) else candidate.kl
