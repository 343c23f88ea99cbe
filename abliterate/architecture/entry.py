"""The entry of the table for a checkpoint's config; for a multimodal model that of its text tower as well."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from abliterate.architecture.blueprint import Blueprint
from abliterate.architecture.rules import Family, Rules
from abliterate.architecture.table import Table, load_table
from abliterate.errors import RefusedError


@dataclass(frozen=True)
class Entry:
    """What is known of an architecture.

    Attributes:
        text: the entry for the text decoder.
        outside: rules for what is beside it.
        inexact: why no direction is exact; None where one is.
        probed: nothing in the table: found by gradients.
    """

    text: Family
    outside: Rules
    inexact: str | None = None
    probed: bool = False


def find_entry(config: Mapping[str, Any], blueprint: Blueprint, table: Table | None = None) -> Entry | None:
    """The entry for a config; None where the table has none.

    Raises:
        RefusedError: the entry says that this config is not converted.
    """
    table = table or load_table()
    model_type, settings = str(config.get("model_type")), settings_of(blueprint)
    family = table.find(model_type, settings)
    if family is None:
        return None
    outer = family
    if family.tower is not None:
        inner = _tower_type(config, family.tower, blueprint)
        found = table.find(inner, settings)
        if found is None:
            return None
        own = {"ahead" if key == "mtp" else key for key in outer.own}
        family = replace(found, **{key: getattr(outer, key) for key in own})
    return Entry(family, outer.outside, _refused(model_type, (outer, family), settings))


def check_type(model_type: str, table: Table | None = None) -> None:
    """Stops for types that no config makes convertible, before anything is built of theirs.

    Raises:
        RefusedError: with the table's reason.
    """
    families = [family for family in (table or load_table()).families if model_type in family.types]
    if families and all(family.refused is not None and not family.when for family in families):
        _refused(model_type, tuple(families), {})


def settings_of(blueprint: Blueprint) -> dict[str, Any]:
    """What the text decoder's config says, transformers' defaults filled in."""
    config = blueprint.model.config
    return {**config.to_dict(), **config.get_text_config(decoder=True).to_dict()}


def _tower_type(config: Mapping[str, Any], key: str, blueprint: Blueprint) -> str:
    """Model type of the text tower; as transformers takes it where config.json does not say."""
    stored: Any = config
    for name in key.split("."):
        stored = stored.get(name) if isinstance(stored, Mapping) else None
    named = stored.get("model_type") if isinstance(stored, Mapping) else None
    return str(named or blueprint.model.config.get_text_config(decoder=True).model_type)


def _refused(model_type: str, families: tuple[Family, ...], settings: Mapping[str, Any]) -> str | None:
    """Why a conversion would not be exact.

    Raises:
        RefusedError: there is none at all.
    """
    inexact: str | None = None
    for family in families:
        if family.refused is not None:
            raise RefusedError(f"model type {model_type} is not supported: {family.refused}", family.refused)
        inexact = inexact or family.inexact
        for refusal in family.refusals:
            if not refusal.applies(settings):
                continue
            if not refusal.inexact:
                value = settings[refusal.key]
                where = f"this {model_type} ({refusal.key} is {value} in config.json)"
                raise RefusedError(f"{where} is not supported: {refusal.why}", refusal.why)
            inexact = inexact or refusal.why
    return inexact
