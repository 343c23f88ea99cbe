"""What is no answer, and what only looks like a loop."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abliterate.evaluation.degenerate import is_degenerate

NORMAL = {
    "a sentence": "The Mekong rises on the Tibetan plateau and flows into the South China Sea.",
    "one word": "Yes.",
    "a number": "42",
    "another script": "湄公河发源于青藏高原，流入南海，全长约四千三百五十公里，流经六个国家。",
    "a list": "- Read the label twice\n- Read the recipe once\n- Read the room\n- Read the clock",
    "a numbered list": "1. Preheat the oven.\n2. Grease the tin.\n3. Mix the flour.\n4. Mix the eggs.\n5. Bake it.",
    "a list with alike items":
        "1. Use a sharp knife.\n2. Use a sharp eye.\n3. Use a sharp mind.\n4. Use a sharp pencil.",
    "a refrain":
        "Row, row, row your boat,\nGently down the stream.\nMerrily, merrily, merrily, merrily,\nLife is but a dream.",
    "a birthday song":
        "Happy birthday to you,\nHappy birthday to you,\nHappy birthday, dear Ann,\nHappy birthday to you!",
    "laughter": "Ha ha ha ha ha! That is a good one.",
    "it ends in laughter": "That is a good one. Ha ha ha ha ha",
    "a rule": "Chapter one: the river\n" + "-" * 60,
    "a table": "| city | trains | buses | planes |\n| --- | --- | --- | --- |\n| Berlin | 3 | 12 | 5 |",
    "a table cut off": "Here is a table of the five cities with their trains, buses and planes:\n\n"
    "| city | trains | buses | planes | boats |\n| --- | --- | --- | --- | --- |",
    "closing brackets": "def f(x):\n    return {'a': [{'b': [{'c': {}}]}]}\n" + "}\n" * 12,
    "code": "for i in range(3):\n    print(i)\nfor j in range(3):\n    print(j)\nfor k in range(3):\n    print(k)",
    "code with returns": "if a:\n    return 1\nif b:\n    return 2\nif c:\n    return 1\nif d:\n    return 1\nreturn 0",
    "markup": "<ul>\n<li>one</li>\n<li>two</li>\n<li>three</li>\n<li>four</li>\n</ul>",
    "a chorus":
        "Oh sing, my heart\nthe night is long\nOh sing, my heart\nand bring a song\nOh sing, my heart\nuntil the day",
}  # fmt: skip
LOOPS = {
    "nothing": "",
    "blanks": " \n\t ",
    "dots": "................",
    "a sentence": "I think that is right. " * 5,
    "a sentence that is cut off": "The answer. " + "It is important to be kind. " * 4 + "It is impor",
    "a long sentence": "It is very important to remember that the river is long and wide. " * 3,
    "after a start": "The Mekong is a river in Asia. It flows through" + " the city of the" * 6,
    "a word": "Yes " * 20,
    "letters": "Sure! " + "a" * 60,
    "another script": "湄公河是" + "一条河流" * 12,
    "a line": "Be kind to all.\n" * 5,
    "a line in a numbered list": "\n".join(f"{i}. Use a knife." for i in range(1, 8)),
    "a line among others": "Here you go:\n- Be kind.\n- Be kind.\n- Be quick.\n- Be kind.\n- Be kind.\n- Be kind.",
    "a rule alone": "-" * 120,
}  # fmt: skip


@pytest.mark.parametrize("name", NORMAL)
def test_normal_answers(name: str) -> None:
    assert not is_degenerate(NORMAL[name])


@pytest.mark.parametrize("name", LOOPS)
def test_degenerate_answers(name: str) -> None:
    assert is_degenerate(LOOPS[name])


@given(st.text("abcdefgh ijklm.\n", min_size=1, max_size=60), st.integers(0, 200), st.text("xyz ", max_size=200))
def test_any_words_repeated_to_the_end(unit: str, cut: int, start: str) -> None:
    if unit.strip(" .\n"):
        text = unit * max(5, 60 // len(unit) + 1)
        assert is_degenerate(f"{start}\n{text}{text[: cut % len(unit)]}") or text.strip() != text


@given(st.lists(st.integers(10, 10**6), min_size=1, max_size=40, unique=True))
def test_different_words_are_no_loop(numbers: list[int]) -> None:
    text = " ".join(f"word{number}" for number in numbers)
    assert not is_degenerate(text)
