"""Which rule a tensor's name finds, and which configs an entry refuses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abliterate.architecture.rules import Refusal, Rule, Rules, fold_numbers
from abliterate.architecture.writer import Role


def rule(module: str, role: Role = "reader") -> Rule:
    return Rule(role, "", module)


def rules(*modules: str, exact: tuple[str, ...] = (), trees: tuple[str, ...] = ()) -> Rules:
    return Rules(*({name: rule(name) for name in names} for names in (exact, modules, trees)))


def found(of: Rules, name: str) -> str | None:
    rule = of.find(name)
    return None if rule is None else rule.module


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


@given(st.integers(0, 10**9 - 1), st.integers(0, 10**9 - 1))
def test_a_star_is_every_number(layer: int, expert: int) -> None:
    of = rules(exact=("layers.*.experts.*.w2.weight",))
    assert found(of, f"layers.{layer}.experts.{expert}.w2.weight") == "layers.*.experts.*.w2.weight"
    assert found(of, f"layers.{layer}.experts.0{expert}.w2.weight") is None
    assert found(of, f"layers.{layer}.experts.w2.weight") is None


def test_a_rule_for_one_number_alone() -> None:
    of = rules("mlp.*", "mlp.0", exact=("merger.mlp.2.weight", "a.*.b.1.w", "a.0.b.*.w", "a.*.b.*.w"))
    assert found(of, "merger.mlp.2.weight") == "merger.mlp.2.weight"
    assert found(of, "merger.mlp.0.weight") is None and found(of, "merger.mlp.12.weight") is None
    assert found(of, "mlp.0.weight") == "mlp.0" and found(of, "mlp.1.weight") == "mlp.*"
    assert found(of, "a.3.b.1.w") == "a.*.b.1.w" and found(of, "a.0.b.3.w") == "a.0.b.*.w"
    assert found(of, "a.3.b.3.w") == "a.*.b.*.w" and found(of, "a.0.b.1.w") in ("a.*.b.1.w", "a.0.b.*.w")


@pytest.mark.parametrize("name", ["layers.*.w", "*", "layers.*", "a.*.*.b", "layers.0.experts.*.w2.weight"])
def test_a_name_that_has_a_star_of_its_own(name: str) -> None:
    of = rules("layers.*", "*", "a", exact=("layers.*.w", "*", "layers.*.experts.*.w2.weight"), trees=("a", "*"))
    assert found(of, name) is None


def test_a_module_is_itself_and_what_is_directly_below() -> None:
    of = rules("self_attn.q_proj", "self_attn.sinks", "A_log")
    assert found(of, "self_attn.q_proj.weight") == found(of, "self_attn.q_proj.anything") == "self_attn.q_proj"
    assert found(of, "self_attn.sinks") == "self_attn.sinks" and found(of, "A_log") == "A_log"
    assert found(of, "self_attn.q_proj.lora.weight") is None and found(of, "self_attn.q_proj_.weight") is None
    assert found(of, "x.self_attn.q_proj.weight") is None and found(of, "self_attn.weight") is None


def test_a_tree_is_everything_below() -> None:
    of = rules(trees=("self_attn.indexer", "vision"))
    assert found(of, "self_attn.indexer.weight") == found(of, "self_attn.indexer.a.0.b.weight") == "self_attn.indexer"
    assert found(of, "vision.x") == "vision"
    assert found(of, "self_attn.indexer2.weight") is None and found(of, "self_attn.weight") is None


def test_the_most_specific_rule_wins() -> None:
    of = rules("a.b", "a", exact=("a.b.weight",), trees=("a", "a.b", "a.b.c"))
    assert of.find("a.b.weight") is of.exact["a.b.weight"]
    assert of.find("a.b.bias") is of.modules["a.b"]
    assert of.find("a.x") is of.modules["a"]
    assert of.find("a.b.c.d.weight") is of.trees["a.b.c"]
    assert of.find("a.b.d.weight") is of.trees["a.b"]
    assert of.find("a.d.e.weight") is of.trees["a"]


def test_the_most_specific_tree_wins_where_there_are_numbers() -> None:
    of = rules(trees=("a", "a.*.b", "a.2", "a.2.b.c"))
    assert found(of, "a.2.b.c.weight") == "a.2.b.c"
    assert found(of, "a.2.x.weight") == "a.2"
    assert found(of, "a.3.b.weight") == "a.*.b"
    assert found(of, "a.3.x.weight") == "a"


def test_refusals() -> None:
    wanted = Refusal("a", "why", value=True)
    assert wanted.applies({"a": True}) and not wanted.applies({"a": False}) and not wanted.applies({})
    off = Refusal("a", "why", value=False)
    assert off.applies({"a": False}) and not off.applies({"a": True}) and not off.applies({})
    word = Refusal("a", "why", value="vector")
    assert word.applies({"a": "vector"}) and not word.applies({"a": "float"}) and not word.applies({"b": "vector"})
    nothing = Refusal("a", "why", value=None)
    assert nothing.applies({"a": None}) and not nothing.applies({}) and not nothing.applies({"a": 0})
    given = Refusal("a", "why", given=True)
    assert given.applies({"a": [1]}) and given.applies({"a": "x"})
    silent: tuple[object, ...] = (None, [], 0, False)
    assert not any(given.applies({"a": nothing}) for nothing in silent) and not given.applies({})


@pytest.mark.timeout(5)
def test_a_name_of_nothing_but_numbers() -> None:
    """Of what can stand in a file every name is looked up at once."""
    name = ".".join(["7"] * 60)
    rule = Rule("reader", "reads", "x")
    assert Rules().find(name) is None
    assert Rules(exact={name: rule}).find(name) is rule
    assert Rules(exact={fold_numbers(name): rule}).find(name) is rule
