"""One direction turned down its gradient, so that refusals of some prompts go and what others are answered stays.

A difference of means tells two sets of prompts apart where it is read, which is not quite what later layers make
refusals of: along it lies much that both sets share with others. Its ablation everywhere is therefore improved on train
prompts against mean softplus(refusal score + margin) on those to be answered, plus a weight times mean KL(base ||
ablated) at the first token on those that are to stay, by steps on the sphere of unit directions. Each entry has a rate
of its own (Adam): a few entries of the stream are far larger than all others, and would else be all that moves.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from abliterate.calibration.lockstep import Call
from abliterate.calibration.model import LanguageModel, Tokens
from abliterate.direction.descent import Moments, adam, gradients, rows_of, shares, tangent
from abliterate.direction.opening import Opening, opening_of
from abliterate.direction.score import kl_divergence, refusal_score
from abliterate.evaluation.metrics import first_logits
from abliterate.progress import SILENT, Progress


@dataclass(frozen=True)
class Aim:
    """What a direction is improved for.

    Attributes:
        answered: token ids of prompts whose refusals are to go.
        harmful: of prompts that are to be refused, or answered, as they are.
        harmless: of prompts that are to be answered as they are; those that the model refuses are left out, since that
            is a false refusal too.
        refusal_tokens: what refusals start with.
    """

    answered: Sequence[Tokens]
    harmful: Sequence[Tokens]
    harmless: Sequence[Tokens]
    refusal_tokens: Sequence[int]


@dataclass(frozen=True)
class Descent:
    """How the direction is improved.

    Attributes:
        prompts: to be answered, in each step; half as many again stay.
        rate: radians of the first step, about; it falls to 0 along a cosine.
        margin: nats below 0 to which refusal scores are still pushed.
        kl_weight: what a nat of KL counts beside a nat of refusal score.
    """

    prompts: int = 16
    rate: float = 0.25
    margin: float = 2.0
    kl_weight: float = 5.0
    seed: int = 0


def refined(
    model: LanguageModel,
    start: Tensor,
    aim: Aim,
    steps: int,
    descent: Descent = Descent(),
    progress: Progress = SILENT,
) -> list[Tensor]:
    """The direction after each step.

    Args:
        start: unit direction [hidden], the same all along the stream: the skip path may have no gains.
    """
    kept = _kept(model, aim, progress)
    r = _unit(start.double())
    moments = Moments.zero(r)
    found: list[Tensor] = []
    for step in progress.track(range(steps), "refining", steps, "step"):
        counts = ((aim.answered, descent.prompts), (kept.prompts, 3 * descent.prompts // 2))
        rows = [rows_of(prompts, step, count, descent.seed) for prompts, count in counts]
        slope = tangent(_slope(model, r.float(), _losses(aim, kept, rows, descent)), r)
        moments, move = adam(moments, slope, slope.square(), step + 1)
        rate = descent.rate * (1 + math.cos(math.pi * step / steps)) / 2 / math.sqrt(len(r))
        r = _unit(r - rate * tangent(move, r))
        found.append(r.float())
    return found


@dataclass(frozen=True)
class _Kept:
    """Prompts whose answers stay, the untouched model's logits [prompts, vocabulary], and how prompts are run."""

    prompts: Sequence[Tokens]
    logits: Tensor
    opening: Opening


def _kept(model: LanguageModel, aim: Aim, progress: Progress) -> _Kept:
    prompts = [*aim.harmful, *aim.harmless]
    opening = opening_of(model, prompts)
    logits = first_logits(model, prompts, progress, "refining: baseline", opening.logits)
    refused = (refusal_score(logits, aim.refusal_tokens) > 0).tolist()
    rows = [i for i in range(len(prompts)) if i < len(aim.harmful) or not refused[i]]
    return _Kept([prompts[i] for i in rows], logits[rows], opening)


def passes(aim: Aim, steps: int, descent: Descent = Descent()) -> int:
    """Prompts that go through the model for so many steps; a backward pass counts as two more."""
    kept = len(aim.harmful) + len(aim.harmless)
    each = min(descent.prompts, len(aim.answered)) + min(3 * descent.prompts // 2, kept)
    return kept + 3 * each * steps if steps else 0


def _losses(aim: Aim, kept: _Kept, rows: Sequence[list[int]], descent: Descent) -> list[Call[Tensor]]:
    """Shares of the loss on prompts of each kind, batch by batch."""

    def refusal(_: Sequence[int], logits: Tensor) -> Tensor:
        return softplus(refusal_score(logits, aim.refusal_tokens) + descent.margin)

    def divergence(numbers: Sequence[int], logits: Tensor) -> Tensor:
        return descent.kl_weight * kl_divergence(kept.logits[list(numbers)].to(logits.device), logits)

    shared = kept.opening
    return [*shares(shared, aim.answered, rows[0], refusal), *shares(shared, kept.prompts, rows[1], divergence)]


def _slope(model: LanguageModel, r: Tensor, calls: Sequence[Call[Tensor]]) -> Tensor:
    """Gradient [hidden] fp64 of the calls' sum: with o an output of a writer and g the gradient at what goes on of it,
    it is -((r . o) g + (g . r) o), summed over tokens and writers.
    """
    total = torch.zeros(len(calls), len(r), dtype=torch.float64)

    def change(_writer: int, output: Tensor) -> Tensor:
        unit = r.to(output.device, output.dtype)
        return output - (output @ unit)[..., None] * unit

    def seen(call: int, _writer: int, output: Tensor, gradient: Tensor) -> None:
        output, gradient, unit = output.float().flatten(0, -2), gradient.float().flatten(0, -2), r.to(output.device)
        total[call] -= ((output @ unit) @ gradient + (gradient @ unit) @ output).cpu().double()

    gradients(model, calls, seen, change)
    return total.sum(0)


def _unit(vector: Tensor) -> Tensor:
    unit: Tensor = vector / vector.norm()
    return unit
