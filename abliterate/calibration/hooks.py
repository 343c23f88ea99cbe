"""Interventions on the residual stream at run time: ablation at every writer, addition at one layer.

Used to score candidate directions before any weight is edited. Every row of a batch carries its own intervention, so
that many candidates share one forward pass. A hook acts on the pass that set it only: several may be under way (see
`lockstep`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent
from torch import Tensor, nn

from abliterate.calibration.basis import orthonormal
from abliterate.calibration.transport import Transport

Transform = Callable[[Tensor], Tensor]
Place = tuple[int | None, str]


@dataclass(frozen=True)
class Steer:
    """What happens to the residual stream of one prompt.

    Attributes:
        ablate: unit direction [hidden] removed from the output of every residual writer (Arditi et al. 2024, eq. 4), or
            an orthonormal basis [k, hidden] of which all is removed.
        add: vector [hidden] added at the input of layer `layer`, at every position (eq. 3).
        layer: the layer of `add`.
        strength: the share of what lies along `ablate` that is removed.
        layers: `ablate` acts on writers inside these layers alone; None: on every writer, embeddings included.
    """

    ablate: Tensor | None = None
    add: Tensor | None = None
    layer: int | None = None
    strength: float = 1.0
    layers: range | None = None


NOTHING = Steer()
STATES = ("hidden_states", "inputs_embeds", "x", "hidden", "input_embeds")
"""Names that models give the hidden states which a layer takes."""


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a module's input or output, in order, as far as they hold floating-point numbers."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)


def first_tensor(value: Any) -> Tensor:
    """The hidden states in a module's output, which may be a tuple that starts with them."""
    found = next(tensors_in(value), None)
    if found is None:
        raise TypeError(f"expected hidden states, found {type(value).__name__}")
    return found


def replace_first(value: Any, tensor: Tensor) -> Any:
    """`value` with its hidden states replaced."""
    return (tensor, *value[1:]) if isinstance(value, tuple | list) else tensor


@contextmanager
def on_output(modules: Sequence[nn.Module], transform: Transform) -> Iterator[None]:
    """Applies `transform` to the hidden states that each module puts out."""

    mine = getcurrent()

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        return replace_first(output, transform(first_tensor(output))) if getcurrent() is mine else None

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


@contextmanager
def on_input(module: nn.Module, transform: Transform) -> Iterator[None]:
    """Applies `transform` to the hidden states that come into the module."""

    mine = getcurrent()

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if getcurrent() is not mine:
            return None
        for i, value in enumerate(args):
            if isinstance(value, Tensor) and value.is_floating_point():
                return (*args[:i], transform(value), *args[i + 1 :]), kwargs
        name = next((key for key in STATES if isinstance(kwargs.get(key), Tensor)), None)
        if name is None:
            raise TypeError(f"{type(_module).__name__} takes no hidden states that are known here")
        return args, kwargs | {name: transform(kwargs[name])}

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def by_row(hidden: Tensor, rows: int) -> Tensor:
    """[rows, tokens, hidden], also of a module that puts all tokens along one axis (OPT's fc2)."""
    return hidden.reshape(rows, -1, hidden.shape[-1]) if hidden.dim() == 2 else hidden


def ablate(directions: Tensor, positionwise: bool = False, strengths: Tensor | None = None) -> Transform:
    """h - (h . r) r for each row; of a basis h - sum (h . q) q.

    Args:
        directions: [rows, hidden], or orthonormal bases [rows, k, hidden], of which those with fewer directions end in
            rows of zeros; where all is zero the prompt is left alone.
        positionwise: hidden states come as [tokens, hidden], the same for all rows, and leave with a row for each.
        strengths: [rows], the share that is removed; None removes all.
    """
    basis = directions if directions.dim() == 3 else directions[:, None]

    def along(hidden: Tensor, direction: Tensor) -> Tensor:
        r = direction.to(hidden.device, hidden.dtype)[:, None, :]
        size = (hidden * r).sum(-1, keepdim=True)
        if strengths is not None:
            size = size * strengths.to(hidden.device, hidden.dtype)[:, None, None]
        return size * r

    def transform(hidden: Tensor) -> Tensor:
        rows = hidden if positionwise else by_row(hidden, len(basis))
        removed = along(rows, basis[:, 0])
        for j in range(1, basis.shape[1]):
            removed = removed + along(rows, basis[:, j])
        ablated = rows - removed
        return ablated.flatten(0, 1) if hidden.dim() == 2 and not positionwise else ablated

    return transform


def add(vectors: Tensor) -> Transform:
    """h + d for each row, in every stream of several. `vectors` [rows, hidden]; a zero row leaves its prompt alone."""

    def transform(hidden: Tensor) -> Tensor:
        added = vectors.to(hidden.device, hidden.dtype)
        streams = hidden.reshape(*hidden.shape[:2], -1, added.shape[-1])
        return (streams + added[:, None, None, :]).reshape(hidden.shape)

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
        unreached: writers of layers whose output cannot be reached by a hook.
        positionwise: numbers of writers that put out a row for each position, the same for all prompts.
        transport: takes directions along the skip path where that has gains; None where r is the same everywhere.
        sometimes: numbers of layers that only run when there is an image.
        places: of each writer its decoder layer, None outside of layers, and its kind (see `Writer`); empty where the
            stream was not found through a plan.
    """

    writers: tuple[nn.Module, ...]
    names: tuple[str, ...]
    layers: tuple[nn.Module, ...]
    hidden_size: int
    head: nn.Module | None = None
    unreached: tuple[str, ...] = ()
    positionwise: frozenset[int] = frozenset()
    transport: Transport | None = None
    sometimes: frozenset[int] = frozenset()
    places: tuple[Place, ...] = ()

    def along(self, directions: Tensor) -> list[Tensor]:
        """Directions [rows, hidden] or bases [rows, k, hidden] at the end of the stream, as the writers see them."""
        if self.transport is None:
            return [directions] * len(self.writers)
        if directions.dim() == 2:
            return [self.transport.at_writer(i, directions) for i in range(len(self.writers))]
        flat, rows = directions.flatten(0, 1), directions.shape[:2]
        seen = (self.transport.at_writer(i, flat) for i in range(len(self.writers)))
        return [orthonormal(each.reshape(*rows, -1)) for each in seen]

    def layer_of_writers(self) -> list[int | None]:
        """The number of the layer that each writer is in (the first that has it); None of embeddings."""
        homes: dict[int, int] = {}
        for number, layer in enumerate(self.layers):
            for module in layer.modules():
                homes.setdefault(id(module), number)
        return [homes.get(id(writer)) for writer in self.writers]


@contextmanager
def steered(stream: Stream, steers: Sequence[Steer]) -> Iterator[None]:
    """Applies each row's `Steer` (one a row of the batch) while the batch runs."""
    zero = torch.zeros(stream.hidden_size)
    with ExitStack() as stack:
        if any(steer.ablate is not None for steer in steers):
            _ablated(stream, steers, stack)
        for layer in sorted({steer.layer for steer in steers if steer.layer is not None}):
            rows = torch.stack([s.add if s.layer == layer and s.add is not None else zero for s in steers])
            stack.enter_context(on_input(stream.layers[layer], add(rows)))
        yield


def _ablated(stream: Stream, steers: Sequence[Steer], stack: ExitStack) -> None:
    """Hooks for what the steers ablate."""
    rows = _padded([steer.ablate for steer in steers], stream.hidden_size)
    shares = [steer.strength for steer in steers]
    strengths = None if all(share == 1.0 for share in shares) else torch.tensor(shares)
    windows = [steer.layers for steer in steers]
    homes = stream.layer_of_writers() if any(window is not None for window in windows) else None
    for i, seen in enumerate(stream.along(rows)):
        acting = seen if homes is None else _within(seen, windows, homes[i])
        stack.enter_context(on_output([stream.writers[i]], ablate(acting, i in stream.positionwise, strengths)))
    if stream.head is not None:
        acting = rows if homes is None else _within(rows, windows, None)
        stack.enter_context(on_input(stream.head, ablate(acting, strengths=strengths)))


def _padded(directions: Sequence[Tensor | None], hidden: int) -> Tensor:
    """[rows, hidden] of single directions; [rows, k, hidden] where one is a basis. Zeros where there is none."""
    most = max((len(each) for each in directions if each is not None and each.dim() == 2), default=1)
    padded = torch.zeros(len(directions), most, hidden)
    for row, each in zip(padded, directions, strict=True):
        if each is not None:
            vectors = each if each.dim() == 2 else each[None]
            row[: len(vectors)] = vectors
    return padded if most > 1 else padded[:, 0]


def _within(directions: Tensor, windows: Sequence[range | None], layer: int | None) -> Tensor:
    """Zeros for the rows whose window this layer is not in."""
    acts = torch.tensor([window is None or layer in window for window in windows])
    return directions * acts.reshape(-1, *[1] * (directions.dim() - 1))
