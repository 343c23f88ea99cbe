"""Candidate directions: differences of means, at every post-instruction position and layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abliterate.calibration.model import LanguageModel, Tokens
from abliterate.calibration.transport import Transport
from abliterate.direction.score import refusal_score
from abliterate.errors import CalibrationError
from abliterate.progress import SILENT, Progress

LEAST_KEPT = 8


@dataclass(frozen=True)
class Mean:
    """Mean hidden state over the prompts that were kept.

    Attributes:
        value: [positions, layers, hidden] fp64.
        kept: how many prompts had a refusal score of the expected sign; `total`: how many there were.
    """

    value: Tensor
    kept: int
    total: int


@dataclass(frozen=True)
class Directions:
    """The candidate grid.

    Attributes:
        grid: [positions, layers, hidden] fp32, harmful mean minus harmless mean, not normalised; index p of the first
            axis is position p - positions.
        harmful, harmless: the means it comes from.
    """

    grid: Tensor
    harmful: Mean
    harmless: Mean
    transport: Transport | None = None

    def vector(self, position: int, layer: int) -> Tensor:
        """The difference of means d [hidden] at a position (-1 is the last) and layer."""
        return self.grid[self.grid.shape[0] + position, layer]

    def unit(self, position: int, layer: int) -> Tensor:
        """The unit direction r [hidden] there, as it is at the end of the stream."""
        vector = self.vector(position, layer).double()
        if self.transport is not None:
            vector = self.transport.at_end(layer, vector)
        unit: Tensor = (vector / vector.norm()).float()
        return unit


def mean_hidden(
    model: LanguageModel,
    prompts: Sequence[Tokens],
    positions: int,
    keep_sign: int,
    refusal_tokens: Sequence[int],
    progress: Progress = SILENT,
    description: str = "hidden states",
) -> Mean:
    """Mean input of every layer at positions -P..-1, accumulated in fp64 (Arditi et al. 2024, eq. 1).

    Args:
        positions: P.
        keep_sign: +1 keeps prompts whose refusal score is above 0, -1 those below 0, 0 all.

    Raises:
        CalibrationError: fewer than 8 prompts are left.
    """
    total: Tensor | None = None
    kept = 0
    for batch in model.forward(prompts, positions=positions, progress=progress, description=description):
        assert batch.hidden is not None
        scores = refusal_score(batch.logits, refusal_tokens).cpu() if keep_sign else torch.ones(len(batch.rows))
        chosen = batch.hidden[scores * (keep_sign or 1) > 0].double()
        kept += len(chosen)
        total = chosen.sum(0) if total is None else total + chosen.sum(0)
    if total is None or kept < LEAST_KEPT:
        kind = "refused" if keep_sign > 0 else "answered"
        raise CalibrationError(
            f"too few prompts: the model {kind} {kept} of {len(prompts)}, and at least {LEAST_KEPT} are needed; "
            "give more prompts, or set direction.filter to false in the recipe"
        )
    return Mean(total / kept, kept, len(prompts))


def difference(harmful: Mean, harmless: Mean, transport: Transport | None = None) -> Directions:
    """d = mean over harmful minus mean over harmless (eq. 1), stored in fp32.

    Raises:
        CalibrationError: the means are the same, or not finite.
    """
    grid = harmful.value - harmless.value
    if not bool(torch.isfinite(grid).all()):
        raise CalibrationError("hidden states are not finite (NaN or infinity); try --dtype float32")
    if float(grid.norm()) <= 1e-6 * float(harmful.value.norm()):
        raise CalibrationError("harmful and harmless prompts give the same hidden states; the two sets must differ")
    return Directions(grid.float(), harmful, harmless, transport)
