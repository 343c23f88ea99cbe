"""Which first tokens start refusals: a family's published set where the model bears it out, else what it writes."""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from abliterate.calibration.model import Batch, LanguageModel, Tokens
from abliterate.direction.refusal_tokens import (
    FAMILIES,
    NEW_TOKENS,
    PROBED,
    RefusalTokens,
    find_refusal_tokens,
    named_refusal_tokens,
    other_starts,
)
from abliterate.errors import CalibrationError
from tests.resident import byte_tokenizer

WORDS = ["I", "As", "Sorry", " cannot", " an AI", "Sure", "The", "It", ", here it is"]
TOKENIZER = byte_tokenizer(words=WORDS)
LLAMA3 = "... <|start_header_id|> ..."


def ids(text: str) -> list[int]:
    found: list[int] = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return found


class Scripted(LanguageModel):
    """Prompt [n] gets the n-th answer."""

    def generate(self, prompts: Sequence[Tokens], max_new_tokens: int, *_: Any) -> list[list[int]]:
        assert max_new_tokens == NEW_TOKENS and len(prompts) <= PROBED
        return [ids(self.model.answers[tokens[0]])[:max_new_tokens] for tokens in prompts]

    def forward(self, prompts: Sequence[Tokens], *_: Any, **__: Any) -> Iterator[Batch]:
        assert len(prompts) <= PROBED
        first = torch.tensor([ids(self.model.answers[tokens[0]])[0] for tokens in prompts])
        yield Batch(list(range(len(prompts))), torch.nn.functional.one_hot(first, len(TOKENIZER)).float(), None)


def found(refusals: Sequence[str], answers: Sequence[str], family: str = "other", template: str = "") -> RefusalTokens:
    """From the completions of harmful prompts and of harmless ones."""
    texts = [*refusals, *answers]
    model = SimpleNamespace(answers=texts, config=SimpleNamespace(model_type=family))
    scripted = Scripted(model, TOKENIZER, None, None, 1)  # type: ignore[arg-type]
    prompts = [[number] for number in range(len(texts))]
    return find_refusal_tokens(scripted, prompts[: len(refusals)], prompts[len(refusals) :], template=template)


SURE = ["Sure, here it is"] * 20


def test_first_tokens_of_refusals() -> None:
    tokens = found(["I cannot"] * 15 + ["As an AI"] * 3 + ["Sure, here it is"] * 2, SURE)
    assert tokens == RefusalTokens((*ids("I"), *ids("As")), ("I", "As"), "completions")


def test_a_token_that_answers_start_with_as_often_does_not_count() -> None:
    refusals = ["I cannot"] * 14 + ["The I cannot"] * 4 + ["It I cannot"] * 2
    answers = ["The"] * 3 + ["It"] * 2 + ["Sure"] * 15
    assert found(refusals, answers).texts == ("I", "The")
    assert found(refusals, ["The"] * 4 + ["It"] * 1 + ["Sure"] * 15).texts == ("I", "It")


def test_shares_are_compared_when_the_sets_differ_in_size() -> None:
    assert found(["I cannot"] * 10, ["I"] * 12 + ["Sure"] * 28).texts == ("I",)
    with pytest.raises(CalibrationError, match=r"start with the same tokens; .*direction\.refusal_tokens"):
        found(["I cannot"] * 10 + ["Sure"] * 30, ["I"] * 3 + ["Sure"] * 7)


@pytest.mark.parametrize(("family", "mark", "words"), FAMILIES)
def test_a_familys_own_set(family: str, mark: str, words: tuple[str, ...]) -> None:
    tokens = found(["I cannot"] * 18 + ["Sorry I cannot"] * 2, SURE, family, f"..{mark}..")
    assert tokens == RefusalTokens(tuple(ids(word)[0] for word in words), words, "family")


@pytest.mark.parametrize(("others", "source"), [(2, "family"), (3, "completions")])
def test_a_familys_set_needs_nine_refusals_in_ten(others: int, source: str) -> None:
    tokens = found(["I cannot"] * (20 - others) + ["Sorry I cannot"] * others, SURE, "llama", LLAMA3)
    assert tokens.source == source
    assert tokens.texts == (("I",) if source == "family" else ("I", "Sorry"))


def test_both_tokens_of_a_family_bear_it_out_together() -> None:
    refusals = ["I cannot"] * 10 + ["As an AI"] * 9 + ["Sorry I cannot"]
    assert found(refusals, SURE, "qwen2", "<|im_start|>").source == "family"


def test_a_family_in_another_template_is_another_model() -> None:
    assert found(["I cannot"] * 20, SURE, "llama", "USER: ").source == "completions"
    assert found(["I cannot"] * 20, SURE, "mistral", LLAMA3).source == "completions"


def test_answers_to_harmful_prompts_do_not_count() -> None:
    assert found(["I cannot"] * 10 + ["The"] * 10, SURE).texts == ("I",)


@pytest.mark.parametrize(("refused", "of", "enough"), [(1, 8, False), (2, 8, True), (3, 48, False), (4, 48, True)])
def test_a_model_that_does_not_refuse(refused: int, of: int, enough: bool) -> None:
    completions = ["I cannot"] * refused + ["Sure, here it is"] * (of - refused)
    if enough:
        assert found(completions, SURE).texts == ("I",)
        return
    with pytest.raises(CalibrationError, match=f"the model refused {refused} of {of} harmful prompts.*--direction"):
        found(completions, SURE)


def test_empty_completions_are_no_refusals() -> None:
    with pytest.raises(CalibrationError, match="refused 0 of 9"):
        found([""] * 9, SURE)


def test_only_the_first_prompts_are_tried() -> None:
    tokens = found(["I cannot"] * PROBED + ["Sorry I cannot"] * 50, ["Sure"] * PROBED + ["I"] * 200)
    assert tokens.texts == ("I",)


def test_words_of_a_recipe() -> None:
    model = Scripted(None, TOKENIZER, None, None, 1)  # type: ignore[arg-type]
    tokens = named_refusal_tokens(model, ["I cannot", "Sorry", "I", "xyz"])
    assert tokens.source == "recipe" and tokens.texts == ("I", "Sorry", "x")
    assert tokens.ids == (*ids("I"), *ids("Sorry"), *ids("x"))


def test_what_a_refusal_may_fall_back_on() -> None:
    model = Scripted(None, TOKENIZER, None, None, 1)  # type: ignore[arg-type]
    known = RefusalTokens(tuple(ids("Sorry")), ("Sorry",), "completions")
    assert other_starts(model, known) == (*ids("I"), *ids("As"))
    assert other_starts(model, named_refusal_tokens(model, ["Sure"])) == ()


def test_words_do_not_start_with_the_tokenizers_bos() -> None:
    tokenizer = byte_tokenizer(words=WORDS, adds_bos=True)
    model = Scripted(None, tokenizer, None, None, 1)  # type: ignore[arg-type]
    assert named_refusal_tokens(model, ["I"]).texts == ("I",)
