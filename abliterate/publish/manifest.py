"""The manifest, `abliteration.json`: a plain nested mapping to bytes and back; its shape is `manifest.schema.json`."""

import json
import math
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from abliterate.checkpoint.jsontext import is_shallow
from abliterate.checkpoint.regular import read_regular
from abliterate.errors import CheckpointError, first_line
from abliterate.publish.portable import portable_command, portable_name, portable_text, portable_values

MANIFEST_NAME = "abliteration.json"
SCHEMA = "abliteration/1"
MAX_BYTES = 20_000_000
"""Of a manifest that is read: one of 100,000 writers has half of that."""


def manifest_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a manifest."""
    text = resources.files("abliterate.publish").joinpath("manifest.schema.json").read_text("utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def portable_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest in JSON types alone: NaN and infinities as None, tuples as lists, no rooted paths of this machine.

    Top-level keys come in the schema's order, the keys below sorted. Paths are looked for where a user's own words may
    hold them (base.id, recipe, prompt and template sources, warnings, reproduce), and reduced to their last component.

    Raises:
        TypeError: a value is not of a JSON type (a tensor, a Path), or a key not a string; the message says where.
    """
    plain = plain_values(manifest, "manifest")
    for path, clean in _PLACES.items():
        _replace(plain, path, clean)
    order = list(manifest_schema()["properties"])
    known = [key for key in order if key in plain]
    return {key: plain[key] for key in [*known, *(key for key in plain if key not in order)]}


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """The file's content: UTF-8 JSON, indented by two, a newline at the end; equal manifests give equal bytes.

    Raises:
        TypeError: as `portable_manifest`.
    """
    text = json.dumps(portable_manifest(manifest), indent=2, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8", errors="backslashreplace")  # a lone surrogate becomes its JSON escape


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a converted checkpoint.

    Raises:
        CheckpointError: there is none, it is not JSON, or not one that this version writes.
    """
    path = folder / MANIFEST_NAME
    try:
        manifest = json.loads(read_regular(path, MAX_BYTES))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {MANIFEST_NAME}: it was not made by `abliterate convert`") from None
    except (OSError, ValueError, RecursionError, CheckpointError) as error:
        raise CheckpointError(f"{path} cannot be read ({first_line(error)}); convert the base model again") from error
    if not isinstance(manifest, dict) or not is_shallow(manifest) or manifest.get("schema") != SCHEMA:
        raise CheckpointError(f"{path} is not a manifest of schema {SCHEMA}; use the version that wrote it")
    missing = [key for key in manifest_schema()["required"] if key not in manifest]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}; convert the base model again")
    return manifest


def plain_values(value: Any, where: str) -> Any:
    """A copy in JSON types, keys sorted; NaN and infinities become None.

    Raises:
        TypeError: a value is not of a JSON type, or a key not a string; `where` says which.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        strange = [key for key in value if not isinstance(key, str)]
        if strange:
            raise TypeError(f"{where} has a key that is no string: {strange[0]!r}")
        return {key: plain_values(value[key], f"{where}.{key}") for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [plain_values(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise TypeError(f"{where} is a {type(value).__name__}, not a JSON type")


def _texts(values: Any) -> Any:
    return [portable_text(value) if isinstance(value, str) else value for value in values]


_PLACES: Mapping[tuple[str, ...], Callable[[Any], Any]] = {
    ("base", "id"): portable_name,
    ("recipe",): portable_values,
    ("calibration", "harmful", "source"): portable_name,
    ("calibration", "harmless", "source"): portable_name,
    ("calibration", "chat", "template_source"): portable_name,
    ("warnings",): _texts,
    ("reproduce",): portable_command,
}


def _replace(tree: Any, path: tuple[str, ...], clean: Callable[[Any], Any]) -> None:
    """Applies `clean` to the value at `path`, where there is one."""
    for key in path[:-1]:
        tree = tree.get(key) if isinstance(tree, dict) else None
    if isinstance(tree, dict) and tree.get(path[-1]) is not None:
        tree[path[-1]] = clean(tree[path[-1]])
