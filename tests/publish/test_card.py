import json
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from abliterate.publish.card import render_card
from abliterate.publish.markdown import block, code, plain

Manifest = dict[str, Any]
Change = Callable[[str, Any], Manifest]
GOLDEN = Path(__file__).parent / "golden"
BASE = """\
---
license: other
license_name: pico-licence
license_link: https://example.org/licence
language: [no, en]
base_model: example-org/Pico-Root
tags: [conversational, onnx, "license:other", "arxiv:1234.5678"]
datasets: [example-org/secret-set]
model-index: [{name: x}]
---
# Pico
"""
NAME = "Pico-Chat-135M-abliterated"


def _metadata(card: str) -> dict[str, Any]:
    return ModelCard(card).data.to_dict()


def _same(name: str, text: str) -> None:
    """Equal to the golden file; ABLITERATE_WRITE_GOLDEN=1 writes it anew."""
    path = GOLDEN / name
    if os.environ.get("ABLITERATE_WRITE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_golden_calibrated(manifest: Manifest) -> None:
    _same("calibrated.md", render_card(manifest, BASE, NAME))


def test_golden_from_a_file(gemma_manifest: Manifest) -> None:
    _same("from_a_file.md", render_card(gemma_manifest, None, "pico-gemma-abliterated"))


def test_metadata_inherits_what_still_holds(manifest: Manifest) -> None:
    assert _metadata(render_card(manifest, BASE, NAME)) == {
        "base_model": "example-org/Pico-Chat-135M",
        "base_model_relation": "finetune",
        "language": ["no", "en"],
        "library_name": "transformers",
        "license": "other",
        "license_name": "pico-licence",
        "license_link": "https://example.org/licence",
        "pipeline_tag": "text-generation",
        "tags": ["abliterated", "abliterate", "refusal-direction", "conversational"],
    }


def test_local_base_names_its_origin(gemma_manifest: Manifest) -> None:
    card = render_card(gemma_manifest, BASE, "x")
    assert _metadata(card)["base_model"] == "example-org/Pico-Root"
    assert "made from [example-org/Pico-Root](https://huggingface.co/example-org/Pico-Root)" in card
    unnamed = render_card(gemma_manifest, "# no metadata", "x")
    assert not {"base_model", "base_model_relation", "license", "language"} & set(_metadata(unnamed))
    assert "huggingface.co/pico-gemma" not in unnamed
    assert "names none" in unnamed and "came without a card" in render_card(gemma_manifest, None, "x")


@pytest.mark.parametrize(
    "block_text",
    [
        "license: [unclosed",
        "- a\n- list",
        "!!python/object/apply:os.system ['touch /tmp/owned']",
        "a: " + "[" * 5000,
        "license: apache-2.0\nx: " + "y" * 70_000,
        "? {a: b}\n: c",
        "\x00: 1",
    ],
)
def test_a_broken_base_card_does_not_stop(
    manifest: Manifest, caplog: pytest.LogCaptureFixture, block_text: str
) -> None:
    with caplog.at_level(logging.WARNING, logger="abliterate"):
        card = render_card(manifest, f"---\n{block_text}\n---\n# Pico\n", NAME)
    assert [record for record in caplog.records if "no readable metadata" in record.message]
    assert all("\n" not in record.message for record in caplog.records)
    assert "license" not in _metadata(card) and "its card cannot be read" in card


@pytest.mark.parametrize(
    "block_text",
    [
        "license: {a: b}\nlanguage: !!python/tuple [[en]]",
        "license: 'a\n\n  b'",
        "license: <script>x</script>",
        "license: [[mit]]",
        "license: " + "x" * 300,
        "license_link: javascript:alert(1)\nlanguage: ['[x](y)']",
        "license_link: https://a.example/(x)[y]",
    ],
)
def test_values_that_are_no_names_are_left_out(manifest: Manifest, block_text: str) -> None:
    metadata = _metadata(render_card(manifest, f"---\n{block_text}\n---\n", NAME))
    assert not {"license", "license_name", "license_link", "language"} & set(metadata)


def test_hostile_yaml_is_quick_and_small(manifest: Manifest) -> None:
    rows = ["a0: &a0 [mit, mit, mit, mit, mit, mit, mit, mit, mit]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40)]
    started = time.monotonic()
    card = render_card(manifest, "\n".join(["---", *rows, "license: *a39", "tags: *a39", "---", ""]), NAME)
    assert time.monotonic() - started < 5
    assert "license" not in _metadata(card) and len(card) < 20_000


def test_failed_certificate_is_said_first(change: Change) -> None:
    manifest = change("certificate.holds", False)
    manifest["certificate"].update(exact=False, claim="does not hold: the direction is back")
    manifest["certificate"]["stream"].update(holds=False, first_failure="the input of layer 3, written by layer_2.mlp")
    body = render_card(manifest, None, NAME).split("# " + NAME)[1].strip()
    assert body.startswith("> **The certificate does not hold.**")
    assert "**Does not hold:** the direction is back." in body
    assert "layer 3, written by layer\\_2.mlp" in body and "**fails**" in body
    assert "with its refusal direction removed" not in body


def test_partial_edit_is_said_first(change: Change) -> None:
    manifest = change("edit.strength", 0.5)
    manifest["certificate"].update(holds=False, exact=False, claim="not exact: strength 0.5 leaves part")
    body = render_card(manifest, None, NAME).split("# " + NAME)[1].strip()
    assert body.startswith("> **The edit is not exact**, on purpose")
    assert "W - 0.5\\,r\\,(r^\\top W)" in body and "**Not exact:** strength 0.5 leaves part." in body
    assert "direction removed" not in body and "not a finished conversion" not in body
    assert "at run time would" not in body


def test_relaxed_selection_is_said_first(change: Change) -> None:
    card = render_card(change("selection.relaxed", True), None, NAME)
    assert card.split("# " + NAME)[1].strip().startswith("> **The selection was relaxed.**")


def test_nothing_is_said_that_was_not_measured(manifest: Manifest, change: Change) -> None:
    card = render_card(change("evaluation", None), None, NAME)
    assert "**Not measured.**" in card and "98.4 %" not in card and "loss on" not in card
    for which in ("base", "edited"):
        for key in manifest["evaluation"]["base"]:
            if "refusal" in key:
                manifest["evaluation"][which][key] = None
    manifest["evaluation"]["edited"]["kl_first_token"] = float("nan")
    card = render_card(manifest, None, NAME)
    assert (
        "**Refusals were not measured.**" in card
        and "refused, by" not in card
        and "KL from the base, first" not in card
    )
    assert "| 3.042 [2.607, 3.693] | 3.053 [2.617, 3.708] |" in card and "declined" not in card


def test_heads(change: Change) -> None:
    ablation = "computes what ablating the direction at run time would"
    assert "**Tied head.**" in render_card(change("edit.head", "tied"), None, NAME)
    assert ablation not in render_card(change("edit.head", "tied"), None, NAME)
    assert ablation in render_card(change("edit.head", "separate"), None, NAME)
    untied = change("edit.head", "untied")
    untied["edit"].update(added=["lm_head.weight"], config_changes={"tie_word_embeddings": False})
    card = render_card(untied, None, NAME)
    assert ablation in card and "(`lm_head.weight`; in `config.json` `tie_word_embeddings: false`)" in card
    untied["edit"]["writers"][0]["form"] = "orthogonal"
    card = render_card(untied, None, NAME)
    assert ablation not in card and "u = \\frac{g \\odot r}{\\lVert g \\odot r \\rVert}" in card


def test_values_cannot_become_markup(manifest: Manifest) -> None:
    evil = "x](http://evil.example) <img src=x> {{ 7*7 }} | `a` $b$\n# new"
    manifest["warnings"] = [evil]
    manifest["selection"]["reason"] = evil
    manifest["calibration"]["chat"].update(system_prompt="`{% raw %}`\n\n# x", post_instruction_tokens=["|`", "\n"])
    manifest["edit"]["writers"][0]["tensor"] = "a|b`c"
    manifest["reproduce"] = "abliterate convert 'x\n````\n# y'"
    card = render_card(manifest, None, "[evil](x)")
    assert (
        "49" not in card and "](http://evil" not in re.sub(r"\\\]", "", card) and "<img" not in card.replace("\\<", "")
    )
    assert not re.search(
        r"^# (?!\\\[evil\\\])", re.sub(r"^(`{3,}).*?^\1$", "", card, flags=re.DOTALL | re.MULTILINE), re.M
    )
    tables = [line for line in card.splitlines() if line.startswith("| ``a")]
    assert len(tables) == 1 and tables[0].startswith("| ``a\\|b`c`` | 1 |")


def test_no_completions_and_no_folders(manifest: Manifest) -> None:
    manifest["base"].update(id="/home/someone/pico", source="local")
    manifest["reproduce"] = "abliterate convert /home/someone/pico OUT"
    card = render_card(manifest, None, "/home/someone/out")
    assert "someone" not in card and "abliterate convert pico OUT" in card and "# out\n" in card


def test_snippets(manifest: Manifest, gemma_manifest: Manifest) -> None:
    chat = render_card(manifest, None, NAME)
    assert "apply_chat_template" in chat and "trust_remote_code" not in chat
    assert "apply_chat_template" not in render_card(gemma_manifest, None, NAME)
    manifest["output"]["files"].append("modeling_pico.py")
    manifest["calibration"]["chat"]["template_source"] = "chatml"
    card = render_card(manifest, None, 'a"b')
    assert card.count("trust_remote_code=True") == 2 and "found with `chatml`" in card and "apply_chat" not in card
    for text in (chat, card):
        code_text = text.split("```python\n")[1].split("\n```")[0]
        compile(code_text, "snippet", "exec")


def test_many_shards_are_folded(change: Change) -> None:
    shards = [{"name": f"model-0000{i}-of-00003.safetensors", "sha256": "0" * 64, "bytes": 1} for i in (1, 2, 3)]
    card = render_card(change("output.shards", shards), None, NAME)
    assert "`model-00001-of-00003.safetensors` to `model-00003-of-00003.safetensors` (3 files)" in card


def test_stream_not_measured(change: Change) -> None:
    card = render_card(change("certificate.stream", None), None, NAME)
    assert "The stream was not measured." in card and "residual stream: largest" not in card


def test_markdown_helpers() -> None:
    assert plain("a*b\n  c|d\\") == "a\\*b c\\|d\\\\"
    assert code("a`b``c") == "```a`b``c```" and code("`x") == "`` `x ``" and code("") == "` `"
    assert block("a\n```\nb").startswith("````\n")


def test_card_is_yaml_and_ends_with_a_newline(manifest: Manifest) -> None:
    card = render_card(manifest, BASE, NAME)
    assert yaml.safe_load(card.split("---\n")[1])["language"] == ["no", "en"]
    assert (
        card.endswith(".\n")
        and "\n\n\n" not in card
        and card == render_card(json.loads(json.dumps(manifest)), BASE, NAME)
    )


def test_evidence_has_intervals_and_changes(manifest: Manifest, older_manifest: Manifest) -> None:
    card = render_card(manifest, None, NAME)
    assert "| harmful refused, by phrase | 98.4 % [91.7, 99.7] | 1.6 % [0.3, 8.3] | -96.9 [-100, -92.2] |" in card
    assert "| look-alikes refused, by phrase | 17.2 % [9.9, 28.2] | 0 % [0, 5.7] | -17.2 [" in card
    assert "| KL from the base, 16 tokens | – | 0.0235 [" in card and "*Look-alikes* are harmless" in card
    older = render_card(older_manifest, None, NAME)
    assert "| harmful refused, by phrase | 98.4 % (63/64) | 1.56 % (1/64) |\n" in older
    assert not any(word in older for word in ("intervals", "ook-alike", "changes"))
