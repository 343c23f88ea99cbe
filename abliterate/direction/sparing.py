"""The direction of false refusals: what lets refused look-alikes differ from harmless prompts, and no true refusal.

After Wang et al. 2024, "Surgical, Cheap, and Flexible: Mitigating False Refusal in Language Models via Single Vector
Ablation": the difference of means is made orthogonal to the refusal direction at the same place. What that leaves can
still touch true refusals, through other layers; so candidates are measured on harmful prompts, too. Beyond the paper,
the best of them is improved along its gradient (see `refining`), with what harmful prompts are answered held.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from abliterate.calibration.hooks import Steer
from abliterate.calibration.model import LanguageModel, Tokens
from abliterate.direction.means import Directions
from abliterate.direction.refining import Aim, refined
from abliterate.direction.refining import passes as steps_cost
from abliterate.direction.score import kl_divergence, refusal_score
from abliterate.direction.screening import Selection
from abliterate.direction.selection import Candidate, Choice, Thresholds, layer_allowed
from abliterate.errors import SelectionError
from abliterate.progress import SILENT, Progress

log = logging.getLogger(__name__)
Key = tuple[int, int]
METHOD = "sparing"
SCREENED, FINALISTS = 4, 8
"""Prompts of both kinds that all candidates are measured on, and how many of these go on to all prompts."""
SPARED = 0.05
"""Of harmful validation prompts, how many fewer may be refused."""
ENOUGH = 0.5
"""Share of the refusals of look-alikes; what leaves more goes behind what costs more KL than allowed."""
MEASURED_EVERY = 2
"""Steps of refining between two directions that are measured."""


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
        kl: mean KL on harmless prompts that the untouched model does not refuse, in nats.
        step: of refining, from the candidate on; 0 is the candidate itself.
    """

    key: Key
    refused: float
    score: float
    kept: float
    harmful: float
    kl: float
    step: int = 0


@dataclass(frozen=True)
class Before:
    """Shares of the untouched model's refusals."""

    look_alike: float
    harmful: float

    def spares(self, one: Spared) -> bool:
        """Whether refusals of harmful prompts stay."""
        return self.harmful - one.kept <= SPARED

    def nearest(self, measured: Sequence[Spared]) -> list[Spared]:
        """Those first that leave few refusals of look-alikes, where a true refusal too many that goes counts double."""

        def miss(one: Spared) -> tuple[float, float]:
            return one.refused + 2 * max(0.0, self.harmful - one.kept - SPARED), one.score

        return sorted(measured, key=miss)


@dataclass(frozen=True)
class Refining:
    """How the best candidate is improved: train prompts, and the number of steps."""

    train: Sets
    steps: int

    @property
    def aim(self) -> Aim:
        """Look-alikes are to be answered, all else is to stay."""
        return Aim(self.train.look_alike, self.train.harmful, self.train.harmless, self.train.refusal_tokens)


def apart(directions: Directions, refusal: Directions) -> Directions:
    """Directions less what each has along the refusal direction at its place."""
    along = refusal.grid.double()
    unit = along / along.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    grid = directions.grid.double()
    return replace(directions, grid=(grid - (grid * unit).sum(-1, keepdim=True) * unit).float())


def choose_sparing(
    model: LanguageModel,
    directions: Directions,
    sets: Sets,
    thresholds: Thresholds,
    progress: Progress = SILENT,
    refining: Refining | None = None,
) -> Selection:
    """Of the directions that leave refusals of harmful prompts, the one that takes most from those of look-alikes.

    In the candidates `bypass` is the mean refusal score on look-alikes, `induce` that on harmful prompts, both with the
    direction ablated; the status `induce` says that fewer harmful prompts are refused.

    Args:
        directions: orthogonal to the refusal directions, see `apart`.
        refining: also improves the nearest candidate; where that is picked, it is in `Selection.refined`, and the
            candidate that it came from has its figures.

    Raises:
        SelectionError: no look-alike is refused, or no direction leaves the refusals of harmful prompts.
    """
    positions, layers = directions.grid.shape[:2]
    grid = [(p, layer) for p in range(-positions, 0) for layer in range(layers)]
    eligible = [key for key in grid if layer_allowed(key[1], layers, thresholds)]
    base = _logits(model, sets.all, [], progress)
    scores = [refusal_score(part, sets.refusal_tokens) for part in sets.parts(base)]
    if not bool((scores[0] > 0).any()):
        raise SelectionError("the model refuses none of the look-alikes: there is no false refusal to take out")
    before = Before(_share(scores[0]), _share(scores[1]))
    finalists = _screen(model, directions, sets, base, eligible, progress)
    measured = _measure(model, [directions.unit(*key) for key in finalists], sets, base, finalists, progress)
    units = _refine(model, directions, measured, before, refining, progress)
    start = before.nearest(measured)[0].key
    better = _measure(model, list(units.values()), sets, base, [start] * len(units), progress)
    measured += [replace(one, step=step) for one, step in zip(better, units, strict=True)]
    each = len(sets.all)
    pick, choice = _choose(grid, measured, before, thresholds, each)
    passes = each * (1 + len(measured)) + 2 * SCREENED * len(eligible)
    passes += steps_cost(refining.aim, refining.steps) if refining and units else 0
    means = (float(scores[0].mean()), float(scores[1].mean()))
    return Selection(choice, METHOD, passes, each * len(eligible), *means, units.get(pick.step))


def _refine(
    model: LanguageModel,
    directions: Directions,
    measured: Sequence[Spared],
    before: Before,
    refining: Refining | None,
    progress: Progress,
) -> dict[int, Tensor]:
    """Directions improved from the nearest candidate, by the number of steps."""
    if refining is None:
        return {}
    if model.stream.transport is not None:
        log.warning("the skip path of this model has gains, through which directions are not refined")
        return {}
    start = directions.unit(*before.nearest(measured)[0].key)
    found = refined(model, start, refining.aim, refining.steps, progress=progress)
    steps = sorted({*range(MEASURED_EVERY, refining.steps + 1, MEASURED_EVERY), refining.steps})
    return {step: found[step - 1] for step in steps}


def _screen(
    model: LanguageModel, directions: Directions, sets: Sets, base: Tensor, keys: Sequence[Key], progress: Progress
) -> list[Key]:
    """Those that a few refused prompts tell most for: scores left on look-alikes, and lost on harmful prompts.

    First-order estimates do not serve here: they are largest where an ablation breaks the model.
    """
    if len(keys) <= FINALISTS:
        return list(keys)
    before = [refusal_score(part, sets.refusal_tokens) for part in sets.parts(base)[:2]]
    few = [(part > 0).nonzero().flatten()[:SCREENED].tolist() for part in before]
    prompts = [sets.look_alike[i] for i in few[0]] + [sets.harmful[i] for i in few[1]]
    steers = [Steer(ablate=directions.unit(*key)) for key in keys for _ in prompts]
    scores = refusal_score(_logits(model, prompts * len(keys), steers, progress), sets.refusal_tokens)
    left = scores.clamp_min(0).reshape(len(keys), -1)
    look_alike, harmful = left[:, : len(few[0])], left[:, len(few[0]) :]
    cost = look_alike.mean(1)
    if few[1]:
        cost = cost + (before[1][few[1]] - harmful).clamp_min(0).mean(1)
    order = cost.nan_to_num(math.inf).argsort(stable=True)
    return [keys[i] for i in order[:FINALISTS].tolist()]


def _measure(
    model: LanguageModel, units: Sequence[Tensor], sets: Sets, base: Tensor, keys: Sequence[Key], progress: Progress
) -> list[Spared]:
    """All of some directions in one run. `keys`: which candidates they come from."""
    if not keys:
        return []
    prompts, count = sets.all, len(sets.all)
    steers = [Steer(ablate=unit) for unit in units for _ in range(count)]
    logits = _logits(model, prompts * len(keys), steers, progress)
    return [_spared(key, logits[i * count : (i + 1) * count], base, sets) for i, key in enumerate(keys)]


def _spared(key: Key, logits: Tensor, base: Tensor, sets: Sets) -> Spared:
    look_alike, harmful, harmless = sets.parts(logits)
    score = refusal_score(look_alike, sets.refusal_tokens)
    kept = refusal_score(harmful, sets.refusal_tokens)
    before = sets.parts(base)[2]
    answered = refusal_score(before, sets.refusal_tokens) <= 0
    divergence = kl_divergence(before, harmless)[answered if bool(answered.any()) else slice(None)]
    return Spared(key, _share(score), float(score.mean()), _share(kept), float(kept.mean()), float(divergence.mean()))


def _logits(model: LanguageModel, prompts: Sequence[Tokens], steers: Sequence[Steer], progress: Progress) -> Tensor:
    found: dict[int, Tensor] = {}
    for batch in model.forward(prompts, steers or None, progress=progress, description="false refusals"):
        found.update(zip(batch.rows, batch.logits.cpu(), strict=True))
    return torch.stack([found[i] for i in range(len(prompts))])


def _share(scores: Tensor) -> float:
    return float((scores > 0).double().mean())


def _choose(
    grid: Sequence[Key], measured: Sequence[Spared], before: Before, thresholds: Thresholds, prompts: int
) -> tuple[Spared, Choice]:
    """The pick, and all candidates. What halves the refusals of look-alikes goes first, then what keeps to the KL."""
    sparing = [one for one in measured if before.spares(one) and one.refused < before.look_alike]
    near = [one for one in sparing if one.kl <= thresholds.max_kl]
    if not sparing or (thresholds.strict and not near):
        raise SelectionError(_nothing_spares(measured, before, thresholds))
    within = near if thresholds.strict else sparing
    halving = [one for one in within if one.refused <= ENOUGH * before.look_alike]
    among = [one for one in halving if one in near] or halving or near or sparing
    pick = min(among, key=lambda one: (one.refused, one.score, one.key, one.step))
    steps = f", after {pick.step} steps of refining" if pick.step else ""
    several = f"the fewest of look-alikes among {len(among)} directions that leave"
    why = several if len(among) > 1 else "the only direction that takes so many and leaves"
    reason = (
        f"refusals of look-alikes go from {before.look_alike:.0%} to {pick.refused:.0%} and those of harmful prompts "
        f"from {before.harmful:.0%} to {pick.kept:.0%}{steps}: {why} the others within "
        f"{100 * SPARED:.0f} points"
    )
    found = {one.key: _candidate(one, False, before, thresholds, prompts) for one in measured if not one.step}
    found[pick.key] = _candidate(pick, True, before, thresholds, prompts)
    candidates = tuple(found.get(key, Candidate(*key)) for key in grid)
    return pick, Choice(found[pick.key], candidates, pick not in near, reason)


def _candidate(one: Spared, picked: bool, before: Before, thresholds: Thresholds, prompts: int) -> Candidate:
    status = "picked" if picked else "passed"
    if not picked and not before.spares(one):
        status = "induce"
    elif not picked and one.kl > thresholds.max_kl:
        status = "kl"
    return Candidate(*one.key, one.score, one.harmful, one.kl, prompts, status)


def _nothing_spares(measured: Sequence[Spared], before: Before, thresholds: Thresholds) -> str:
    nearest = before.nearest(measured)[:3]
    listed = "; ".join(f"{one.key} {one.refused:.0%} and {one.kept:.0%}, KL {one.kl:.3f}" for one in nearest)
    return (
        f"no direction takes refusals of look-alikes ({before.look_alike:.0%}) and leaves those of harmful prompts "
        f"({before.harmful:.0%}, at most {100 * SPARED:.0f} points less; KL <= {thresholds.max_kl:g} where strict); "
        f"nearest: {listed}"
    )
