"""The card's method section: how the direction was found, what was edited, and what became of the head."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from abliterate.publish.candidates import ranked, score_names, spares, verdict
from abliterate.publish.figures import significant, visible
from abliterate.publish.markdown import code, plain, table
from abliterate.publish.searched import search_text

Manifest = Mapping[str, Any]


def method_text(manifest: Manifest) -> dict[str, Any]:
    """The template's variables for the section."""
    edit, selection = manifest["edit"], manifest["selection"]
    strength = _strength(edit["strength"])
    common = {"edit": _edit(edit), "strength": strength, "gains": _gains(edit, strength), "head": _head(edit)}
    if selection is None or manifest["calibration"] is None:
        given = (
            "The direction *r*, a unit vector as wide as the residual stream, was given as a file; how it was found is "
            f"not known to this conversion. SHA-256 {code(manifest['direction']['sha256'])}."
        )
        return {**common, "direction": given, "direction_equation": False}
    pick = selection["pick"]
    return {
        **common,
        "direction": _between(selection),
        "direction_equation": True,
        "layer": pick["layer"],
        "position": f"{pick['position']}{_token(pick['position'], manifest['calibration'])}",
        "prompts": _prompts(manifest["calibration"], manifest["recipe"]["direction"]["filter"]),
        "selection": _selection(selection),
        "candidates": _candidates(selection),
        "search": search_text(manifest["search"]) if manifest.get("search") else "",
    }


def _between(selection: Manifest) -> str:
    kind = "refused look-alikes of harmful prompts" if spares(selection) else "harmful prompts"
    return f"Between the mean hidden states of {kind} *H* and harmless prompts *B*:"


def _strength(strength: float | None) -> str:
    """The factor in the equations; lambda where it is not the same everywhere."""
    if strength is None:
        return "\\lambda\\,"
    return "" if strength == 1 else f"{strength:g}\\,"


def _token(position: int, calibration: Manifest) -> str:
    tokens = calibration["chat"]["post_instruction_tokens"]
    return f" ({code(visible(tokens[position]))})" if 0 < -position <= len(tokens) else ""


def _prompts(calibration: Manifest, filtered: bool) -> str:
    chat = calibration["chat"]
    sets = " and ".join(
        f"{each['train']} {kind} prompts ({code(each['source'])}, {each['kept']} kept)"
        for kind, each in ((kind, calibration[kind]) for kind in ("harmful", "harmless"))
    )
    own = chat["template_source"] == "model"
    template = "the model's own chat template" if own else f"the chat template {code(chat['template_source'])}"
    system = f", system prompt {code(chat['system_prompt'])}" if chat["system_prompt"] else ""
    thinking = {"on": ", thinking", "off": ", thinking switched off"}.get(chat["thinking"], "")
    tokens = ", ".join(code(visible(token["text"])) for token in calibration["refusal_tokens"]["tokens"])
    kept = "; a prompt is kept when the model itself answers it as expected" if filtered else ""
    return (
        f"Means over {sets}, in {template}{system}{thinking}{kept}. A refusal score is the log-odds that the answer "
        f"starts with one of {tokens}."
    )


def _selection(selection: Manifest) -> str:
    pick, base, limits = selection["pick"], selection["baseline"], selection["thresholds"]
    reason = plain(selection["reason"])
    if spares(selection):
        return (
            f"{reason[:1].upper()}{reason[1:]}, on validation prompts. Each candidate is first made orthogonal to the "
            f"refusal direction at its place; the first token's KL on harmless prompts is "
            f"{significant(pick['kl'])} nats. {len(selection['candidates'])} candidates were {_searched(selection)}."
        )
    bypass = f"from {significant(base['harmful'])} to {significant(pick['bypass'])} (bypass)"
    induce = f"from {significant(base['harmless'])} to {significant(pick['induce'])} (induce)"
    return (
        f"{reason[:1].upper()}{reason[1:]}. With the pick ablated, the mean refusal score on harmful validation "
        f"prompts goes {bypass}; with it added, that on harmless ones {induce}; the first token's KL on harmless ones "
        f"is {significant(pick['kl'])} nats. The rule takes the lowest bypass among candidates with KL at most "
        f"{limits['max_kl']:g}, induce at least {limits['min_induce']:g}, and a layer below "
        f"{limits['max_layer_fraction']:g} of the depth; "
        f"{len(selection['candidates'])} candidates were {_searched(selection)}."
    )


def _candidates(selection: Manifest) -> str:
    rows = [
        [
            verdict(row, selection),
            str(row["position"]),
            str(row["layer"]),
            *(significant(row[key]) for key in ("bypass", "induce", "kl")),
        ]
        for row in ranked(selection)
    ]
    return table(["candidate", "position", "layer", *score_names(selection)], rows, right=5)


def _searched(selection: Manifest) -> str:
    passes, whole = selection["forward_passes"], selection["exhaustive_forward_passes"]
    if selection["method"] == "exhaustive":
        return f"all measured, in {passes:,} forward passes"
    return f"screened in {passes:,} forward passes instead of {whole:,}"


def _edit(edit: Manifest) -> str:
    kinds = Counter(writer["kind"] for writer in edit["writers"])
    named = ", ".join(f"{count} {plain(kind)}" for kind, count in kinds.items())
    text = (
        f"Every tensor that writes to the residual stream ({len(edit['writers'])}: {named}) is edited along *r*, on "
        f"its output axis, whatever its layout on disk; every other tensor is the base's, bit for bit.{_removes(edit)}"
    )
    return f"{text[:-1]}:"


def _removes(edit: Manifest) -> str:
    """What is removed beside one direction at one strength."""
    removes, texts = edit.get("removes", {}), []
    if removes.get("directions", 1) > 1:
        texts.append(f"*r* stands for {removes['directions']} orthonormal directions, all of which are removed.")
    if removes.get("per_layer"):
        texts.append("Each layer loses a direction of its own.")
    if removes.get("strengths"):
        values = [value for row in removes["strengths"]["layers"] for value in row]
        texts.append(
            f"The strength *λ* is set for each layer, of attention and of the MLP, from {min(values):.2g} to "
            f"{max(values):.2g}; `abliteration.json` has all of them."
        )
    if removes.get("norms") == "kept":
        texts.append("Then every column is scaled back to the length that it had, which keeps it free of *r*.")
    return "".join(f" {text}" for text in texts)


def _gains(edit: Manifest, strength: str) -> str:
    """What was done where a norm with a learned gain stands between the tensor and the stream."""
    forms = Counter(writer["form"] for writer in edit["writers"])
    texts = []
    if forms["oblique"]:
        texts.append(
            f"Where a norm with gain *g* follows ({forms['oblique']} tensors), the projection is oblique, which is "
            "exact after the gain:\n\n"
            f"$$ W \\leftarrow W - {strength}(r \\oslash g)\\,\\big((g \\odot r)^\\top W\\big) $$"
        )
    if forms["orthogonal"]:
        texts.append(
            f"Where such a gain is close to 0 somewhere ({forms['orthogonal']} tensors), the projection is "
            f"orthogonal:\n\n$$ W \\leftarrow W - {strength}u\\,(u^\\top W), "
            "\\qquad u = \\frac{g \\odot r}{\\lVert g \\odot r \\rVert} $$"
        )
    return "\n\n".join(texts)


def _head(edit: Manifest) -> str:
    same = all(writer["form"] == "plain" for writer in edit["writers"]) and edit["strength"] == 1
    ablation = " The model computes what ablating the direction at run time would." if same else ""
    if edit["head"] == "tied":
        return (
            "**Tied head.** The output head shares the embedding, so the edit of the embedding edits the head as well: "
            "the logits are not those of ablating the direction at run time."
        )
    if edit["head"] == "separate":
        return f"**Separate head.** The output head is a tensor of its own and was left as it is.{ablation}"
    added = ", ".join(code(name) for name in edit["added"]) or "the copy that the base has of it"
    changes = ", ".join(code(f"{key}: {str(value).lower()}") for key, value in edit["config_changes"].items())
    return (
        "**Untied head.** In the base the output head shares the embedding. Here the unedited embedding is stored as "
        f"the head ({added}; in `config.json` {changes}), and only the embedding that writes to the stream is edited."
        f"{ablation}"
    )
