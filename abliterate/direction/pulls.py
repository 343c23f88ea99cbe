"""Losses of an edit by degrees, and which way they pull its strengths and directions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import softplus

from abliterate.calibration.dials import Dialled, Dials, Slopes
from abliterate.calibration.lockstep import Call
from abliterate.calibration.model import LanguageModel
from abliterate.direction.descent import gradients, shares
from abliterate.direction.opening import Opening
from abliterate.direction.score import kl_divergence, refusal_score
from abliterate.direction.scoring import Validation
from abliterate.direction.substrings import is_refusal
from abliterate.progress import SILENT, Advance, Progress, unseen


@dataclass(frozen=True)
class Pull:
    """Two losses, and their gradients: index 0 is that of refusals, 1 that of KL.

    Attributes:
        losses: mean softplus of the refusal score plus the margin on harmful prompts, mean KL(base || edited) at the
            first token on harmless ones; in nats.
        strengths: [2, layers, 2] fp64.
        directions: [2, layers, hidden] fp64; None unless wanted.
    """

    losses: tuple[float, float]
    strengths: Tensor
    directions: Tensor | None


@dataclass(frozen=True)
class Effect:
    """What an edit does to prompts; see `Point`.

    Attributes:
        refused: of each harmful prompt, whether it is.
    """

    refused: tuple[bool, ...]
    bypass: float
    kl: float

    @property
    def refusal(self) -> float:
        """Share of the harmful prompts."""
        return sum(self.refused) / len(self.refused)


@dataclass(frozen=True)
class Trial:
    """A model, prompts, and what the model says to the harmless ones as it is.

    Attributes:
        opening: how prompts are run through the model.
        base: logits [harmless prompts, vocabulary] of the untouched model.
        others: tokens beside the refusal tokens that refusals may start with once these are closed to the model; the
            loss counts them, the score does not.
        new_tokens: of answers in which refusals are also looked for by phrase; 0 goes by the first token alone.
    """

    opening: Opening
    data: Validation
    base: Tensor
    others: tuple[int, ...] = ()
    new_tokens: int = 0

    @property
    def model(self) -> LanguageModel:
        """The model."""
        return self.opening.model

    @property
    def prompts(self) -> int:
        """How many go through the model for an effect."""
        return len(self.data.harmful) + len(self.data.harmless)

    @property
    def answered(self) -> int:
        """How many are answered for refusals by phrase."""
        return len(self.data.harmful) if self.new_tokens else 0

    def pull(
        self,
        dials: Dials,
        rows: tuple[Sequence[int], Sequence[int]],
        margin: float,
        directions: bool,
        advance: Advance = unseen,
    ) -> Pull:
        """Losses and gradients on some of the prompts.

        Args:
            rows: numbers of harmful and of harmless prompts.
            directions: also the gradients of directions.
        """
        calls, kinds = self._calls(rows, margin)
        slopes = Slopes(Dialled(self.model.stream, dials), len(calls), directions)
        losses = gradients(self.model, calls, slopes.add, slopes.dialled.change, advance)
        return Pull(
            (_sum(losses, kinds, 0), _sum(losses, kinds, 1)),
            _by_kind(slopes.strengths, kinds),
            None if slopes.directions is None else _by_kind(slopes.directions, kinds),
        )

    def _calls(self, rows: tuple[Sequence[int], Sequence[int]], margin: float) -> tuple[list[Call[Tensor]], list[int]]:
        """Batches of harmful prompts and of harmless ones; each gives its share of the mean loss."""
        harmful = shares(self.opening, self.data.harmful, rows[0], lambda _, logits: self._refusal(margin, logits))
        harmless = shares(self.opening, self.data.harmless, rows[1], self._divergence)
        return [*harmful, *harmless], [0] * len(harmful) + [1] * len(harmless)

    def _refusal(self, margin: float, logits: Tensor) -> Tensor:
        return softplus(refusal_score(logits, [*self.data.refusal_tokens, *self.others]) + margin)

    def _divergence(self, numbers: Sequence[int], logits: Tensor) -> Tensor:
        return kl_divergence(self.base[list(numbers)].to(logits.device), logits)

    def effect(self, dials: Dials, progress: Progress = SILENT) -> Effect:
        """On all prompts, refusals by the first token alone."""
        tokens, count = self.data.refusal_tokens, len(self.data.harmful)
        prompts = [*self.data.harmful, *self.data.harmless]
        scores, refused, divergences = [0.0] * count, [False] * count, [0.0] * (len(prompts) - count)
        applied = Dialled(self.model.stream, dials).applied
        run = partial(self.model.forward, progress=progress, description="search: effect")
        for batch in run(prompts, inside=applied, logits=self.opening.logits):
            for row, last in zip(batch.rows, batch.logits, strict=True):
                if row < count:
                    scores[row] = float(refusal_score(last, tokens))
                    refused[row] = scores[row] > 0 or int(last.argmax()) in tokens
                else:
                    divergences[row - count] = float(kl_divergence(self.base[row - count].to(last.device), last))
        return Effect(tuple(refused), sum(scores) / count, sum(divergences) / len(divergences))

    def with_answers(self, effects: Sequence[tuple[Dials, Effect]], progress: Progress = SILENT) -> list[Effect]:
        """Effects with refusals by phrase beside those by the first token; all answers are made in one run."""
        if not self.new_tokens:
            return [effect for _, effect in effects]
        edits = [Dialled(self.model.stream, dials).applied for dials, _ in effects]
        name = "search: answers"
        answers = self.model.generate_under(edits, self.data.harmful, self.new_tokens, progress, name)
        said = [[is_refusal(self.model.decode(tokens)) for tokens in each] for each in answers]
        return [
            replace(effect, refused=tuple(map(max, effect.refused, phrased)))
            for (_, effect), phrased in zip(effects, said, strict=True)
        ]


def _by_kind(slopes: Tensor, kinds: Sequence[int]) -> Tensor:
    """[2, ...]: those of all calls [calls, ...], summed up."""
    of = torch.tensor(kinds)
    return torch.stack([slopes[of == kind].sum(0) for kind in (0, 1)])


def _sum(losses: Sequence[float], kinds: Sequence[int], kind: int) -> float:
    return sum(loss for loss, of in zip(losses, kinds, strict=True) if of == kind)
