"""What differs beside the weights: config.json key by key, tokenizer, chat template, and whatever else is there."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterate.checkpoint.files import CONFIG, INDEX_SUFFIX, Checkpoint, files_in, read_json
from abliterate.checkpoint.hashing import file_sha256
from abliterate.checkpoint.regular import is_file
from abliterate.errors import AbliterateError
from abliterate.progress import unseen

SMALL_JSON = 1 << 20
"""JSON files up to here are compared key by key."""
MOST_KEYS = 50
SHORT = 80


@dataclass(frozen=True)
class ChangedKey:
    """A value of a JSON file; None stands for a key that is not there."""

    key: str
    base: str | None
    edited: str | None


@dataclass(frozen=True)
class ChangedFile:
    """A file that both have with other content.

    Attributes:
        keys: what changed in it, of a JSON file that is not large; empty where that was not compared.
    """

    name: str
    keys: tuple[ChangedKey, ...]


@dataclass(frozen=True)
class OtherFiles:
    """Files beside the weights. `config`: keys of config.json that changed."""

    config: tuple[ChangedKey, ...]
    changed: tuple[ChangedFile, ...]
    missing: tuple[str, ...]
    added: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not (self.config or self.changed or self.missing or self.added)


def compare_files(base: Checkpoint, edited: Checkpoint) -> OtherFiles:
    """Compares every file but weights and their index."""
    ours, theirs = _files(base), _files(edited)
    changed = []
    for name in sorted(set(ours) & set(theirs)):
        if file_sha256(ours[name], unseen) != file_sha256(theirs[name], unseen):
            changed.append(ChangedFile(name, _keys_of(ours[name], theirs[name])))
    config = changed_keys(base.config, edited.config)
    return OtherFiles(
        config, tuple(changed), tuple(sorted(set(ours) - set(theirs))), tuple(sorted(set(theirs) - set(ours)))
    )


def _files(checkpoint: Checkpoint) -> dict[str, Path]:
    weights = {shard.path for shard in checkpoint.shards}
    found = {}
    for path in files_in(checkpoint.folder):
        name = path.relative_to(checkpoint.folder).as_posix()
        if is_file(path) and path not in weights and name != CONFIG and not name.endswith(INDEX_SUFFIX):
            found[name] = path
    return found


def _keys_of(base: Path, edited: Path) -> tuple[ChangedKey, ...]:
    if base.suffix != ".json" or max(base.stat().st_size, edited.stat().st_size) > SMALL_JSON:
        return ()
    try:
        return changed_keys(read_json(base), read_json(edited))
    except AbliterateError:
        return ()


def changed_keys(base: Mapping[str, Any], edited: Mapping[str, Any]) -> tuple[ChangedKey, ...]:
    """Keys, dotted, whose values differ."""
    before, after = _flat(base, ""), _flat(edited, "")
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return tuple(ChangedKey(key, before.get(key), after.get(key)) for key in sorted(keys)[:MOST_KEYS])


def _flat(value: Any, where: str) -> dict[str, str]:
    if isinstance(value, Mapping) and value:
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{where}.{key}" if where else key).items()}
    text = json.dumps(value, ensure_ascii=True)
    return {where: text if len(text) <= SHORT else f"{text[:SHORT]}… ({len(text)} characters)"}
