"""How forward passes are run: one after another on weights in memory, or all together on weights that come and go."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from transformers import Cache

from abliterate.calibration.hooks import first_tensor, replace_first
from abliterate.calibration.lockstep import Call, Layer, Weights, lockstep
from abliterate.calibration.spool import Spool
from abliterate.malloc import frugal
from abliterate.progress import SILENT, Advance, Progress

T = TypeVar("T")


@dataclass(frozen=True)
class Bar:
    """What the progress bar of a run says.

    Attributes:
        sizes: prompts in each call.
        steps: how often every call passes through the layers, at most.
    """

    progress: Progress = SILENT
    description: str = "forward"
    sizes: Sequence[int] = ()
    steps: int = 1


class Runner(Protocol):
    """Runs calls of a model's forward pass."""

    @property
    def streamed(self) -> bool:
        """Whether weights are read for every run anew, so that calls had better come together."""

    @property
    def spool(self) -> Spool | None:
        """Where activations wait that outgrow memory."""

    def weights(self, layers: Sequence[nn.Module]) -> Weights:
        """Of these decoder layers."""

    def run(self, calls: Sequence[Call[T]], bar: Bar) -> Iterator[tuple[int, T]]:
        """Yields the number of each call and what it returned, as they finish."""


class Store(Weights, Protocol):
    """Weights that are read from somewhere."""

    @property
    def bytes_read(self) -> int:
        """So far."""


@dataclass(frozen=True)
class _InMemory:
    layers: Sequence[nn.Module]

    def load(self, index: int) -> None:
        """They are there."""

    def release(self, index: int) -> None:
        """And stay."""


class Resident:
    """All weights are in memory: one call after another."""

    streamed = False
    spool: Spool | None = None

    def weights(self, layers: Sequence[nn.Module]) -> Weights:
        """See `Runner`."""
        return _InMemory(layers)

    def run(self, calls: Sequence[Call[T]], bar: Bar) -> Iterator[tuple[int, T]]:
        """See `Runner`."""
        sizes = bar.sizes or [1] * len(calls)
        with bar.progress.bar(bar.description, sum(sizes), "prompt") as advance:
            for number, (call, size) in enumerate(zip(calls, sizes, strict=True)):
                with torch.inference_mode():
                    result = call()
                yield number, result
                advance(size)


class Streamed:
    """One decoder layer at a time is in memory: all calls together, layer by layer.

    Args:
        store: of the layers' weights.
        spool: where activations wait that outgrow memory.

    Attributes:
        pass_bytes, pass_seconds: what the last run read of stored weights, and took, for every time it passed through
            all layers.
    """

    streamed = True

    def __init__(self, store: Store, spool: Spool | None) -> None:
        self.store, self.spool = store, spool
        self.pass_bytes, self.pass_seconds = 0, 0.0

    def weights(self, layers: Sequence[nn.Module]) -> Weights:
        """See `Runner`."""
        return self.store

    def run(self, calls: Sequence[Call[T]], bar: Bar) -> Iterator[tuple[int, T]]:
        """See `Runner`."""
        layers, read, start = len(self.store.layers), self.store.bytes_read, time.monotonic()
        with frugal(), bar.progress.bar(bar.description, layers * bar.steps, "layer") as advance:
            counted = _Counting(self.store, advance)
            visit = _Spilling(self.spool, len(calls), layers) if self.spool else None
            yield from lockstep(counted, calls, visit)
        rounds = max(1.0, counted.visited / layers)
        self.pass_bytes = int((self.store.bytes_read - read) / rounds)
        self.pass_seconds = (time.monotonic() - start) / rounds


class _Counting:
    """Weights, with a progress bar that moves on with every layer."""

    def __init__(self, weights: Weights, advance: Advance) -> None:
        self._weights, self._advance = weights, advance
        self.layers, self.visited = weights.layers, 0

    def load(self, index: int) -> None:
        """See `Weights`."""
        self._weights.load(index)

    def release(self, index: int) -> None:
        """See `Weights`."""
        self._weights.release(index)
        self.visited += 1
        self._advance(1)


class _Spilling(Layer):
    """A layer whose output and cache wait on the disk where those of all calls together are too much for memory."""

    def __init__(self, spool: Spool, calls: int, layers: int) -> None:
        self._spool, self._calls, self._layers = spool, calls, layers

    def __call__(self, index: int, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `Layer`."""
        output = forward(*args, **kwargs)
        hidden = first_tensor(output)
        for value in (*args, *kwargs.values()):
            if isinstance(value, Cache):
                self._put_out(value, index)
        if not self._spool.outgrows(hidden, 2 * self._calls):
            return output
        return replace_first(output, self._spool.keep(hidden))

    def _put_out(self, cache: Cache, index: int) -> None:
        entry = cache.layers[index] if index < len(cache.layers) else None
        for name in ("keys", "values"):
            value = getattr(entry, name, None)
            if isinstance(value, torch.Tensor) and self._spool.outgrows(value, 2 * self._calls * self._layers):
                setattr(entry, name, self._spool.keep(value))
