"""What an ablation does on validation prompts: refusals by score with an interval, and how far it moves the model."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from abliterate.calibration.hooks import Steer
from abliterate.calibration.model import LanguageModel
from abliterate.direction.score import kl_divergence, refusal_score
from abliterate.direction.scoring import Validation
from abliterate.evaluation import statistics
from abliterate.progress import SILENT, Progress


@dataclass(frozen=True)
class Rate:
    """A share of prompts with its 95 % interval.

    Attributes:
        share, low, high: in 0..1.
        count: prompts it is a share of.
    """

    share: float
    low: float
    high: float
    count: int


def rate_of(refused: int, count: int) -> Rate:
    """The rate with Wilson's interval, see `statistics.Rate`."""
    found = statistics.Rate(refused, count)
    return Rate(found.value, found.low, found.high, count)


@dataclass(frozen=True)
class Effect:
    """What is left of refusal, and the cost.

    Attributes:
        refusals: harmful prompts whose refusal score is above 0.
        score: mean refusal score on harmful prompts, nats.
        kl: mean KL(base || steered) in nats on harmless prompts, at the last position; None where not measured.
    """

    refusals: Rate
    score: float
    kl: float | None


def effects(
    model: LanguageModel,
    steers: Sequence[Steer],
    data: Validation,
    baseline: Tensor | None,
    progress: Progress = SILENT,
    description: str = "ablations",
) -> list[Effect]:
    """The effect of every steer, in its order; one pass over the weights serves all.

    Args:
        data: prompts; the KL is left out where there are no harmless ones.
        baseline: logits [harmless prompts, vocabulary] of the untouched model.
    """
    texts, count = [*data.harmful, *data.harmless], len(data.harmful)
    jobs = [steer for steer in steers for _ in texts]
    values = [0.0] * len(jobs)
    for batch in model.forward(list(texts) * len(steers), jobs, progress=progress, description=description):
        scores = refusal_score(batch.logits, data.refusal_tokens).tolist()
        places = [row % len(texts) for row in batch.rows]
        if baseline is not None and data.harmless:
            references = baseline[[max(0, place - count) for place in places]]
            divergences = kl_divergence(references, batch.logits).tolist()
            scores = [d if p >= count else s for p, s, d in zip(places, scores, divergences, strict=True)]
        for row, value in zip(batch.rows, scores, strict=True):
            values[row] = value
    return [_effect(values[i : i + len(texts)], count) for i in range(0, len(values), len(texts))]


def _effect(values: Sequence[float], harmful: int) -> Effect:
    scores, divergences = values[:harmful], values[harmful:]
    refusals = rate_of(sum(score > 0 for score in scores), harmful)
    return Effect(refusals, sum(scores) / harmful, sum(divergences) / len(divergences) if divergences else None)
