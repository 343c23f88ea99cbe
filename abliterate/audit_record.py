"""What `audit.json` says, as a plain nested mapping."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from abliterate.audit.effects import Effect
from abliterate.audit.halving import Window, smallest_dose
from abliterate.audit.similarity import Categories
from abliterate.audit.study import Audit
from abliterate.find import FoundDirection
from abliterate.publish.audit_verdict import verdict
from abliterate.publish.manifest import plain_values
from abliterate.publish.portable import portable_command, portable_name
from abliterate.subject import Subject, versions

AUDIT_NAME = "audit.json"
SCHEMA = "abliteration-audit/1"
HOOKS = (
    "Measured with hooks on the loaded model, without changing a weight, and by refusal score at the first token of "
    "the answer, not by reading completions: the figures of a converted checkpoint are those of its own card."
)
MEANING = (
    "Whoever has the weights can make these edits. Where little of the model carries refusal, refusal does not protect "
    "against that."
)


@dataclass(frozen=True)
class Setting:
    """What was audited, and how.

    Attributes:
        recipe: its name. `command`: makes the same report again.
        dtype: what was computed in.
        categorised: every harmful train prompt has a category.
    """

    subject: Subject
    recipe: str
    command: str
    dtype: str
    categorised: bool


def audit_record(audit: Audit, found: FoundDirection, setting: Setting) -> dict[str, Any]:
    """The record, in JSON types alone; NaN as None."""
    source, plan = setting.subject.source, setting.subject.plan
    content = {
        "schema": SCHEMA,
        "model": {
            "id": portable_name(setting.subject.name),
            "commit": source.commit,
            "type": plan.model_type,
            "layers": plan.num_layers,
            "hidden_size": plan.hidden_size,
        },
        "recipe": setting.recipe,
        "verdict": verdict(audit),
        "notes": _notes(audit, setting),
        "prompts": _prompts(audit, found),
        "tokens": [found.chat.tokenizer.decode([token]) for token in found.chat.post_instruction],
        "refusal_tokens": list(found.refusal_tokens.texts),
        "pick": {
            "position": audit.pick[0],
            "layer": audit.pick[1],
            "relaxed": found.selection.choice.relaxed,
            "reason": found.selection.choice.reason,
        },
        "base": _effect(audit.base),
        "grid": _grid(audit),
        "directions": _directions(audit),
        "strengths": _strengths(audit),
        "windows": _windows(audit),
        "layers": {"position": audit.pick[0], "cosines": audit.layers},
        "categories": _categories(audit.categories),
        "dtype": setting.dtype,
        "tool": versions(),
        "reproduce": portable_command(setting.command),
    }
    record: dict[str, Any] = {key: plain_values(value, key) for key, value in content.items()}
    return record


def audit_bytes(record: Mapping[str, Any]) -> bytes:
    """The file's content: UTF-8 JSON, a newline at the end; equal records give equal bytes."""
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8", errors="backslashreplace")


def _notes(audit: Audit, setting: Setting) -> list[str]:
    notes = [HOOKS, MEANING]
    if setting.subject.plan.inexact:
        notes.append(f"On this architecture no direction is exact: {setting.subject.plan.inexact}.")
    if not setting.categorised:
        notes.append("Categories are left out: not every harmful prompt has a `category` in its source.")
    elif audit.categories is None:
        notes.append("Categories are left out: fewer than two have enough refused prompts.")
    elif audit.categories.left_out:
        notes.append(f"Categories with too few refused prompts are left out: {', '.join(audit.categories.left_out)}.")
    return notes


def _prompts(audit: Audit, found: FoundDirection) -> dict[str, Any]:
    sets = {"harmful": found.prompts.harmful, "harmless": found.prompts.harmless}
    means = {"harmful": found.directions.harmful, "harmless": found.directions.harmless}
    return {
        name: {
            "source": portable_name(split.train.source),
            "train": len(split.train.instructions),
            "kept": means[name].kept,
            "validation": len(split.validation.instructions),
            "grid": min(audit.grid.prompts, len(split.validation.instructions)),
        }
        for name, split in sets.items()
    }


def _effect(effect: Effect) -> dict[str, Any]:
    rate = effect.refusals
    return {
        "refusal_rate": rate.share,
        "low": rate.low,
        "high": rate.high,
        "prompts": rate.count,
        "score": effect.score,
        "kl": effect.kl,
    }


def _grid(audit: Audit) -> dict[str, Any]:
    grid = audit.grid
    positions = len(grid.bypass)
    return {
        "positions": list(range(-positions, 0)),
        "bypass": grid.bypass,
        "induce": grid.induce,
        "kl": grid.kl,
        "baseline": {"harmful": grid.base_harmful, "harmless": grid.base_harmless},
    }


def _directions(audit: Audit) -> dict[str, Any]:
    steps = [
        {"directions": k, "position": key[0], "layer": key[1]} | _effect(effect)
        for k, (key, effect) in enumerate(zip(audit.span.keys, audit.span.effects, strict=True), 1)
    ]
    return {"enough": audit.span.enough, "steps": steps}


def _strengths(audit: Audit) -> dict[str, Any]:
    least = smallest_dose(audit.doses, audit.base)
    doses = [{"strength": dose.strength} | _effect(dose.effect) for dose in audit.doses]
    return {"halving": None if least is None else {"strength": least.strength} | _effect(least.effect), "doses": doses}


def _windows(audit: Audit) -> dict[str, Any]:
    windows = audit.windows
    return {
        "base": _effect(windows.base),
        "tried": [_window(window) for window in windows.tried],
        "halving": _window(windows.smallest) if windows.smallest else None,
    }


def _window(window: Window) -> dict[str, Any]:
    return {"first": window.first, "last": window.last} | _effect(window.effect)


def _categories(found: Categories | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "names": found.names,
        "prompts": found.counts,
        "cosines": found.cosines,
        "cosine_to_pick": found.to_pick,
        "mean": found.mean,
        "chance": found.chance,
        "left_out": found.left_out,
    }
