"""The table as shipped, and how strictly it is read."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abliterate.architecture.rules import Condition, GainRule, Refusal, Rule, fold_numbers
from abliterate.architecture.table import expand, find_family, load_table, read_table
from abliterate.errors import ArchitectureError
from tests import pico

PARTS: dict[str, Any] = {"mlp": {"mlp.{gate,up}": {"reads": 1}, "mlp.down": {"writes": 0, "kind": "mlp"}}}
ENTRY: dict[str, Any] = {
    "defaults": {"tie_word_embeddings": False, "has_bias": False},
    "prefix": "model.",
    "layers": "layers",
    "embedding": "embed",
    "head": ["lm_head"],
    "stem": [{"embed": {"writes": 1, "kind": "embedding"}, "norm": {"norm": "hidden"}}],
    "layer": ["mlp", {"mlp.down": {"bias": "has_bias"}, "after": {"norm": "hidden"}}],
}


def rules(entry: dict[str, Any], **others: Any) -> dict[str, Rule]:
    return {rule.name: rule for rule in read_table([("f", {"a": entry, **others})], PARTS)["a"].rules}


def test_the_shipped_table() -> None:
    table = load_table()
    assert {name for name, family in table.items() if family.refused is None} == set(pico.FAMILIES)
    assert {name for name, family in table.items() if family.refused} == {"gemma3"}
    for name, family in table.items():
        if family.refused:
            continue
        assert family.model_type == name
        by_name = {rule.name: rule for rule in family.rules}
        assert by_name[family.embedding].axis == 1
        for rule in family.rules:
            assert rule.reason and rule.optional is (rule.role == "outside")
            assert (rule.role == "writer") is (rule.kind != "")
            assert rule.role != "writer" or rule.axis in (0, 1)
            assert rule.gain is None or (rule.role == "writer" and by_name[rule.gain.tensor].role == "norm")
        assert all(refusal.why for refusal in family.refusals)


def test_only_gemma_has_gains() -> None:
    with_gain = {name: {r.gain.offset for r in family.rules if r.gain} for name, family in load_table().items()}
    assert {name: offsets for name, offsets in with_gain.items() if offsets} == {"gemma2": {1.0}, "gemma3_text": {1.0}}


def test_find_family() -> None:
    assert find_family("mistral").name == "llama"
    with pytest.raises(ArchitectureError, match=r"model type rwkv is not in the table .*; supported: gemma2, gemma3_t"):
        find_family("rwkv")
    with pytest.raises(ArchitectureError, match="model type gemma3 is not supported: it is multimodal"):
        find_family("gemma3")


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("a.b", ["a.b"]),
        ("a.{x,y}.b", ["a.x.b", "a.y.b"]),
        ("{a,b}{c,d}", ["ac", "ad", "bc", "bd"]),
        ("{N}.{x,y}", ["{N}.x", "{N}.y"]),
        ("{x,}y", ["xy", "y"]),
    ],
)
def test_expand(name: str, names: list[str]) -> None:
    assert expand(name) == names


@pytest.mark.parametrize(
    ("name", "folded"),
    [
        ("layers.0.a", "layers.*.a"),
        ("layers.12.a.3", "layers.*.a.*"),
        ("1.a", "*.a"),
        ("7", "*"),
        ("layers.01.a", "layers.01.a"),
        ("ln_1.weight", "ln_1.weight"),
        ("layers.-1.a", "layers.-1.a"),
        ("layers.1e3.a", "layers.1e3.a"),
        ("layers. 1.a", "layers. 1.a"),
        ("layers.١.a", "layers.١.a"),
        ("layers.1١.a", "layers.1١.a"),
        ("a.0.1.b", "a.*.*.b"),
        ("layers.1234567890.a", "layers.1234567890.a"),
    ],
)
def test_fold_numbers(name: str, folded: str) -> None:
    assert fold_numbers(name) == folded


@given(st.integers(0, 10**9 - 1))
def test_a_folded_layer_is_the_rule_of_all_layers(layer: int) -> None:
    rule = Rule("layers.{N}.mlp.down_proj.weight", "writer", "")
    assert fold_numbers(rule.name.replace("{N}", str(layer))) == rule.folded


def test_parts_and_what_adds_to_them() -> None:
    found = rules(ENTRY)
    assert list(found) == [
        "embed.weight",
        "norm.weight",
        "layers.{N}.mlp.gate.weight",
        "layers.{N}.mlp.up.weight",
        "layers.{N}.mlp.down.weight",
        "layers.{N}.mlp.down.bias",
        "layers.{N}.after.weight",
    ]
    down, bias = found["layers.{N}.mlp.down.weight"], found["layers.{N}.mlp.down.bias"]
    assert (down.role, down.kind, down.axis, down.dimensions, down.present) == ("writer", "mlp", 0, 2, Condition())
    assert (bias.role, bias.kind, bias.axis, bias.dimensions) == ("writer", "bias", 0, 1)
    assert bias.present == Condition(("has_bias",))


def test_a_gain_is_that_of_the_same_layer_for_weight_and_bias() -> None:
    gain = {"mlp.down": {"gain": {"norm": "after", "offset": 1}, "bias": True}}
    found = rules({**ENTRY, "layer": [*ENTRY["layer"], gain]})
    expected = GainRule("layers.{N}.after.weight", 1.0)
    assert found["layers.{N}.mlp.down.weight"].gain == found["layers.{N}.mlp.down.bias"].gain == expected


def test_like_fills_in_what_is_left_out() -> None:
    child = {"like": "a", "layer": ["mlp"], "defaults": {"tie_word_embeddings": True}}
    found = read_table([("f", {"a": ENTRY}), ("g", {"b": child, "c": {"like": "b"}})], PARTS)
    assert found["b"].name == "g" and found["b"].prefix == "model."
    assert "layers.{N}.after.weight" not in {rule.name for rule in found["b"].rules}
    assert found["c"].rules == found["b"].rules and found["c"].defaults == {"tie_word_embeddings": True}
    assert found["c"].model_type == "c"


def test_a_refused_type_needs_nothing_else() -> None:
    family = read_table([("f", {"a": {"refused": "it is odd"}})], {})["a"]
    assert family.refused == "it is odd" and not family.rules


def _set(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def damage(entry: dict[str, Any]) -> None:
        for key in path[:-1]:
            entry = entry[key]
        entry[path[-1]] = value

    return damage


def _gain(norm: str) -> dict[str, Any]:
    return {"writes": 0, "kind": "x", "gain": {"norm": norm, "offset": 0}}


DAMAGES: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (_set("prefx", value=""), r"a: unknown keys \['prefx'\]"),
    (_set("layer", 1, "x", value={"reads": 0, "axis": 1}), "a, x: unknown keys"),
    (_set("layer", 1, "x", value={"kind": "mlp"}), "a, x: needs one of"),
    (_set("layer", 1, "x", value={"reads": 0, "writes": 1, "kind": "mlp"}), "a, x: needs one of"),
    (_set("layer", 1, "x", value={"writes": 1}), "a, x: writes, but has no kind"),
    (_set("layer", 0, value="attention"), "a names a part that is not there: attention"),
    (_set("layer", 1, "mlp.down", value={"bias": "biased"}), r"a says no default for \['biased'\]"),
    (_set("layer", 1, "x", value={"reads": 0, "when": "not gated"}), r"a says no default for \['gated'\]"),
    (_set("defaults", value={"has_bias": True}), r"a says no default for \['tie_word_embeddings'\]"),
    (_set("refuse", value=[{"key": "odd", "is": True, "why": "odd"}]), r"a says no default for \['odd'\]"),
    (_set("layer", 1, "x", value=_gain("nowhere")), "a has a gain that is no norm of the stream: .*nowhere"),
    (_set("layer", 1, "x", value=_gain("mlp.gate")), "a has a gain that is no norm of the stream: .*gate"),
    (_set("layer", 1, "mlp.down.bias", value={"ignored": "twice"}), "a has two rules for one tensor"),
    (_set("embedding", value="wte"), "a has no rule for its embedding"),
    (_set("like", value="nobody"), "a is like nobody"),
    (_set("like", value="a"), "a is like a"),
    (lambda entry: entry.pop("layers"), r"a: \['layers'\] are not there"),
    (lambda entry: entry.pop("defaults"), r"a: \['defaults'\] are not there"),
]


@pytest.mark.parametrize(("damage", "problem"), DAMAGES, ids=[problem for _, problem in DAMAGES])
def test_damage_is_named(damage: Callable[[dict[str, Any]], None], problem: str) -> None:
    entry = copy.deepcopy(ENTRY)
    damage(entry)
    with pytest.raises(ArchitectureError, match=f"the table of architectures is damaged: {problem}"):
        read_table([("f", {"a": entry})], PARTS)


def test_two_entries_for_one_type() -> None:
    with pytest.raises(ArchitectureError, match="a has two entries, in f and g"):
        read_table([("f", {"a": ENTRY}), ("g", {"a": ENTRY})], PARTS)


def test_a_circle_of_likes() -> None:
    circle = {"a": {"like": "b"}, "b": {"like": "c"}, "c": {"like": "b"}}
    with pytest.raises(ArchitectureError, match="is like b, which does not work"):
        read_table([("f", circle)], PARTS)


@pytest.mark.parametrize(
    ("switches", "settings", "holds"),
    [
        ((), {}, True),
        (("a",), {"a": True}, True),
        (("a",), {"a": False}, False),
        (("not a",), {"a": False}, True),
        (("not a",), {"a": True}, False),
        (("a", "not b"), {"a": True, "b": True}, False),
        (("a", "not b"), {"a": True, "b": False}, True),
    ],
)
def test_conditions(switches: tuple[str, ...], settings: dict[str, bool], holds: bool) -> None:
    assert Condition(switches).holds(settings) is holds


def test_refusals() -> None:
    wanted = Refusal("a", "why", value=True)
    assert wanted.applies({"a": True}) and not wanted.applies({"a": False}) and not wanted.applies({})
    other = Refusal("a", "why", differs_from="b")
    assert other.applies({"a": 1, "b": 2})
    assert not other.applies({"a": 2, "b": 2}) and not other.applies({"a": None, "b": 2})
