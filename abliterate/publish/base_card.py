"""What a model card inherits from the card of its base: untrusted text, read as strings and nothing else."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

log = logging.getLogger(__name__)
LARGEST_BLOCK = 64 * 1024  # characters of metadata; the Hub's own cards stay far below
_MOST_ITEMS, _LONGEST = 256, 200
_BLOCK = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)(?:\r?\n)---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_HUB_ID = re.compile(r"\A[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}\Z")
_CODE = re.compile(r"\A[A-Za-z0-9][\w.+-]{0,63}\Z")
_LINK = re.compile(r"\A(?:https://[^\s<>()\[\]\"'`\\]+|[\w][\w.-]*)\Z")
# Tags of files that are not converted, or that the Hub derives itself.
_OWN_TAGS = ("onnx", "gguf", "ggml", "transformers.js", "coreml", "openvino", "mlx", "tflite", "jax", "tf", "pytorch")
_DERIVED_TAG = re.compile(r"\A(?:base_model|license|dataset|datasets|region|arxiv|doi|model-index|generated_from)\b")


@dataclass(frozen=True)
class Inherited:
    """Metadata of the base card that the new card takes over; empty where it is absent or not usable.

    Attributes:
        readable: False where there is metadata that cannot be parsed.
    """

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = ()
    base_models: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    readable: bool = True


def is_hub_id(name: str | None) -> bool:
    """Whether the name has the form `org/name`."""
    return name is not None and _HUB_ID.match(name) is not None


def inherit(card: str | None) -> Inherited:
    """Reads the metadata block; a card that cannot be read is logged and gives nothing."""
    match = _BLOCK.match(card) if card else None
    if match is None:
        return Inherited()
    try:
        metadata = _parse(match.group(1))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        log.warning("the base model's card has no readable metadata (%s): license and language are left out", reason)
        return Inherited(readable=False)
    return Inherited(
        license=_first(metadata, "license", _CODE),
        license_name=_first(metadata, "license_name", _CODE),
        license_link=_first(metadata, "license_link", _LINK),
        languages=_strings(metadata.get("language"), _CODE),
        base_models=_strings(metadata.get("base_model"), _HUB_ID),
        tags=tuple(tag for tag in _strings(metadata.get("tags"), _CODE) if _keeps(tag)),
    )


def _parse(block: str) -> Mapping[str, Any]:
    """BaseLoader makes strings of every scalar: no objects, no dates, and `language: no` stays Norwegian."""
    if len(block) > LARGEST_BLOCK:
        raise ValueError(f"{len(block)} characters long")
    metadata = yaml.load(block, Loader=yaml.BaseLoader)
    if not isinstance(metadata, dict):
        raise ValueError("not a mapping")
    return metadata


def _first(metadata: Mapping[str, Any], key: str, form: re.Pattern[str]) -> str | None:
    return next(iter(_strings(metadata.get(key), form)), None)


def _strings(value: Any, form: re.Pattern[str]) -> tuple[str, ...]:
    """The well-formed strings of a string or a list, each once."""
    items = value if isinstance(value, list) else [value]
    texts = [item for item in items[:_MOST_ITEMS] if isinstance(item, str) and len(item) <= _LONGEST]
    return tuple(dict.fromkeys(text for text in texts if form.match(text)))


def _keeps(tag: str) -> bool:
    return tag not in _OWN_TAGS and not _DERIVED_TAG.match(tag)
