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
MEDIAN_STEPS, MEDIAN_NEAR = 100, 1e-8


@dataclass(frozen=True)
class MeanMethod:
    """What the middle of a set of activations is.

    Attributes:
        geometric_median: instead of the mean: no single prompt moves it far.
        winsorize: quantile of the sizes in each activation that larger entries are cut down to; 1 cuts nothing.
    """

    geometric_median: bool = False
    winsorize: float = 1.0


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
    method: MeanMethod = MeanMethod(),
) -> Mean:
    """Mean input of every layer at positions -P..-1, accumulated in fp64 (Arditi et al. 2024, section 2.3).

    Args:
        positions: P.
        keep_sign: +1 keeps prompts whose refusal score is above 0, -1 those below 0, 0 all.
        method: another middle than the mean, and clipping.

    Raises:
        CalibrationError: fewer than 8 prompts are left.
    """
    middle, kept = _Middle(model, method), 0
    for batch in model.forward(prompts, positions=positions, progress=progress, description=description):
        assert batch.hidden is not None
        scores = refusal_score(batch.logits, refusal_tokens).cpu() if keep_sign else torch.ones(len(batch.rows))
        chosen = batch.hidden[scores * (keep_sign or 1) > 0]
        kept += len(chosen)
        middle.add(winsorized(chosen, method.winsorize))
    if kept < LEAST_KEPT:
        kind = "refused" if keep_sign > 0 else "answered"
        raise CalibrationError(
            f"too few prompts: the model {kind} {kept} of {len(prompts)}, and at least {LEAST_KEPT} are needed; "
            "give more prompts, or set direction.filter to false in the recipe"
        )
    return Mean(middle.value(), kept, len(prompts))


class _Middle:
    """The mean of what comes batch by batch, or its geometric median, for which all of it waits."""

    def __init__(self, model: LanguageModel, method: MeanMethod) -> None:
        self._spool, self._median = model.runner.spool, method.geometric_median
        self._total: Tensor | None = None
        self._count, self._kept = 0, list[Tensor]()

    def add(self, hidden: Tensor) -> None:
        """Takes [prompts, positions, layers, hidden]."""
        if self._median:
            far = self._spool is not None and self._spool.outgrows(hidden, LEAST_KEPT)
            self._kept.append(self._spool.keep(hidden) if far and self._spool is not None else hidden)
            return
        self._count += len(hidden)
        part = hidden.double().sum(0)
        self._total = part if self._total is None else self._total + part

    def value(self) -> Tensor:
        """[positions, layers, hidden] fp64."""
        if not self._median:
            assert self._total is not None
            return self._total / self._count
        layers = self._kept[0].shape[2]
        parts = [
            geometric_median(torch.cat([hidden[:, :, i].double() for hidden in self._kept])) for i in range(layers)
        ]
        return torch.stack(parts, dim=1)


def winsorized(hidden: Tensor, quantile: float) -> Tensor:
    """Every vector [..., hidden] with the entries that are larger than this quantile of their sizes cut down to it.

    A few massive activations would else be most of a mean, and of what is removed along the harmless one.
    """
    if quantile >= 1:
        return hidden
    most = torch.quantile(hidden.abs(), quantile, dim=-1, keepdim=True)
    return hidden.clamp(-most, most)


def geometric_median(points: Tensor) -> Tensor:
    """The point with the least sum of distances, by Weiszfeld's iteration. `points`: [n, ..., hidden] fp64."""
    middle = points.mean(0)
    for _ in range(MEDIAN_STEPS):
        distances = (points - middle).norm(dim=-1, keepdim=True)
        weights = 1 / distances.clamp_min(MEDIAN_NEAR * float(distances.max()) + 1e-300)
        found = (points * weights).sum(0) / weights.sum(0)
        moved, middle = float((found - middle).norm()), found
        if moved <= MEDIAN_NEAR * float(middle.norm()):
            break
    return middle


def difference(
    harmful: Mean, harmless: Mean, transport: Transport | None = None, harmless_part: bool = True
) -> Directions:
    """d = mean over harmful minus mean over harmless (section 2.3), stored in fp32.

    Args:
        harmless_part: keep what d has along the harmless mean; else it is removed, so that an ablation along d leaves
            what harmless prompts have in common.

    Raises:
        CalibrationError: the means are the same, or not finite.
    """
    grid = harmful.value - harmless.value
    if not bool(torch.isfinite(grid).all()):
        raise CalibrationError("hidden states are not finite (NaN or infinity); try --dtype float32")
    if float(grid.norm()) <= 1e-6 * float(harmful.value.norm()):
        raise CalibrationError("harmful and harmless prompts give the same hidden states; the two sets must differ")
    if not harmless_part:
        unit = harmless.value / harmless.value.norm(dim=-1, keepdim=True).clamp_min(1e-300)
        grid = grid - (grid * unit).sum(-1, keepdim=True) * unit
    return Directions(grid.float(), harmful, harmless, transport)
