"""What a search goes by and finds: settings, the points that it measured, the front among them, and the pick."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from abliterate.errors import SelectionError

Method = Literal["gradient", "optuna"]


@dataclass(frozen=True)
class SearchSettings:
    """How a search goes about it.

    Attributes:
        method: gradient, or optuna where gradients do not serve.
        steps: gradient steps at the first KL weight; at each further one, which starts where the one before it ended,
            there are `further_steps`.
        kl_weights: what a nat of KL counts beside the refusal loss, in turn.
        max_strength: of any writer; 1 takes all of its direction out.
        start: strength of every writer at the start.
        margin: nats below 0 to which refusal scores are still pushed.
        prompts: of each kind in a step; all of them, where there are fewer.
        rate: of strengths at the first step; `direction_rate`: of directions, in radians. Later steps are smaller.
        optimise_directions: improve the directions along with the strengths.
        measure_every: steps between two measured points.
        most_refused: share of refusals that the pick may have.
        halvings: how often the last weight is halved, as long as no point has few enough refusals.
        trials: of optuna.
        new_tokens: of the answers that a measured point is told refusals by.
    """

    method: Method = "gradient"
    steps: int = 4
    further_steps: int = 20
    kl_weights: tuple[float, ...] = (5.0, 20.0)
    max_strength: float = 1.5
    start: float = 0.2
    margin: float = 3.0
    prompts: int = 16
    rate: float = 0.1
    direction_rate: float = 0.05
    optimise_directions: bool = True
    measure_every: int = 4
    most_refused: float = 0.05
    halvings: int = 2
    trials: int = 24
    new_tokens: int = 32
    seed: int = 0


@dataclass(frozen=True)
class Point:
    """Strengths and directions, and what they do to validation prompts.

    Attributes:
        strengths: [layers, 2] fp32, of attention and of mlp writers.
        directions: [layers, hidden] fp32, unit: what the writers of each layer give up, at the end of the stream.
        refusal: share of harmful prompts that are refused: by phrase in the answer, by a score above 0, or because the
            likeliest token is one of the refusal tokens.
        bypass: mean refusal score on harmful prompts, in nats.
        kl: mean KL(base || edited) at the first token on harmless prompts that the base does not refuse, in nats.
        step: how many steps (or trials) it took.
        weight: of KL, with which it was found.
    """

    strengths: Tensor
    directions: Tensor
    refusal: float
    bypass: float
    kl: float
    step: int
    weight: float


@dataclass(frozen=True)
class SearchResult:
    """All points that were measured.

    Attributes:
        front: numbers of those that no other one betters in both refusals and KL, the lowest KL first.
        pick: number of the one to take; `reason`: why that one.
        passes: prompts that went through the model (a backward pass counts as two more).
    """

    points: tuple[Point, ...]
    front: tuple[int, ...]
    pick: int
    reason: str
    passes: int


def pareto(points: Sequence[Point]) -> tuple[int, ...]:
    """Numbers of the points that no other one betters in one of refusals and KL and equals in the other.

    Of equal ones it is the first; what is not finite is not on the front.

    Returns:
        Lowest KL first, and so most refusals first.
    """
    usable = [i for i, p in enumerate(points) if math.isfinite(p.kl) and math.isfinite(p.refusal)]
    front: list[int] = []
    for i in sorted(usable, key=lambda i: (points[i].kl, points[i].refusal, i)):
        if not front or points[i].refusal < points[front[-1]].refusal:
            front.append(i)
    return tuple(front)


def result_of(points: Sequence[Point], most_refused: float, passes: int) -> SearchResult:
    """The front, and the pick: of those with few enough refusals the lowest KL, else the fewest refusals.

    Raises:
        SelectionError: no point has finite scores.
    """
    front = pareto(points)
    if not front:
        raise SelectionError("the search found only scores that are not finite (NaN or infinity); try --dtype float32")
    bound = f"at most {100 * most_refused:g} % refusals"
    low_enough = [i for i in front if points[i].refusal <= most_refused]
    pick = low_enough[0] if low_enough else front[-1]
    chosen = f"{100 * points[pick].refusal:.1f} % at KL {points[pick].kl:.4f}"
    if low_enough:
        reason = f"lowest KL of the points with {bound} on validation prompts ({chosen})"
    else:
        reason = f"no point has {bound} on validation prompts; the fewest of all ({chosen})"
    return SearchResult(tuple(points), front, pick, reason, passes)
