"""Recipes: read strictly, and the shipped ones say what the code does without them."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from abliterate.errors import RecipeError
from abliterate.recipe import (
    Recipe,
    list_recipes,
    load_recipe,
    read_recipe,
    recipe_path,
    recipe_word,
    recipes_folder,
)


def recipe(tmp_path: Path, text: str, name: str = "own.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_the_shipped_recipe_is_the_default() -> None:
    shipped = load_recipe("refusal")
    assert dataclasses.replace(shipped, description="") == Recipe()
    assert shipped.description


def keys(part: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in part.items():
        yield from keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]


def test_the_default_recipe_names_every_key() -> None:
    text = (recipes_folder() / "refusal.yaml").read_text(encoding="utf-8")
    assert sorted(keys(yaml.safe_load(text))) == sorted(keys(Recipe().as_dict()))


def test_the_methods_of_the_field_are_there() -> None:
    wanted = "refusal projected norm-preserving per-layer subspace false-refusal induce search"
    assert sorted(list_recipes()) == sorted(wanted.split())


@pytest.mark.parametrize("name", list_recipes())
def test_shipped_recipes_say_what_they_are_and_differ(name: str) -> None:
    text = (recipes_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ") and yaml.safe_load(text)["name"] == name
    found = load_recipe(name)
    assert found.name == name and found.description
    alike = [other for other, r in list_recipes().items() if dataclasses.replace(r, name=name, description="") == (
        dataclasses.replace(found, description="")
    )]  # fmt: skip
    assert alike == [name]


def test_a_recipe_lies_over_the_one_that_it_extends(tmp_path: Path) -> None:
    recipe(tmp_path, "extends: projected\ndescription: beneath\nedit: {head: tied, mlp: {peak: 0.5}}\n", "beneath.yaml")
    found = load_recipe(str(recipe(tmp_path, "extends: beneath.yaml\nedit: {mlp: {floor: 0}, strength: 0.7}\n")))
    projected = load_recipe("projected")
    assert (found.name, found.description) == ("own", "")
    assert found.direction == projected.direction and found.edit.head == "tied" and found.edit.strength == 0.7
    assert (found.edit.mlp.peak, found.edit.mlp.floor, found.edit.attention.floor) == (0.5, 0, 1.0)


@pytest.mark.parametrize("name", ["own.yaml", "missing.yaml", "nothing", "3", "[refusal]", "{refusal: }"])
def test_what_cannot_be_extended(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match=r"extends is|no recipe named nothing; shipped|missing\.yaml"):
        load_recipe(str(recipe(tmp_path, f"extends: {name}\n")))


def test_recipes_that_extend_each_other(tmp_path: Path) -> None:
    recipe(tmp_path, "extends: own.yaml\n", "other.yaml")
    with pytest.raises(RecipeError, match="extends is"):
        load_recipe(str(recipe(tmp_path, "extends: other.yaml\n")))


def test_a_missing_key_stands_for_the_default(tmp_path: Path) -> None:
    found = load_recipe(str(recipe(tmp_path, "edit:\n  head: tied\n")))
    expected = dataclasses.replace(Recipe(), name="own").replacing("edit", head="tied")
    assert found == expected
    assert load_recipe(str(recipe(tmp_path, "name: mine\n"))) == dataclasses.replace(Recipe(), name="mine")
    assert load_recipe(str(recipe(tmp_path, "{}"))) == dataclasses.replace(Recipe(), name="own")


FULL = """
name: mine
description: all of it
calibration: {harmful: a.txt, harmless: "hf:org/data::train:text", look_alike: b.txt, train: 8, validation: 2, test: 1,
  thinking: "on"}
direction: {contrast: false-refusal, filter: false, refusal_tokens: [Sorry, "I"], positions: 3, mean: geometric-median,
  winsorize: 0.9, harmless_part: removed, refine: 5}
selection: {max_layer_fraction: 1, max_kl: 2.5, min_induce: -1, strict: true, exhaustive: true}
edit: {head: tied, directions: one, count: 1, span: pairs, strength: 0.5, strengths: curve, embeddings: kept,
  norms: kept, attention: {peak: 0.1, at: 0.2, floor: 0.3, reach: 0.4},
  mlp: {peak: 0.1, at: 0.2, floor: 0.3, reach: 0.4}}
search: {method: optuna, steps: 3, further_steps: 2, kl_weights: [1.5, 2], margin: 0.5, trials: 5,
  max_strength: 0.7, directions: false, refusals: 0.1}
evaluation: {max_new_tokens: 7, kl_tokens: 3}
"""


def test_every_key_is_read(tmp_path: Path) -> None:
    read = load_recipe(str(recipe(tmp_path, FULL)))
    assert read.as_dict() == yaml.safe_load(FULL)
    assert read.direction.refusal_tokens == ("Sorry", "I")
    default = dict(zip(keys(Recipe().as_dict()), flat(Recipe().as_dict()), strict=True))
    left = [key for key, value in zip(keys(read.as_dict()), flat(read.as_dict()), strict=True) if value == default[key]]
    assert left == ["edit.directions", "edit.count", "edit.strengths"], "what would not go together with the others"


def flat(part: dict[str, Any]) -> Iterator[Any]:
    for value in part.values():
        yield from flat(value) if isinstance(value, dict) else [value]


def test_a_recipe_written_out_is_read_again(tmp_path: Path) -> None:
    read = load_recipe(str(recipe(tmp_path, FULL)))
    again = load_recipe(str(recipe(tmp_path, yaml.safe_dump(read.as_dict()), "again.yml")))
    assert again == read


@pytest.mark.parametrize(("word", "value"), [("off", "off"), ("on", "on"), ("no", "off"), ("auto", "auto")])
def test_a_bare_off_and_on_are_words(tmp_path: Path, word: str, value: str) -> None:
    assert load_recipe(str(recipe(tmp_path, f"calibration: {{thinking: {word}}}"))).calibration.thinking == value


REFUSED = {
    "colour: red": r"unknown key colour; allowed: extends, name, description, calibration, dir",
    "edit: {colour: red}": r"unknown key edit\.colour; allowed: head, directions",
    "edit: {3: red}": r"unknown key edit\.3;",
    "edit: 3": "edit must be a mapping",
    "edit:": "edit must be a mapping",
    "calibration: [train]": "calibration must be a mapping",
    "edit: {head: loose}": r"edit\.head is 'loose'; allowed: untied, tied",
    "edit: {head: false}": r"edit\.head is False; allowed: untied, tied",
    "edit: {head: [tied]}": r"edit\.head is \['tied'\]; allowed: untied, tied",
    "edit: {strength: strong}": r"edit\.strength is 'strong'; allowed: a number",
    "edit: {strength: true}": r"edit\.strength is True; allowed: a number",
    "edit: {strength: null}": r"edit\.strength is None; allowed: a number",
    "edit: {strength: 0}": r"edit\.strength is 0, so that nothing would be edited",
    "edit: {strength: 2.01}": r"edit\.strength is 2\.01; allowed: -2 to 2",
    "edit: {strength: .nan}": r"edit\.strength is nan; allowed: -2 to 2",
    "edit: {directions: subspace}": r"edit\.directions is subspace: say with edit\.count how many",
    "edit: {count: 2}": r"edit\.count is 2; it is for edit\.directions: subspace",
    "edit: {strengths: search}": r"edit\.strengths is search, which needs edit\.directions: per-layer",
    "direction: {contrast: false-refusal}\nedit: {directions: per-layer}": "false-refusal, which needs",
    "direction: {refine: 4}": "it is for contrast: false-refusal",
    "search: {kl_weights: []}": r"search\.kl_weights is \[\]; allowed: a list of numbers",
    "search: {kl_weights: [1, -1]}": r"search\.kl_weights is \[1, -1\]; allowed: 0 to 1e\+06",
    "search: {kl_weights: [a]}": r"search\.kl_weights is \['a'\]; allowed: a list of numbers",
    "edit: {mlp: {peak: 3}}": r"edit\.mlp\.peak is 3; allowed: -2 to 2",
    "edit: {mlp: {colour: 3}}": r"unknown key edit\.mlp\.colour; allowed: peak, at, floor, reach",
    "edit: {strength: .inf}": r"edit\.strength is inf; allowed: -2 to 2",
    "calibration: {train: 7}": r"calibration\.train is 7; allowed: 8 to 1e\+06",
    "calibration: {train: 8.0}": r"calibration\.train is 8\.0; allowed: a whole number",
    "calibration: {validation: 1}": r"calibration\.validation is 1;",
    "calibration: {test: 0}": r"calibration\.test is 0;",
    "calibration: {train: true}": r"calibration\.train is True; allowed: a whole number",
    "calibration: {harmful: 3}": r"calibration\.harmful is 3; allowed: text",
    "calibration: {thinking: maybe}": r"calibration\.thinking is 'maybe'; allowed: auto, off, on",
    "direction: {positions: 0}": r"direction\.positions is 0; allowed: 1 to 64",
    "direction: {positions: some}": r"direction\.positions is 'some'; allowed: all or a whole number",
    "direction: {positions: true}": r"direction\.positions is True; allowed: all or a whole number",
    "direction: {filter: 1}": r"direction\.filter is 1; allowed: true, false",
    "direction: {refusal_tokens: []}": r"direction\.refusal_tokens is \[\]; allowed: auto or a list of words",
    "direction: {refusal_tokens: [1]}": r"direction\.refusal_tokens is \[1\]; allowed: auto or a list of words",
    "direction: {refusal_tokens: Sorry}": r"direction\.refusal_tokens is 'Sorry'; allowed: auto or a list of words",
    "selection: {max_layer_fraction: 1.5}": r"selection\.max_layer_fraction is 1\.5;",
    "selection: {max_kl: -1}": r"selection\.max_kl is -1;",
    "evaluation: {max_new_tokens: 0}": r"evaluation\.max_new_tokens is 0;",
    "name: 3": "name is 3; allowed: text",
    "": "a recipe is a YAML mapping",
    "- edit": "a recipe is a YAML mapping",
    "edit: [": "not readable as YAML: while parsing a flow node expected the node content",
    "a: b: c": "not readable as YAML: mapping values are not allowed here",
    "name: !!python/object/apply:os.getcwd []": "not readable as YAML: could not determine a constructor",
    "name: 2024-13-45": "not readable as YAML: month must be in 1..12",
    "[" * 100_000: "not readable as YAML: maximum recursion depth exceeded",
}


@pytest.mark.parametrize("text", REFUSED, ids=[text[:40] for text in REFUSED])
def test_what_is_refused(tmp_path: Path, text: str) -> None:
    path = recipe(tmp_path, text)
    with pytest.raises(RecipeError, match=REFUSED[text]) as caught:
        load_recipe(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(RecipeError, match=r"own\.yaml: not readable as YAML"):
        load_recipe(str(path))
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(RecipeError, match=r"not readable as YAML: .*directory"):
        read_recipe(tmp_path / "folder.yaml")


YAML_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
SECTIONS = [field.name for field in dataclasses.fields(Recipe)]
SECTION_KEYS = sorted({key.rpartition(".")[2] for key in keys(Recipe().as_dict())})


@given(
    st.dictionaries(
        st.sampled_from(SECTIONS), YAML_VALUES | st.dictionaries(st.sampled_from(SECTION_KEYS), YAML_VALUES)
    )
)
def test_any_recipe_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    try:
        read = load_recipe(str(path))
    except RecipeError as error:
        assert str(error).startswith(str(path))
        return
    for section, values in read.as_dict().items():
        if isinstance(values, dict):
            given_values = content.get(section, {})
            assert all(values[key] == value for key, value in given_values.items() if not isinstance(value, bool))


def test_names_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe(tmp_path, "name: here\n", "refusal")
    recipe(tmp_path, "name: file\n", "refusal.yaml")
    assert load_recipe("refusal").name == "refusal"
    assert load_recipe("refusal.yaml").name == "file"
    (tmp_path / "deeper").mkdir()
    recipe(tmp_path, "name: deeper\n", "deeper/bare")
    assert load_recipe("deeper/bare").name == "deeper"
    assert recipe_path("refusal") == recipes_folder() / "refusal.yaml"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("nope", r"no recipe named nope; shipped recipes: .*refusal.*; a file needs its \.yaml ending"),
        ("nope.yaml", r"no recipe file nope\.yaml"),
        ("../refusal", r"no recipe file \.\./refusal"),
        ("", "no recipe named"),
    ],
)
def test_recipes_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=message):
        load_recipe(word)


def test_replacing_leaves_what_is_not_given() -> None:
    base = Recipe()
    assert base.replacing("calibration", harmful=None, harmless=None) == base
    changed = base.replacing("calibration", harmful="a.txt", harmless=None)
    assert changed.calibration == dataclasses.replace(base.calibration, harmful="a.txt")
    assert base.calibration.harmful == "builtin"


def test_the_word_for_a_recipe() -> None:
    shipped = load_recipe("refusal")
    assert recipe_word(shipped) == "refusal"
    assert recipe_word(shipped.replacing("calibration", harmful="a.txt", harmless="b.txt")) == "refusal"
    assert recipe_word(shipped.replacing("selection", exhaustive=True)) == "refusal"
    assert recipe_word(shipped.replacing("edit", strength=0.5)) == "refusal.yaml"
    assert recipe_word(dataclasses.replace(shipped, name="mine")) == "mine.yaml"
