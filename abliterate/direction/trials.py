"""Search without gradients: curves of strengths over the layers, tried and improved by Optuna.

For each kind of writer a curve falls from its height at one layer, in a straight line, to another value as far away as
it reaches, and is 0 beyond; the directions stay. It needs forward passes alone, so it also serves where a model has
no gradients, and it is how other tools of the field search (there with TPE, Bergstra et al. 2011).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from abliterate.calibration.dials import KINDS, Dials
from abliterate.direction.points import Point, SearchSettings
from abliterate.direction.pulls import Trial
from abliterate.errors import SelectionError
from abliterate.progress import Progress
from abliterate.stages import Once, Stages


@dataclass(frozen=True)
class Tried:
    """Parameters of the curves, and what was measured with them."""

    parameters: Mapping[str, float]
    point: Point


def curve(height: float, at: float, low: float, reach: float, layers: int) -> Tensor:
    """Strengths [layers]: `height` at a layer, `low` times that as far away as it reaches, a line between, 0 beyond."""
    away = (torch.arange(layers) - at).abs() / max(reach, 1e-9)
    return torch.where(away <= 1, height * (1 - (1 - low) * away), 0.0).float()


def bounds(layers: int, settings: SearchSettings) -> dict[str, tuple[float, float]]:
    """Of every parameter, lowest and highest."""
    of = {"height": (0.0, settings.max_strength), "at": (0.0, layers - 1.0), "low": (0.0, 1.0)}
    every = of | {"reach": (1.0, max(1.0, float(layers)))}
    return {f"{kind} {name}": pair for kind in KINDS for name, pair in every.items()}


def strengths_of(parameters: Mapping[str, float], layers: int) -> Tensor:
    """[layers, 2]."""

    def of(kind: str) -> Tensor:
        height, at, low, reach = (parameters[f"{kind} {name}"] for name in ("height", "at", "low", "reach"))
        return curve(height, at, low, reach, layers)

    return torch.stack([of(kind) for kind in KINDS], dim=1)


def try_curves(
    validation: Once[Trial], directions: Tensor, settings: SearchSettings, progress: Progress, stages: Stages
) -> list[Point]:
    """Measures one curve after another on validation prompts, each chosen by what those before it gave.

    Args:
        directions: [layers, hidden] unit vectors.

    Raises:
        SelectionError: Optuna is not installed.
    """
    optuna = _optuna()
    tried: list[Tried] = []
    for number in progress.track(range(settings.trials), "search: trials", settings.trials, "trial"):
        # optuna is asked only where the trial is made: what was kept needs no answer
        make = lambda number=number: _try(optuna, validation(), directions, tried, number, settings)  # noqa: E731
        tried.append(stages.stage(f"search: trial {number + 1}", Tried, make))
    return [one.point for one in tried]


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise SelectionError("search by trials needs optuna: pip install 'abliterate[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _try(
    optuna: Any, trial: Trial, directions: Tensor, before: Sequence[Tried], number: int, settings: SearchSettings
) -> Tried:
    parameters = _suggested(optuna, before, bounds(len(directions), settings), settings.seed + number)
    strengths = strengths_of(parameters, len(directions))
    dials = Dials(strengths, directions)
    effect = trial.with_answers([(dials, trial.effect(dials))])[0]
    point = Point(strengths, directions, effect.refusal, effect.bypass, effect.kl, number + 1, 0.0)
    return Tried(parameters, point)


def _suggested(
    optuna: Any, before: Sequence[Tried], limits: Mapping[str, tuple[float, float]], seed: int
) -> dict[str, float]:
    """What to try next: of a study made anew from what is known, so that an interrupted search goes on the same."""
    spaces = {name: optuna.distributions.FloatDistribution(*pair) for name, pair in limits.items()}
    study = optuna.create_study(directions=["minimize"] * 2, sampler=optuna.samplers.TPESampler(seed=seed))
    for one in before:
        values = [value if math.isfinite(value) else math.inf for value in (one.point.refusal, one.point.kl)]
        parameters = dict(one.parameters)
        study.add_trial(optuna.trial.create_trial(params=parameters, distributions=spaces, values=values))
    return {name: float(value) for name, value in study.ask(spaces).params.items()}
