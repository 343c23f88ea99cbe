"""Prompt sets: split the same way for the same seed, nothing in two parts, nothing in both kinds."""

import hashlib
import json
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abliterate.calibration.prompts import (
    PromptSet,
    PromptSplit,
    builtin,
    check_contrast,
    load_prompts,
    split_prompts,
)
from abliterate.errors import CalibrationError
from abliterate.prompting import load_calibration
from abliterate.recipe import CalibrationRecipe

PARTS = ("train", "validation", "test")


def numbered(count: int, word: str = "Name river") -> PromptSet:
    return PromptSet.of(tuple(f"{word} {number}" for number in range(count)), "rivers.txt")


def parts_of(split: PromptSplit) -> list[PromptSet]:
    return [split.train, split.validation, split.test]


def split_of(*instructions: str) -> PromptSplit:
    return PromptSplit(PromptSet.of(instructions, "x"), PromptSet.of((), "x"), PromptSet.of((), "x"))


def save(path: Path, prompts: PromptSet) -> str:
    path.write_text("\n".join(prompts.instructions), encoding="utf-8")
    return str(path)


@given(st.integers(0, 12), st.integers(0, 6), st.integers(0, 6), st.integers(0, 5), st.integers(0, 1 << 40))
def test_splits_are_disjoint_and_of_the_sizes_asked(one: int, two: int, three: int, more: int, seed: int) -> None:
    prompts = numbered(one + two + three + more)
    split = split_prompts(prompts, one, two, three, seed)
    assert [len(part.instructions) for part in parts_of(split)] == [one, two, three]
    assert len(set(split.all)) == len(split.all) and set(split.all) <= set(prompts.instructions)
    assert all(part.source == "rivers.txt" for part in parts_of(split))


def test_a_seed_gives_one_split_whatever_the_order_of_the_file() -> None:
    prompts = numbered(40)
    backwards = PromptSet.of(prompts.instructions[::-1], "other.txt")
    one, two = (split_prompts(p, 20, 8, 8, seed=7) for p in (prompts, backwards))
    assert [p.instructions for p in parts_of(one)] == [p.instructions for p in parts_of(two)]
    assert [p.sha256 for p in parts_of(one)] == [p.sha256 for p in parts_of(two)]


def test_a_split_stays_what_it_was() -> None:
    # a seed in a manifest must give the same prompts in every version
    split = split_prompts(numbered(10), 4, 2, 2, seed=0)
    assert split.train.instructions == tuple(f"Name river {n}" for n in (7, 8, 1, 5))
    assert split.test.instructions == tuple(f"Name river {n}" for n in (2, 0))


def test_another_seed_gives_another_split() -> None:
    assert len({split_prompts(numbered(40), 20, 8, 8, seed).train.instructions for seed in range(20)}) == 20


def test_too_few_prompts_to_split() -> None:
    with pytest.raises(CalibrationError, match=r"too few prompts in rivers\.txt: 19, and 20 are needed \(12 t"):
        split_prompts(numbered(19), 12, 4, 4, 0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Name a river.", "Name a river."),
        ("Name a river.", "name a RIVER"),
        ("Name a river.", "  Name   a\nriver!! "),
        ("Straße, bitte", "STRASSE bitte"),
        ("Where's the café?", "where’s the CAFÉ"),
    ],
)
def test_a_prompt_in_both_sets(one: str, other: str) -> None:
    with pytest.raises(CalibrationError, match=r"^1 prompts are both in the harmful and in the harmless set"):
        check_contrast(split_of(one, "Name a hill."), split_of("Name a lake.", other))


def test_equal_sets() -> None:
    with pytest.raises(CalibrationError, match="are the same; they must differ"):
        check_contrast(split_of("Name a hill.", "Name a lake."), split_of("name a lake", "Name a hill"))


def test_overlap_between_different_parts_counts() -> None:
    hill, lake, none = (PromptSet.of(texts, "x") for texts in (("Name a hill",), ("Name a lake",), ()))
    with pytest.raises(CalibrationError, match="1 prompts are both"):
        check_contrast(PromptSplit(hill, none, none), PromptSplit(lake, none, hill))
    check_contrast(PromptSplit(hill, none, none), PromptSplit(lake, none, none))


def test_the_hash_is_of_the_instructions_in_their_order() -> None:
    texts = ("Name a café.", "Why?")
    expected = hashlib.sha256('["Name a café.","Why?"]'.encode()).hexdigest()
    assert PromptSet.of(texts, "one.txt").sha256 == PromptSet.of(texts, "two.txt").sha256 == expected
    # one text that looks like two, and another order
    others = [PromptSet.of(t, "x").sha256 for t in (('Name a café.","Why?',), texts[::-1], (*texts, "x"), ())]
    assert len({expected, *others}) == 5


@pytest.mark.parametrize("kind", ["harmful", "harmless"])
def test_builtin_parts_by_name(kind: str) -> None:
    split = builtin(kind)  # type: ignore[arg-type]
    assert [load_prompts(f"builtin:{kind}_{part}") for part in PARTS] == parts_of(split)
    assert [part.source for part in parts_of(split)] == [f"builtin:{kind}_{part}" for part in PARTS]
    assert all(not set(a.instructions) & set(b.instructions) for a, b in combinations(parts_of(split), 2))


def test_the_builtin_sets_contrast() -> None:
    check_contrast(builtin("harmful"), builtin("harmless"))


@pytest.mark.parametrize("spec", ["builtin:", "builtin:harmful", "builtin:../prompts"])
def test_unknown_builtin_names(spec: str) -> None:
    with pytest.raises(CalibrationError, match=r"no built-in prompts named .*; there are harmful_train, harmful_val"):
        load_prompts(spec)


def test_builtin_sizes_follow_the_recipe() -> None:
    found = load_calibration(CalibrationRecipe(train=10, validation=3, test=2), seed=5)
    whole = builtin("harmful")
    assert [len(part.instructions) for part in parts_of(found.harmful)] == [10, 3, 2]
    assert found.harmful.train.instructions == whole.train.instructions[:10]
    assert found.harmful.train.sha256 != whole.train.sha256
    with pytest.raises(CalibrationError, match=r"builtin:harmful_test has \d+ prompts, not 9999"):
        load_calibration(CalibrationRecipe(test=9999), seed=0)


def test_files_are_divided_as_the_recipe_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    harmful, harmless = (save(tmp_path / f"{kind}.txt", numbered(60, f"Name {kind}")) for kind in ("a", "b"))
    found = load_calibration(CalibrationRecipe(harmful, harmless, train=16, validation=8, test=8), seed=1)
    for split in (found.harmful, found.harmless):
        assert [len(part.instructions) for part in parts_of(split)] == [16, 8, 8]
    assert caplog.text == ""
    load_calibration(CalibrationRecipe(harmful, harmless), seed=1)
    assert "a.txt has 60 prompts, not 224: divided 34/8/17" in caplog.text


def test_files_with_too_few_prompts(tmp_path: Path) -> None:
    few, enough = save(tmp_path / "few.txt", numbered(20)), save(tmp_path / "many.txt", numbered(60, "Name"))
    with pytest.raises(CalibrationError, match=r"too few prompts in .*few\.txt: 20 divide into 11 train, 2 validation"):
        load_calibration(CalibrationRecipe(few, enough), seed=0)


def test_the_same_file_twice(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(list(numbered(60).instructions)))
    with pytest.raises(CalibrationError, match="they must differ"):
        load_calibration(CalibrationRecipe(str(path), str(path)), seed=0)
