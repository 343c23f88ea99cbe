"""The base's answers and the distance along them, against the plainest way to get them."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from abliterate.calibration.model import LanguageModel
from abliterate.codec import decode, encode
from abliterate.evaluation import answers as module
from abliterate.evaluation.answers import Answers, distance, record_answers
from abliterate.progress import SILENT
from tests.resident import VOCABULARY, llama, random_prompts, resident

PROMPTS = random_prompts(9, seed=4)
MODEL, OTHER = resident(llama(), batch_size=4), resident(llama(seed=1), batch_size=2)
COUNT, LONGEST = 6, 8
WHOLE = random_prompts(9, seed=6, shortest=LONGEST, longest=LONGEST)


def completions() -> list[list[int]]:
    """Some of them ended early: at once, before the sixth token, and after it."""
    return [tokens[:cut] for tokens, cut in zip(WHOLE, (0, 2, 5, 6, 7, 8, 8, 8, 8), strict=True)]


def record(count: int = COUNT) -> Answers:
    return record_answers(MODEL, PROMPTS, completions(), count, LONGEST, SILENT, "own")


def plain_logits(model: LanguageModel, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """One prompt a time, all positions, in fp64 from here on: [tokens, vocabulary]."""
    with torch.no_grad():
        logits = model.model(torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].double()


def test_answers_are_the_first_tokens_and_what_ended_them() -> None:
    found = record()
    for own, tokens, prompt in zip(completions(), found.tokens, PROMPTS, strict=True):
        assert tokens[: len(own)] == tuple(own[:COUNT])
        assert len(tokens) == min(COUNT, len(own) + 1)
        if len(own) < COUNT:
            after = plain_logits(MODEL, prompt, [*own, 0])[-1]
            assert tokens[-1] == int(after.argmax())
    assert found.lengths[:3] == (1, 3, 6)


def test_nothing_is_added_to_answers_that_were_cut_off() -> None:
    whole = [tokens[:4] for tokens in WHOLE]
    found = record_answers(MODEL, PROMPTS, whole, COUNT, 4, SILENT, "own")
    assert found.tokens == tuple(map(tuple, whole)) and set(found.lengths) == {4}


@pytest.mark.parametrize("kept", [VOCABULARY + 5, VOCABULARY, VOCABULARY - 1])
def test_distance_against_the_plain_way(monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    monkeypatch.setattr(module, "KEPT", kept)
    found = record()
    far = distance(OTHER, PROMPTS, found, SILENT, "other")
    for number, (prompt, tokens) in enumerate(zip(PROMPTS, found.tokens, strict=True)):
        base, other = plain_logits(MODEL, prompt, tokens), plain_logits(OTHER, prompt, tokens)
        p, q = base.log_softmax(-1), other.log_softmax(-1)
        assert far.kl[number] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
        assert far.agreement[number] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
        rows = torch.arange(len(tokens))
        assert far.losses[number] == pytest.approx(float(-q[rows, list(tokens)].mean()), rel=1e-4)
        assert found.losses[number] == pytest.approx(float(-p[rows, list(tokens)].mean()), rel=1e-4)


@pytest.mark.parametrize("kept", [3, 30, VOCABULARY])
def test_of_fewer_classes_the_distance_is_a_little_less_and_none_from_itself(
    monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    exact = distance(OTHER, PROMPTS, record(), SILENT, "other")
    monkeypatch.setattr(module, "KEPT", kept)
    found = record()
    assert found.ids.shape == (sum(found.lengths), kept) and found.log_probs.shape[1] == kept + 1
    torch.testing.assert_close(
        found.log_probs.double().exp().sum(-1), torch.ones(len(found.ids)).double(), atol=1e-5, rtol=0
    )
    far = distance(OTHER, PROMPTS, found, SILENT, "other")
    assert all(0 < less <= more + 1e-5 for less, more in zip(far.kl, exact.kl, strict=True))
    assert far.losses == exact.losses and far.agreement == exact.agreement
    same = distance(MODEL, PROMPTS, found, SILENT, "same")
    assert set(same.kl) == {0.0} and set(same.agreement) == {1.0} and same.losses == found.losses


def test_most_of_the_distance_is_in_the_likeliest_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = distance(OTHER, PROMPTS, record(), SILENT, "other")
    monkeypatch.setattr(module, "KEPT", 80)
    far = distance(OTHER, PROMPTS, record(), SILENT, "other")
    assert sum(far.kl) > 0.95 * sum(exact.kl)


def test_few_logits_at_a_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = record()
    assert {len(rows) for rows in module._small(MODEL, COUNT).batches(PROMPTS)} == {4, 1}
    monkeypatch.setattr(module, "MOST_LOGITS", 2 * COUNT * VOCABULARY)
    assert {len(rows) for rows in module._small(MODEL, COUNT).batches(PROMPTS)} == {2, 1}
    again = record()
    assert again.tokens == found.tokens
    torch.testing.assert_close(again.log_probs, found.log_probs, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(module, "MOST_LOGITS", 1)
    assert module._small(MODEL, COUNT).batch_size == 1


def test_likelihoods_that_are_not_numbers_are_not_hidden() -> None:
    broken = resident(llama(), batch_size=3)
    broken.model.lm_head.weight[7] = torch.nan
    assert all(kl != kl for kl in distance(broken, PROMPTS, record(), SILENT, "other").kl)


def test_equal_logits_agree_with_themselves() -> None:
    """Half precision has many of them, and argmax and topk name different ones."""
    even = resident(llama(), batch_size=3)
    even.model.lm_head.weight.zero_()
    found = record_answers(even, PROMPTS, completions(), COUNT, LONGEST, SILENT, "own")
    assert set(distance(even, PROMPTS, found, SILENT, "same").agreement) == {1.0}


def test_answers_are_stored_exactly() -> None:
    found = record()
    stored = decode(Answers, encode(found))
    assert (stored.tokens, stored.losses) == (found.tokens, found.losses)
    assert stored.ids.dtype == torch.int32 and torch.equal(stored.ids, found.ids)
    assert distance(OTHER, PROMPTS, stored, SILENT, "a") == distance(OTHER, PROMPTS, found, SILENT, "a")


def test_the_model_is_asked_for_no_more_logits_than_answers_have() -> None:
    seen: list[int] = []
    hook = MODEL.head.register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[1]))
    record()
    hook.remove()
    assert max(seen) == COUNT and len(seen) == 3
