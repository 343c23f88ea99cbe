"""What is left of a direction in a model's stream, measured without the product's own certificate.

Where the stream is, is found here by structure: tokens run, the outermost checkpointing layers that they come through
are the decoder layers, and the first module after the last of those takes what the final norm reads. So a mistake in
the table, in the plan, or in the certificate shows here.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

Bearings = Mapping[str, tuple[Tensor, Tensor]]
"""For each decoder layer by its name, r [hidden] as it is at its input and at its output."""
_END = "the input of what follows the layers"


class NotSeenError(Exception):
    """The stream does not run where the plan says."""


@dataclass(frozen=True)
class Residual:
    """max over tokens of abs(h . r) / norm(h), the largest over all places (NaN if any is), and its place."""

    value: float
    place: str


def stream_residual(model: nn.Module, tokens: Tensor, bearings: Bearings) -> Residual:
    """Measures at every decoder layer's input and output, and at the input of what comes after the last.

    Args:
        tokens: ids [batch, sequence].

    Raises:
        NotSeenError: tokens come through a layer that has no bearings, or through none.
    """
    watch = _Watch(bearings)
    with torch.inference_mode(), ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(watch.before(name), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(watch.after(name)).remove)
        model(input_ids=tokens, use_cache=False)
    return watch.result()


class _Watch:
    """Follows the calls of a forward pass, and looks at the stream wherever it shows."""

    def __init__(self, bearings: Bearings) -> None:
        self._bearings = bearings
        self._open, self._passed = "", ""
        self._seen: dict[str, float] = {}
        self._wanted = {_END: None}

    def before(self, name: str) -> Any:
        """A hook on a module's input: opens a layer, or is the first to take what the last one put out."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._open:
                return
            values = [*args, kwargs.get("hidden_states"), *kwargs.values()]
            if isinstance(module, GradientCheckpointingLayer) or name in self._bearings:
                self._open = name
                self._look(f"the input of {name}", values, self._at(name)[0])
            elif self._passed and not any(module.children()):
                self._look(_END, values, self._at(self._passed)[1])

        return hook

    def after(self, name: str) -> Any:
        """A hook on a module's output: closes a layer."""

        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if name and name == self._open:
                self._open, self._passed = "", name
                self._seen.pop(_END, None)
                values = output if isinstance(output, tuple | list) else [output]
                self._look(f"the output of {name}", values, self._at(name)[1])

        return hook

    def _at(self, name: str) -> tuple[Tensor, Tensor]:
        if name not in self._bearings:
            raise NotSeenError(f"tokens come through {name}, which is no decoder layer in the plan")
        return self._bearings[name]

    def _look(self, place: str, values: Iterable[Any], r: Tensor) -> None:
        """At the first tensor that is as wide as the stream, or as several streams side by side."""
        self._wanted[place] = None
        hidden = next(_wide(values, len(r)), None)
        if hidden is None or (place == _END and _END in self._seen):
            return
        streams = hidden.double().reshape(-1, len(r))
        ratios = (streams @ r.double()).abs() / streams.norm(dim=-1).clamp_min(1e-30)
        self._seen[place] = max(float(ratios.max()), self._seen.get(place, 0.0), key=_nan_most)

    def result(self) -> Residual:
        """The largest ratio."""
        missed = [place for place in self._wanted if place not in self._seen]
        if missed or len(self._seen) < 3:
            raise NotSeenError(f"the stream was not seen at {(missed or ['any layer'])[0]}")
        place = max(self._seen, key=lambda place: _nan_most(self._seen[place]))
        return Residual(self._seen[place], place)


def _nan_most(value: float) -> tuple[bool, float]:
    return value != value, value


def _wide(values: Iterable[Any], width: int) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1 and not value.shape[-1] % width:
            yield value
