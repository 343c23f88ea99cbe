"""One direction turned down its gradient, so that refusals of some prompts go and what others are answered stays.

A difference of means tells two sets of prompts apart where it is read, which is not quite what later layers make
refusals of: along it lies much that both sets share with others. Its ablation everywhere is therefore improved on train
prompts against mean softplus(refusal score + margin) on those to be answered, plus a weight times mean KL(base ||
ablated) at the first token on those that are to stay, by steps on the sphere of unit directions. Each entry has a rate
of its own (Adam): a few entries of the stream are far larger than all others, and would else be all that moves.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import softplus

from abliterate.calibration.backward import gradients_at
from abliterate.calibration.lockstep import Call
from abliterate.calibration.model import LanguageModel, Tokens
from abliterate.calibration.spool import frugal
from abliterate.direction.score import kl_divergence, refusal_score
from abliterate.evaluation.metrics import first_logits
from abliterate.progress import SILENT, Progress

_FIRST, _SECOND, _LEAST = 0.8, 0.95, 1e-12
"""Of Adam (Kingma & Ba 2015): shares of the old moments that stay, and what keeps their quotient finite."""


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
    moment, square = torch.zeros_like(r), torch.zeros_like(r)
    found: list[Tensor] = []
    for step in progress.track(range(1, steps + 1), "refining", steps, "step"):
        counts = ((aim.answered, descent.prompts), (kept.prompts, 3 * descent.prompts // 2))
        rows = tuple(_rows(prompts, step, count, descent.seed) for prompts, count in counts)
        slope = _across(_slope(model, r.float(), _losses(model, aim, kept, rows, descent)), r)
        moment = _FIRST * moment + (1 - _FIRST) * slope
        square = _SECOND * square + (1 - _SECOND) * slope.square()
        sizes = (square / (1 - _SECOND**step)).sqrt() + _LEAST
        rate = descent.rate * (1 + math.cos(math.pi * (step - 1) / steps)) / 2 / math.sqrt(len(r))
        r = _unit(r - rate * _across(moment / (1 - _FIRST**step) / sizes, r))
        found.append(r.float())
    return found


@dataclass(frozen=True)
class _Kept:
    """Prompts whose answers stay, and the untouched model's logits [prompts, vocabulary]."""

    prompts: Sequence[Tokens]
    logits: Tensor


def _kept(model: LanguageModel, aim: Aim, progress: Progress) -> _Kept:
    prompts = [*aim.harmful, *aim.harmless]
    logits = first_logits(model, prompts, progress, "refining: baseline")
    refused = (refusal_score(logits, aim.refusal_tokens) > 0).tolist()
    rows = [i for i in range(len(prompts)) if i < len(aim.harmful) or not refused[i]]
    return _Kept([prompts[i] for i in rows], logits[rows])


def passes(aim: Aim, steps: int, descent: Descent = Descent()) -> int:
    """Prompts that go through the model for so many steps; a backward pass counts as two more."""
    kept = len(aim.harmful) + len(aim.harmless)
    each = min(descent.prompts, len(aim.answered)) + min(3 * descent.prompts // 2, kept)
    return kept + 3 * each * steps if steps else 0


def _losses(
    model: LanguageModel, aim: Aim, kept: _Kept, rows: Sequence[list[int]], descent: Descent
) -> list[Call[Tensor]]:
    """Shares of the loss on prompts of each kind, batch by batch."""

    def refusal(_numbers: list[int], logits: Tensor) -> Tensor:
        return softplus(refusal_score(logits, aim.refusal_tokens) + descent.margin)

    def divergence(numbers: list[int], logits: Tensor) -> Tensor:
        return descent.kl_weight * kl_divergence(kept.logits[numbers].to(logits.device), logits)

    calls: list[Call[Tensor]] = []
    for prompts, chosen, loss in zip((aim.answered, kept.prompts), rows, (refusal, divergence), strict=True):
        for places in model.batches([prompts[i] for i in chosen]):
            numbers = [chosen[i] for i in places]
            calls.append(partial(_share, model, loss, numbers, [prompts[i] for i in numbers], len(chosen)))
    return calls


def _share(
    model: LanguageModel,
    loss: Callable[[list[int], Tensor], Tensor],
    numbers: list[int],
    prompts: Sequence[Tokens],
    count: int,
) -> Tensor:
    return loss(numbers, model.logits(prompts)).sum() / count


def _slope(model: LanguageModel, r: Tensor, calls: Sequence[Call[Tensor]]) -> Tensor:
    """Gradient [hidden] fp64 of the calls' sum: with o an output of a writer and g the gradient at what goes on of it,
    it is -((r . o) g + (g . r) o), summed over tokens and writers.
    """
    streamed, total = model.runner.streamed, torch.zeros(len(calls), len(r), dtype=torch.float64)

    def change(_number: int, output: Tensor) -> Tensor:
        unit = r.to(output.device, output.dtype)
        return output - (output @ unit)[..., None] * unit

    def seen(numbers: Sequence[int], call: int, _writer: int, output: Tensor, gradient: Tensor) -> None:
        output, gradient, unit = output.float().flatten(0, -2), gradient.float().flatten(0, -2), r.to(output.device)
        total[numbers[call]] -= ((output @ unit) @ gradient + (gradient @ unit) @ output).cpu().double()

    everything = list(range(len(calls)))
    # Streamed weights are read once for all; in memory, the graph of one batch at a time is enough.
    for numbers in [everything] if streamed else [[number] for number in everything]:
        with frugal() if streamed else nullcontext():
            gradients_at(
                model.runner.weights(model.stream.layers),
                model.stream.writers,
                [calls[number] for number in numbers],
                partial(seen, numbers),
                lambda amount=1: None,
                model.runner.spool,
                change,
                again=streamed,
            )
    return total.sum(0)


def _rows(prompts: Sequence[Tokens], step: int, count: int, seed: int) -> list[int]:
    """Numbers of the prompts of a step: in a random order, and round again."""
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    wanted = min(count, len(order))
    return [order[((step - 1) * wanted + i) % len(order)] for i in range(wanted)]


def _across(vector: Tensor, unit: Tensor) -> Tensor:
    return vector - (vector @ unit) * unit


def _unit(vector: Tensor) -> Tensor:
    unit: Tensor = vector / vector.norm()
    return unit
