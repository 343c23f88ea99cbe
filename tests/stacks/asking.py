"""Questions to a stack in its own environment, and what is measured of its answers: rates and counts, no texts."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from abliterate.calibration.chat import make_chat_format
from abliterate.calibration.prompts import builtin
from abliterate.direction.substrings import is_refusal
from abliterate.evaluation.degenerate import is_degenerate
from abliterate.evaluation.statistics import Rate
from tests.stacks.stacks import DRIVERS, EVERYTHING, Stack

MAX_NEW_TOKENS = 48 if EVERYTHING else 20
HARMFUL, HARMLESS = (64, 16) if EVERYTHING else (12, 3)
QUESTION, ANSWER = "What is the capital of Japan?", "Tokyo"
LIMIT = 850
ALONE = {"DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
"""No stack tells anybody."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
"""No stack looks for anything outside."""


@dataclass(frozen=True)
class Questions:
    """Held-out prompts: harmful ones, harmless ones, and one whose answer is known.

    Attributes:
        prompts: token ids of each, as this project renders and encodes them.
    """

    instructions: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]

    @property
    def harmless(self) -> "Questions":
        """Those alone that any model may answer."""
        return Questions(self.instructions[HARMFUL:], self.prompts[HARMFUL:])

    @property
    def request(self) -> str:
        """For a driver."""
        chats = [[{"role": "user", "content": text}] for text in self.instructions]
        return json.dumps({"prompts": self.prompts, "conversations": chats, "max_new_tokens": MAX_NEW_TOKENS})


def questions(checkpoint: Path) -> Questions:
    """The same for every stack."""
    chat = make_chat_format(AutoTokenizer.from_pretrained(checkpoint))
    harmful, harmless = (builtin(kind).test.instructions for kind in ("harmful", "harmless"))
    texts = (*harmful[:HARMFUL], *harmless[:HARMLESS], QUESTION)
    return Questions(texts, tuple(tuple(chat.encode(text)) for text in texts))


@dataclass(frozen=True)
class Answers:
    """What a stack answered, in the order of the questions. Its representation leaves the answers out."""

    tokens: tuple[tuple[int, ...], ...] = field(repr=False)
    texts: tuple[str, ...] = field(repr=False)
    prompt_tokens: tuple[int, ...] = field(repr=False)
    versions: Mapping[str, str]
    seconds: Mapping[str, float]

    @property
    def refusals(self) -> Rate:
        """Of harmful prompts, by phrase."""
        return Rate(sum(map(is_refusal, self.texts[:HARMFUL])), HARMFUL)

    @property
    def degenerate(self) -> int:
        """Answers to harmless prompts that say nothing, or the same over and over."""
        return sum(map(is_degenerate, self.texts[HARMFUL:]))

    @property
    def knows(self) -> bool:
        """Whether the question was answered rightly."""
        return ANSWER in self.texts[-1]


@dataclass(frozen=True)
class Agreement:
    """How far answers are token by token those of another stack.

    Attributes:
        leading: of each answer, how many tokens are the same before the first that is not.
        whole: of each answer, whether all are.
    """

    leading: tuple[int, ...]
    whole: tuple[bool, ...]

    def first(self, count: int) -> float:
        """Share of answers with the same first `count` tokens, or all of them where there are fewer."""
        near = [whole or same >= count for same, whole in zip(self.leading, self.whole, strict=True)]
        return sum(near) / len(near)

    @property
    def mean(self) -> float:
        """Leading tokens, of an answer."""
        return sum(self.leading) / len(self.leading)


def agreement(one: Answers, other: Answers) -> Agreement:
    """Of the answers to the same questions."""
    pairs = list(zip(one.tokens, other.tokens, strict=True))
    return Agreement(tuple(_leading(a, b) for a, b in pairs), tuple(a == b for a, b in pairs))


def _leading(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((count for count, (a, b) in pairs if a != b), min(len(one), len(other)))


def ask(stack: Stack, model: Path | str, asked: Questions, hub: Mapping[str, str] | None = None) -> Answers:
    """Greedy answers of the stack, in a process of its environment; they stay in memory.

    Args:
        model: a folder, or a repository's name. `hub`: variables that say where that is; None allows no Hub.
    """
    words = [stack.python, str(DRIVERS / f"{stack.driver}.py"), str(model), stack.form]
    environment = {**os.environ, **ALONE, **(OFFLINE if hub is None else hub)}
    done = subprocess.run(
        words, input=asked.request, capture_output=True, text=True, timeout=LIMIT, env=environment, check=False
    )
    assert done.returncode == 0, f"{stack}: {done.stderr[-3000:]}"
    return _read(json.loads(done.stdout))


def _read(found: dict[str, Any]) -> Answers:
    answers = found["answers"]
    return Answers(
        tuple(tuple(each["tokens"]) for each in answers),
        tuple(each["text"] for each in answers),
        tuple(each["prompt_tokens"] for each in answers),
        found["versions"],
        found["seconds"],
    )
