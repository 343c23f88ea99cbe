"""Which first tokens start a refusal in this model."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from abliterate.calibration.model import LanguageModel, Tokens
from abliterate.direction.substrings import is_refusal
from abliterate.errors import CalibrationError
from abliterate.progress import SILENT, Progress

log = logging.getLogger(__name__)
PROBED, NEW_TOKENS = 48, 16

# Arditi et al. 2024, table 4: (model type, what its chat template holds, the words that start its refusals).
FAMILIES = (
    ("gemma", "<start_of_turn>", ("I",)),
    ("gemma2", "<start_of_turn>", ("I",)),
    ("llama", "[INST]", ("I",)),
    ("llama", "<|start_header_id|>", ("I",)),
    ("qwen", "<|im_start|>", ("I", "As")),
    ("qwen2", "<|im_start|>", ("I", "As")),
)


STARTS = ("I", "As", "Sorry")
"""Words that start refusals in most models: where a model's own start is closed to it, it refuses with another."""


@dataclass(frozen=True)
class RefusalTokens:
    """Ids of the tokens that start refusals, their texts, and where the list comes from.

    Attributes:
        source: "family" (published for it), "completions" (found from the model's own) or "recipe".
    """

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    source: str


def find_refusal_tokens(
    model: LanguageModel,
    harmful: Sequence[Tokens],
    harmless: Sequence[Tokens],
    progress: Progress = SILENT,
    template: str = "",
) -> RefusalTokens:
    """The known set of the model's family where its own refusals bear it out, else what its completions show.

    A token counts when more of the refusals to harmful prompts than of the answers to harmless ones start with it.

    Raises:
        CalibrationError: the model refuses too little for a direction to be found.
    """
    refused = _first_tokens_of_refusals(model, harmful[:PROBED], progress)
    answered = _first_tokens(model, harmless[:PROBED], progress)
    tried = min(PROBED, len(harmful))
    if sum(refused.values()) < max(2, tried // 10):
        raise CalibrationError(
            f"the model refused {sum(refused.values())} of {tried} harmful prompts, so there is no refusal direction "
            "to find; use a chat model that refuses, other --harmful prompts, or --direction FILE"
        )
    known = _family(model, template)
    if known and sum(refused[token] for token in known) >= 0.9 * sum(refused.values()):
        return _named(model, known, "family")
    chosen = [token for token, n in refused.most_common() if n / tried > answered[token] / min(PROBED, len(harmless))]
    if not chosen:
        raise CalibrationError(
            "refusals and answers start with the same tokens; name them in the recipe's direction.refusal_tokens"
        )
    return _named(model, tuple(chosen), "completions")


def named_refusal_tokens(model: LanguageModel, words: Sequence[str]) -> RefusalTokens:
    """The first token of each word that the recipe lists."""
    return _named(model, tuple(dict.fromkeys(_first_id(model, word) for word in words)), "recipe")


def other_starts(model: LanguageModel, known: RefusalTokens) -> tuple[int, ...]:
    """First tokens that a refusal may fall back on; none where the recipe says which tokens count."""
    if known.source == "recipe":
        return ()
    return tuple(dict.fromkeys(token for word in STARTS if (token := _first_id(model, word)) not in known.ids))


def _named(model: LanguageModel, ids: tuple[int, ...], source: str) -> RefusalTokens:
    texts = tuple(str(model.tokenizer.decode([token])) for token in ids)
    log.info("refusal tokens (%s): %s", source, ", ".join(map(repr, texts)))
    return RefusalTokens(ids, texts, source)


def _first_id(model: LanguageModel, word: str) -> int:
    return int(model.tokenizer(word, add_special_tokens=False)["input_ids"][0])


def _family(model: LanguageModel, template: str) -> tuple[int, ...]:
    kind = model.model.config.model_type
    words = next((words for family, mark, words in FAMILIES if family == kind and mark in template), ())
    return tuple(_first_id(model, word) for word in words)


def _first_tokens_of_refusals(model: LanguageModel, prompts: Sequence[Tokens], progress: Progress) -> Counter[int]:
    completions = model.generate(prompts, NEW_TOKENS, progress, "refusal tokens")
    return Counter(tokens[0] for tokens in completions if tokens and is_refusal(model.decode(tokens)))


def _first_tokens(model: LanguageModel, prompts: Sequence[Tokens], progress: Progress) -> Counter[int]:
    found: Counter[int] = Counter()
    for batch in model.forward(prompts, progress=progress, description="first tokens"):
        found.update(batch.logits.argmax(-1).tolist())
    return found
