"""The card of an adapter: what it does to its base, how it is loaded, and what it cannot do."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from abliterate.publish.base_card import Inherited, inherit, is_hub_id
from abliterate.publish.card import OWN_TAGS, one_or_list
from abliterate.publish.card_evidence import evidence_text
from abliterate.publish.card_text import license_text
from abliterate.publish.figures import claim_of, fold, significant
from abliterate.publish.markdown import block, bullets, code, link, plain, table
from abliterate.publish.portable import portable_name

Manifest = Mapping[str, Any]
_LOAD = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({base})
model = AutoModelForCausalLM.from_pretrained({base}, dtype="auto", device_map="auto")
model = PeftModel.from_pretrained(model, {name})  # this folder, or its id on the Hub
# model = model.merge_and_unload()  # for good"""
_SAFETY = (
    "**It makes the base follow harmful requests more often.** What that then writes can be dangerous, illegal, or "
    "wrong.",
    "It is for people who study how refusal works, who test the safeguards around models, or who build on models with "
    "safeguards of their own. It is not for the public without supervision, nor for minors.",
    "Bring your own safeguards: filters on what goes in and comes out, limits on who may use it, people who look. You "
    "answer for what you do with it.",
)
_ON = "the base with the stored adapter merged into it as PEFT merges it, in the dtype of the base's weights"
_TIED = (
    "**Head.** The base's output head is its embedding. Beside the base this adapter changes what is looked up and "
    "leaves the head as it is. Merged, both change, since they are one tensor."
)


def render_adapter_card(manifest: Manifest, base_card: str | None, name: str) -> str:
    """The content of `README.md`.

    Args:
        manifest: of the adapter.
        base_card: text of the base model's README.md.
        name: of the adapter: its folder, or its id on the Hub.
    """
    inherited, base = inherit(base_card), manifest["base"]
    bases = (base["id"],) if is_hub_id(base["id"]) else ()
    metadata = ModelCardData(
        base_model=one_or_list(bases),
        base_model_relation="adapter" if bases else None,
        language=one_or_list(inherited.languages),
        library_name="peft",
        license=inherited.license,
        license_name=inherited.license_name,
        license_link=inherited.license_link,
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys((*OWN_TAGS, "lora", *inherited.tags))),
    )
    snippet = _LOAD.format(base=json.dumps(base["id"]), name=json.dumps(portable_name(name)))
    parts = [
        f"# {plain(portable_name(name))}",
        *(f"> **{plain(warning)}.**" for warning in manifest["warnings"]),
        f"A LoRA adapter that takes a direction out of what the layers of {_named(base, inherited)} write: the one "
        "along which its hidden state moves when it declines a request. Nothing was trained.",
        bullets([*_SAFETY, license_text(inherited, base_card is not None)]),
        f"## Evidence\n\n{evidence_text(manifest['evaluation'], _ON)}",
        f"## How to use it\n\n{block(snippet, 'python')}",
        _loaders(manifest["edit"]),
        f"## What it holds\n\n{_table(manifest['edit']['tensors'])}",
        _exactness(manifest),
        _TIED if manifest["edit"]["head"] == "shared" else "",
        _left_out(manifest["edit"]["left_out"]),
        f"## How it was made\n\n{block(manifest['reproduce'], 'sh')}",
        _files(manifest),
    ]
    text = "\n\n".join(part for part in parts if part)
    return str(ModelCard(f"---\n{metadata}\n---\n\n{text}")).rstrip("\n") + "\n"


def _named(base: Manifest, inherited: Inherited) -> str:
    """The base; one that is not on the Hub is told by its hashes, since what it was made from is another model."""
    if is_hub_id(base["id"]):
        return link(base["id"], f"https://huggingface.co/{base['id']}")
    origin = ", ".join(link(model, f"https://huggingface.co/{model}") for model in inherited.base_models)
    made = f", made from {origin}, to which it does not belong" if origin else ""
    return f"{code(base['id'])} (a local model{made}; `abliteration.json` has the hashes of its weights)"


def _loaders(edit: Manifest) -> str:
    if edit["plain"]:
        return (
            "Servers that take LoRA adapters in PEFT's format, vLLM among them, take this one as far as they adapt "
            "these modules; PEFT adapts all of them."
        )
    return "It has biases or experts in it, which PEFT takes and many servers do not: merge it first for those."


def adapter_rows(tensors: Sequence[Manifest]) -> list[list[str]]:
    """Tensors that differ by layer alone in one row: name, how many, as what, largest share before, after, merged."""
    groups: dict[tuple[str, str], list[Manifest]] = {}
    for each in tensors:
        groups.setdefault((fold(each["tensor"]), each["kind"]), []).append(each)
    return [
        [name, str(len(group)), kind, _most(group, "before"), _most(group, "after"), _merged(group)]
        for (name, kind), group in groups.items()
    ]


def _table(tensors: Sequence[Manifest]) -> str:
    rows = [[code(name), *others] for name, *others in adapter_rows(tensors)]
    return table(["tensors", "how many", "as", "share along the direction before", "after", "merged"], rows, right=3)


def _most(group: Sequence[Manifest], key: str) -> str:
    return significant(max((each[key] for each in group if each[key] is not None), default=None))


def _merged(group: Sequence[Manifest]) -> str:
    return significant(max((each["merged"]["after"] for each in group if each["merged"]), default=None))


def _exactness(manifest: Manifest) -> str:
    certificate, stored = manifest["certificate"], ", ".join(manifest["base"]["dtype"])
    verdict = f"{'' if certificate['holds'] else '**not** '}within the tolerance that conversions are held to"
    if certificate["claim"].startswith("not exact"):
        verdict = "not certified"
    return (
        f"Rank {manifest['edit']['rank']}, in float32. Shares are ‖vᵀW‖ / ‖W‖, the largest of each group: of the base, "
        f"by the factors as stored, and as merged into weights of {stored}. Merged, it is {verdict}: "
        f"{plain(claim_of(certificate))}. Merging rounds, and that brings a little of the direction back; `abliterate "
        "convert` without `--adapter` writes weights whose rounding takes it out again."
    )


def _left_out(left_out: Sequence[Manifest]) -> str:
    if not left_out:
        return ""
    rows = [[code(each["tensor"]), plain(each["why"]), "no" if each["faithful"] else "**yes**"] for each in left_out]
    return f"Not in it:\n\n{table(['tensor', 'why', 'missed'], rows)}"


def _files(manifest: Manifest) -> str:
    tool = ", ".join(f"{key} {plain(value)}" for key, value in manifest["tool"].items())
    return (
        f"Made with {tool}. `abliteration.json` has every tensor and hash, {code(manifest['direction']['file'])} the "
        "direction."
    )
