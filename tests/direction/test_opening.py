"""Prompts that start alike: run once or whole, logits and gradients are the same."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abliterate.calibration.dials import Dials
from abliterate.direction import opening
from abliterate.direction.opening import LEAST, Opening, in_common, opening_of
from abliterate.direction.pulls import Trial
from abliterate.direction.scoring import Validation
from abliterate.evaluation.metrics import first_logits
from abliterate.progress import SILENT
from tests import pico
from tests.resident import Load, random_prompts

START = [3, 77, 41, 90, 8, 19, 22]
HARMFUL, HARMLESS = ([[*START, *tokens] for tokens in random_prompts(5, seed=seed)] for seed in (1, 2))
DATA = Validation(HARMFUL, HARMLESS, (5, 9, 17))
ATTENTION = ["llama", "gemma3_text", "gpt2", "mixtral", "opt"]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=5))
def test_what_prompts_have_in_common(prompts: list[list[int]]) -> None:
    count = in_common(prompts)
    assert all(tokens[:count] == prompts[0][:count] for tokens in prompts) and count < min(map(len, prompts))
    longer = [tuple(tokens[: count + 1]) for tokens in prompts]
    assert count + 1 == min(map(len, prompts)) or len(set(longer)) > 1


@pytest.mark.parametrize("family", ATTENTION)
def test_what_runs_once_is_the_same(load: Load, family: str) -> None:
    model = load(family)
    found = opening_of(model, HARMLESS)
    assert found.once
    layers = len(model.stream.layers)
    dials = Dials(torch.full((layers, 2), 0.7), torch.stack([pico.unit(seed=layer) for layer in range(layers)]))
    whole = Opening(model, False)
    ways = [Trial(each, DATA, first_logits(model, HARMLESS, SILENT, "base")) for each in (whole, found)]
    first, second = (trial.pull(dials, ([0, 2, 4], [1, 2, 3]), 4.0, directions=True) for trial in ways)
    assert first.losses == pytest.approx(second.losses, rel=1e-4)
    torch.testing.assert_close(first.strengths, second.strengths, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(first.directions, second.directions, rtol=1e-3, atol=1e-5)
    effects = [trial.effect(dials) for trial in ways]
    assert effects[0].refused == effects[1].refused and effects[0].kl == pytest.approx(effects[1].kl, rel=1e-3)
    passed: list[tuple[int, ...]] = []
    handle = model.stream.layers[0].register_forward_pre_hook(lambda _m, args: passed.append(tuple(args[0].shape[:2])))
    found.logits(HARMFUL)
    longest = max(map(len, HARMFUL))
    assert passed == [(1, len(START)), (len(HARMFUL), longest - len(START))]
    passed.clear()
    ways[1].effect(dials)
    first_logits(model, HARMLESS, SILENT, "base", found.logits)
    handle.remove()
    assert passed.count((1, len(START))) == 3 + 2, "batches of three and two prompts; one alone runs whole"


@pytest.mark.parametrize("family", ["qwen3_next", "zamba"])
def test_other_layers_run_whole(load: Load, family: str) -> None:
    assert not opening_of(load(family), HARMLESS).once


def test_a_model_that_makes_something_else_of_it_runs_whole(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    continued = opening._continued
    monkeypatch.setattr(opening, "_continued", lambda *a: continued(*a) * 1.2)
    assert not opening_of(load(), HARMLESS).once


def test_where_there_is_nothing_to_gain(load: Load) -> None:
    assert not opening_of(load(memory="streamed"), HARMLESS).once
    short = [[*START[: LEAST - 1], 1, 2], [*START[: LEAST - 1], 3, 4]]
    assert not opening_of(load(), short).once and not opening_of(load(), HARMLESS[:1]).once
    model = load()
    torch.testing.assert_close(Opening(model, True).logits(short), model.logits(short), rtol=0, atol=0)
