"""Candidates measured on validation prompts, prompt by prompt, so that no forward pass is ever done twice."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from abliterate.calibration.hooks import NOTHING, Steer
from abliterate.calibration.model import ResidentModel, Tokens
from abliterate.direction.means import Directions
from abliterate.direction.score import kl_divergence, refusal_score
from abliterate.direction.selection import Candidate
from abliterate.progress import SILENT, Progress

Key = tuple[int, int]


@dataclass(frozen=True)
class Validation:
    """What candidates are measured on: token ids of both validation sets, and the refusal tokens."""

    harmful: Sequence[Tokens]
    harmless: Sequence[Tokens]
    refusal_tokens: Sequence[int]


@dataclass(frozen=True)
class Scores:
    """All that a sheet has measured so far; see `ScoreSheet`."""

    bypass: dict[Key, list[float]]
    induce: dict[Key, list[float]]
    kl: dict[Key, list[float]]
    passes: int
    base: Tensor | None


@dataclass
class ScoreSheet:
    """Scores of (position, layer) candidates, one a prompt, filled in as rounds need them.

    Attributes:
        bypass, induce, kl: for each candidate, scores of the first prompts of its validation set.
        passes: prompts that went through the model so far (a backward pass counts as two more).
    """

    model: ResidentModel
    directions: Directions
    data: Validation
    bypass: dict[Key, list[float]] = field(default_factory=dict)
    induce: dict[Key, list[float]] = field(default_factory=dict)
    kl: dict[Key, list[float]] = field(default_factory=dict)
    passes: int = 0
    _base: Tensor | None = None

    def scores(self) -> Scores:
        """What was measured so far, to be stored."""
        return Scores(self.bypass, self.induce, self.kl, self.passes, self._base)

    def restore(self, scores: Scores) -> None:
        """Goes on from there."""
        self.bypass, self.induce, self.kl, self.passes = scores.bypass, scores.induce, scores.kl, scores.passes
        self._base = None if scores.base is None else scores.base.to(self.model.device)

    def baseline(self, progress: Progress = SILENT) -> Tensor:
        """Logits [harmless prompts, vocabulary] of the untouched model."""
        if self._base is None:
            self._base = self._logits(self.data.harmless, None, progress, "baseline")
        return self._base

    def baseline_scores(self) -> tuple[float, float]:
        """Mean refusal scores of the untouched model on harmful and harmless validation prompts."""
        harmful = self._scores(self.data.harmful, [NOTHING] * len(self.data.harmful), SILENT, "baseline")
        harmless = refusal_score(self.baseline(), self.data.refusal_tokens)
        return sum(harmful) / len(harmful), float(harmless.mean())

    def _logits(
        self, prompts: Sequence[Tokens], steers: Sequence[Steer] | None, progress: Progress, description: str
    ) -> Tensor:
        self.passes += len(prompts)
        gathered: list[Tensor | None] = [None] * len(prompts)
        for batch in self.model.forward(prompts, steers, progress=progress, description=description):
            for row, logits in zip(batch.rows, batch.logits, strict=True):
                gathered[row] = logits
        return torch.stack([logits for logits in gathered if logits is not None])

    def measure_bypass(self, keys: Sequence[Key], count: int, progress: Progress = SILENT) -> None:
        """Refusal scores with the candidate ablated, on the first `count` harmful prompts."""
        jobs = self._missing(self.bypass, keys, count, len(self.data.harmful))
        steers = [Steer(ablate=self.directions.unit(*key)) for key, _ in jobs]
        scores = self._scores([self.data.harmful[i] for _, i in jobs], steers, progress, "bypass")
        self._store(self.bypass, jobs, scores)

    def measure_induce(self, keys: Sequence[Key], count: int, progress: Progress = SILENT) -> None:
        """Refusal scores with the difference of means added at its layer, on the first `count` harmless prompts."""
        jobs = self._missing(self.induce, keys, count, len(self.data.harmless))
        steers = [Steer(add=self.directions.vector(*key), layer=key[1]) for key, _ in jobs]
        scores = self._scores([self.data.harmless[i] for _, i in jobs], steers, progress, "induce")
        self._store(self.induce, jobs, scores)

    def measure_kl(self, keys: Sequence[Key], count: int, progress: Progress = SILENT) -> None:
        """KL(base || ablated) on the first `count` harmless prompts."""
        base = self.baseline(progress)
        jobs = self._missing(self.kl, keys, count, len(self.data.harmless))
        prompts = [self.data.harmless[i] for _, i in jobs]
        steers = [Steer(ablate=self.directions.unit(*key)) for key, _ in jobs]
        scores = [0.0] * len(jobs)
        for batch in self.model.forward(prompts, steers, progress=progress, description="KL"):
            reference = base[[jobs[row][1] for row in batch.rows]]
            for row, value in zip(batch.rows, kl_divergence(reference, batch.logits).tolist(), strict=True):
                scores[row] = value
        self.passes += len(jobs)
        self._store(self.kl, jobs, scores)

    def _scores(
        self, prompts: Sequence[Tokens], steers: Sequence[Steer], progress: Progress, description: str
    ) -> list[float]:
        scores = [0.0] * len(prompts)
        for batch in self.model.forward(prompts, steers, progress=progress, description=description):
            for row, value in zip(batch.rows, refusal_score(batch.logits, self.data.refusal_tokens), strict=True):
                scores[row] = float(value)
        self.passes += len(prompts)
        return scores

    @staticmethod
    def _missing(sheet: dict[Key, list[float]], keys: Sequence[Key], count: int, most: int) -> list[tuple[Key, int]]:
        return [(key, i) for key in keys for i in range(len(sheet.get(key, [])), min(count, most))]

    @staticmethod
    def _store(sheet: dict[Key, list[float]], jobs: Sequence[tuple[Key, int]], scores: Sequence[float]) -> None:
        for (key, _), score in zip(jobs, scores, strict=True):
            sheet.setdefault(key, []).append(score)

    def candidate(self, key: Key) -> Candidate:
        """The candidate with the means of what was measured so far."""
        bypass, induce, kl = (_mean(sheet.get(key, [])) for sheet in (self.bypass, self.induce, self.kl))
        prompts = max(len(sheet.get(key, [])) for sheet in (self.bypass, self.induce, self.kl))
        return Candidate(*key, bypass, induce, kl, prompts)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
