"""The direction as a writer sees it: pulled back through what stands between its output and the end of the stream."""

from collections.abc import Callable

import torch
from torch import Tensor

from abliterate.architecture.writer import Path, Step
from abliterate.errors import EditError

ReadTensor = Callable[[str], Tensor]
"""A stored tensor by its on-disk name."""


def pull_back(covectors: Tensor, path: Path, read: ReadTensor) -> Tensor:
    """Covectors v with v.x = c.(what the path makes of x), up to factors that differ from token to token.

    Args:
        covectors: c [k, hidden] fp64.
        path: the step nearest to the stream's end first.

    Returns:
        [k, hidden] fp64, rows of length 1; [k * taps, hidden] after a convolution, one for every lag.

    Raises:
        EditError: a step takes the direction away entirely, or its tensor is not finite.
    """
    for step in path:
        covectors = _through(step, covectors, read)
        size = covectors.norm(dim=-1, keepdim=True)
        if not bool(torch.isfinite(size).all()) or not bool((size > 0).all()):
            what = step.tensor or "the mean over channels"
            raise EditError(f"{what}, between a writer and the stream, is zero along the direction, or not finite")
        covectors = covectors / size
    return covectors


def _through(step: Step, covectors: Tensor, read: ReadTensor) -> Tensor:
    if step.tensor is None:
        return covectors - covectors.mean(dim=-1, keepdim=True)
    weight = read(step.tensor).double()
    if step.kind == "scale":
        return covectors * gain_of(step, weight)
    taps = weight.reshape(len(weight), -1).clone()
    taps[:, -1] += 1.0  # the convolution's input is added to its output
    return (covectors[:, None, :] * taps.T[None]).reshape(-1, len(weight))


def gain_along(path: Path, read: ReadTensor) -> Tensor | None:
    """The product of the gains of a path [hidden] fp64; None of a path without steps, or where not all are gains."""
    product: Tensor | None = None
    for step in path:
        if step.kind != "scale" or step.tensor is None:
            return None
        g = gain_of(step, read(step.tensor))
        product = g if product is None else product * g
    return product


def gain_of(step: Step, weight: Tensor) -> Tensor:
    """g = offset + w [hidden]."""
    return weight.double().reshape(-1) + step.offset
