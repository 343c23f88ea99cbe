"""What a model does on held-out prompts, as rates and means. Completions are judged and dropped, never stored."""

import functools
import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from abliterate.calibration.model import LanguageModel, Tokens
from abliterate.calibration.runner import Bar, Streamed
from abliterate.direction.score import kl_divergence, refusal_score
from abliterate.direction.substrings import is_refusal
from abliterate.evaluation.answers import Answers, distance, record_answers
from abliterate.evaluation.degenerate import is_degenerate
from abliterate.evaluation.sets import Evaluation, EvaluationSet, Measured, Samples
from abliterate.progress import SILENT, Progress

log = logging.getLogger(__name__)

WINDOW = 256
KINDS = ("refusal_rate", "over_refusal_rate", "look_alike_refusal_rate")
"""Of harmful, harmless and look-alike prompts."""
Listener = Callable[[Sequence[str]], None]


def evaluate_model(
    model: LanguageModel,
    data: EvaluationSet,
    baseline: Measured | None = None,
    progress: Progress = SILENT,
    label: str = "evaluate",
    hear: Listener | None = None,
) -> Measured:
    """Measures one model.

    Args:
        baseline: the model to compare with, measured on the same prompts.
        hear: is told the completions of all prompts, in the order of `EvaluationSet.prompts`.
    """
    first = first_logits(model, data.prompts, progress, f"{label}: first tokens")
    start = len(data.harmful)
    harmless = first[start : start + len(data.harmless)].clone()
    completions = complete(model, data, progress, label)
    texts = [model.decode(tokens) for tokens in completions]
    if hear is not None:
        hear(texts)
    answers, along = _along_answers(model, data, completions, baseline, progress, label)
    empty = Evaluation(
        len(data.harmful),
        len(data.harmless),
        data.max_new_tokens,
        prompts_look_alike=len(data.look_alike),
        kl_tokens=min(data.kl_tokens, data.max_new_tokens),
    )
    samples = (_verdicts(data, texts, first), along, neutral_loss(model, data.neutral, progress))
    found = functools.reduce(Evaluation.having, samples, empty)
    if baseline is not None:
        found = found.having(first_token(baseline.harmless_logits, harmless, data.refusal_tokens or ()))
    return Measured(found, harmless, answers)


def first_logits(
    model: LanguageModel,
    prompts: Sequence[Tokens],
    progress: Progress,
    description: str,
    logits: Callable[[Sequence[Tokens]], Tensor] | None = None,
) -> Tensor:
    """Logits [prompts, vocabulary] of the first token of each answer.

    Args:
        logits: see `LanguageModel.forward`.
    """
    gathered: dict[int, Tensor] = {}
    for batch in model.forward(prompts, progress=progress, description=description, logits=logits):
        gathered.update(zip(batch.rows, batch.logits.cpu(), strict=True))
    return torch.stack([gathered[i] for i in range(len(prompts))])


def complete(model: LanguageModel, data: EvaluationSet, progress: Progress, label: str) -> list[list[int]]:
    """Greedy answers to all prompts, in one run."""
    _tell_cost(model, data.max_new_tokens)
    return model.generate(data.prompts, data.max_new_tokens, progress, f"{label}: answers")


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


def by_kind(data: EvaluationSet, name: str, flags: Sequence[bool | None]) -> dict[str, tuple[bool | None, ...]]:
    """Flags of all prompts as verdicts by the names of the three rates; nothing for a model without a chat format."""
    if not data.harmful:
        return {}
    found, start = {}, 0
    for kind, prompts in zip(KINDS, (data.harmful, data.harmless, data.look_alike), strict=True):
        found[f"{kind}_{name}"] = tuple(flags[start : start + len(prompts)])
        start += len(prompts)
    return {kind: each for kind, each in found.items() if each}


def _verdicts(data: EvaluationSet, texts: Sequence[str], first: Tensor) -> Samples:
    """Refusals by phrase and by score, and degenerate answers to harmless prompts."""
    start = len(data.harmful)
    verdicts = by_kind(data, "substring", [is_refusal(text) for text in texts])
    if data.refusal_tokens:
        verdicts |= by_kind(data, "score", (refusal_score(first, data.refusal_tokens) > 0).tolist())
    harmless = texts[start : start + len(data.harmless)]
    return Samples({**verdicts, "degenerate_rate": tuple(map(is_degenerate, harmless))})


def _along_answers(
    model: LanguageModel,
    data: EvaluationSet,
    completions: Sequence[Tokens],
    baseline: Measured | None,
    progress: Progress,
    label: str,
) -> tuple[Answers | None, Samples]:
    """A model's own answers where it is the base; else its distance from the base along the base's."""
    if baseline is not None and baseline.answers is not None:
        base, name = baseline.answers, f"{label}: base's answers"
        found = distance(model, data.harmless, base, progress, name)
        values = {"kl_answers": found.kl, "top1_agreement_answers": found.agreement}
        return None, _losses(base, found.losses, values)
    if baseline is not None or not data.kl_tokens:
        return None, Samples()
    own = completions[len(data.harmful) : len(data.harmful) + len(data.harmless)]
    name, longest = f"{label}: own answers", data.max_new_tokens
    answers = record_answers(model, data.harmless, own, min(data.kl_tokens, longest), longest, progress, name)
    return answers, _losses(answers, answers.losses, {})


def _losses(answers: Answers, losses: tuple[float, ...], values: dict[str, tuple[float, ...]]) -> Samples:
    name = "cross_entropy_answers"
    return Samples({}, {**values, name: losses}, {name: tuple(map(float, answers.lengths))})


def first_token(baseline: Tensor, logits: Tensor, refusal_tokens: Sequence[int] = ()) -> Samples:
    """KL(baseline || model) in nats, and whether the likeliest token is the same, of each row of logits.

    Args:
        refusal_tokens: to tell which prompts the baseline refuses; none leaves out what is told apart by that.
    """
    same = (baseline.argmax(-1) == logits.argmax(-1)).tolist()
    divergence = kl_divergence(baseline, logits).double().tolist()
    values = {"kl_first_token": tuple(divergence)}
    if refusal_tokens:
        refused = (refusal_score(baseline, refusal_tokens) > 0).tolist()
        values["kl_first_token_answered"] = tuple(kl for kl, no in zip(divergence, refused, strict=True) if not no)
    return Samples({"top1_agreement": tuple(same)}, values)


def neutral_loss(model: LanguageModel, tokens: Tokens, progress: Progress = SILENT) -> Samples:
    """Mean negative log-likelihood in nats a token over windows of 256 tokens, each token predicted once."""
    windows = [tokens[start : start + WINDOW + 1] for start in range(0, len(tokens) - 1, WINDOW)]
    losses = dict(model.runner.run([partial(_loss, model, window) for window in windows], Bar(progress, "loss")))
    values = tuple(losses[number] for number in range(len(windows)))
    return Samples({}, {"cross_entropy": values}, {"cross_entropy": tuple(len(each) - 1.0 for each in windows)})


def _loss(model: LanguageModel, window: Tokens) -> float:
    """Mean over the window's tokens but the first."""
    ids = torch.tensor([list(window)], device=model.device)
    logits = model.model(input_ids=ids[:, :-1], use_cache=False).logits[0].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))
