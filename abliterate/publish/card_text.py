"""The card's sentences and tables, from the manifest; the template only lays them out."""

from collections.abc import Mapping, Sequence
from typing import Any

from abliterate.publish.base_card import Inherited, is_hub_id
from abliterate.publish.card_evidence import evidence_text
from abliterate.publish.card_method import method_text
from abliterate.publish.figures import claim_of, percent, significant, writer_groups
from abliterate.publish.markdown import block, bullets, code, link, plain, table
from abliterate.publish.usage import usage

Manifest = Mapping[str, Any]
_STREAM_TEXTS = {"chat": "chat prompts", "plain": "plain text", "random": "random tokens"}


def card_text(manifest: Manifest, inherited: Inherited, name: str, has_base_card: bool) -> dict[str, Any]:
    """Every variable of the template."""
    return {
        "title": plain(name),
        "notices": _notices(manifest),
        "statement": _statement(manifest, inherited),
        "safety": bullets([*_safety(manifest), license_text(inherited, has_base_card)]),
        "evidence": evidence_text(manifest["evaluation"]),
        **_certificate(manifest),
        "verify": block(f"abliterate verify {code_word(name)}", "sh"),
        **method_text(manifest),
        "usage": usage(manifest, name),
        "reproduce": block(manifest["reproduce"], "sh"),
        "versions": _versions(manifest),
        "files": bullets(_files(manifest)),
        "warnings": bullets([plain(warning) for warning in manifest["warnings"]]),
    }


def code_word(name: str) -> str:
    """A name as one word of a shell command."""
    return name if all(char.isalnum() or char in "-_./@" for char in name) else "FOLDER"


def _notices(manifest: Manifest) -> str:
    """What must be read before anything else: a failed certificate, a partial edit, a relaxed selection."""
    certificate, selection = manifest["certificate"], manifest["selection"]
    strength, notices = manifest["edit"]["strength"], []
    if manifest["edit"].get("inexact"):
        notices.append(
            f"> **The edit is not exact, and on this architecture cannot be:** {plain(manifest['edit']['inexact'])}. "
            f"Nothing is certified: {plain(claim_of(certificate))}."
        )
    elif strength != 1:
        notices.append(
            "> **The edit is not exact**, on purpose, and nothing is certified beyond that the weights lost what they "
            f"should: {plain(claim_of(certificate))}."
        )
    elif not certificate["holds"]:
        notices.append(
            "> **The certificate does not hold.** The direction is still in the residual stream of these weights, so "
            f"this is not a finished conversion: {plain(claim_of(certificate))}."
        )
    if selection and selection["relaxed"]:
        notices.append(
            "> **The selection was relaxed.** No candidate direction was within the bound on side effects, so the edit "
            f"may cost more than refusals: {plain(selection['reason'])}."
        )
    return "\n\n".join(notices)


def _statement(manifest: Manifest, inherited: Inherited) -> str:
    base = manifest["base"]
    named = code(base["id"] or base["model_type"])
    if base["source"] == "hub" and is_hub_id(base["id"]):
        named = link(base["id"], f"https://huggingface.co/{base['id']}")
    origin = ", ".join(link(model, f"https://huggingface.co/{model}") for model in inherited.base_models)
    came = f" (a local model, made from {origin})" if origin and base["source"] == "local" else ""
    whole = manifest["certificate"]["holds"]
    done = "with its refusal direction removed" if whole else "edited along its refusal direction"
    how = (
        "projected out of the stored weights, so that no layer can use it"
        if whole
        else "weakened in the stored weights"
    )
    return (
        f"**This is {named}{came} {done}.** When a chat model declines a request, its hidden state moves along one "
        f"direction. Here that direction was {how}. Nothing was trained, and nothing was put in its place."
    )


def _safety(manifest: Manifest) -> list[str]:
    figures, evaluation = "", manifest["evaluation"] or {}
    before, after = (evaluation.get(which, {}).get("refusal_rate_substring") for which in ("base", "edited"))
    if before is not None and after is not None:
        figures = (
            f" Of held-out harmful prompts it declined {percent(before)} before the edit and {percent(after)} after."
        )
    return [
        "**It will follow harmful requests more often than its base.** What it then writes can be dangerous, illegal, "
        f"or wrong.{figures}",
        "It is for people who study how refusal works, who test the safeguards around models, or who build on models "
        "with safeguards of their own. It is not for the public without supervision, nor for minors.",
        "Bring your own safeguards: filters on what goes in and comes out, limits on who may use it, people who look. "
        "You answer for what you do with it.",
        "Only refusing was meant to change; what the base knows and its biases are still there. The same direction may "
        "have carried more than refusals: read the side effects under Evidence.",
    ]


def license_text(inherited: Inherited, has_base_card: bool) -> str:
    """Which license there is, or why none is named."""
    if inherited.license is None and inherited.license_name is None:
        why = "its card cannot be read" if not inherited.readable else "its card names none"
        if not has_base_card:
            why = "it came without a card"
        return (
            "**License:** that of the base model, which still applies with its restrictions on use. It is not named "
            f"here because {why}: look it up before you use or share these weights."
        )
    named = code(inherited.license_name or inherited.license or "")
    if inherited.license_link and inherited.license_link.startswith("https://"):
        named += f" ({link('text', inherited.license_link)})"
    return f"**License:** {named}, inherited from the base model; it still applies with its restrictions on use."


def _certificate(manifest: Manifest) -> dict[str, str]:
    certificate, stream = manifest["certificate"], manifest["certificate"]["stream"]
    exact = manifest["edit"]["strength"] == 1 and not manifest["edit"].get("inexact")
    failed = "Does not hold" if exact else "Not exact"
    text = f"**{'Holds' if certificate['holds'] else failed}:** {plain(claim_of(certificate))}."
    rows = [_worst_row(manifest)]
    if stream is None:
        text += " The stream was not measured."
    else:
        kind = _STREAM_TEXTS[stream["text"]]
        text += f" The stream was measured with the stored weights over {stream['tokens']} tokens of {kind}."
        if stream["first_failure"]:
            text += f" The direction first returns at {plain(stream['first_failure'])}."
        rows.append(
            [
                "residual stream: largest abs(h·r) / ‖h‖ over layers and tokens",
                *_measures(stream["before"], stream["after"], stream),
            ]
        )
    return {
        "certificate": text,
        "certificate_table": table(["share of the direction", "before", "after", "tolerance", ""], rows, right=4),
        "writers_table": _writers_table(manifest["edit"]["writers"]),
    }


def _worst_row(manifest: Manifest) -> list[str]:
    writers = manifest["certificate"]["writers"]
    label = f"{writers['checked']} tensors that write to the stream: worst, relative to its tolerance"
    if writers["worst"] is None:
        return [label, *["–"] * 4]
    worst = writers["worst"]
    before = next((w["residual_before"] for w in manifest["edit"]["writers"] if w["tensor"] == worst["tensor"]), None)
    verdict = {**worst, "holds": not writers["failed"]}
    return [f"{label} ({code(worst['tensor'])})", *_measures(before, worst["residual_after"], verdict)]


def _measures(before: float | None, after: float | None, part: Manifest) -> list[str]:
    verdict = "holds" if part["holds"] else "**fails**"
    return [significant(before), significant(after), significant(part["tolerance"]), verdict]


def _writers_table(writers: Sequence[Manifest]) -> str:
    rows = [
        [
            code(group.pattern),
            str(group.count),
            group.form,
            significant(group.before),
            significant(group.after),
            significant(group.tolerance),
        ]
        for group in writer_groups(writers)
    ]
    return table(["tensors", "how many", "edit", "before", "after", "tolerance"], rows, right=3)


def _versions(manifest: Manifest) -> str:
    tool, base = manifest["tool"], manifest["base"]
    versions = ", ".join(
        f"{name} {plain(tool[name])}" for name in ("abliterate", "torch", "transformers", "safetensors")
    )
    commit = f" The base was at commit {code(base['commit'])}." if base["commit"] else ""
    hashes = (
        "`abliteration.json` has the SHA-256 of every file of weights that went in and came out."
        if manifest["output"]["hashed"]
        else "SHA-256 of the files of weights was left out (`--no-hash`), so that they cannot be told from others."
    )
    return (
        f"Made with {versions} and Python {plain(tool['python'])}.{commit} The same command on the same base and "
        f"machine makes the same bytes; {hashes}"
    )


def _files(manifest: Manifest) -> list[str]:
    names = [shard["name"] for shard in manifest["output"]["shards"]]
    weights = code(names[0]) if len(names) == 1 else f"{code(names[0])} to {code(names[-1])} ({len(names)} files)"
    by_hash = " by hash," if manifest["output"]["hashed"] else ""
    lines = [
        f"{weights}: the edited weights",
        f"`abliteration.json`: what was done to what,{by_hash} with every score and residual",
        f"{code(manifest['direction']['file'])}: the direction, in the tensor `direction`",
    ]
    if len(names) == 1:
        index = f"{names[0].removesuffix('.safetensors')}.safetensors.index.json"
        lines.append(f"{code(index)}: names the weights, so that loaders leave the direction's file aside")
    if manifest["selection"]:
        lines.append("`selection.png`: the scores of the candidate directions")
    if "README.base.md" in manifest["output"]["files"]:
        lines.append("`README.base.md`: the card of the base model")
    carried = [name for name in manifest["output"]["files"] if name != "README.base.md"]
    changed = " (`config.json` with the change named above)" if manifest["edit"]["config_changes"] else ""
    named = ", ".join(code(name) for name in carried)
    return [*lines, f"carried over from the base{changed}: {named}"] if carried else lines
