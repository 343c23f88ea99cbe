"""A first-order estimate of every candidate's bypass score, from one backward pass.

Ablating r takes (o . r) r out of the output o of every residual writer, so to first order the refusal score s changes
by minus the sum over writers and tokens of (grad_o s . r)(o . r). Outputs and gradients do not depend on r: all
candidates share them.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from abliterate.calibration.hooks import first_tensor, replace_first
from abliterate.calibration.model import LanguageModel, Tokens
from abliterate.direction.score import refusal_score
from abliterate.progress import SILENT, Progress


@contextmanager
def _with_gradients(modules: Sequence[nn.Module]) -> Iterator[list[tuple[int, Tensor]]]:
    """Collects the modules' outputs, with the modules' numbers, as nodes of the gradient graph."""
    outputs: list[tuple[int, Tensor]] = []

    def hook(number: int, output: Any) -> Any:
        hidden = first_tensor(output)
        node = hidden if hidden.requires_grad else hidden.detach().requires_grad_()
        outputs.append((number, node))
        return replace_first(output, node)

    with ExitStack() as stack:
        for number, module in enumerate(modules):
            handle = module.register_forward_hook(lambda _m, _a, out, number=number: hook(number, out))
            stack.callback(handle.remove)
        yield outputs


def first_order_bypass(
    model: LanguageModel,
    prompts: Sequence[Tokens],
    refusal_tokens: Sequence[int],
    units: Tensor,
    progress: Progress = SILENT,
) -> Tensor:
    """Estimated mean refusal score with each direction ablated.

    Args:
        units: [candidates, hidden] unit directions.

    Returns:
        [candidates] fp64.
    """
    total = torch.zeros(len(units), dtype=torch.float64)
    with progress.bar("first-order screen", len(prompts), "prompt") as advance:
        for rows in model.batches(prompts):
            total += _batch([prompts[i] for i in rows], model, refusal_tokens, units.to(model.device))
            advance(len(rows))
    return total / len(prompts)


def _batch(prompts: Sequence[Tokens], model: LanguageModel, refusal_tokens: Sequence[int], units: Tensor) -> Tensor:
    with torch.enable_grad(), _with_gradients(model.stream.writers) as outputs:
        score = refusal_score(model.logits(prompts), refusal_tokens).sum()
        gradients = torch.autograd.grad(score, [node for _, node in outputs], allow_unused=True)
    change = torch.zeros(len(units), dtype=torch.float64)
    seen = model.stream.along(units)
    for (number, output), gradient in zip(outputs, gradients, strict=True):
        if gradient is not None:
            along = (gradient.float() @ seen[number].T) * (output.detach().float() @ seen[number].T)
            change -= along.flatten(0, -2).cpu().double().sum(0)
    return change + score.detach().cpu().double()
