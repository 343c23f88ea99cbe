"""All that the bytes of an output depend on: two runs with the same identity may go on with one another's work."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from abliterate.calibration.chat import ChatFormat
from abliterate.calibration.load import pick_device, pick_dtype
from abliterate.calibration.prompts import PromptSplit
from abliterate.checkpoint.fingerprint import fingerprint
from abliterate.job import Job
from abliterate.prompting import Prompts
from abliterate.subject import RunOptions, Subject, versions

SHOWN = 3
"""So many differences a message names."""
WITHOUT_EFFECT = {"progress", "memory", "scratch", "cache_limit"}
"""Options that the output does not depend on: wherever they are, weights give the same bits."""


def identity_of(job: Job) -> dict[str, Any]:
    """The identity of a run, as plain JSON values, in the parts that a message may name.

    Raises:
        CheckpointError: a file of the base cannot be read.
    """
    source = job.subject.source
    return {
        "recipe": job.recipe.as_dict(),
        "prompts": prompts_identity(job.prompts),
        "base": {"name": job.subject.name, "revision": source.revision, "commit": source.commit},
        "files of the base": fingerprint(job.subject.checkpoint),
        "options": _options(job),
        "versions": versions(),
        "command": job.command,
    }


def prompts_identity(prompts: Prompts) -> dict[str, Any]:
    """All sets by their hashes."""
    sets = {"harmful": prompts.harmful, "harmless": prompts.harmless, "look-alike": prompts.look_alike}
    return {name: _split(split) for name, split in sets.items()}


def _split(split: PromptSplit) -> dict[str, str]:
    parts = {"train": split.train, "validation": split.validation, "test": split.test}
    return {"source": split.train.source} | {name: part.sha256 for name, part in parts.items()}


def _options(job: Job) -> dict[str, Any]:
    file = job.direction_file
    return options_identity(job.options, job.subject, job.tongue.chat) | {
        "evaluate": job.evaluate,
        "direction file": hashlib.sha256(file.read_bytes()).hexdigest() if file else None,
    }


def options_identity(options: RunOptions, subject: Subject, chat: ChatFormat | None) -> dict[str, Any]:
    """Every option, whatever options there will be; those that are left to the machine as it chooses."""
    device = pick_device(options.device)
    names = {field.name for field in fields(options)} - WITHOUT_EFFECT
    given = {name: getattr(options, name) for name in sorted(names)}
    return given | {
        "device": str(device),
        "dtype": str(pick_dtype(options.dtype, device, subject.stored_dtype)).removeprefix("torch."),
        "chat template": hashlib.sha256(chat.template.encode()).hexdigest() if chat else None,
    }


def what_differs(earlier: Mapping[str, Any], now: Mapping[str, Any], files: bool = True) -> str | None:
    """In what an earlier run is another one, in words; None where it is the same.

    Args:
        files: the files of the base count, which are not at hand for a model that has yet to be fetched.
    """
    for part in now:
        if part == "files of the base" and not files:
            continue
        found = list(_differences(earlier.get(part), now[part]))
        if found:
            return f"{part}: {', '.join(found[:SHOWN])}{', ...' if len(found) > SHOWN else ''}"
    return None


def _differences(earlier: Any, now: Any, name: str = "") -> Iterator[str]:
    """Names of what differs; with its values where they are short."""
    if isinstance(earlier, Mapping) and isinstance(now, Mapping):
        for key in sorted({*earlier, *now}):
            yield from _differences(earlier.get(key), now.get(key), f"{name}.{key}".lstrip("."))
    elif earlier != now:
        values = (json.dumps(now), json.dumps(earlier))
        short = all(len(value) <= 40 for value in values)
        yield f"{name} is {values[0]}, was {values[1]}" if short and name else name or "another one"
