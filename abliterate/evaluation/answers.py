"""The base's own greedy answers, and how far another model's likelihoods are from the base's along them.

Both models read the same tokens (teacher forcing), so that every position can be compared however their answers part.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from abliterate.calibration.hooks import on_input
from abliterate.calibration.model import LanguageModel, Tokens, pad
from abliterate.calibration.runner import Bar
from abliterate.calibration.tour import run
from abliterate.progress import Progress

R = TypeVar("R")
KEPT = 8192
"""So many of the likeliest tokens are kept at a position: 67 MB for 64 prompts and 16 tokens, whatever the vocabulary;
all of 150,000 would be 600 MB."""
MOST_LOGITS = 32 * 2**20
"""So many logits a pass: 128 MB in float32."""
LARGEST_VOCABULARY = 2**18


@dataclass(frozen=True)
class Answers:
    """Greedy answers to prompts and the likelihoods of the model that gave them.

    Of every position there are the log-probabilities of the likeliest tokens, and that of all others together. The KL
    divergence over these classes is exact where the vocabulary is no larger than `KEPT`; else at most the true one
    (data processing): by 0.1 % of it for an edited SmolLM2 (vocabulary 49,152), and 0 for equal models.

    Attributes:
        tokens: of each answer, what ends it included where it ended.
        likeliest: [tokens of all answers] int32, the token that comes first there.
        ids: [tokens of all answers, kept] int32, the likeliest tokens there.
        log_probs: [tokens of all answers, kept + 1] fp32, of those tokens and of the rest.
        losses: of each answer, mean negative log-likelihood in nats a token.
    """

    tokens: tuple[tuple[int, ...], ...]
    likeliest: Tensor
    ids: Tensor
    log_probs: Tensor
    losses: tuple[float, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """In tokens."""
        return tuple(map(len, self.tokens))


@dataclass(frozen=True)
class Distance:
    """How another model does along the answers, for each of them a mean over its tokens.

    Attributes:
        kl: KL(base || this) in nats. `agreement`: share of positions with the same likeliest token.
        losses: negative log-likelihood in nats.
    """

    kl: tuple[float, ...]
    agreement: tuple[float, ...]
    losses: tuple[float, ...]


def record_answers(
    model: LanguageModel,
    prompts: Sequence[Tokens],
    completions: Sequence[Tokens],
    count: int,
    longest: int,
    progress: Progress,
    description: str,
) -> Answers:
    """The likelihoods of a model along its own answers.

    Args:
        completions: its greedy answers without what ends them, of at most `longest` tokens.
        count: of tokens of each answer that are kept, at least one: of an empty answer, what ended it.
    """
    short = [tuple(tokens[:count]) for tokens in completions]
    # what ended an answer that is shorter is a token, too: the likeliest there
    whole = [(*tokens, None) if len(tokens) < min(count, longest) else tokens for tokens in short]

    def summary(number: int, logits: Tensor) -> tuple[tuple[int, ...], tuple[Tensor, ...], float]:
        # of equal logits, which half precision has, argmax and topk name different ones
        first, ids = logits.argmax(-1), logits.topk(min(KEPT, logits.shape[-1]), -1).indices
        tokens = tuple(int(first[i]) if token is None else token for i, token in enumerate(whole[number]))
        kept = tuple(each.cpu() for each in (first.int(), ids.int(), _classes(logits, ids)))
        return tokens, kept, _loss(logits, tokens)

    found = along(model, prompts, short, [len(tokens) for tokens in whole], summary, Bar(progress, description))
    tokens, kept, losses = zip(*found, strict=True)
    likeliest, ids, log_probs = (torch.cat(each) for each in zip(*kept, strict=True))
    return Answers(tokens, likeliest, ids, log_probs, losses)


def distance(
    model: LanguageModel, prompts: Sequence[Tokens], answers: Answers, progress: Progress, description: str
) -> Distance:
    """How far a model is from the one that gave the answers to these very prompts."""
    starts = torch.tensor([0, *answers.lengths]).cumsum(0).tolist()

    def compared(number: int, logits: Tensor) -> tuple[float, float, float]:
        rows = slice(starts[number], starts[number + 1])
        ids, base = answers.ids[rows].long().to(logits.device), answers.log_probs[rows].to(logits.device)
        kl = _divergence(base, _classes(logits, ids))
        same = (logits.argmax(-1) == answers.likeliest[rows].to(logits.device)).double()
        return float(kl.mean()), float(same.mean()), _loss(logits, answers.tokens[number])

    found = along(model, prompts, answers.tokens, answers.lengths, compared, Bar(progress, description))
    kl, agreement, losses = zip(*found, strict=True)
    return Distance(kl, agreement, losses)


def _divergence(base: Tensor, other: Tensor) -> Tensor:
    """KL(base || other) in nats for log-probabilities [..., classes]; a class without probability adds nothing."""
    p, q = base.double(), other.double()
    return torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1).clamp_min(0.0)


def _classes(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities [tokens, kept + 1] of the tokens `ids` [tokens, kept], and of all others together."""
    total = logits.logsumexp(-1, keepdim=True)
    rest = logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, ids), rest], -1) - total


def _loss(logits: Tensor, tokens: Sequence[int]) -> float:
    target = torch.tensor(tokens, device=logits.device)
    return float(torch.nn.functional.cross_entropy(logits, target))


def along(
    model: LanguageModel,
    prompts: Sequence[Tokens],
    answers: Sequence[Sequence[int]],
    lengths: Sequence[int],
    work: Callable[[int, Tensor], R],
    bar: Bar,
) -> list[R]:
    """Gives `work` the number of each prompt and the logits [length, vocabulary] fp32 of the tokens of its answer."""
    texts = [[*prompt, *answer[: size - 1]] for prompt, answer, size in zip(prompts, answers, lengths, strict=True)]
    batches = list(_small(model, max(lengths)).batches(texts))

    def call(rows: list[int]) -> list[R]:
        first = torch.tensor([len(prompts[i]) - 1 for i in rows])
        sizes = torch.tensor([lengths[i] for i in rows])
        logits = _logits_at(model, [texts[i] for i in rows], first, sizes)
        return [work(i, logits[place, : lengths[i]].float()) for place, i in enumerate(rows)]

    calls = [partial(call, rows) for rows in batches]
    found: dict[int, R] = {}
    for number, results in model.runner.run(calls, replace(bar, sizes=list(map(len, batches)))):
        found.update(zip(batches[number], results, strict=True))
    return [found[i] for i in range(len(prompts))]


def _logits_at(model: LanguageModel, texts: Sequence[Tokens], first: Tensor, sizes: Tensor) -> Tensor:
    """Logits [texts, most, vocabulary] at `sizes` positions of each text from `first` on; then the last one again."""
    steps = torch.arange(int(sizes.max()))[None]
    where = first[:, None] + steps.minimum(sizes[:, None] - 1)
    rows = torch.arange(len(texts))[:, None]
    with on_input(model.head, lambda hidden: hidden[rows, where]):
        logits: Tensor = run(model.model, pad(texts, model.device) | {"use_cache": False}).logits
    return logits


def _small(model: LanguageModel, most: int) -> LanguageModel:
    """The model with as many prompts a pass as their logits have room for."""
    vocabulary = getattr(model.head, "out_features", LARGEST_VOCABULARY)
    return replace(model, batch_size=max(1, min(model.batch_size, MOST_LOGITS // (most * vocabulary))))
