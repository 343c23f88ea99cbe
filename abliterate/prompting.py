"""The prompts of one run: which instructions, in which chat format, as token ids."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from abliterate.calibration.chat import ChatFormat, make_chat_format
from abliterate.calibration.prompts import (
    Kind,
    PromptSet,
    PromptSplit,
    builtin,
    check_contrast,
    load_prompts,
    split_prompts,
)
from abliterate.errors import CalibrationError
from abliterate.recipe import CalibrationRecipe

log = logging.getLogger(__name__)
LEAST_TRAIN, LEAST_HELD_OUT = 16, 4


@dataclass(frozen=True)
class Prompts:
    """Both contrasting sets, and look-alikes: harmless in the words of harmful. Each split into its three parts."""

    harmful: PromptSplit
    harmless: PromptSplit
    look_alike: PromptSplit = field(default_factory=lambda: builtin("look_alike"))


def load_calibration(recipe: CalibrationRecipe, seed: int) -> Prompts:
    """The sets that the recipe names.

    Raises:
        CalibrationError: not found, too few, or the same prompt in both sets.
    """
    harmful = _load("harmful", recipe.harmful, recipe, seed)
    harmless = _load("harmless", recipe.harmless, recipe, seed)
    look_alike = _load("look_alike", recipe.look_alike, recipe, seed)
    check_contrast(harmful, harmless)
    return Prompts(harmful, harmless, look_alike)


def _load(kind: Kind, source: str, recipe: CalibrationRecipe, seed: int) -> PromptSplit:
    if source != "builtin":
        prompts = load_prompts(source)
        return split_prompts(prompts, *_sizes(len(prompts.instructions), recipe, source), seed)
    whole, sizes = builtin(kind), (recipe.train, recipe.validation, recipe.test)
    parts = list(zip((whole.train, whole.validation, whole.test), sizes, strict=True))
    if kind == "look_alike":
        # there are fewer of these, and no recipe asks for a number of them
        return PromptSplit(*(_first(part, min(n, len(part.instructions))) for part, n in parts))
    return PromptSplit(*(_first(part, n) for part, n in parts))


def _first(prompts: PromptSet, count: int) -> PromptSet:
    available = len(prompts.instructions)
    if count > available:
        raise CalibrationError(
            f"{prompts.source} has {available} prompts, not {count}; give a larger set, or ask for fewer in the recipe"
        )
    return PromptSet.of(prompts.instructions[:count], prompts.source)


def _sizes(available: int, recipe: CalibrationRecipe, source: str) -> tuple[int, int, int]:
    """Train, validation and test sizes; a set smaller than the recipe asks for is divided in the same proportions."""
    wanted = (recipe.train, recipe.validation, recipe.test)
    share = min(1.0, available / sum(wanted))
    sizes = tuple(math.floor(n * share) for n in wanted)
    least = (min(LEAST_TRAIN, recipe.train), *(min(LEAST_HELD_OUT, n) for n in wanted[1:]))
    if any(size < n for size, n in zip(sizes, least, strict=True)):
        raise CalibrationError(
            f"too few prompts in {source}: {available} divide into {sizes[0]} train, {sizes[1]} validation and "
            f"{sizes[2]} test, and at least {least[0]}, {least[1]} and {least[2]} are needed"
        )
    if share < 1:
        log.warning("%s has %d prompts, not %d: divided %d/%d/%d", source, available, sum(wanted), *sizes)
    return sizes[0], sizes[1], sizes[2]


def chat_format(
    tokenizer: Any, recipe: CalibrationRecipe, template: str | None, system_prompt: str | None
) -> ChatFormat:
    """The model's chat format; see `make_chat_format`."""
    return make_chat_format(tokenizer, template, system_prompt, thinking=recipe.thinking)


def encode(chat: ChatFormat, prompts: PromptSet) -> list[list[int]]:
    """Token ids of every instruction in its chat template, generation prompt included."""
    return [chat.encode(instruction) for instruction in prompts.instructions]


def encode_plain(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of plain text, with the tokenizer's own special tokens."""
    return [list(tokenizer(text)["input_ids"]) for text in texts]


def neutral_paragraphs() -> list[str]:
    """The built-in neutral text, a paragraph an item."""
    text = (resources.files("abliterate") / "evaluation" / "data" / "neutral.txt").read_text(encoding="utf-8")
    return [paragraph.strip() for paragraph in text.split("\n\n") if paragraph.strip()]
