"""Many forward passes at once, layer by layer, each layer's weights in memory only while the passes run through it.

Every pass is the model's own code, suspended in a greenlet wherever it comes to a decoder layer: masks, positions,
caches and whatever else an architecture does between its layers stay its own business. When all passes wait, the layer
that most of them wait for is loaded, run for each, and dropped. All of it happens on one thread, one pass at a time, so
that the arithmetic is that of a pass alone (DESIGN 5).
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol, TypeVar

import torch
from greenlet import getcurrent, greenlet
from torch import nn

T = TypeVar("T")
Call = Callable[[], T]


class Weights(Protocol):
    """Where decoder layers get their weights from."""

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The modules, in order."""

    def load(self, index: int) -> None:
        """Puts the weights into a layer."""

    def release(self, index: int) -> None:
        """Takes them out again."""


class Layer:
    """What runs in place of a layer, with the layer's weights in memory, as part of the pass: the layer itself."""

    def __call__(self, index: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the layer puts out; `forward` is its own method."""
        return forward(*args, **kwargs)


def lockstep(
    weights: Weights, calls: Sequence[Call[T]], visit: Layer | None = None, gradients: bool = False
) -> Iterator[tuple[int, T]]:
    """Runs calls that pass through the layers, all of them together.

    Args:
        visit: runs each layer for each call.
        gradients: without inference mode, in which they run otherwise.

    Yields:
        The number of a call and what it returned, as they finish.
    """
    waiting: dict[greenlet, int] = {}
    numbers = {greenlet(call): number for number, call in enumerate(calls)}
    with _gates(weights.layers, visit or Layer()):
        try:
            for run in numbers:
                yield from _go_on(run, waiting, numbers, gradients)
            while waiting:
                layer = _next(waiting)
                weights.load(layer)
                try:
                    for run in [run for run, at in waiting.items() if at == layer]:
                        yield from _go_on(run, waiting, numbers, gradients)
                finally:
                    weights.release(layer)
        finally:
            for run in waiting:
                with _mode(gradients):  # what a pass leaves on its way out, it would else leave behind
                    run.throw()


def _go_on(
    run: greenlet, waiting: dict[greenlet, int], numbers: dict[greenlet, int], gradients: bool
) -> Iterator[tuple[int, Any]]:
    """Lets one pass run to its next layer; yields its result where it has come to its end."""
    waiting.pop(run, None)
    # Entered for each stretch, not within the passes: there it would be left in another order than entered.
    with _mode(gradients):
        reply = run.switch()
    if run.dead:
        yield numbers[run], reply
    else:
        waiting[run] = reply


def _mode(gradients: bool) -> AbstractContextManager[Any]:
    return torch.enable_grad() if gradients else torch.inference_mode()


def _next(waiting: dict[greenlet, int]) -> int:
    """The layer that most passes wait for, the first of several."""
    counts = Counter(waiting.values())
    return min(counts, key=lambda layer: (-counts[layer], layer))


@contextmanager
def _gates(layers: Sequence[nn.Module], visit: Layer) -> Iterator[None]:
    """Suspends whatever greenlet comes to one of the layers until it is told to go on."""
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.enter_context(replaced(layer, _gate(index, layer.forward, visit)))
        yield


def _gate(index: int, forward: Callable[..., Any], visit: Layer) -> Callable[..., Any]:
    @functools.wraps(forward)
    def gate(*args: Any, **kwargs: Any) -> Any:
        scheduler = getcurrent().parent
        assert scheduler is not None, "a layer ran outside of the passes that are run together"
        scheduler.switch(index)
        return visit(index, forward, args, kwargs)

    return gate


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Has a module run another forward method."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
