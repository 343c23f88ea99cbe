"""Interventions on the residual stream at run time: ablation at every writer, addition at one layer.

Used to score candidate directions before any weight is edited. Every row of a batch carries its own intervention, so
that many candidates share one forward pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Steer:
    """What happens to the residual stream of one prompt.

    Attributes:
        ablate: unit direction [hidden] removed from the output of every residual writer (Arditi et al. 2024, eq. 4).
        add: vector [hidden] added at the input of layer `layer`, at every position (eq. 3).
        layer: the layer of `add`.
    """

    ablate: Tensor | None = None
    add: Tensor | None = None
    layer: int | None = None


NOTHING = Steer()


def first_tensor(value: Any) -> Tensor:
    """The hidden states in a module's input or output, which may be a tuple that starts with them."""
    found = value[0] if isinstance(value, tuple | list) else value
    if not isinstance(found, Tensor):
        raise TypeError(f"expected hidden states, found {type(found).__name__}")
    return found


def replace_first(value: Any, tensor: Tensor) -> Any:
    """`value` with its hidden states replaced."""
    return (tensor, *value[1:]) if isinstance(value, tuple | list) else tensor


@contextmanager
def on_output(modules: Sequence[nn.Module], transform: Transform) -> Iterator[None]:
    """Applies `transform` to the hidden states that each module puts out."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        return replace_first(output, transform(first_tensor(output)))

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


@contextmanager
def on_input(module: nn.Module, transform: Transform) -> Iterator[None]:
    """Applies `transform` to the hidden states that come into the module."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (transform(first_tensor(args)), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": transform(kwargs["hidden_states"])}

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def by_row(hidden: Tensor, rows: int) -> Tensor:
    """[rows, tokens, hidden], also of a module that puts all tokens along one axis (OPT's fc2)."""
    return hidden.reshape(rows, -1, hidden.shape[-1]) if hidden.dim() == 2 else hidden


def ablate(directions: Tensor) -> Transform:
    """h - (h . r) r for each row. `directions` [rows, hidden]; a zero row leaves its prompt alone."""

    def transform(hidden: Tensor) -> Tensor:
        r = directions.to(hidden.device, hidden.dtype)[:, None, :]
        rows = by_row(hidden, len(directions))
        ablated = rows - (rows * r).sum(-1, keepdim=True) * r
        return ablated.flatten(0, 1) if hidden.dim() == 2 else ablated

    return transform


def add(vectors: Tensor) -> Transform:
    """h + d for each row. `vectors` [rows, hidden]; a zero row leaves its prompt alone."""

    def transform(hidden: Tensor) -> Tensor:
        return hidden + vectors.to(hidden.device, hidden.dtype)[:, None, :]

    return transform


@dataclass(frozen=True)
class Stream:
    """Where the residual stream can be reached in a loaded model.

    Attributes:
        writers: modules whose outputs are added to the stream (the output norm where one follows the projection).
        names: their names, in the same order.
        layers: the decoder layers; `final` is the module that reads the stream after the last of them.
        head: the output embedding, when an ablation must also reach it (as editing a tied embedding does), else None.
        hidden_size: width of the stream.
    """

    writers: tuple[nn.Module, ...]
    names: tuple[str, ...]
    layers: tuple[nn.Module, ...]
    hidden_size: int
    head: nn.Module | None = None


@contextmanager
def steered(stream: Stream, steers: Sequence[Steer]) -> Iterator[None]:
    """Applies each row's `Steer` (one a row of the batch) while the batch runs."""
    zero = torch.zeros(stream.hidden_size)
    with ExitStack() as stack:
        if any(steer.ablate is not None for steer in steers):
            rows = torch.stack([zero if steer.ablate is None else steer.ablate for steer in steers])
            stack.enter_context(on_output(stream.writers, ablate(rows)))
            if stream.head is not None:
                stack.enter_context(on_input(stream.head, ablate(rows)))
        for layer in sorted({steer.layer for steer in steers if steer.layer is not None}):
            rows = torch.stack([s.add if s.layer == layer and s.add is not None else zero for s in steers])
            stack.enter_context(on_input(stream.layers[layer], add(rows)))
        yield
