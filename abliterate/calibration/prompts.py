"""Calibration prompts: the built-in sets, files, and Hub datasets, split and held apart."""

import hashlib
import json
import logging
import random
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal, get_args

from abliterate.calibration.sources import read_prompts
from abliterate.errors import CalibrationError

log = logging.getLogger(__name__)
Kind = Literal["harmful", "harmless", "look_alike"]
"""Look-alikes are harmless requests in the words of harmful ones: "how do I kill a process"."""
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class PromptSet:
    """Instructions, where they come from, and the sha256 of their canonical JSON."""

    instructions: tuple[str, ...]
    source: str
    sha256: str

    @classmethod
    def of(cls, instructions: tuple[str, ...], source: str) -> "PromptSet":
        """A set with its hash."""
        canonical = json.dumps(list(instructions), ensure_ascii=False, separators=(",", ":"))
        return cls(instructions, source, hashlib.sha256(canonical.encode()).hexdigest())


@dataclass(frozen=True)
class PromptSplit:
    """Three sets with no prompt in common: for means, for selection, and held out for evaluation."""

    train: PromptSet
    validation: PromptSet
    test: PromptSet

    @property
    def all(self) -> tuple[str, ...]:
        """Every instruction."""
        return self.train.instructions + self.validation.instructions + self.test.instructions


def builtin(kind: Kind) -> PromptSplit:
    """The built-in prompts of one kind."""
    return PromptSplit(*(_builtin_part(f"{kind}_{part}") for part in PARTS))


def _builtin_part(name: str) -> PromptSet:
    path = resources.files("abliterate.calibration") / "data" / f"{name}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    return PromptSet.of(tuple(json.loads(line)["instruction"] for line in lines if line.strip()), f"builtin:{name}")


def load_prompts(spec: str) -> PromptSet:
    """Prompts from `builtin:NAME`, `FILE[:column]`, or `hf:dataset[:config][:split][:column]`, without duplicates.

    Raises:
        CalibrationError: not found, not readable, or the column is not clear.
    """
    if spec.startswith("builtin:"):
        return _builtin_part(_known_part(spec))
    found = [text.replace("\r\n", "\n").strip() for text in read_prompts(spec)]
    unique = tuple(dict.fromkeys(found))
    if len(unique) < len(found):
        log.warning("%s: %d duplicate prompts left out", spec, len(found) - len(unique))
    name = spec if spec.startswith("hf:") else Path(spec).name
    return PromptSet.of(unique, name)


def _known_part(spec: str) -> str:
    name = spec.removeprefix("builtin:")
    known = [f"{kind}_{part}" for kind in get_args(Kind) for part in PARTS]
    if name not in known:
        raise CalibrationError(f"no built-in prompts named {name}; there are {', '.join(known)}")
    return name


def split_prompts(prompts: PromptSet, train: int, validation: int, test: int, seed: int) -> PromptSplit:
    """A deterministic split of the first `train + validation + test` prompts of a seeded shuffle.

    Raises:
        CalibrationError: there are too few.
    """
    needed = train + validation + test
    available = len(prompts.instructions)
    if available < needed:
        raise CalibrationError(
            f"too few prompts in {prompts.source}: {available}, and {needed} are needed "
            f"({train} train, {validation} validation, {test} test)"
        )
    shuffled = sorted(prompts.instructions)
    random.Random(seed).shuffle(shuffled)
    parts, start = [], 0
    for size in (train, validation, test):
        parts.append(PromptSet.of(tuple(shuffled[start : start + size]), prompts.source))
        start += size
    return PromptSplit(*parts)


def check_contrast(harmful: PromptSplit, harmless: PromptSplit) -> None:
    """Two sets that share prompts have no contrast to find a direction in.

    Raises:
        CalibrationError: any prompt is in both, whatever its case, spaces and punctuation.
    """
    left, right = ({_normalised(text) for text in split.all} for split in (harmful, harmless))
    both = left & right
    if both:
        whole = left == right
        raise CalibrationError(
            "the harmful and the harmless prompts are the same; they must differ"
            if whole
            else f"{len(both)} prompts are both in the harmful and in the harmless set; take them out of one"
        )


def _normalised(text: str) -> str:
    return re.sub(r"\W+", " ", text.casefold()).strip()
