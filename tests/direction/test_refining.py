"""A direction turned down its gradient: the gradient against measured slopes, and what a descent comes to."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from abliterate.calibration.hooks import Steer
from abliterate.calibration.model import LanguageModel, Tokens
from abliterate.direction.opening import Opening
from abliterate.direction.refining import Aim, Descent, _Kept, _kept, _losses, _slope, refined
from abliterate.direction.score import kl_divergence, refusal_score
from abliterate.evaluation.metrics import first_logits
from abliterate.progress import SILENT
from tests import pico
from tests.resident import Load

ANSWERED = [[7, 20, 33, 41, 90, 12, 55], [8, 9, 100, 101], [60, 61, 62, 63, 64, 65]]
KEPT = [[9, 8, 7, 70, 71], [50] * 9, [12, 13, 14], [99, 98, 97, 96]]
AIM, DESCENT, STEP = Aim(ANSWERED, KEPT, [], (5, 9, 17)), Descent(margin=4.0, kl_weight=3.0), 2e-2


def logits(model: LanguageModel, prompts: list[Tokens], r: Tensor) -> Tensor:
    batches = model.forward(prompts, [Steer(ablate=r)] * len(prompts))
    found = {row: last for batch in batches for row, last in zip(batch.rows, batch.logits, strict=True)}
    return torch.stack([found[i] for i in range(len(prompts))]).double()


def loss_at(model: LanguageModel, base: Tensor, r: Tensor, answered: list[int], kept: list[int]) -> float:
    refusal = refusal_score(logits(model, [ANSWERED[i] for i in answered], r), AIM.refusal_tokens)
    moved = kl_divergence(base[kept], logits(model, [KEPT[i] for i in kept], r))
    return float(softplus(refusal + DESCENT.margin).mean() + DESCENT.kl_weight * moved.mean())


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_the_gradient_is_the_slope(load: Load, family: str, memory: str) -> None:
    model, still = load(family, memory), load(family, "resident")
    base, rows, r = first_logits(still, KEPT, SILENT, "base"), ([0, 2], [1, 2, 3]), pico.unit(seed=3)
    kept = _Kept(KEPT, base, Opening(model, False))
    found = _slope(model, r, _losses(AIM, kept, rows, DESCENT))
    for seed in (101, 102):
        towards = pico.unit(seed=seed)
        at = {k: loss_at(still, base, r + k * STEP * towards, *rows) for k in (-2, -1, 1, 2)}
        measured = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * STEP)
        assert abs(measured) > 1e-3, "the loss depends on it"
        assert float(found @ towards.double()) == pytest.approx(measured, rel=2e-2, abs=1e-3)


def test_a_descent_lowers_the_loss_on_the_sphere_the_same_in_every_run(load: Load) -> None:
    model, start = load("llama", "resident"), pico.unit(seed=3)
    base, every = first_logits(model, KEPT, SILENT, "base"), (range(len(ANSWERED)), range(len(KEPT)))
    first, again = (refined(model, start, AIM, 8, DESCENT) for _ in range(2))
    assert len(first) == 8 and all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert all(float(one.norm()) == pytest.approx(1.0, abs=1e-5) for one in first)
    before, after = (loss_at(model, base, r, *map(list, every)) for r in (start, first[-1]))
    assert after < 0.98 * before
    assert float(first[0] @ start) == pytest.approx((1 + DESCENT.rate**2) ** -0.5, abs=1e-2)
    assert float(first[-1] @ first[-2]) > float(first[1] @ first[0])


def test_refusals_of_harmless_prompts_are_not_held(load: Load) -> None:
    model = load("llama", "resident")
    base = first_logits(model, KEPT, SILENT, "base")
    likeliest = base[1].argsort(descending=True).tolist()
    several = (likeliest[:count] for count in range(1, len(likeliest)))
    tokens = next(some for some in several if len(set((refusal_score(base, some) > 0).tolist())) == 2)
    answered = [i for i in range(len(KEPT)) if float(refusal_score(base[i], tokens)) <= 0]
    held = _kept(model, Aim(ANSWERED, KEPT, KEPT, tokens), SILENT)
    assert list(held.prompts) == [*KEPT, *(KEPT[i] for i in answered)]
    torch.testing.assert_close(held.logits, torch.cat((base, base[answered])), atol=1e-5, rtol=1e-4)


def test_streamed_weights_give_the_same(load: Load) -> None:
    held, streamed = (refined(load("llama", memory), pico.unit(seed=3), AIM, 3) for memory in ("resident", "streamed"))
    torch.testing.assert_close(torch.stack(held), torch.stack(streamed), rtol=1e-3, atol=1e-4)
