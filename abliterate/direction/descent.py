"""What descents along gradients of an edit share: the prompts of a step, gradients, and Adam on the sphere."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from abliterate.calibration.backward import gradients_at
from abliterate.calibration.lockstep import Call
from abliterate.calibration.model import LanguageModel, Tokens
from abliterate.direction.opening import Opening
from abliterate.malloc import frugal
from abliterate.progress import Advance, unseen

_FIRST, _SECOND, _LEAST = 0.8, 0.95, 1e-12
"""Of Adam (Kingma & Ba 2015): shares of the old moments that stay, and what keeps their quotient finite."""
Seen = Callable[[int, int, Tensor, Tensor], None]


@dataclass(frozen=True)
class Moments:
    """Running means of a gradient and of its square."""

    first: Tensor
    second: Tensor

    @classmethod
    def zero(cls, like: Tensor) -> "Moments":
        """Before the first step, fp64."""
        return cls(torch.zeros_like(like).double(), torch.zeros_like(like).double())


def adam(moments: Moments, slope: Tensor, square: Tensor, step: int) -> tuple[Moments, Tensor]:
    """Moments that took up a slope, and the step they stand for at a rate of 1.

    Args:
        square: of the slope; of its length, where all of a vector's entries are to move at one rate.
        step: counted from 1.
    """
    first = _FIRST * moments.first + (1 - _FIRST) * slope
    second = _SECOND * moments.second + (1 - _SECOND) * square
    move = first / (1 - _FIRST**step) / ((second / (1 - _SECOND**step)).sqrt() + _LEAST)
    return Moments(first, second), move


def tangent(vectors: Tensor, units: Tensor) -> Tensor:
    """Vectors [..., hidden] fp64 less what they have along the unit vectors."""
    r = units.double()
    return vectors - (vectors * r).sum(-1, keepdim=True) * r


def rows_of(prompts: Sequence[Tokens], step: int, count: int, seed: int) -> list[int]:
    """Numbers of the prompts of a step, counted from 0: in a random order, and round again."""
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    wanted = min(count, len(order))
    return [order[(step * wanted + i) % len(order)] for i in range(wanted)]


def shares(
    opening: Opening,
    prompts: Sequence[Tokens],
    rows: Sequence[int],
    loss: Callable[[Sequence[int], Tensor], Tensor],
) -> list[Call[Tensor]]:
    """A call for each batch of some prompts, which gives its share of their mean loss.

    Args:
        opening: how prompts are run.
        rows: numbers of the prompts.
        loss: takes numbers of prompts and their logits [prompts, vocabulary], gives [prompts].
    """

    def share(numbers: Sequence[int]) -> Tensor:
        return loss(numbers, opening.logits([prompts[i] for i in numbers])).sum() / len(rows)

    batches = opening.model.batches([prompts[i] for i in rows])
    return [partial(share, [rows[i] for i in places]) for places in batches]


def gradients(
    model: LanguageModel,
    calls: Sequence[Call[Tensor]],
    seen: Seen,
    change: Callable[[int, Tensor], Tensor],
    advance: Advance = unseen,
) -> list[float]:
    """What the calls' losses are, with the edit applied.

    Args:
        seen: is told number of the call, number of the writer, the writer's output, and the gradient at what goes on.
        change: what goes on of an output, by the writer's number.
    """
    streamed, everything = model.runner.streamed, list(range(len(calls)))
    losses = [0.0] * len(calls)
    # Streamed weights are read once for all; in memory, the graph of one batch at a time is enough.
    for numbers in [everything] if streamed else [[number] for number in everything]:
        with frugal() if streamed else nullcontext():
            found = gradients_at(
                model.runner.weights(model.stream.layers),
                model.stream.writers,
                [calls[number] for number in numbers],
                partial(_renumbered, seen, numbers),
                advance,
                model.runner.spool,
                change,
                again=streamed,
            )
        for number, loss in zip(numbers, found, strict=True):
            losses[number] = float(loss)
    return losses


def _renumbered(seen: Seen, numbers: Sequence[int], call: int, writer: int, output: Tensor, gradient: Tensor) -> None:
    seen(numbers[call], writer, output, gradient)
