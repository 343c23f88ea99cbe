"""The first-order estimate against the derivative, measured by ablating a little, on models of two families."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from abliterate.architecture.plan import plan_architecture
from abliterate.calibration.load import load_resident
from abliterate.calibration.model import LanguageModel
from abliterate.checkpoint.files import open_checkpoint
from abliterate.direction.firstorder import first_order_bypass
from abliterate.direction.score import refusal_score
from tests import pico
from tests.resident import gpt2, llama, random_prompts, random_units, resident, writers_of

MAKERS: dict[str, Callable[[], Any]] = {"llama": llama, "gpt2": gpt2}
TOKENS = [5, 9, 17]
STEP = 1e-2


@pytest.fixture(params=MAKERS, scope="module")
def model(request: pytest.FixtureRequest) -> LanguageModel:
    """In fp64, as far as the architecture goes, so that the measured derivative is exact to several digits."""
    return resident(MAKERS[request.param]().double(), batch_size=4)


def ablated_by(strength: float, unit: Tensor) -> Callable[..., Tensor]:
    def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output - strength * (output @ unit)[..., None] * unit

    return hook


def mean_score(model: LanguageModel, prompts: Sequence[Sequence[int]], strength: float, unit: Tensor) -> float:
    """Mean refusal score with the direction taken out by a share, one prompt a time."""
    total = 0.0
    with ExitStack() as stack, torch.no_grad():
        for module in writers_of(model.model).values():
            stack.callback(module.register_forward_hook(ablated_by(strength, unit)).remove)
        for tokens in prompts:
            logits = model.model(torch.tensor([list(tokens)]), use_cache=False).logits[0, -1]
            chosen = torch.isin(torch.arange(len(logits)), torch.tensor(TOKENS))
            total += float(logits[chosen].logsumexp(0) - logits[~chosen].logsumexp(0))
    return total / len(prompts)


def test_the_estimate_is_the_score_and_its_derivative(model: LanguageModel) -> None:
    prompts, units = random_prompts(4), random_units(3).double()
    units /= units.norm(dim=-1, keepdim=True)
    estimate = first_order_bypass(model, prompts, TOKENS, units.float())
    assert estimate.shape == (3,) and estimate.dtype == torch.float64
    for number, unit in enumerate(units):
        scores = {k: mean_score(model, prompts, k * STEP, unit) for k in (-2, -1, 0, 1, 2)}
        # central difference of fourth order: norms and scores are in fp32, which a smaller step would show
        slope = (8 * (scores[1] - scores[-1]) - (scores[2] - scores[-2])) / (12 * STEP)
        assert abs(slope) > 1e-2
        assert float(estimate[number]) - scores[0] == pytest.approx(slope, rel=1e-3, abs=1e-4)


def test_batches_change_nothing(model: LanguageModel) -> None:
    prompts, units = random_prompts(9), random_units(6)
    alone = torch.stack([first_order_bypass(resident(model.model, 1), [p], TOKENS, units) for p in prompts]).mean(0)
    torch.testing.assert_close(first_order_bypass(model, prompts, TOKENS, units), alone, rtol=1e-5, atol=1e-5)


def test_a_direction_and_its_opposite_are_the_same_ablation(model: LanguageModel) -> None:
    prompts, units = random_prompts(4), random_units(3)
    torch.testing.assert_close(
        first_order_bypass(model, prompts, TOKENS, units), first_order_bypass(model, prompts, TOKENS, -units)
    )


def test_a_candidate_that_is_no_number_spoils_no_other(model: LanguageModel) -> None:
    prompts, units = random_prompts(4), random_units(3)
    expected = first_order_bypass(model, prompts, TOKENS, units)
    units[1] = torch.nan
    found = first_order_bypass(model, prompts, TOKENS, units)
    assert bool(found[1].isnan())
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]])


def test_no_gradients_and_hooks_stay_behind(model: LanguageModel) -> None:
    hooks = [len(module._forward_hooks) for module in model.model.modules()]
    first_order_bypass(model, random_prompts(4), TOKENS, random_units(2))
    assert [len(module._forward_hooks) for module in model.model.modules()] == hooks
    assert all(p.grad is None and not p.requires_grad for p in model.model.parameters())
    logits = next(iter(model.forward(random_prompts(1)))).logits
    assert not logits.requires_grad and bool(refusal_score(logits, TOKENS).isfinite().all())


def whole_graph(model: LanguageModel, prompts: Sequence[Sequence[int]], units: Tensor) -> Tensor:
    """The same estimate from one backward pass through the whole graph, a prompt a time."""
    total, seen = torch.zeros(len(units), dtype=torch.float64), model.stream.along(units)
    for tokens in prompts:
        nodes: list[tuple[int, Tensor]] = []

        def keep(_module: nn.Module, _args: Any, output: Any, number: int, nodes: Any = nodes) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            node = hidden if hidden.requires_grad else hidden.detach().requires_grad_()
            nodes.append((number, node))
            return (node, *output[1:]) if isinstance(output, tuple) else node

        with ExitStack() as stack, torch.enable_grad():
            for number, module in enumerate(model.stream.writers):
                hook = partial(keep, number=number)
                stack.callback(module.register_forward_hook(hook).remove)
            score = refusal_score(
                model.model(torch.tensor([list(tokens)]), use_cache=False).logits[:, -1].float(), TOKENS
            )
            gradients = torch.autograd.grad(score.sum(), [node for _, node in nodes], allow_unused=True)
        total += score.detach().double()
        for (number, node), gradient in zip(nodes, gradients, strict=True):
            if gradient is not None:
                along = (gradient @ seen[number].T) * (node.detach() @ seen[number].T)
                total -= along.flatten(0, -2).double().sum(0)
    return total / len(prompts)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral", "qwen3_next", "zamba"])
def test_layer_by_layer_is_the_whole_graph(family: str, tmp_path: Path) -> None:
    """Also where layers take more than one tensor that gradients go through: zamba's take the embeddings as well."""
    folder = pico.save(tmp_path / "m", family)
    plan = plan_architecture(open_checkpoint(folder))
    model = load_resident(folder, plan, device=torch.device("cpu"), dtype=torch.float32, batch_size=2)
    prompts, units = [[7, 20, 33, 41], [8, 9, 100, 101, 60, 61], [50, 51, 52]], random_units(4, pico.HIDDEN)
    expected = whole_graph(model, prompts, units)
    torch.testing.assert_close(first_order_bypass(model, prompts, TOKENS, units), expected, rtol=1e-4, atol=1e-4)
    assert float((expected - expected.mean()).abs().max()) > 1e-2, "directions differ"
