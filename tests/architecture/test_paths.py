"""From a family's gains and skip path to the steps of one writer."""

from collections.abc import Mapping

import pytest

from abliterate.architecture.paths import gain_path, skip_paths
from abliterate.architecture.rules import StepRule
from abliterate.architecture.writer import Step
from abliterate.errors import ArchitectureError

CENTER = StepRule("center")
LAYERS = ("l.0.", "l.1.", "l.2.")


def everything(module: str) -> str | None:
    return f"{module}.weight"


def scale(layer: int, name: str, offset: float = 0.0) -> Step:
    return Step("scale", f"l.{layer}.{name}.weight", offset)


def test_a_gain_is_named_within_its_place() -> None:
    rules = (StepRule("scale", "after"), CENTER, StepRule("taps", "conv"))
    found = gain_path(rules, "model.layers.3.", everything, 1.0)
    assert found == (
        Step("scale", "model.layers.3.after.weight", 1.0),
        Step("center"),
        Step("taps", "model.layers.3.conv.weight"),
    )
    assert gain_path((), "model.", everything, 1.0) == ()


def test_of_a_norm_that_is_not_stored_there_is_no_step() -> None:
    stored: Mapping[str, str] = {"l.0.a": "l.0.a.weight", "l.0.c": "l.0.c"}
    rules = tuple(StepRule("scale", name) for name in "abc")
    assert gain_path(rules, "l.0.", stored.get, 0.0) == (Step("scale", "l.0.a.weight"), Step("scale", "l.0.c"))


def test_without_a_skip_path_everything_begins_at_the_end() -> None:
    boundaries, join = skip_paths((), LAYERS, everything, 0.0)
    assert boundaries == ((), (), (), ())
    with pytest.raises(ArchitectureError, match="skip does not say where out adds"):
        join(0, "out")


def test_norms_after_each_sublayer() -> None:
    """x = n2(n1(x + attn) + mlp): what is nearest to the end comes first, a LayerNorm's gain before its mean."""
    skip = ("attn", CENTER, StepRule("scale", "n1"), "mlp", CENTER, StepRule("scale", "n2"))
    boundaries, join = skip_paths(skip, LAYERS, everything, 0.0)

    def whole(layer: int) -> tuple[Step, ...]:
        return (scale(layer, "n2"), Step("center"), scale(layer, "n1"), Step("center"))

    assert boundaries == ((*whole(2), *whole(1), *whole(0)), (*whole(2), *whole(1)), whole(2), ())
    for i in range(3):
        assert join(i, "attn") == boundaries[i]
        assert join(i, "n1") == (*boundaries[i + 1], *whole(i)[:2]) == join(i, "mlp")
        assert join(i, "n2") == boundaries[i + 1]


def test_gains_before_each_sublayer() -> None:
    """x = g2(g1(x) + attn) + mlp."""
    skip = (StepRule("scale", "g1"), "attn", StepRule("scale", "g2"), "mlp")
    boundaries, join = skip_paths(skip, LAYERS[:2], everything, 1.0)
    last, first = (scale(1, "g2", 1.0), scale(1, "g1", 1.0)), (scale(0, "g2", 1.0), scale(0, "g1", 1.0))
    assert boundaries == ((*last, *first), last, ())
    assert join(1, "mlp") == () and join(1, "attn") == last[:1]
    assert join(0, "mlp") == last and join(0, "attn") == (*last, first[0])


def test_a_norm_that_some_layers_do_not_have_is_passed_over() -> None:
    def stored(module: str) -> str | None:
        return None if module == "l.1.g" else f"{module}.weight"

    boundaries, join = skip_paths((StepRule("scale", "g"), "out"), LAYERS, stored, 0.0)
    assert boundaries == ((scale(2, "g"), scale(0, "g")), (scale(2, "g"),), (scale(2, "g"),), ())
    assert join(0, "out") == (scale(2, "g"),)


def test_what_adds_within_a_module_that_is_named() -> None:
    _, join = skip_paths(("mlp.experts", StepRule("scale", "g"), "mlp"), LAYERS[:1], everything, 0.0)
    assert join(0, "mlp.experts.*.down") == join(0, "mlp.experts") == (scale(0, "g"),)
    assert join(0, "mlp.other.down") == join(0, "mlp") == ()
    with pytest.raises(ArchitectureError, match="damaged: skip does not say where attn\\.out adds"):
        join(0, "attn.out")
    with pytest.raises(ArchitectureError, match="skip does not say where mlps adds"):
        join(0, "mlps")
