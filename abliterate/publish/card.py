"""The model card: metadata and text from the manifest, through `card.md.jinja` and huggingface_hub's ModelCard."""

import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from abliterate.publish.base_card import Inherited, inherit, is_hub_id
from abliterate.publish.card_text import card_text
from abliterate.publish.manifest import portable_manifest
from abliterate.publish.portable import portable_name

OWN_TAGS = ("abliterated", "abliterate", "refusal-direction")


def render_card(manifest: Mapping[str, Any], base_card: str | None, name: str) -> str:
    """The content of `README.md`: YAML metadata and Markdown, a newline at the end.

    Args:
        manifest: the manifest of the conversion, in the shape of `manifest.schema.json`.
        base_card: text of the base model's README.md; of one that cannot be parsed nothing is inherited, and the log
            says so.
        name: of the converted model: its folder, or its id on the Hub.
    """
    record, inherited = portable_manifest(manifest), inherit(base_card)
    template = resources.files("abliterate.publish").joinpath("card.md.jinja").read_text("utf-8")
    text = card_text(record, inherited, portable_name(name), base_card is not None)
    card = ModelCard.from_template(card_metadata(record, inherited), template_str=template, c=text)
    return re.sub(r"\n{3,}", "\n\n", str(card)).rstrip("\n") + "\n"


def card_metadata(manifest: Mapping[str, Any], inherited: Inherited) -> ModelCardData:
    """What the Hub indexes; keys without a value are left out."""
    bases = base_models(manifest, inherited)
    return ModelCardData(
        base_model=one_or_list(bases),
        base_model_relation="finetune" if bases else None,
        language=one_or_list(inherited.languages),
        library_name="transformers",
        license=inherited.license,
        license_name=inherited.license_name,
        license_link=inherited.license_link,
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys((*OWN_TAGS, *inherited.tags))),
    )


def base_models(manifest: Mapping[str, Any], inherited: Inherited) -> tuple[str, ...]:
    """Hub ids of the base: what was converted, or where a local folder's own card says it comes from."""
    base = manifest["base"]
    return (base["id"],) if is_hub_id(base["id"]) else inherited.base_models


def one_or_list(values: tuple[str, ...]) -> str | list[str] | None:
    """As the metadata has it: one by itself, several as a list, None for none."""
    return values[0] if len(values) == 1 else list(values) or None
