"""Gradients through a model of which one layer at a time is in memory: forward once, then backward layer by layer.

Each layer runs without a graph on the way forward, and again with one, from the inputs it had, on the way back. What
the model does between its layers stays in the graph. In memory and streamed the arithmetic is the same.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from greenlet import getcurrent
from torch import Tensor, nn

from abliterate.calibration.hooks import first_tensor, replace_first, tensors_in
from abliterate.calibration.lockstep import Call, Layer, Weights, lockstep
from abliterate.calibration.spool import Spool
from abliterate.progress import Advance

Node = tuple[int, Tensor, Tensor]
"""The number of a watched module, what it put out, and what went on in its stead, as a node of the graph."""
Change = Callable[[int, Tensor], Tensor]
"""Takes the number of a watched module and what it put out, and gives what goes on in its stead."""
Seen = Callable[[int, int, Tensor, Tensor], None]
"""Takes the number of a call and of a watched module, an output of it there, and the gradient at what went on."""


@dataclass(frozen=True)
class _Visit:
    """One call of one layer on the way forward: what it takes, cut from what made it, and what it gave, as leaves."""

    index: int
    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: list[Tensor]


@dataclass
class _Pass:
    """One pass: its visits, the nodes of modules between layers, and gradients that are not yet taken further back."""

    number: int
    visits: list[_Visit] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    pending: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def gradients_at(
    weights: Weights,
    watched: Sequence[nn.Module],
    calls: Sequence[Call[Tensor]],
    seen: Seen,
    advance: Advance,
    spool: Spool | None = None,
    change: Change | None = None,
    again: bool = True,
) -> list[Tensor]:
    """Runs calls that each give a scalar, and the gradient of each back to every output of the watched modules.

    Args:
        weights: of the layers.
        seen: called for each output that the scalar depends on, those of one call in the same order always.
        advance: told of each layer, forward and back.
        spool: where inputs of layers wait.
        change: made to every output of the watched modules, without a graph of its own: `seen` is given the output
            before it, and the gradient at the output after it.
        again: run each layer again on the way back. Without, the whole graph of each call stays in memory, which is
            faster by a forward pass.

    Returns:
        The scalars, in the order of the calls.
    """
    recording = _Recording(advance, spool, len(calls) * len(weights.layers), again)
    scalars: list[Tensor | None] = [None] * len(calls)
    passes = [_Pass(number) for number in range(len(calls))]

    def begun(one: _Pass) -> Tensor:
        recording.passes[getcurrent()] = one
        with watching(watched, one.nodes, change):
            return calls[one.number]()

    for number, scalar in lockstep(weights, [partial(begun, one) for one in passes], recording, gradients=True):
        scalars[number] = scalar.detach()
        passes[number].pending.append((scalar, torch.ones_like(scalar)))
    while any(one.visits for one in passes):
        _back(weights, watched, [one for one in passes if one.visits], seen, change)
        advance(1)
    for one in passes:
        _report(one, one.nodes, _gradients(one.pending, [node for _, _, node in one.nodes]), seen)
    return [scalar for scalar in scalars if scalar is not None]


class _Recording(Layer):
    """A layer on the way forward."""

    def __init__(self, advance: Advance, spool: Spool | None, count: int, again: bool) -> None:
        self.passes: dict[Any, _Pass] = {}
        self._again = again
        self._advance, self._spool, self._count, self._last = advance, spool, count, -1

    def __call__(self, index: int, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `Layer`."""
        if index != self._last:
            self._last = index
            self._advance(1)
        if not self._again:
            return forward(*args, **kwargs)
        with torch.no_grad():
            output = forward(*args, **kwargs)
        given: list[Tensor] = []
        output = _mapped(output, lambda tensor: self._leaf(tensor, given))
        self.passes[getcurrent()].visits.append(_Visit(index, forward, args, kwargs, given))
        return output

    def _leaf(self, tensor: Tensor, given: list[Tensor]) -> Tensor:
        if self._spool is not None and self._spool.outgrows(tensor, self._count):
            tensor = self._spool.keep(tensor)
        given.append(tensor.detach().requires_grad_())
        return given[-1]


def _back(
    weights: Weights, watched: Sequence[nn.Module], passes: Sequence[_Pass], seen: Seen, change: Change | None
) -> None:
    """One layer further back: the last of those that passes still have to go through."""
    index = max(one.visits[-1].index for one in passes)
    weights.load(index)
    try:
        for one in passes:
            if one.visits[-1].index == index:
                _back_through(one, watched, seen, change)
    finally:
        weights.release(index)


def _back_through(one: _Pass, watched: Sequence[nn.Module], seen: Seen, change: Change | None) -> None:
    visit = one.visits.pop()
    arriving = _gradients(one.pending, visit.given)
    # A leaf depends on nothing further back.
    leaves = {id(tensor) for tensor in visit.given}
    one.pending = [(tensor, gradient) for tensor, gradient in one.pending if id(tensor) not in leaves]
    taken: list[tuple[Tensor, Tensor]] = []

    def cut(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        taken.append((tensor, tensor.detach().requires_grad_()))
        return taken[-1][1]

    nodes: list[Node] = []
    with torch.enable_grad(), watching(watched, nodes, change):
        args, kwargs = _mapped(visit.args, cut), _mapped(visit.kwargs, cut)
        outputs = list(tensors_in(visit.forward(*args, **kwargs)))
    ends = [(out, g) for out, g in zip(outputs, arriving, strict=True) if g is not None and out.requires_grad]
    wanted = [leaf for _, leaf in taken] + [node for _, _, node in nodes]
    found = _gradients(ends, wanted)
    one.pending += [(tensor, g) for (tensor, _), g in zip(taken, found, strict=False) if g is not None]
    _report(one, nodes, found[len(taken) :], seen)


def _gradients(ends: Sequence[tuple[Tensor, Tensor]], wanted: Sequence[Tensor]) -> list[Tensor | None]:
    """Of the ends, weighted, with respect to each wanted tensor; None where nothing depends on it."""
    ends = [(tensor, gradient) for tensor, gradient in ends if tensor.requires_grad]
    if not ends or not wanted:
        return [None] * len(wanted)
    tensors, weights = [tensor for tensor, _ in ends], [gradient for _, gradient in ends]
    return list(torch.autograd.grad(tensors, list(wanted), weights, retain_graph=True, allow_unused=True))


def _report(one: _Pass, nodes: Sequence[Node], gradients: Sequence[Tensor | None], seen: Seen) -> None:
    for (number, output, _), gradient in zip(nodes, gradients, strict=True):
        if gradient is not None:
            seen(one.number, number, output, gradient)


@contextmanager
def watching(modules: Sequence[nn.Module], nodes: list[Node], change: Change | None = None) -> Iterator[None]:
    """Collects what modules put out while a graph is made, and changes it whether one is made or not."""
    mine = getcurrent()

    def hook(number: int, output: Any) -> Any:
        if getcurrent() is not mine:
            return None
        hidden = first_tensor(output)
        changed = hidden if change is None else change(number, hidden)
        if torch.is_grad_enabled():
            changed = changed if changed.requires_grad else changed.detach().requires_grad_()
            nodes.append((number, hidden.detach(), changed))
        return replace_first(output, changed)

    with ExitStack() as stack:
        for number, module in enumerate(modules):
            handle = module.register_forward_hook(lambda _m, _a, out, number=number: hook(number, out))
            stack.callback(handle.remove)
        yield


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The value with every floating-point tensor in it replaced; what is no plain container is left as it is."""
    if isinstance(value, Tensor):
        return function(value) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_mapped(item, function) for item in value)
    if isinstance(value, Mapping) and type(value) is dict:
        return {key: _mapped(item, function) for key, item in value.items()}
    return value
