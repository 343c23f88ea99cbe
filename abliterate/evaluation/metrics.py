"""What a model does on held-out prompts, as rates and means. Completions are judged and dropped, never stored."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from abliterate.calibration.model import LanguageModel, Tokens
from abliterate.calibration.runner import Bar, Streamed
from abliterate.direction.score import kl_divergence, refusal_score
from abliterate.direction.substrings import is_refusal
from abliterate.progress import SILENT, Progress

log = logging.getLogger(__name__)

WINDOW = 256


@dataclass(frozen=True)
class EvaluationSet:
    """What is measured on: token ids of held-out prompts, neutral text, and how long completions are.

    Attributes:
        harmful: empty for a model without a chat format, of which refusals are then not measured.
        refusal_tokens: None where they are not known; the rates by score are then not measured.
        neutral: token ids of the neutral text; empty leaves the cross-entropy out.
    """

    harmful: Sequence[Tokens]
    harmless: Sequence[Tokens]
    neutral: Tokens
    refusal_tokens: Sequence[int] | None
    max_new_tokens: int


@dataclass(frozen=True)
class Evaluation:
    """Rates are shares of prompts in 0..1, cross-entropy and KL in nats a token.

    Attributes:
        refusal_rate_substring, refusal_rate_score: refusals of harmful prompts.
        over_refusal_rate_substring, over_refusal_rate_score: refusals of harmless prompts.
        kl_first_token: mean KL(baseline || this) at the first token on harmless prompts; None without a baseline.
        top1_agreement: share of harmless prompts whose most likely first token is the baseline's.
    """

    prompts_harmful: int
    prompts_harmless: int
    max_new_tokens: int
    refusal_rate_substring: float | None
    over_refusal_rate_substring: float | None
    refusal_rate_score: float | None
    over_refusal_rate_score: float | None
    cross_entropy: float | None
    kl_first_token: float | None = None
    top1_agreement: float | None = None


@dataclass(frozen=True)
class Measured:
    """An evaluation, with the first-token logits on harmless prompts that another model can be held against."""

    evaluation: Evaluation
    harmless_logits: Tensor


def evaluate_model(
    model: LanguageModel,
    data: EvaluationSet,
    baseline: Tensor | None = None,
    progress: Progress = SILENT,
    label: str = "evaluate",
) -> Measured:
    """Measures one model.

    Args:
        baseline: first-token logits [harmless prompts, vocabulary] of the model to compare with.
    """
    first = first_logits(model, [*data.harmful, *data.harmless], progress, f"{label}: first tokens")
    harmful, harmless = first[: len(data.harmful)], first[len(data.harmful) :]
    kl, agreement = compare(baseline, harmless) if baseline is not None else (None, None)
    refusals, over_refusals = substring_rates(model, data, progress, label)
    evaluation = Evaluation(
        prompts_harmful=len(data.harmful),
        prompts_harmless=len(data.harmless),
        max_new_tokens=data.max_new_tokens,
        refusal_rate_substring=refusals,
        over_refusal_rate_substring=over_refusals,
        refusal_rate_score=score_rate(harmful if data.harmful else None, data.refusal_tokens),
        over_refusal_rate_score=score_rate(harmless if data.harmful else None, data.refusal_tokens),
        cross_entropy=cross_entropy(model, data.neutral, progress) if data.neutral else None,
        kl_first_token=kl,
        top1_agreement=agreement,
    )
    return Measured(evaluation, harmless)


def first_logits(model: LanguageModel, prompts: Sequence[Tokens], progress: Progress, description: str) -> Tensor:
    """Logits [prompts, vocabulary] of the first token of each answer."""
    gathered: dict[int, Tensor] = {}
    for batch in model.forward(prompts, progress=progress, description=description):
        gathered.update(zip(batch.rows, batch.logits.cpu(), strict=True))
    return torch.stack([gathered[i] for i in range(len(prompts))])


def compare(baseline: Tensor, logits: Tensor) -> tuple[float, float]:
    """Mean KL(baseline || model) in nats, and the share of equal most-likely tokens."""
    same = (baseline.argmax(-1) == logits.argmax(-1)).double().mean()
    return float(kl_divergence(baseline, logits).double().mean()), float(same)


def substring_rates(
    model: LanguageModel, data: EvaluationSet, progress: Progress, label: str
) -> tuple[float | None, float | None]:
    """Refusals of harmful and of harmless prompts; None for a model without a chat format."""
    if not data.harmful:
        return None, None
    _tell_cost(model, data.max_new_tokens)
    prompts = [*data.harmful, *data.harmless]
    completions = model.generate(prompts, data.max_new_tokens, progress, f"{label}: refusals")
    refused = [is_refusal(model.decode(tokens)) for tokens in completions]
    count = len(data.harmful)
    return sum(refused[:count]) / count, sum(refused[count:]) / len(data.harmless)


def _tell_cost(model: LanguageModel, tokens: int) -> None:
    """Streamed weights are read once a token: the user may want fewer."""
    runner = model.runner
    if isinstance(runner, Streamed):
        log.warning(
            "each of up to %d new tokens reads %.1f GB of weights, in about %.0f s; --max-new-tokens makes them fewer",
            tokens,
            runner.pass_bytes / 10**9,
            runner.pass_seconds,
        )


def score_rate(logits: Tensor | None, refusal_tokens: Sequence[int] | None) -> float | None:
    """Share of prompts whose refusal score is above 0."""
    if not refusal_tokens or logits is None:
        return None
    return float((refusal_score(logits, refusal_tokens) > 0).double().mean())


def cross_entropy(model: LanguageModel, tokens: Tokens, progress: Progress = SILENT) -> float:
    """Mean negative log-likelihood in nats a token, over windows of 256 tokens, each token predicted once."""
    windows = [tokens[start : start + WINDOW + 1] for start in range(0, len(tokens) - 1, WINDOW)]
    losses = model.runner.run([partial(_loss, model, window) for window in windows], Bar(progress, "loss"))
    found = dict(losses)
    total = sum(found[number] for number in range(len(windows)))
    return total / (len(tokens) - 1) if windows else math.nan


def _loss(model: LanguageModel, window: Tokens) -> float:
    """Summed over the window's tokens but the first."""
    ids = torch.tensor([list(window)], device=model.device)
    logits = model.model(input_ids=ids[:, :-1], use_cache=False).logits[0].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
