"""Which way losses pull: the analytic gradients against measured slopes, in memory and streamed."""

import functools
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from abliterate.calibration.dials import Dialled, Dials
from abliterate.calibration.model import LanguageModel
from abliterate.direction.opening import Opening
from abliterate.direction.pulls import Trial
from abliterate.direction.score import kl_divergence, refusal_score
from abliterate.direction.scoring import Validation
from abliterate.evaluation.metrics import first_logits
from abliterate.progress import SILENT
from tests import pico
from tests.resident import Load

HARMFUL = [[7, 20, 33, 41, 90, 12, 55], [8, 9, 100, 101], [60, 61, 62, 63, 64, 65]]
HARMLESS = [[9, 8, 7, 70, 71], [50] * 9, [12, 13, 14], [99, 98, 97, 96]]
TOKENS, MARGIN, STEP = (5, 9, 17), 4.0, 2e-2
ROWS = ([0, 2], [1, 2, 3])
Made = Callable[[str, str], Trial]


@pytest.fixture(scope="module")
def made(load: Load) -> Made:
    @functools.cache
    def trial(family: str, memory: str) -> Trial:
        model = load(family, memory, batch_size=2)
        data = Validation(HARMFUL, HARMLESS, TOKENS)
        return Trial(Opening(model, False), data, first_logits(model, HARMLESS, SILENT, "base"))

    return trial


def dials_of(model: LanguageModel) -> Dials:
    layers = len(model.stream.layers)
    strengths = 0.2 + 0.6 * torch.rand(layers, 2, generator=torch.Generator().manual_seed(1))
    return Dials(strengths, torch.stack([pico.unit(seed=layer) for layer in range(layers)]))


def losses_at(trial: Trial, dials: Dials) -> Tensor:
    """Both losses, one prompt at a time, fp64."""
    losses = torch.zeros(2, dtype=torch.float64)
    for kind, prompts in enumerate((HARMFUL, HARMLESS)):
        for row in ROWS[kind]:
            with Dialled(trial.model.stream, dials).applied(), torch.no_grad():
                last = trial.model.model(torch.tensor([prompts[row]])).logits[0, -1].double()
            kl = lambda last=last, row=row: kl_divergence(trial.base[row], last)  # noqa: E731
            loss = kl() if kind else softplus(refusal_score(last, TOKENS) + MARGIN)
            losses[kind] += float(loss) / len(ROWS[kind])
    return losses


def slope(measured: Callable[[float], Tensor]) -> Tensor:
    """Central difference of fourth order."""
    at = {k: measured(k * STEP) for k in (-2, -1, 1, 2)}
    return (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * STEP)


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_the_gradients_are_the_slopes(made: Made, family: str, memory: str) -> None:
    trial, still = made(family, memory), made(family, "resident")
    dials = dials_of(trial.model)
    pull = trial.pull(dials, ROWS, MARGIN, directions=True)
    assert pull.losses == pytest.approx(losses_at(still, dials).tolist(), rel=1e-4, abs=1e-5)
    assert pull.directions is not None
    layers = range(len(dials.strengths))
    towards = torch.stack([pico.unit(seed=100 + layer) for layer in layers])

    def stronger(layer: int, column: int, by: float) -> Tensor:
        strengths = dials.strengths.clone()
        strengths[layer, column] += by
        return losses_at(still, Dials(strengths, dials.directions))

    def turned(layer: int, by: float) -> Tensor:
        directions = dials.directions.clone()
        directions[layer] += by * towards[layer]
        return losses_at(still, Dials(dials.strengths, directions))

    by_strength = torch.stack([slope(partial(stronger, layer, column)) for layer in layers for column in (0, 1)], -1)
    by_direction = torch.stack([slope(partial(turned, layer)) for layer in layers], -1)
    along = (pull.directions * towards.double()).sum(-1)
    for found, measured in ((pull.strengths.flatten(1), by_strength), (along, by_direction)):
        assert float(measured.norm(dim=-1).min()) > 1e-3, "both losses depend on them"
        assert bool(((found - measured).norm(dim=-1) < 1e-2 * measured.norm(dim=-1)).all())


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "qwen3_next"])
def test_the_same_streamed_and_in_memory(made: Made, family: str) -> None:
    held, streamed = made(family, "resident"), made(family, "streamed")
    dials = dials_of(held.model)
    first, second = (trial.pull(dials, ROWS, MARGIN, directions=True) for trial in (held, streamed))
    torch.testing.assert_close(first.strengths, second.strengths, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.directions, second.directions, rtol=1e-4, atol=1e-5)
    assert held.effect(dials) == streamed.effect(dials)


def test_an_effect_is_that_of_each_prompt(made: Made) -> None:
    trial = made("llama", "resident")
    dials = dials_of(trial.model)
    with Dialled(trial.model.stream, dials).applied():
        harmful, harmless = (first_logits(trial.model, p, SILENT, "after") for p in (HARMFUL, HARMLESS))
    effect = trial.effect(dials)
    assert effect.bypass == pytest.approx(float(refusal_score(harmful, TOKENS).mean()), rel=1e-5)
    assert effect.kl == pytest.approx(float(kl_divergence(trial.base, harmless).mean()), rel=1e-5) and effect.kl > 1e-3
    top = torch.isin(harmful.argmax(-1), torch.tensor(TOKENS))
    assert effect.refusal == float(((refusal_score(harmful, TOKENS) > 0) | top).double().mean())


def test_other_starts_count_in_the_loss_and_not_in_the_score(made: Made) -> None:
    trial = made("llama", "resident")
    with_others = replace(trial, others=(40, 41))
    dials = dials_of(trial.model)
    with Dialled(trial.model.stream, dials).applied():
        logits = first_logits(trial.model, [HARMFUL[i] for i in ROWS[0]], SILENT, "after")
    wanted = torch.nn.functional.softplus(refusal_score(logits, [*TOKENS, 40, 41]) + MARGIN).mean()
    found = with_others.pull(dials, ROWS, MARGIN, directions=False)
    assert found.losses[0] == pytest.approx(float(wanted), rel=1e-4)
    assert found.losses[0] > trial.pull(dials, ROWS, MARGIN, directions=False).losses[0]
    assert with_others.effect(dials) == trial.effect(dials)


class Words:
    """A tokenizer: what starts with an even token is a refusal."""

    eos_token_id = None

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return "I cannot help with that." if tokens[0] % 2 == 0 else "Sure, here it is."


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_refusals_are_told_by_the_answers_too(made: Made, memory: str) -> None:
    trial = made("llama", memory)
    opening = Opening(replace(trial.model, tokenizer=Words()), False)
    trial = replace(trial, opening=opening, new_tokens=2)
    dials = replace(dials_of(trial.model), strengths=5 * dials_of(trial.model).strengths)
    still = made("llama", "resident").model
    with Dialled(still.stream, dials).applied():
        first = first_logits(still, HARMFUL, SILENT, "after")
    untouched = first_logits(still, HARMFUL, SILENT, "before")
    assert not torch.equal(first.argmax(-1) % 2, untouched.argmax(-1) % 2), "the edit changes what is answered"
    even, top = first.argmax(-1) % 2 == 0, torch.isin(first.argmax(-1), torch.tensor(TOKENS))
    expected = even | top | (refusal_score(first, TOKENS) > 0)
    plain = trial.effect(dials)
    told, unedited = trial.with_answers([(dials, plain), (Dials(torch.zeros(3, 2), dials.directions), plain)])
    assert told == replace(plain, refused=tuple(expected.tolist())) and told != plain
    all_refused = replace(plain, refused=(True,) * len(HARMFUL))
    assert trial.with_answers([(dials, all_refused)]) == [all_refused], "by the first token they are"
    assert unedited.refused == tuple((untouched.argmax(-1) % 2 == 0).logical_or(torch.tensor(plain.refused)).tolist())


def test_nothing_stays_behind(made: Made) -> None:
    trial = made("llama", "resident")
    trial.pull(dials_of(trial.model), ROWS, MARGIN, directions=False)
    modules = list(trial.model.model.modules())
    assert not any(module._forward_hooks for module in modules)
    assert all(p.grad is None and not p.requires_grad for p in trial.model.model.parameters())
