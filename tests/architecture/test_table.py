"""The table as shipped, and how strictly it is read."""

import copy
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from typing import Any

import pytest
import yaml

from abliterate.architecture.paths import skip_paths
from abliterate.architecture.reader import expand
from abliterate.architecture.rules import Ahead, Family, Refusal, Rules, StepRule
from abliterate.architecture.table import load_table, read_family, read_table
from abliterate.errors import ArchitectureError
from tests import pico

PARTS: dict[str, Any] = {"mlp": {"reads": ["mlp.{gate,up}"], "writes": {"mlp.down": "mlp"}}}
ENTRY: dict[str, Any] = {
    "types": ["a"],
    "stem": [{"writes": {"embed_tokens": {"kind": "embedding", "axis": 1}}, "norms": ["norm"]}],
    "layer": ["mlp", {"norms": ["before", "after"]}],
}
SHIPPED = load_table()


def named(family: Family) -> str:
    return family.name


each = pytest.mark.parametrize("family", SHIPPED.families, ids=named)
with_decoder = pytest.mark.parametrize(
    "family", [f for f in SHIPPED.families if f.refused is None and f.tower is None], ids=named
)


@functools.cache
def shipped() -> Mapping[str, Mapping[str, Any]]:
    """The entries as they are written, by name; `like` not followed."""
    folder = resources.files("abliterate.architecture") / "families"
    read = [yaml.safe_load(f.read_text("utf-8")) for f in sorted(folder.iterdir(), key=str) if f.name.endswith(".yaml")]
    entries = {name: entry for content in read for name, entry in content.items()}
    assert len(entries) == sum(map(len, read))
    return entries


def whole(name: str, key: str) -> Any:
    """What an entry says, or the one that it is like."""
    entry = shipped()[name]
    return entry[key] if key in entry else whole(entry["like"], key) if "like" in entry else None


def sections(family: Family) -> Iterator[tuple[str, Rules]]:
    yield "stem", family.stem
    yield "layer", family.layer
    yield "beyond", family.beyond
    yield "outside", family.outside
    if family.ahead is not None:
        yield "ahead", family.ahead.stem


def test_every_entry_is_read() -> None:
    assert {family.name for family in SHIPPED.families} == set(shipped())
    assert len(SHIPPED.families) > 100 and len(SHIPPED.types) > 300
    assert set(pico.FAMILIES) | set(pico.OTHERS) <= set(SHIPPED.types)


def test_every_model_type_is_in_one_entry_for_each_condition() -> None:
    counts = Counter((t, repr(sorted(f.when.items()))) for f in SHIPPED.families for t in f.types)
    assert set(counts.values()) == {1}
    conditional = {t for f in SHIPPED.families if f.when for t in f.types}
    assert conditional and all((t, "[]") in counts for t in conditional)
    assert set(SHIPPED.types) == {t for t, _ in counts}


@each
def test_an_entry_is_whole(family: Family) -> None:
    assert family.types and all(isinstance(t, str) and t for t in family.types)
    assert family.layers and family.embedding and family.head
    assert all(refusal.why and refusal.key for refusal in family.refusals)
    if family.refused is not None:
        assert family.refused and family.stem == family.layer == family.outside == Rules()
    elif family.tower is not None:
        assert family.stem == family.layer == Rules() and family.skip == () and family.gain_offset == 0
    else:
        assert family.layer.exact and family.stem.exact
        assert any(family.stem.find(f"{name}.weight") for name in family.embedding)


@each
def test_rules_are_well_formed(family: Family) -> None:
    for _, rules in sections(family):
        for rule in (*rules.exact.values(), *rules.modules.values(), *rules.trees.values()):
            assert rule.reason and rule.module
            assert (rule.role == "writer") is (rule.kind != "") is bool(rule.axes)
            if rule.role == "writer":
                assert rule.dimensions is not None and all(0 <= axis < rule.dimensions for axis in rule.axes)
            else:
                assert rule.gain == () and not rule.narrow
        assert all(rule.role == "writer" for rule in rules.exact.values())
        assert not any(rule.role == "writer" for rule in (*rules.modules.values(), *rules.trees.values()))
        assert not any("{" in name or "," in name or " " in name for name in (*rules.exact, *rules.modules))


@with_decoder
def test_the_token_embedding_is_written_along_its_second_axis(family: Family) -> None:
    for name in family.embedding:
        rule = family.stem.find(f"{name}.weight")
        assert rule is not None and rule.role in ("writer", "inside")
        assert rule.role == "inside" or (rule.kind, rule.axes, rule.dimensions) == ("embedding", (1,), 2)
        assert rule.role == "writer" or any(r.kind == "embedding" for r in family.stem.exact.values())


@each
def test_gains_name_norms_that_the_entry_has(family: Family) -> None:
    for place, rules in sections(family):
        for rule in rules.exact.values():
            for step in rule.gain:
                if step.kind == "center":
                    assert step.module is None
                    continue
                assert step.module is not None
                stands = rules.find(f"{step.module}.weight")
                if place == "outside":  # the tower's own name, before these, may be what is listed
                    assert stands is None or stands.role == "outside"
                    continue
                assert stands is not None, f"{step.module}, behind {rule.module} in {place}"
                assert stands.role == ("inside" if step.kind == "taps" else "norm")


@each
def test_the_bias_of_a_layer_norm_behind_a_writer_is_a_writer(family: Family) -> None:
    """It is added to the stream as it is."""
    for place, rules in sections(family):
        for rule in rules.exact.values():
            for step, then in itertools.pairwise((*rule.gain, None)):
                if step is not None and step.module is not None and then == StepRule("center"):
                    bias = rules.find(f"{step.module}.bias")
                    assert bias is not None and bias.role == "writer", f"{step.module}.bias, in {place}"


@each
def test_every_gain_is_some_writer_s(family: Family) -> None:
    wanted = {module for names in shipped()[family.name].get("gains", {}) for module in expand(names)}
    gained = {rule.module for _, rules in sections(family) for rule in rules.exact.values() if rule.gain}
    norms = {step.module for _, rules in sections(family) for rule in rules.exact.values() for step in rule.gain}
    inherited = {module for names in whole(family.name, "gains") or {} for module in expand(names)}
    assert wanted <= gained <= inherited | norms


@each
def test_every_skip_item_is_a_writer_or_a_norm_of_the_layer(family: Family) -> None:
    wanted = whole(family.name, "skip") or []
    assert bool(wanted) is bool(family.skip)
    for step in family.skip:
        if isinstance(step, str):
            assert family.layer.exact[step].role == "writer"
        elif step.module is not None:
            assert step.kind == "scale" and family.layer.modules[step.module].role == "norm"
        else:
            assert step.kind == "center"


FOR_OTHERS = {
    "opt_350m": {"encoder_attn.out_proj"},
    "minimax": {"self_attn.to_out", "block_sparse_moe.shared_experts.down_proj"},
    "doge": {"self_attn.to_out"},
    "zaya": {"post_attention_residual_scale.hidden_states_scale", "post_mlp_residual_scale.hidden_states_scale"},
}
"""Writers that come with a part or as the bias of a norm, and that no model of the entry has."""


@pytest.mark.parametrize("family", [f for f in SHIPPED.families if f.skip], ids=named)
def test_a_skip_path_says_where_every_writer_of_a_layer_adds(family: Family) -> None:
    _, join = skip_paths(family.skip, ["l.0.", "l.1."], lambda module: f"{module}.weight", family.gain_offset)
    others = FOR_OTHERS.get(family.name, set())
    for rule in family.layer.exact.values():
        if rule.module not in others:
            assert len(join(1, rule.module)) < len(join(0, rule.module))
    for module in others:
        assert module in {rule.module for rule in family.layer.exact.values()}
        with pytest.raises(ArchitectureError, match=f"skip does not say where {module} adds"):
            join(0, module)


def test_only_gemma_s_gains_have_an_offset() -> None:
    assert {f.name for f in SHIPPED.families if f.gain_offset} == {"gemma2"}
    (gemma,) = [f for f in SHIPPED.families if f.name == "gemma2"]
    assert gemma.gain_offset == 1 and {"gemma2", "gemma3_text"} <= set(gemma.types)


@pytest.mark.parametrize(
    ("model_type", "settings", "name"),
    [
        ("mistral", {}, "llama"),
        ("phi3", {}, "llama"),
        ("gemma3_text", {}, "gemma2"),
        ("opt", {}, "opt"),
        ("opt", {"do_layer_norm_before": True}, "opt"),
        ("opt", {"do_layer_norm_before": False}, "opt_350m"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "bloom_post_norm"),
        ("gemma3", {}, "gemma3"),
    ],
)
def test_find(model_type: str, settings: Mapping[str, Any], name: str) -> None:
    found = SHIPPED.find(model_type, settings)
    assert found is not None and found.name == name


def test_a_type_that_is_not_there() -> None:
    assert SHIPPED.find("strange", {}) is None and SHIPPED.find("", {}) is None
    rwkv = SHIPPED.find("rwkv", {})
    assert rwkv is not None and rwkv.refused


def family(entry: Mapping[str, Any], **changes: Any) -> Family:
    return read_family("f", {**entry, **changes}, PARTS)


def test_what_an_entry_leaves_out() -> None:
    found = family(ENTRY)
    assert found == Family("f", ("a",), stem=found.stem, layer=found.layer)
    assert (found.layers, found.embedding, found.head) == (("layers",), ("embed_tokens",), ("lm_head",))
    assert found.ahead is None and found.beyond == found.outside == Rules()
    assert set(found.layer.modules) == {"mlp.gate", "mlp.up", "before", "after"}
    assert set(found.layer.exact) == {"mlp.down", "mlp.down.weight", "mlp.down.bias"}


def test_what_an_entry_says() -> None:
    found = family(
        ENTRY,
        when={"x": 1},
        layers=["a.layers", "b.layers"],
        embedding="wte",
        head=["out", "lm_head"],
        beyond=[{"writes": {"eh": "projector"}}],
        mtp={"prefix": "mtp", "layers": "mtp.layers", "block": "block", "stem": [{"writes": {"fc": "projector"}}]},
        outside=["tower"],
        writes={"tower.out": "projector"},
        with_images="cross",
        gain_offset=1,
        inexact="why",
    )
    assert (found.layers, found.embedding, found.head) == (("a.layers", "b.layers"), ("wte",), ("out", "lm_head"))
    assert found.when == {"x": 1} and found.with_images == "cross" and found.gain_offset == 1.0
    assert found.inexact == "why" and "eh.weight" in found.beyond.exact
    assert found.ahead is not None and "fc.weight" in found.ahead.stem.exact
    assert (found.ahead.prefix, found.ahead.layers, found.ahead.block) == ("mtp", "mtp.layers", "block")
    assert "tower.out.weight" in found.outside.exact and found.outside.trees["tower"].role == "outside"
    plain = family(ENTRY, mtp={"prefix": "", "layers": "mtp"})
    assert plain.ahead == Ahead("", "mtp", "", Rules())


def test_gains_of_every_place() -> None:
    gains = {"mlp.down": {"norm": "after", "center": True}, "embed_tokens": "norm", "tower.{a,b}": "tower.norm"}
    found = family(ENTRY, gains=gains, writes={"tower.{a,b}": "projector"}, outside=["tower"])
    assert found.layer.exact["mlp.down.weight"].gain == (StepRule("scale", "after"), StepRule("center"))
    assert found.layer.exact["after.bias"].kind == "bias" and found.layer.exact["after.bias"].gain == ()
    assert found.stem.exact["embed_tokens.weight"].gain == (StepRule("scale", "norm"),)
    assert found.stem.exact["norm.bias"].role == "writer"
    assert found.outside.exact["tower.b.bias"].gain == (StepRule("scale", "tower.norm"),)


def test_the_skip_path_in_order() -> None:
    found = family(ENTRY, skip=[{"norm": "before", "center": True}, "mlp.down", "after"])
    scale = StepRule("scale", "before")
    assert found.skip == (StepRule("center"), scale, "mlp.down", StepRule("scale", "after"))
    assert found.layer.exact["before.bias"].role == found.layer.exact["after.bias"].role == "writer"
    assert family(ENTRY, skip=["{before,after}"]).skip == (StepRule("scale", "before"), StepRule("scale", "after"))
    either = family(ENTRY, skip=[{"norm": "{before,after}", "center": True}])
    assert [step.module for step in either.skip if isinstance(step, StepRule)] == [None, "before", None, "after"]


def test_refusals_are_read() -> None:
    entry = family(
        ENTRY,
        refuse=[{"key": "a", "is": True, "why": "one"}, {"key": "b", "set": True, "why": "two"}],
        inexact_if=[{"key": "c", "is": "x", "why": "three"}],
    )
    assert entry.refusals == (
        Refusal("a", "one", value=True),
        Refusal("b", "two", given=True),
        Refusal("c", "three", value="x", inexact=True),
    )


def test_a_refused_type_needs_nothing_else() -> None:
    found = read_family("f", {"types": ["a"], "refused": "it is odd"}, {})
    assert found.refused == "it is odd" and found.layer == Rules()


def test_like_fills_in_what_is_left_out() -> None:
    child = {"types": ["b"], "like": "f", "layer": ["mlp"], "gain_offset": 1}
    parent = {**ENTRY, "when": {"x": 1}, "embedding": "wte"}
    table = read_table({"f": parent, "g": child, "h": {"types": ["c"], "like": "g", "embedding": "e"}}, PARTS)
    f, g, h = table.families
    assert g.types == ("b",) and g.when == {} and g.embedding == ("wte",) and g.stem == f.stem
    assert "after" not in g.layer.modules and "after" in f.layer.modules
    assert h.layer == g.layer and h.gain_offset == 1.0 and h.embedding == ("e",) and h.types == ("c",)


def test_an_entry_for_some_configs_comes_first() -> None:
    some = {"types": ["a"], "like": "f", "when": {"x": True}}
    both = {"types": ["a"], "like": "f", "when": {"x": True, "y": 2}}
    for entries in ({"f": ENTRY, "g": some}, {"g": some, "f": ENTRY}):
        table = read_table(entries, PARTS)
        assert [found.name for x in (True, False, None) if (found := table.find("a", {"x": x}))] == ["g", "f", "f"]
        found = table.find("a", {})
        assert found is not None and found.name == "f"
    alone = read_table({"f": {**ENTRY, "types": ["z"]}, "g": both}, PARTS)
    assert alone.find("a", {"x": True}) is None and alone.find("a", {"x": True, "y": 2}) is not None
    assert alone.types == ("a", "z")


def test_what_an_entry_with_a_tower_says_itself() -> None:
    found = read_family("f", {"types": ["a"], "tower": "text_config", "layers": ["x"], "outside": ["v"]}, {})
    assert found.tower == "text_config" and found.own == {"layers"}
    more = {"types": ["a"], "tower": "t", "embedding": "e", "beyond": [], "mtp": {"prefix": "m", "layers": "l"}}
    assert read_family("f", more, {}).own == {"embedding", "beyond", "mtp"}


def _set(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def damage(entry: dict[str, Any]) -> None:
        inner: Any = entry
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return damage


DAMAGES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (_set("prefx", value=""), r"f: unknown keys \['prefx'\]"),
    (_set("prefix", value="model."), r"f: unknown keys \['prefix'\]"),
    (_set("layer", 0, value="attention"), "f: there is no part attention"),
    (_set("layer", 1, "reeds", value=["x"]), r"f: unknown keys in a part: \['reeds'\]"),
    (_set("layer", 1, "writes", value={"x": "out"}), "f: x has the unknown kind out"),
    (_set("stem", 0, "writes", "embed_tokens", "axis", value=2), r"f: embed_tokens has no axis \(2,\)"),
    (_set("writes", value={"x": {"kind": "mlp", "of": 0}}), r"f: x has no axis \(0,\)"),
    (_set("beyond", value=["next"]), "f: there is no part next"),
    (_set("mtp", value={"prefix": "", "layers": "l", "stem": ["next"]}), "f: there is no part next"),
    (_set("like", value="nobody"), "f is like nobody, which does not work"),
    (_set("like", value="f"), "f is like f, which does not work"),
    (lambda entry: entry.pop("types"), "f has no types"),
    (_set("types", value=[]), "f has no types"),
]


@pytest.mark.parametrize(("damage", "problem"), DAMAGES, ids=[problem for _, problem in DAMAGES])
def test_damage_is_named(damage: Callable[[dict[str, Any]], Any], problem: str) -> None:
    entry = copy.deepcopy(ENTRY)
    damage(entry)
    with pytest.raises(ArchitectureError, match=f"the table of architectures is damaged: {problem}"):
        read_table({"f": entry}, PARTS)


@pytest.mark.parametrize("when", [{}, {"x": True}])
def test_two_entries_for_one_type(when: dict[str, Any]) -> None:
    twice = {"f": {**ENTRY, "when": when}, "g": {**ENTRY, "types": ["b", "a"], "when": dict(when)}}
    with pytest.raises(ArchitectureError, match="damaged: a is in f and in g"):
        read_table(twice, PARTS)


def test_a_circle_of_likes() -> None:
    circle = {name: {"types": [name], "like": other} for name, other in (("a", "b"), ("b", "c"), ("c", "b"))}
    with pytest.raises(ArchitectureError, match="is like b, which does not work"):
        read_table(circle, PARTS)
