"""Strengths and directions of an edit by degrees, found along their gradients.

One strength for the attention and one for the mlp writers of every layer, and a direction for each layer, are improved
against mean softplus(refusal score + margin) on harmful prompts plus a weight times mean KL(base || edited) on
harmless ones. Several weights in turn, each from where the one before it ended, give the whole front; where none of its
points has few enough refusals, the last weight is halved, and halved again. Every few steps the edit is measured on
validation prompts; only what was measured there can be picked.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from abliterate.calibration.dials import KINDS, Dials
from abliterate.calibration.model import LanguageModel
from abliterate.direction.descent import Moments, adam, rows_of, tangent
from abliterate.direction.opening import opening_of
from abliterate.direction.points import Point, SearchResult, SearchSettings, result_of
from abliterate.direction.pulls import Effect, Pull, Trial
from abliterate.direction.score import refusal_score
from abliterate.direction.scoring import Validation
from abliterate.direction.trials import try_curves
from abliterate.errors import SelectionError
from abliterate.evaluation.metrics import first_logits
from abliterate.progress import SILENT, Progress
from abliterate.stages import NO_STAGES, Once, Stages

log = logging.getLogger(__name__)

Plan = Sequence[tuple[float, int]]
"""Weights of KL, and how many steps to take with each before a point is measured."""

HALVED_AFTER = 16
"""Steps after which a step is half as large as the first: of one size they go round what they should come to."""


@dataclass(frozen=True)
class State:
    """Where a search has come to, with all that it goes on from.

    Attributes:
        step: steps so far. `weight`: of KL at the last of them.
        strengths: [layers, 2] fp32. `directions`: [layers, hidden] fp32.
        moments: of the gradients of strengths and of directions.
        effect: what was measured at the end of it, refusals by the first token alone.
        passes: prompts through the model so far.
    """

    step: int
    weight: float
    strengths: Tensor
    directions: Tensor
    moments: tuple[Moments, Moments]
    effect: Effect | None
    passes: int

    @property
    def dials(self) -> Dials:
        """The edit."""
        return Dials(self.strengths, self.directions)


@dataclass(frozen=True)
class Told:
    """What was measured at each state, refusals by phrase as well."""

    effects: tuple[Effect, ...]


def search(
    model: LanguageModel,
    directions: Tensor,
    train: Validation,
    validation: Validation,
    settings: SearchSettings,
    progress: Progress = SILENT,
    stages: Stages = NO_STAGES,
    others: tuple[int, ...] = (),
) -> SearchResult:
    """Improves strengths and directions, and measures them on the way.

    Args:
        directions: [layers, hidden] to start from: what writers of each layer give up, at the end of the stream.
        train: prompts that gradients are taken on; `validation`: those that points are measured on.
        others: tokens that refusals may fall back on, see `Trial`.
        stages: keeps every measured point, so that a search that was interrupted goes on.

    Raises:
        SelectionError: the directions or all scores are not finite; Optuna is not installed; or directions are to be
            improved where the skip path has gains.
    """
    _check(model, directions, settings)
    untouched = (
        Once(lambda: _untouched(model, train, progress, others)),
        Once(lambda: _untouched(model, validation, progress, new_tokens=settings.new_tokens)),
    )
    if settings.method == "optuna":
        units = _start(directions, settings).directions
        points = try_curves(untouched[1], units, settings, progress, stages)
        each = untouched[1]().prompts + untouched[1]().answered
        return result_of(points, settings.most_refused, len(points) * each + len(validation.harmless))
    points, passes = _found(untouched, _start(directions, settings), settings, progress, stages)
    answered = len(points) * (len(validation.harmful) if settings.new_tokens else 0)
    passes += answered + len(train.harmless) + len(validation.harmless)
    return result_of(points, settings.most_refused, passes)


def _found(
    untouched: tuple[Once[Trial], Once[Trial]],
    state: State,
    settings: SearchSettings,
    progress: Progress,
    stages: Stages,
) -> tuple[list[Point], int]:
    """All points that were measured, and how many prompts went through the model for them before they were answered."""
    points: list[Point] = []
    for number, plan in enumerate(_plans(settings), 1):
        if number > 1 and any(point.refusal <= settings.most_refused for point in points):
            break
        states = _descend(untouched, state, plan, settings, progress, stages)
        make = lambda states=states: _told(untouched[1](), states, progress)  # noqa: E731
        told = stages.stage(f"search: answers {number}", Told, make)
        points += [_point(state, effect) for state, effect in zip(states, told.effects, strict=True)]
        state = states[-1] if states else state
    return points, state.passes


def _told(validation: Trial, states: Sequence[State], progress: Progress) -> Told:
    """Answers come last, those of all points in one run: of streamed weights each token of them is a reading."""
    effects = [(state.dials, state.effect) for state in states if state.effect is not None]
    return Told(tuple(validation.with_answers(effects, progress)))


def _point(state: State, effect: Effect) -> Point:
    at = state.strengths, state.directions
    return Point(*at, effect.refusal, effect.bypass, effect.kl, state.step, state.weight)


def _descend(
    untouched: tuple[Once[Trial], Once[Trial]],
    state: State,
    plan: Plan,
    settings: SearchSettings,
    progress: Progress,
    stages: Stages,
) -> list[State]:
    """Every state that was measured."""
    states: list[State] = []
    for weight, steps in plan:
        name = f"search: steps {state.step + 1} to {state.step + steps}"
        make = lambda state=state, weight=weight, steps=steps: _advance(  # noqa: E731
            untouched, state, weight, steps, settings, progress
        )
        state = stages.stage(name, State, make)
        states.append(state)
    return states


def _check(model: LanguageModel, directions: Tensor, settings: SearchSettings) -> None:
    if directions.shape != (len(model.stream.layers), model.stream.hidden_size):
        raise ValueError(f"directions are {list(directions.shape)}, not one for each layer")
    if not bool(directions.isfinite().all()) or not bool((directions.norm(dim=-1) > 0).all()):
        raise SelectionError("a layer has no direction to start from (zero or not finite); try --dtype float32")
    if settings.method == "gradient" and settings.optimise_directions and model.stream.transport is not None:
        raise SelectionError(
            "the skip path of this model has gains, through which directions are not improved; set "
            "search.optimise_directions to false in the recipe"
        )


def _untouched(
    model: LanguageModel, data: Validation, progress: Progress, others: tuple[int, ...] = (), new_tokens: int = 0
) -> Trial:
    """Harmless prompts that the model refuses are left out: to hold them would be to hold false refusals."""
    opening = opening_of(model, data.harmless)
    base = first_logits(model, data.harmless, progress, "search: baseline", opening.logits)
    answered = (refusal_score(base, data.refusal_tokens) <= 0).nonzero().flatten().tolist()
    if not answered:
        raise SelectionError("the model refuses every harmless prompt: no KL can be held against its refusals")
    if len(answered) < len(base):
        log.info("%d of %d harmless prompts are refused, and left out", len(base) - len(answered), len(base))
    kept = replace(data, harmless=[data.harmless[i] for i in answered])
    return Trial(opening, kept, base[answered], others, new_tokens)


def _start(directions: Tensor, settings: SearchSettings) -> State:
    units = directions.float() / directions.float().norm(dim=-1, keepdim=True)
    strengths = torch.full((len(units), len(KINDS)), settings.start)
    moments = Moments.zero(strengths), Moments.zero(units)
    return State(0, settings.kl_weights[0], strengths, units, moments, None, 0)


def _plans(settings: SearchSettings) -> Iterator[Plan]:
    """What is done anyway; then, each where all before came to no point with few enough refusals, KL at less weight."""
    weights, every = settings.kl_weights, settings.measure_every
    steps = [settings.further_steps if number else settings.steps for number in range(len(weights))]
    yield [part for weight, count in zip(weights, steps, strict=True) for part in _parts(weight, count, every)]
    for number in range(1, settings.halvings + 1):
        yield list(_parts(weights[-1] / 2**number, 2 * every, every))


def _parts(weight: float, steps: int, every: int) -> Iterator[tuple[float, int]]:
    """A weight, and how many steps to take before the next point is measured."""
    for done in range(0, steps, every):
        yield weight, min(every, steps - done)


def _advance(
    untouched: tuple[Once[Trial], Once[Trial]],
    state: State,
    weight: float,
    steps: int,
    settings: SearchSettings,
    progress: Progress,
) -> State:
    """Some steps, and what they came to."""
    train, validation = untouched[0](), untouched[1]()
    for _ in progress.track(range(steps), f"search: KL weight {weight:g}", steps, "step"):
        sets = train.data.harmful, train.data.harmless
        rows = [rows_of(prompts, state.step, settings.prompts, settings.seed) for prompts in sets]
        pull = train.pull(state.dials, (rows[0], rows[1]), settings.margin, settings.optimise_directions)
        log.debug("step %d: losses %s", state.step, pull.losses)
        state = _moved(replace(state, weight=weight, passes=state.passes + 3 * sum(map(len, rows))), pull, settings)
    effect = validation.effect(state.dials, progress)
    log.info("step %d: %.3f refused by the first token at KL %.4f", state.step, effect.refusal, effect.kl)
    return replace(state, effect=effect, passes=state.passes + validation.prompts)


def _moved(state: State, pull: Pull, settings: SearchSettings) -> State:
    """One step down the slope: strengths within their bounds, directions along the sphere."""
    step, pace = state.step + 1, 1 / (1 + state.step / HALVED_AFTER)
    strengths, slope = state.strengths, pull.strengths[0] + state.weight * pull.strengths[1]
    moments, move = adam(state.moments[0], slope, slope.square(), step)
    strengths = (strengths - pace * settings.rate * move.float()).clamp(0, settings.max_strength)
    if pull.directions is None:
        return replace(state, step=step, strengths=strengths, moments=(moments, state.moments[1]))
    slope = tangent(pull.directions[0] + state.weight * pull.directions[1], state.directions)
    turning, turn = adam(state.moments[1], slope, slope.square().sum(-1, keepdim=True), step)
    turned = state.directions.double() - pace * settings.direction_rate * tangent(turn, state.directions)
    units = (turned / turned.norm(dim=-1, keepdim=True)).float()
    return replace(state, step=step, strengths=strengths, directions=units, moments=(moments, turning))
