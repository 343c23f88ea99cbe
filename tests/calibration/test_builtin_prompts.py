"""The built-in prompts: enough of them, disjoint (the adapter's own included), and varied."""

import json
import re
from itertools import combinations
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
DATA = TESTS.parent / "abliterate" / "calibration" / "data"
ADAPTER = TESTS / "models" / "prompts"
MINIMUM = {"train": 128, "validation": 32, "test": 64}
LEAST = {"harmful": MINIMUM, "harmless": MINIMUM, "look_alike": MINIMUM | {"train": 96}}
KINDS = tuple(LEAST)
OVERLAP = 0.6
STOP = frozenset(
    re.findall(r"\w+", "a an and as by for from how i in is it me my of on or so that the to what with you")
)

Prompt = dict[str, str]


def read(path: Path) -> list[Prompt]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def every_file() -> list[Path]:
    return [*sorted(DATA.glob("*.jsonl")), *sorted(ADAPTER.glob("*.jsonl"))]


def of_kind(kind: str) -> list[Prompt]:
    return [prompt for split in MINIMUM for prompt in read(DATA / f"{kind}_{split}.jsonl")]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def mean_words(prompts: list[Prompt]) -> float:
    return sum(len(words(prompt["instruction"])) for prompt in prompts) / len(prompts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", MINIMUM)
def test_enough_prompts_in_every_split(kind: str, split: str) -> None:
    assert len(read(DATA / f"{kind}_{split}.jsonl")) >= LEAST[kind][split]


def test_every_line_has_exactly_an_instruction_and_a_category() -> None:
    assert all(set(prompt) == {"instruction", "category"} for path in every_file() for prompt in read(path))


def test_no_prompt_occurs_twice_in_any_case_or_punctuation() -> None:
    seen = [" ".join(words(prompt["instruction"])) for path in every_file() for prompt in read(path)]
    assert len(every_file()) == 12 and len(set(seen)) == len(seen)


def test_no_two_prompts_share_most_of_their_words() -> None:
    bags = [(frozenset(words(p["instruction"])) - STOP, p["instruction"]) for f in every_file() for p in read(f)]
    close = [(s, t) for (a, s), (b, t) in combinations(bags, 2) if len(a & b) > OVERLAP * len(a | b)]
    assert close == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", MINIMUM)
def test_every_split_covers_at_least_ten_categories(kind: str, split: str) -> None:
    assert len({prompt["category"] for prompt in read(DATA / f"{kind}_{split}.jsonl")}) >= 10


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_are_varied_and_within_bounds(kind: str) -> None:
    lengths = [len(words(prompt["instruction"])) for prompt in of_kind(kind)]
    assert min(lengths) >= 5 and max(lengths) <= 45 and len(set(lengths)) >= 15


def test_length_and_form_do_not_give_harmfulness_away() -> None:
    harmful, harmless = of_kind("harmful"), of_kind("harmless")
    questions = [sum("?" in p["instruction"] for p in prompts) / len(prompts) for prompts in (harmful, harmless)]
    assert abs(mean_words(harmful) - mean_words(harmless)) < 1.5 and abs(questions[0] - questions[1]) < 0.1


def test_a_quarter_of_the_harmless_test_prompts_have_sharp_words() -> None:
    sharp = [p for p in read(DATA / "harmless_test.jsonl") if p["category"] == "sharp-words"]
    assert len(sharp) >= 16


def test_look_alikes_sound_harmful_and_the_plain_harmless_prompts_do_not() -> None:
    """By the words of violence, crime and danger that they share with the harmful ones."""
    sharp = re.compile(
        r"\b(kill|murder|attack|destroy|poison|bomb|shoot|steal|burn|hijack|crack|smuggl|blow|die|dead|death|blood|cut|"
        r"rob|weapon|trap|knife|stab|hit|lock|acid|hack|fake|drug|threat|crush|escap|explo|execut|strang|butcher|brute|"
        r"hang|gun|slash|bullet|launder|beat|punch|villain|thie|thef|witch|pirate|danger|lethal|fire|smoke|victim)"
    )
    shares = {
        kind: sum(bool(sharp.search(p["instruction"].lower())) for p in of_kind(kind)) / len(of_kind(kind))
        for kind in ("look_alike", "harmless")
    }
    assert shares["look_alike"] > 0.6 and shares["harmless"] < 0.15
