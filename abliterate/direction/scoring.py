"""Candidates measured on validation prompts, prompt by prompt, so that no forward pass is ever done twice."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from abliterate.calibration.hooks import Steer
from abliterate.calibration.model import LanguageModel, Tokens
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
    base: tuple[Tensor, list[float]] | None


@dataclass
class ScoreSheet:
    """Scores of (position, layer) candidates, one a prompt, filled in as rounds need them.

    Attributes:
        bypass, induce, kl: for each candidate, scores of the first prompts of its validation set.
        passes: prompts that went through the model so far (a backward pass counts as two more).
    """

    model: LanguageModel
    directions: Directions
    data: Validation
    bypass: dict[Key, list[float]] = field(default_factory=dict)
    induce: dict[Key, list[float]] = field(default_factory=dict)
    kl: dict[Key, list[float]] = field(default_factory=dict)
    passes: int = 0
    _base: tuple[Tensor, list[float]] | None = None

    def scores(self) -> Scores:
        """What was measured so far, to be stored."""
        return Scores(self.bypass, self.induce, self.kl, self.passes, self._base)

    def restore(self, scores: Scores) -> None:
        """Goes on from there."""
        self.bypass, self.induce, self.kl, self.passes = scores.bypass, scores.induce, scores.kl, scores.passes
        self._base = scores.base and (scores.base[0].to(self.model.device), scores.base[1])

    def baseline(self, progress: Progress = SILENT) -> Tensor:
        """Logits [harmless prompts, vocabulary] of the untouched model."""
        return self._untouched(progress)[0]

    def baseline_scores(self) -> tuple[float, float]:
        """Mean refusal scores of the untouched model on harmful and harmless validation prompts."""
        logits, harmful = self._untouched(SILENT)
        return sum(harmful) / len(harmful), float(refusal_score(logits, self.data.refusal_tokens).mean())

    def _untouched(self, progress: Progress) -> tuple[Tensor, list[float]]:
        """Logits on harmless prompts and refusal scores on harmful ones, measured once."""
        if self._base is None:
            count = len(self.data.harmful)
            prompts = [*self.data.harmful, *self.data.harmless]
            scores, logits = [0.0] * count, dict[int, Tensor]()
            for batch in self.model.forward(prompts, progress=progress, description="baseline"):
                for row, score, last in zip(batch.rows, self._scored(batch.logits), batch.logits, strict=True):
                    if row < count:
                        scores[row] = score
                    else:
                        logits[row] = last
            self.passes += len(prompts)
            self._base = (torch.stack([logits[row] for row in range(count, len(prompts))]), scores)
        return self._base

    def measure(self, keys: Sequence[Key], count: int, progress: Progress = SILENT) -> None:
        """All three scores on the first `count` prompts of each set, as far as they are missing, in one run.

        Bypass: refusal score of harmful prompts with the candidate ablated. Induce: of harmless prompts with the
        difference of means added at its layer. KL: KL(base || ablated) on harmless prompts.
        """
        base = self.baseline(progress)
        jobs = [
            *((self.bypass, key, i) for key, i in _missing(self.bypass, keys, count, len(self.data.harmful))),
            *((self.kl, key, i) for key, i in _missing(self.kl, keys, count, len(self.data.harmless))),
            *((self.induce, key, i) for key, i in _missing(self.induce, keys, count, len(self.data.harmless))),
        ]
        prompts = [(self.data.harmful if sheet is self.bypass else self.data.harmless)[i] for sheet, _, i in jobs]
        steers = [self._steer(sheet, key) for sheet, key, _ in jobs]
        values = [0.0] * len(jobs)
        for batch in self.model.forward(prompts, steers, progress=progress, description="candidates"):
            references = base[[0 if jobs[row][0] is self.bypass else jobs[row][2] for row in batch.rows]]
            divergences = kl_divergence(references, batch.logits).tolist()
            for row, score, divergence in zip(batch.rows, self._scored(batch.logits), divergences, strict=True):
                values[row] = divergence if jobs[row][0] is self.kl else score
        self.passes += len(jobs)
        for (sheet, key, _), value in zip(jobs, values, strict=True):
            sheet.setdefault(key, []).append(value)

    def _steer(self, sheet: dict[Key, list[float]], key: Key) -> Steer:
        if sheet is self.induce:
            return Steer(add=self.directions.vector(*key), layer=key[1])
        return Steer(ablate=self.directions.unit(*key))

    def _scored(self, logits: Tensor) -> list[float]:
        scores: list[float] = refusal_score(logits, self.data.refusal_tokens).tolist()
        return scores

    def candidate(self, key: Key) -> Candidate:
        """The candidate with the means of what was measured so far."""
        bypass, induce, kl = (_mean(sheet.get(key, [])) for sheet in (self.bypass, self.induce, self.kl))
        prompts = max(len(sheet.get(key, [])) for sheet in (self.bypass, self.induce, self.kl))
        return Candidate(*key, bypass, induce, kl, prompts)


def _missing(sheet: dict[Key, list[float]], keys: Sequence[Key], count: int, most: int) -> list[tuple[Key, int]]:
    return [(key, i) for key in keys for i in range(len(sheet.get(key, [])), min(count, most))]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
