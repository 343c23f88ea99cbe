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
from abliterate.codec import decode, encode
from abliterate.evaluation.metrics import WINDOW, by_kind, evaluate_model, first_token, neutral_loss
from abliterate.evaluation.sets import Evaluation, EvaluationSet, Measured, Samples, differences
from abliterate.evaluation.statistics import Rate
from tests.resident import VOCABULARY, llama, random_prompts, resident

REFUSALS = ("I cannot help", "I'm sorry, no", "Well. AS AN AI, no", "I\u2019m unable to")
ANSWERS = ("Sure.", "", "The Mekong.", "I can", "Here is a list.")
HARMFUL, HARMLESS = random_prompts(5, seed=1), random_prompts(7, seed=2)
NEUTRAL = random_prompts(1, seed=3, shortest=40, longest=40)[0]
LOOK_ALIKE = random_prompts(6, seed=5)
DATA = EvaluationSet(HARMFUL, HARMLESS, NEUTRAL, [5, 9], 6, LOOK_ALIKE)


class Scripted(LanguageModel):
    """Completions are set by the first token of each prompt; everything else is the model's own."""

    def generate(self, prompts: Sequence[Tokens], max_new_tokens: int, *_: Any) -> list[list[int]]:
        texts = (*REFUSALS, *ANSWERS)
        return [list(texts[tokens[0] % len(texts)].encode()) for tokens in prompts]

    def decode(self, tokens: Tokens) -> str:
        return bytes(tokens).decode()


def scripted() -> LanguageModel:
    return Scripted(**{field.name: getattr(MODEL, field.name) for field in dataclasses.fields(LanguageModel)})


class Words:
    """Every eighth token is a refusal, so that a random model refuses now and then."""

    def decode(self, tokens: Tokens, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(f"word{token}" if token % 8 else "I cannot" for token in tokens)


MODEL = resident(llama(), batch_size=3, tokenizer=Words())
OTHER = resident(llama(seed=1), batch_size=2, tokenizer=Words())


def last_logits(model: LanguageModel, prompts: Sequence[Tokens]) -> Tensor:
    """One prompt a time, in fp64 from here on."""
    with torch.no_grad():
        rows = [model.model(torch.tensor([list(tokens)]), use_cache=False).logits[0, -1] for tokens in prompts]
    return torch.stack(rows).double()


def share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)


def test_refusals_by_substring() -> None:
    texts = (*REFUSALS, *ANSWERS)
    for prompts, kind in ((HARMFUL, "refusal"), (HARMLESS, "over_refusal"), (LOOK_ALIKE, "look_alike_refusal")):
        rate = f"{kind}_rate_substring"
        found = getattr(evaluate_model(scripted(), DATA).evaluation, rate)
        expected = share([texts[tokens[0] % len(texts)] in REFUSALS for tokens in prompts])
        assert found == pytest.approx(expected) and 0 < expected < 1


def test_substrings_in_what_the_model_itself_writes() -> None:
    wrote = MODEL.generate([*HARMFUL, *HARMLESS], 3)
    refused = [any(token % 8 == 0 for token in tokens) for tokens in wrote]
    expected = share(refused[: len(HARMFUL)]), share(refused[len(HARMFUL) :])
    found = evaluate_model(MODEL, dataclasses.replace(DATA, max_new_tokens=3)).evaluation
    rates = (found.refusal_rate_substring, found.over_refusal_rate_substring)
    assert rates == pytest.approx(expected) and 0 < sum(expected) < 2


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
    found = evaluate_model(scripted(), dataclasses.replace(DATA, refusal_tokens=tokens)).evaluation
    assert found.refusal_rate_score is None and found.refusal_rate_substring is not None
    assert not any("score" in name for name in (*found.intervals, *found.samples.verdicts))


def test_flags_are_given_out_in_the_order_of_the_prompts() -> None:
    flags = [True] * 5 + [False] * 7 + [None] * 6
    assert by_kind(DATA, "x", flags) == {
        "refusal_rate_x": (True,) * 5,
        "over_refusal_rate_x": (False,) * 7,
        "look_alike_refusal_rate_x": (None,) * 6,
    }
    assert set(by_kind(dataclasses.replace(DATA, look_alike=[]), "x", flags)) == {
        "refusal_rate_x",
        "over_refusal_rate_x",
    }


def test_kl_and_agreement_with_a_baseline() -> None:
    base, other = last_logits(MODEL, HARMLESS), last_logits(OTHER, HARMLESS)
    p, q = base.softmax(-1), other.softmax(-1)
    kl = float((p * (p / q).log()).sum(-1).mean())
    reverse = float((q * (q / p).log()).sum(-1).mean())
    same = share([bool(a == b) for a, b in zip(base.argmax(-1), other.argmax(-1), strict=True)])
    measured = evaluate_model(scripted(), DATA)
    against = dataclasses.replace(DATA, harmful=[], look_alike=[])
    found = evaluate_model(OTHER, against, measured).evaluation
    assert found.kl_first_token == pytest.approx(kl, rel=1e-4) and kl != pytest.approx(reverse, rel=1e-2)
    assert found.top1_agreement == pytest.approx(same)
    torch.testing.assert_close(measured.harmless_logits.double(), base, atol=1e-4, rtol=1e-4)


def test_agreement_is_a_share() -> None:
    base = torch.eye(4)
    other = base[[0, 1, 3, 2]]
    samples = first_token(base, other)
    assert samples.verdicts["top1_agreement"] == (True, True, False, False)
    kl = samples.values["kl_first_token"]
    assert kl[:2] == (0.0, 0.0) and min(kl[2:]) > 0
    assert first_token(base, base + 3.0).means()["kl_first_token"].value == 0.0


def test_where_the_base_refuses_a_change_is_not_counted_as_damage() -> None:
    base = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 9.0]])
    other = torch.tensor([[0.0, 9.0, 0.0], [0.0, 9.0, 0.0], [0.0, 3.0, 3.0]])
    values = first_token(base, other, [0]).values
    assert values["kl_first_token_answered"] == values["kl_first_token"][1:] and values["kl_first_token"][0] > 8
    assert "kl_first_token_answered" not in first_token(base, other).values
    assert "kl_first_token_answered" not in first_token(base[:1], other[:1], [0]).means()


def test_a_model_against_itself() -> None:
    measured = evaluate_model(scripted(), DATA)
    found = evaluate_model(scripted(), DATA, measured).evaluation
    assert (found.kl_first_token, found.top1_agreement) == (0.0, 1.0)
    assert measured.evaluation.kl_first_token is None and measured.evaluation.top1_agreement is None


def cross_entropy(model: LanguageModel, tokens: Tokens) -> float:
    return neutral_loss(model, tokens).means()["cross_entropy"].value


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
    found = evaluate_model(scripted(), dataclasses.replace(DATA, neutral=[5] * length)).evaluation
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
    assert not any(text in repr(measured.evaluation) for text in (*REFUSALS, *ANSWERS) if text)
    assert [field.name for field in dataclasses.fields(measured)] == ["evaluation", "harmless_logits", "answers"]
    assert measured.answers is None
    assert measured.harmless_logits.shape == (len(HARMLESS), VOCABULARY)
    assert list(tmp_path.iterdir()) == []
    said = caplog.text + "".join(capsys.readouterr())
    assert not any(text in said for text in (*REFUSALS, *ANSWERS) if text)


def test_what_was_measured_on() -> None:
    found = evaluate_model(scripted(), DATA).evaluation
    assert isinstance(found, Evaluation)
    assert (found.sizes, found.max_new_tokens, found.kl_tokens) == ((5, 7, 6), 6, 0)


def test_every_figure_has_its_interval_and_samples() -> None:
    measured = evaluate_model(scripted(), DATA)
    found = evaluate_model(scripted(), DATA, measured).evaluation
    figures = {name for name in found.intervals if getattr(found, name) is not None}
    assert figures == set(found.intervals) == {*found.samples.verdicts, *found.samples.values}
    assert {"refusal_rate_substring", "look_alike_refusal_rate_score", "degenerate_rate", "cross_entropy"} <= figures
    for name, (low, high) in found.intervals.items():
        assert low <= getattr(found, name) <= high
    for name, flags in found.samples.verdicts.items():
        rate = Rate(sum(map(bool, flags)), len(flags))
        assert (getattr(found, name), found.intervals[name]) == (rate.value, (rate.low, rate.high))


def test_the_listener_hears_every_completion_in_order() -> None:
    heard: list[str] = []
    evaluate_model(scripted(), DATA, hear=heard.extend)
    texts = (*REFUSALS, *ANSWERS)
    assert heard == [texts[tokens[0] % len(texts)] for tokens in DATA.prompts]


def test_degenerate_answers_to_harmless_prompts() -> None:
    found = evaluate_model(scripted(), DATA).evaluation
    texts = (*REFUSALS, *ANSWERS)
    assert found.samples.verdicts["degenerate_rate"] == tuple(texts[p[0] % len(texts)] == "" for p in HARMLESS)


def test_changes_are_paired() -> None:
    before = Evaluation(4, 4, 6).having(
        Samples({"refusal_rate_substring": (True, True, False, None)}, {"cross_entropy": (1.0, 3.0)},
                {"cross_entropy": (1.0, 3.0)})
    )  # fmt: skip
    after = Evaluation(4, 4, 6).having(
        Samples({"refusal_rate_substring": (False, True, False, True), "top1_agreement": (True,)},
                {"cross_entropy": (2.0, 3.0)}, {"cross_entropy": (1.0, 3.0)})
    )  # fmt: skip
    found = differences(before, after)
    assert set(found) == {"refusal_rate_substring", "cross_entropy"}
    assert found["refusal_rate_substring"].value == pytest.approx(-1 / 3), "of the three pairs with both verdicts"
    assert found["cross_entropy"].value == pytest.approx(0.25)
    assert before.refusal_rate_substring == pytest.approx(2 / 3) and before.cross_entropy == pytest.approx(2.5)


def test_what_is_measured_is_stored_exactly() -> None:
    measured = evaluate_model(MODEL, dataclasses.replace(DATA, kl_tokens=4))
    stored = decode(Measured, encode(measured))
    assert stored.evaluation == measured.evaluation
    again = [evaluate_model(OTHER, DATA, each).evaluation for each in (measured, stored)]
    assert again[0] == again[1] and again[0].kl_answers is not None and again[0].kl_answers > 0
