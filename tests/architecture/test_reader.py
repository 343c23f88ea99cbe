"""Parts of the table to rules by name, and how strictly they are read."""

from typing import Any

import pytest

from abliterate.architecture.reader import PartReader, expand, steps
from abliterate.architecture.rules import Rule, Rules, StepRule
from abliterate.errors import ArchitectureError

PARTS: dict[str, Any] = {
    "attention": {"writes": {"attn.out": "attention"}, "reads": ["attn.{q,k,v}"], "inside": ["attn.sinks"]},
    "norms": {"norms": ["before", "after"]},
}


def read(*section: Any, gains: dict[str, Any] | None = None, passed: tuple[str, ...] = ()) -> Rules:
    return PartReader("f", PARTS, {key: steps(gain) for key, gain in (gains or {}).items()}, passed).rules(section)


def rule(of: Rules, name: str) -> Rule:
    found = of.find(name)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("a.b", ["a.b"]),
        ("a.{x,y}.b", ["a.x.b", "a.y.b"]),
        ("{a,b}{c,d}", ["ac", "ad", "bc", "bd"]),
        ("{N}.{x,y}", ["{N}.x", "{N}.y"]),
        ("{x,}y", ["xy", "y"]),
        ("{x, y}.z", ["x.z", "y.z"]),
        ("a.{b.c,d.*.e}.f", ["a.b.c.f", "a.d.*.e.f"]),
        ("a.**", ["a.**"]),
    ],
)
def test_expand(name: str, names: list[str]) -> None:
    assert expand(name) == names


@pytest.mark.parametrize(
    ("gain", "expected"),
    [
        ("n", (StepRule("scale", "n"),)),
        ({"norm": "n"}, (StepRule("scale", "n"),)),
        ({"norm": "n", "center": False}, (StepRule("scale", "n"),)),
        ({"norm": "n", "center": True}, (StepRule("scale", "n"), StepRule("center"))),
        ({"taps": "c"}, (StepRule("taps", "c"),)),
        (["a", "b"], (StepRule("scale", "a"), StepRule("scale", "b"))),
        (
            [{"norm": "a", "center": True}, {"taps": "c"}, "b"],
            (StepRule("scale", "a"), StepRule("center"), StepRule("taps", "c"), StepRule("scale", "b")),
        ),
    ],
)
def test_gains(gain: Any, expected: tuple[StepRule, ...]) -> None:
    assert steps(gain) == expected


def test_a_linear_writes_with_its_weight_and_its_bias() -> None:
    found = read("attention")
    weight, bias = rule(found, "attn.out.weight"), rule(found, "attn.out.bias")
    assert (weight.role, weight.kind, weight.axes, weight.dimensions) == ("writer", "attention", (0,), 2)
    assert (bias.role, bias.kind, bias.axes, bias.dimensions) == ("writer", "bias", (0,), 1)
    assert weight.module == bias.module == "attn.out" and rule(found, "attn.out") == weight
    assert weight.reason == "attention: adds to the stream" and bias.reason == "attention bias: adds to the stream"
    assert found.find("attn.out.scale") is None and not weight.narrow


def test_the_rest_of_a_part() -> None:
    found = read("attention", "norms", {"reads": ["index.**"]})
    roles = {
        "attn.q.weight": "reader",
        "attn.v.bias": "reader",
        "attn.sinks": "inside",
        "before.weight": "norm",
        "after.bias": "norm",
        "index.a.b.weight": "reader",
    }
    assert {name: rule(found, name).role for name in roles} == roles
    assert all(rule(found, name).reason for name in roles)
    assert found.find("attn.o.weight") is None and found.find("attn.weight") is None


@pytest.mark.parametrize(
    ("facts", "kind", "axes", "of"),
    [
        ({"kind": "embedding", "axis": 1}, "embedding", (1,), 2),
        ({"kind": "mlp", "axis": 1, "of": 3}, "mlp", (1,), 3),
        ({"kind": "mlp", "axis": [1, 2], "of": 3}, "mlp", (1, 2), 3),
        ({"kind": "bias", "axis": 0, "of": 1}, "bias", (0,), 1),
        ({"kind": "projector", "axis": 0, "of": 4}, "projector", (0,), 4),
        ("mixer", "mixer", (0,), 2),
    ],
)
def test_writers_of_every_layout(facts: Any, kind: str, axes: tuple[int, ...], of: int) -> None:
    found = rule(read({"writes": {"w": facts}}), "w")
    assert (found.kind, found.axes, found.dimensions) == (kind, axes, of)


def test_a_writer_that_may_be_narrow() -> None:
    found = read({"writes": {"w": {"kind": "mlp", "may_be_narrow": True}}})
    assert rule(found, "w.weight").narrow and rule(found, "w.bias").narrow


def test_later_parts_win() -> None:
    found = read("attention", {"inside": ["attn.q"], "writes": {"attn.out": {"kind": "mlp", "axis": 1}}})
    assert rule(found, "attn.q.weight").role == "inside"
    assert (rule(found, "attn.out.weight").kind, rule(found, "attn.out.weight").axes) == ("mlp", (1,))


def test_a_gain_holds_for_weight_and_bias() -> None:
    found = read("attention", "norms", gains={"attn.out": "after"})
    assert rule(found, "attn.out.weight").gain == rule(found, "attn.out.bias").gain == (StepRule("scale", "after"),)
    assert rule(found, "attn.out.weight").reason == "attention: adds to the stream, through after"
    assert rule(read("attention", "norms"), "attn.out.weight").gain == ()


def test_the_bias_of_a_norm_behind_a_writer_writes() -> None:
    found = read("attention", "norms", gains={"attn.out": {"norm": "after", "center": True}})
    bias = rule(found, "after.bias")
    assert (bias.role, bias.kind, bias.axes, bias.dimensions, bias.gain) == ("writer", "bias", (0,), 1, ())
    assert bias.module == "after" and rule(found, "after.weight").role == "norm"
    assert rule(found, "before.bias").role == "norm"


def test_the_bias_of_a_norm_before_another_passes_that_one() -> None:
    gain = [{"norm": "after", "center": True}, {"norm": "before", "center": True}]
    found = read("attention", "norms", gains={"attn.out": gain})
    assert rule(found, "after.bias").gain == ()
    assert rule(found, "before.bias").gain == (StepRule("scale", "after"), StepRule("center"))
    assert rule(found, "before.bias").role == "writer"


def test_the_bias_of_a_convolution_behind_a_writer_is_no_writer() -> None:
    found = read("attention", {"inside": ["conv"]}, gains={"attn.out": {"taps": "conv"}})
    assert rule(found, "attn.out.weight").gain == (StepRule("taps", "conv"),)
    assert rule(found, "conv.bias").role == "inside"


def test_the_bias_of_a_norm_on_the_skip_path_writes() -> None:
    found = read("attention", "norms", passed=("before", "attn.out"))
    assert rule(found, "before.bias") == Rule(
        "writer", "norm bias: adds to the stream", "before", "bias", (0,), dimensions=1
    )
    assert rule(found, "after.bias").role == "norm" and rule(found, "attn.out.bias").kind == "bias"


def test_what_is_outside_covers_everything_below() -> None:
    found = PartReader("f", PARTS, {}, ()).rules([{"writes": {"tower.out": "projector"}}], outside=["tower", "{a,b}.c"])
    assert rule(found, "tower.layers.3.x.weight").role == "outside" and rule(found, "b.c.d").role == "outside"
    assert rule(found, "tower.out.weight").role == "writer" and found.find("a.d") is None


DAMAGES: list[tuple[Any, str]] = [
    ("mlp", "there is no part mlp"),
    ({"write": {"a": "mlp"}}, r"unknown keys in a part: \['write'\]"),
    ({"reads": ["a"], "kind": "mlp", "axis": 0}, r"unknown keys in a part: \['axis', 'kind'\]"),
    ({"writes": {"a": "router"}}, "a has the unknown kind router"),
    ({"writes": {"a.{b,c}": {"kind": "attn"}}}, r"a\.b has the unknown kind attn"),
    ({"writes": {"a": {"kind": "mlp", "axis": 2}}}, r"a has no axis \(2,\)"),
    ({"writes": {"a": {"kind": "mlp", "axis": -1}}}, r"a has no axis \(-1,\)"),
    ({"writes": {"a": {"kind": "mlp", "axis": 1, "of": 1}}}, r"a has no axis \(1,\)"),
    ({"writes": {"a": {"kind": "mlp", "axis": [1, 3], "of": 3}}}, r"a has no axis \(1, 3\)"),
]


@pytest.mark.parametrize(("part", "problem"), DAMAGES, ids=[problem for _, problem in DAMAGES])
def test_damage_is_named(part: Any, problem: str) -> None:
    with pytest.raises(ArchitectureError, match=f"the table of architectures is damaged: f: {problem}"):
        read("attention", part)


@pytest.mark.parametrize("facts", [{"kind": "mlp", "axs": 1}, {"kind": "mlp", "axis": 0, "dims": 2}])
def test_unknown_keys_of_a_writer(facts: dict[str, Any]) -> None:
    with pytest.raises(ArchitectureError, match="unknown keys of out: "):
        PartReader("mine", {}, {}, []).rules([{"writes": {"out": facts}}])


def test_unknown_keys_of_a_gain() -> None:
    with pytest.raises(ArchitectureError, match=r"unknown keys in a gain: \['centre'\]"):
        steps({"norm": "post", "centre": True})
