"""The entry for a config: refused, inexact, or with a tower that has an entry of its own."""

from collections.abc import Mapping
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from abliterate.architecture.blueprint import Blueprint, blueprint_of
from abliterate.architecture.entry import Entry, find_entry, settings_of
from abliterate.architecture.table import Table, read_table
from abliterate.errors import ArchitectureError
from tests import pico

STEM = [{"writes": {"embed_tokens": {"kind": "embedding", "axis": 1}}}]
LLAMA: Mapping[str, Any] = {"types": ["llama"], "stem": STEM, "layer": [{"writes": {"mlp.down_proj": "mlp"}}]}
LLAVA: Mapping[str, Any] = {"types": ["llava"], "tower": "text_config", "outside": ["vision_tower"]}


def blueprint(family: str = "llama", **config: Any) -> Blueprint:
    made = AutoConfig.for_model(family, **{**pico.CONFIGS[family], **config})
    return blueprint_of(made, AutoModelForCausalLM.from_config)


@pytest.fixture(scope="module")
def llava() -> Blueprint:
    text = AutoConfig.for_model("llama", **pico.CONFIGS["llama"])
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    return blueprint_of(LlavaConfig(text_config=text, vision_config=vision), LlavaForConditionalGeneration)


def table(**entries: Mapping[str, Any]) -> Table:
    return read_table(entries, {})


def found(config: Mapping[str, Any], of: Blueprint, **entries: Mapping[str, Any]) -> Entry:
    entry = find_entry(config, of, table(**entries))
    assert entry is not None
    return entry


def test_the_entry_for_a_model_type() -> None:
    entry = found({"model_type": "llama"}, blueprint(), llama=LLAMA)
    assert entry.text.name == "llama" and entry.outside == entry.text.outside
    assert entry.inexact is None and not entry.probed
    assert find_entry({"model_type": "mistral"}, blueprint(), table(llama=LLAMA)) is None


def test_settings_are_those_of_the_text_tower_with_defaults(llava: Blueprint) -> None:
    settings = settings_of(llava)
    assert settings["hidden_size"] == pico.HIDDEN and settings["rms_norm_eps"] == 1e-6
    assert settings["vision_config"]["hidden_size"] == 16 and settings["model_type"] == "llama"


def test_when_looks_at_defaults_too() -> None:
    gated = {**LLAMA, "when": {"attention_bias": True}}
    assert found({"model_type": "llama"}, blueprint(attention_bias=True), a=LLAMA, b=gated).text.name == "b"
    assert found({"model_type": "llama"}, blueprint(attention_bias=False), a=LLAMA, b=gated).text.name == "a"
    default = {**LLAMA, "when": {"hidden_act": "silu"}}
    assert found({"model_type": "llama"}, blueprint(), a=LLAMA, b=default).text.name == "b"


def test_a_refused_type() -> None:
    with pytest.raises(ArchitectureError, match="model type llama is not supported: it is odd"):
        found({"model_type": "llama"}, blueprint(), llama={"types": ["llama"], "refused": "it is odd"})


def test_a_refused_config() -> None:
    refusing = {**LLAMA, "refuse": [{"key": "attention_bias", "is": True, "why": "it is odd"}]}
    problem = r"this llama \(attention_bias is True in config.json\) is not supported: it is odd"
    with pytest.raises(ArchitectureError, match=problem):
        found({"model_type": "llama"}, blueprint(attention_bias=True), llama=refusing)
    assert found({"model_type": "llama"}, blueprint(attention_bias=False), llama=refusing).inexact is None


def test_an_inexact_type_and_config() -> None:
    assert found({"model_type": "llama"}, blueprint(), llama={**LLAMA, "inexact": "it turns"}).inexact == "it turns"
    some = {**LLAMA, "inexact_if": [{"key": "hidden_act", "is": "relu", "why": "it turns"}]}
    assert found({"model_type": "llama"}, blueprint(hidden_act="relu"), llama=some).inexact == "it turns"
    assert found({"model_type": "llama"}, blueprint(), llama=some).inexact is None


def test_a_tower_has_the_entry_of_its_own_type(llava: Blueprint) -> None:
    config = {"model_type": "llava", "text_config": {"model_type": "llama"}}
    entry = found(config, llava, llama=LLAMA, llava=LLAVA)
    assert entry.text.name == "llama" and "vision_tower" in entry.outside.trees
    assert entry.text.layers == ("layers",) and entry.text.ahead is None


def test_what_the_outer_entry_says_itself_comes_before_the_tower_s(llava: Blueprint) -> None:
    config = {"model_type": "llava", "text_config": {"model_type": "llama"}}
    ahead = {"prefix": "mtp", "layers": "mtp.layers"}
    inner = {**LLAMA, "layers": "inner", "embedding": "e", "beyond": STEM, "mtp": ahead, "skip": ["mlp.down_proj"]}
    plain = found(config, llava, llama=inner, llava=LLAVA).text
    assert plain.layers == ("inner",) and plain.embedding == ("e",) and plain.beyond.exact and plain.skip
    assert plain.ahead is not None and plain.ahead.layers == "mtp.layers"
    own = {**LLAVA, "layers": ["a", "b"], "embedding": "f", "beyond": [], "mtp": {"prefix": "", "layers": "more"}}
    changed = found(config, llava, llama=inner, llava=own).text
    assert changed.layers == ("a", "b") and changed.embedding == ("f",) and not changed.beyond.exact
    assert changed.ahead is not None and changed.ahead.layers == "more"
    assert changed.layer == plain.layer and changed.stem == plain.stem and changed.skip == plain.skip


def test_what_a_tower_cannot_say_for_the_text(llava: Blueprint) -> None:
    config = {"model_type": "llava", "text_config": {"model_type": "llama"}}
    entry = found(config, llava, llama={**LLAMA, "gain_offset": 1}, llava=LLAVA)
    assert entry.text.gain_offset == 1


def test_a_tower_whose_type_is_not_said(llava: Blueprint) -> None:
    """Transformers then takes the type's own default, as the blueprint has it."""
    for text in ({"hidden_size": 3}, {"model_type": None}, "llama", None):
        config = {"model_type": "llava", "text_config": text}
        assert found(config, llava, llama=LLAMA, llava=LLAVA).text.name == "llama"
    assert found({"model_type": "llava"}, llava, llama=LLAMA, llava=LLAVA).text.name == "llama"


def test_a_tower_in_a_tower(llava: Blueprint) -> None:
    entries = {"llama": LLAMA, "llava": {**LLAVA, "tower": "thinker_config.text_config"}}
    config = {"model_type": "llava", "thinker_config": {"text_config": {"model_type": "llama"}}}
    assert found(config, llava, **entries).text.name == "llama"
    other = {"model_type": "llava", "thinker_config": {"text_config": {"model_type": "mistral"}}}
    assert find_entry(other, llava, table(**entries)) is None


def test_a_tower_that_is_not_in_the_table(llava: Blueprint) -> None:
    config = {"model_type": "llava", "text_config": {"model_type": "strange"}}
    assert find_entry(config, llava, table(llama=LLAMA, llava=LLAVA)) is None


@pytest.mark.parametrize("place", ["llama", "llava"])
def test_a_refusal_of_either_counts(llava: Blueprint, place: str) -> None:
    config = {"model_type": "llava", "text_config": {"model_type": "llama"}}
    refusal = {"refuse": [{"key": "hidden_size", "is": pico.HIDDEN, "why": "it is odd"}]}
    entries = {"llama": LLAMA, "llava": LLAVA}
    with pytest.raises(ArchitectureError, match=r"this llava .* it is odd"):
        found(config, llava, **entries | {place: {**entries[place], **refusal}})
    assert found(config, llava, **entries | {place: {**entries[place], "inexact": "why"}}).inexact == "why"
    refused = {"types": [place], "refused": "never"}
    with pytest.raises(ArchitectureError, match="model type llava is not supported: never"):
        found(config, llava, **entries | {place: refused})
