"""The direction of false refusals: what lets refused look-alikes differ from harmless prompts, and no true refusal.

After Wang et al. 2024, "Surgical, Cheap, and Flexible: Mitigating False Refusal in Language Models via Single Vector
Ablation": the difference of means is made orthogonal to the refusal direction at the same place. What that leaves can
still touch true refusals, through other layers; so candidates are measured on harmful prompts as well.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from abliterate.calibration.hooks import Steer
from abliterate.calibration.model import LanguageModel, Tokens
from abliterate.direction.firstorder import first_order_bypass
from abliterate.direction.means import Directions
from abliterate.direction.score import kl_divergence, refusal_score
from abliterate.direction.screening import Selection
from abliterate.direction.selection import Candidate, Choice, Thresholds, layer_allowed
from abliterate.errors import SelectionError
from abliterate.progress import SILENT, Progress

Key = tuple[int, int]
METHOD = "sparing"
FINALISTS = 16
SPARED = 0.05
"""Of harmful validation prompts, how many fewer may be refused."""


@dataclass(frozen=True)
class Sets:
    """What candidates are measured on: token ids of validation prompts, and the refusal tokens."""

    look_alike: Sequence[Tokens]
    harmful: Sequence[Tokens]
    harmless: Sequence[Tokens]
    refusal_tokens: Sequence[int]

    @property
    def all(self) -> list[Tokens]:
        """Every prompt, in this order."""
        return [*self.look_alike, *self.harmful, *self.harmless]

    def parts(self, values: Tensor) -> list[Tensor]:
        """What belongs to each of the sets."""
        first, second = len(self.look_alike), len(self.look_alike) + len(self.harmful)
        return [values[:first], values[first:second], values[second:]]


@dataclass(frozen=True)
class Spared:
    """One candidate, measured.

    Attributes:
        refused: share of look-alikes still refused. `score`: their mean refusal score.
        kept: share of harmful prompts still refused. `harmful`: their mean refusal score.
        kl: mean KL on harmless prompts, in nats.
    """

    key: Key
    refused: float
    score: float
    kept: float
    harmful: float
    kl: float


def apart(directions: Directions, refusal: Directions) -> Directions:
    """Directions less what each has along the refusal direction at its place."""
    along = refusal.grid.double()
    unit = along / along.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    grid = directions.grid.double()
    return replace(directions, grid=(grid - (grid * unit).sum(-1, keepdim=True) * unit).float())


def choose_sparing(
    model: LanguageModel, directions: Directions, sets: Sets, thresholds: Thresholds, progress: Progress = SILENT
) -> Selection:
    """Of the candidates that leave refusals of harmful prompts, the one that takes most from those of look-alikes.

    In the candidates `bypass` is the mean refusal score on look-alikes, `induce` that on harmful prompts, both with the
    direction ablated; the status `induce` says that fewer harmful prompts are refused.

    Args:
        directions: orthogonal to the refusal directions, see `apart`.

    Raises:
        SelectionError: no look-alike is refused, or no candidate leaves the refusals of harmful prompts.
    """
    positions, layers = directions.grid.shape[:2]
    grid = [(p, layer) for p in range(-positions, 0) for layer in range(layers)]
    eligible = [key for key in grid if layer_allowed(key[1], layers, thresholds)]
    base = _logits(model, sets.all, [], progress)
    scores = [refusal_score(part, sets.refusal_tokens) for part in sets.parts(base)]
    if not bool((scores[0] > 0).any()):
        raise SelectionError("the model refuses none of the look-alikes: there is no false refusal to take out")
    finalists = _screen(model, directions, sets, eligible, progress)
    measured = _measure(model, directions, sets, base, finalists, progress)
    before, each = _share(scores[1]), len(sets.all)
    choice = _choose(grid, measured, before, _share(scores[0]), thresholds, each)
    passes = each * (1 + len(finalists)) + 3 * (len(sets.look_alike) + len(sets.harmful))
    means = (float(scores[0].mean()), float(scores[1].mean()))
    return Selection(choice, METHOD, passes, each * len(eligible), *means)


def _screen(
    model: LanguageModel, directions: Directions, sets: Sets, keys: Sequence[Key], progress: Progress
) -> list[Key]:
    """Those that to first order take most from look-alikes beyond what they take from harmful prompts."""
    if len(keys) <= FINALISTS:
        return list(keys)
    units = torch.stack([directions.unit(*key) for key in keys])
    look_alike, harmful = (
        first_order_bypass(model, prompts, sets.refusal_tokens, units, progress)
        for prompts in (sets.look_alike, sets.harmful)
    )
    gain = torch.nan_to_num(harmful - look_alike, nan=-math.inf)
    return [keys[i] for i in gain.argsort(descending=True, stable=True)[:FINALISTS].tolist()]


def _measure(
    model: LanguageModel, directions: Directions, sets: Sets, base: Tensor, keys: Sequence[Key], progress: Progress
) -> list[Spared]:
    """All finalists in one run."""
    prompts, count = sets.all, len(sets.all)
    steers = [Steer(ablate=directions.unit(*key)) for key in keys for _ in range(count)]
    logits = _logits(model, prompts * len(keys), steers, progress)
    return [_spared(key, logits[i * count : (i + 1) * count], base, sets) for i, key in enumerate(keys)]


def _spared(key: Key, logits: Tensor, base: Tensor, sets: Sets) -> Spared:
    look_alike, harmful, harmless = sets.parts(logits)
    score = refusal_score(look_alike, sets.refusal_tokens)
    kept = refusal_score(harmful, sets.refusal_tokens)
    divergence = kl_divergence(sets.parts(base)[2], harmless)
    return Spared(key, _share(score), float(score.mean()), _share(kept), float(kept.mean()), float(divergence.mean()))


def _logits(model: LanguageModel, prompts: Sequence[Tokens], steers: Sequence[Steer], progress: Progress) -> Tensor:
    found: dict[int, Tensor] = {}
    for batch in model.forward(prompts, steers or None, progress=progress, description="false refusals"):
        found.update(zip(batch.rows, batch.logits.cpu(), strict=True))
    return torch.stack([found[i] for i in range(len(prompts))])


def _share(scores: Tensor) -> float:
    return float((scores > 0).double().mean())


def _choose(
    grid: Sequence[Key],
    measured: Sequence[Spared],
    harmful: float,
    look_alike: float,
    thresholds: Thresholds,
    prompts: int,
) -> Choice:
    sparing = [one for one in measured if harmful - one.kept <= SPARED and one.refused < look_alike]
    near = [one for one in sparing if one.kl <= thresholds.max_kl]
    if not sparing or (thresholds.strict and not near):
        raise SelectionError(_nothing_spares(measured, harmful, look_alike, thresholds))
    pick = min(near or sparing, key=lambda one: (one.refused, one.score, one.key))
    reason = (
        f"refusals of look-alikes go from {look_alike:.0%} to {pick.refused:.0%} and those of harmful prompts from "
        f"{harmful:.0%} to {pick.kept:.0%}: the fewest of look-alikes among {len(near or sparing)} candidates that "
        f"leave the others within {100 * SPARED:.0f} points"
    )
    found = {one.key: _candidate(one, one is pick, harmful, thresholds, prompts) for one in measured}
    candidates = tuple(found.get(key, Candidate(*key)) for key in grid)
    return Choice(found[pick.key], candidates, not near, reason)


def _candidate(one: Spared, picked: bool, harmful: float, thresholds: Thresholds, prompts: int) -> Candidate:
    status = "picked" if picked else "passed"
    if not picked and harmful - one.kept > SPARED:
        status = "induce"
    elif not picked and one.kl > thresholds.max_kl:
        status = "kl"
    return Candidate(*one.key, one.score, one.harmful, one.kl, prompts, status)


def _nothing_spares(measured: Sequence[Spared], harmful: float, look_alike: float, thresholds: Thresholds) -> str:
    nearest = sorted(measured, key=lambda one: (max(0.0, harmful - one.kept - SPARED), one.refused))[:3]
    listed = "; ".join(f"{one.key} {one.refused:.0%} and {one.kept:.0%}, KL {one.kl:.3f}" for one in nearest)
    return (
        f"no direction takes refusals of look-alikes ({look_alike:.0%}) and leaves those of harmful prompts "
        f"({harmful:.0%}, at most {100 * SPARED:.0f} points less; KL <= {thresholds.max_kl:g} where strict); nearest: "
        f"{listed}"
    )
