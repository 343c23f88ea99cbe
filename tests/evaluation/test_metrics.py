"""Evaluation: every figure against the plainest way to get it, and completions that are nowhere kept."""

import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from abliterate.calibration.model import LanguageModel, Tokens
from abliterate.evaluation.metrics import (
    WINDOW,
    Evaluation,
    EvaluationSet,
    compare,
    cross_entropy,
    evaluate_model,
    score_rate,
    substring_rates,
)
from abliterate.progress import SILENT
from tests.resident import VOCABULARY, llama, random_prompts, resident

REFUSALS = ("I cannot help", "I'm sorry, no", "Well. AS AN AI, no", "I\u2019m unable to")
ANSWERS = ("Sure.", "", "The Mekong.", "I can", "Here is a list.")
HARMFUL, HARMLESS = random_prompts(5, seed=1), random_prompts(7, seed=2)
NEUTRAL = random_prompts(1, seed=3, shortest=40, longest=40)[0]
DATA = EvaluationSet(HARMFUL, HARMLESS, NEUTRAL, [5, 9], 6)


class Scripted(LanguageModel):
    """Completions are set by the first token of each prompt; everything else is the model's own."""

    def generate(self, prompts: Sequence[Tokens], max_new_tokens: int, *_: Any) -> list[list[int]]:
        texts = (*REFUSALS, *ANSWERS)
        return [list(texts[tokens[0] % len(texts)].encode()) for tokens in prompts]

    def decode(self, tokens: Tokens) -> str:
        return bytes(tokens).decode()


def scripted() -> LanguageModel:
    return Scripted(**{field.name: getattr(MODEL, field.name) for field in dataclasses.fields(LanguageModel)})


MODEL = resident(llama(), batch_size=3)
OTHER = resident(llama(seed=1), batch_size=2)


def last_logits(model: LanguageModel, prompts: Sequence[Tokens]) -> Tensor:
    """One prompt a time, in fp64 from here on."""
    with torch.no_grad():
        rows = [model.model(torch.tensor([list(tokens)]), use_cache=False).logits[0, -1] for tokens in prompts]
    return torch.stack(rows).double()


def share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)


def test_refusals_by_substring() -> None:
    texts = (*REFUSALS, *ANSWERS)
    for prompts, rate in ((HARMFUL, "refusal_rate_substring"), (HARMLESS, "over_refusal_rate_substring")):
        found = getattr(evaluate_model(scripted(), DATA).evaluation, rate)
        expected = share([texts[tokens[0] % len(texts)] in REFUSALS for tokens in prompts])
        assert found == pytest.approx(expected) and 0 < expected < 1


class Words:
    """Every eighth token is a refusal, so that a random model refuses now and then."""

    def decode(self, tokens: Tokens, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(f"word{token}" if token % 8 else "I cannot" for token in tokens)


def test_substrings_in_what_the_model_itself_writes() -> None:
    made = resident(MODEL.model, batch_size=3, tokenizer=Words())
    wrote = made.generate([*HARMFUL, *HARMLESS], 3)
    refused = [any(token % 8 == 0 for token in tokens) for tokens in wrote]
    expected = share(refused[: len(HARMFUL)]), share(refused[len(HARMFUL) :])
    found = substring_rates(made, dataclasses.replace(DATA, max_new_tokens=3), SILENT, "refusals")
    assert found == pytest.approx(expected) and 0 < sum(expected) < 2


def test_refusals_by_score() -> None:
    tokens = list(range(52))
    logits = last_logits(MODEL, HARMLESS)
    odds = logits.softmax(-1)[:, tokens].sum(-1)
    expected = share([bool(p > 0.5) for p in odds])
    assert 0 < expected < 1
    found = evaluate_model(scripted(), dataclasses.replace(DATA, refusal_tokens=tokens)).evaluation
    assert found.over_refusal_rate_score == pytest.approx(expected)
    harmful = last_logits(MODEL, HARMFUL).softmax(-1)[:, tokens].sum(-1)
    assert found.refusal_rate_score == pytest.approx(share([bool(p > 0.5) for p in harmful]))


@pytest.mark.parametrize("tokens", [None, [], ()])
def test_without_refusal_tokens_there_is_no_rate_by_score(tokens: list[int] | None) -> None:
    assert score_rate(torch.zeros(3, 9), tokens) is None
    assert score_rate(None, [1]) is None


def test_a_score_of_zero_is_no_refusal() -> None:
    assert score_rate(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [2.0, 0.0]]), [0]) == 0.5


def test_kl_and_agreement_with_a_baseline() -> None:
    base, other = last_logits(MODEL, HARMLESS), last_logits(OTHER, HARMLESS)
    p, q = base.softmax(-1), other.softmax(-1)
    kl = float((p * (p / q).log()).sum(-1).mean())
    reverse = float((q * (q / p).log()).sum(-1).mean())
    same = share([bool(a == b) for a, b in zip(base.argmax(-1), other.argmax(-1), strict=True)])
    measured = evaluate_model(scripted(), DATA)
    against = dataclasses.replace(DATA, harmful=[])
    found = evaluate_model(OTHER, against, measured.harmless_logits).evaluation
    assert found.kl_first_token == pytest.approx(kl, rel=1e-4) and kl != pytest.approx(reverse, rel=1e-2)
    assert found.top1_agreement == pytest.approx(same)
    torch.testing.assert_close(measured.harmless_logits.double(), base, atol=1e-4, rtol=1e-4)


def test_agreement_is_a_share() -> None:
    base = torch.eye(4)
    other = base[[0, 1, 3, 2]]
    kl, agreement = compare(base, other)
    assert agreement == 0.5 and kl > 0
    assert compare(base, base + 3.0) == (0.0, 1.0)


def test_a_model_against_itself() -> None:
    measured = evaluate_model(scripted(), DATA)
    found = evaluate_model(scripted(), DATA, measured.harmless_logits).evaluation
    assert (found.kl_first_token, found.top1_agreement) == (0.0, 1.0)
    assert measured.evaluation.kl_first_token is None and measured.evaluation.top1_agreement is None


@pytest.mark.parametrize("length", [2, 3, WINDOW, WINDOW + 1, WINDOW + 2, 2 * WINDOW + 40])
def test_cross_entropy_predicts_every_token_but_the_first_once(length: int) -> None:
    tokens = random_prompts(1, seed=4, shortest=length, longest=length)[0]
    total = 0.0
    for target in range(1, length):
        start = (target - 1) // WINDOW * WINDOW
        if target == start + 1:
            with torch.no_grad():
                window = torch.tensor([tokens[start : start + WINDOW]])
                logp = MODEL.model(window, use_cache=False).logits[0].double().log_softmax(-1)
        total -= float(logp[target - 1 - start, tokens[target]])
    assert cross_entropy(MODEL, tokens) == pytest.approx(total / (length - 1), rel=1e-5)


@pytest.mark.parametrize("length", [0, 1])
def test_cross_entropy_of_nothing(length: int) -> None:
    assert math.isnan(cross_entropy(MODEL, [5] * length))
    found = evaluate_model(scripted(), dataclasses.replace(DATA, neutral=[])).evaluation
    assert found.cross_entropy is None


def test_cross_entropy_of_even_odds_is_the_log_of_the_vocabulary() -> None:
    even = resident(llama(layers=1))
    even.model.lm_head.weight.zero_()
    assert cross_entropy(even, NEUTRAL) == pytest.approx(math.log(VOCABULARY), rel=1e-6)


def test_a_model_without_a_chat_format_has_no_refusals() -> None:
    found = evaluate_model(MODEL, EvaluationSet([], HARMLESS, NEUTRAL, None, 6)).evaluation
    rates = ("refusal_rate_substring", "over_refusal_rate_substring", "refusal_rate_score", "over_refusal_rate_score")
    assert [getattr(found, rate) for rate in rates] == [None] * 4
    assert (found.prompts_harmful, found.prompts_harmless) == (0, 7) and found.cross_entropy is not None


def test_completions_are_nowhere_kept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.DEBUG)
    measured = evaluate_model(scripted(), DATA)
    values = dataclasses.asdict(measured.evaluation).values()
    assert all(value is None or type(value) in (int, float) for value in values)
    assert [field.name for field in dataclasses.fields(measured)] == ["evaluation", "harmless_logits"]
    assert measured.harmless_logits.shape == (len(HARMLESS), VOCABULARY)
    assert list(tmp_path.iterdir()) == []
    said = caplog.text + "".join(capsys.readouterr())
    assert not any(text in said for text in (*REFUSALS, *ANSWERS) if text)


def test_what_was_measured_on() -> None:
    found = evaluate_model(scripted(), DATA).evaluation
    assert isinstance(found, Evaluation)
    assert (found.prompts_harmful, found.prompts_harmless, found.max_new_tokens) == (5, 7, 6)
