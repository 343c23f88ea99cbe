"""A first-order estimate of every candidate's bypass score, from one backward pass.

Ablating r takes (o . r) r out of the output o of every residual writer, so to first order the refusal score s changes
by minus the sum over writers and tokens of (grad_o s . r)(o . r). Outputs and gradients do not depend on r: all
candidates share them.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from abliterate.calibration.backward import gradients_at
from abliterate.calibration.lockstep import Call
from abliterate.calibration.model import LanguageModel, Tokens
from abliterate.direction.score import refusal_score
from abliterate.malloc import frugal
from abliterate.progress import SILENT, Progress


def first_order_bypass(
    model: LanguageModel,
    prompts: Sequence[Tokens],
    refusal_tokens: Sequence[int],
    units: Tensor,
    progress: Progress = SILENT,
) -> Tensor:
    """Estimated mean refusal score with each direction ablated.

    Args:
        units: [candidates, hidden] unit directions.

    Returns:
        [candidates] fp64.
    """
    weights, writers = model.runner.weights(model.stream.layers), model.stream.writers
    calls: list[Call[Tensor]] = [
        partial(_score, model, [prompts[i] for i in rows], refusal_tokens) for rows in model.batches(prompts)
    ]
    together = [calls] if model.runner.streamed else [[call] for call in calls]
    total = torch.zeros(len(units), dtype=torch.float64)
    sparing = frugal() if model.runner.streamed else nullcontext()
    with sparing, progress.bar("first-order screen", 2 * len(model.stream.layers) * len(together), "layer") as advance:
        for group in together:
            changes = _Changes(model, units.to(model.device), len(group))
            scores = gradients_at(weights, writers, group, changes.add, advance, model.runner.spool)
            for score, change in zip(scores, changes.totals, strict=True):
                total += score.cpu().double() + change
    return total / len(prompts)


def _score(model: LanguageModel, prompts: Sequence[Tokens], refusal_tokens: Sequence[int]) -> Tensor:
    return refusal_score(model.logits(prompts), refusal_tokens).sum()


class _Changes:
    """Adds up what the scores change by, to first order: of each call alone, so that their order makes no difference.

    Attributes:
        totals: [calls, candidates].
    """

    def __init__(self, model: LanguageModel, units: Tensor, calls: int) -> None:
        self._seen = model.stream.along(units)
        self.totals = torch.zeros(calls, len(units), dtype=torch.float64)

    def add(self, call: int, number: int, output: Tensor, gradient: Tensor) -> None:
        """Takes one output of a writer."""
        r = self._seen[number].T.to(gradient.device)
        along = (gradient.float() @ r) * (output.float() @ r)
        self.totals[call] -= along.flatten(0, -2).cpu().double().sum(0)
