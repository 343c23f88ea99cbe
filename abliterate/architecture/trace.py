"""Where the residual stream of a model can be seen, and one forward pass that keeps it, cut at every layer's input."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from abliterate.architecture.held import HeldConstant
from abliterate.errors import ArchitectureError

Inputs = Mapping[str, Any]
_STREAM_ARGUMENTS = ("hidden_states", "inputs_embeds", "x", "hidden")
_COPIES = (1, 2, 3, 4, 6, 8)
_NORM = re.compile(r"norm|(^|\.)ln_", re.IGNORECASE)


@dataclass(frozen=True)
class Stream:
    """Where the residual stream of a model can be seen.

    Attributes:
        width: of the stream.
        copies: how many streams lie side by side in the last axis (hyper-connections); mostly 1.
        layers: names of the decoder layers, one a call, in call order.
        called: names of all modules that ran.
        idle: members of the same lists as the layers that did not run.
    """

    width: int
    copies: int
    layers: tuple[str, ...]
    called: frozenset[str]
    idle: tuple[str, ...]


@dataclass
class Trace:
    """The residual stream of one forward pass.

    Attributes:
        points: [..., width] each: the input of every call of a layer, the output of the last one and, if it is another
            tensor, the input of the final norm.
        leaves: what the model computed on with in place of the points (of all but the final norm's input), cut from
            what made them; empty where nothing was cut.
    """

    points: list[Tensor] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)


def find_stream(model: nn.Module, inputs: Inputs, width: int) -> Stream:
    """Decoder layers are the composite members of the outermost lists of modules that take the stream and give it.

    Raises:
        ArchitectureError: there are none.
    """
    modules = dict(model.named_modules())
    calls = _calls(model, inputs)
    for copies in _COPIES:
        layers = _layers([name for name, widths in calls if width * copies in widths], modules)
        if layers:
            homes = {name.rpartition(".")[0] for name in layers}
            called = frozenset(name for name, _ in calls)
            idle = tuple(n for n in modules if n.rpartition(".")[0] in homes and n not in called)
            return Stream(width, copies, layers, called, idle)
    raise ArchitectureError(f"no decoder layers found: no list of modules takes and gives a stream of width {width}")


def record(model: nn.Module, inputs: Inputs, stream: Stream, mode: HeldConstant, cut: bool) -> Trace:
    """Runs the model once; with `cut`, in a graph that is cut at every layer's input and after the last layer."""
    recorder = _Recorder(stream, cut)
    with recorder.attached(model), mode.active():
        model(**inputs)
    recorder.close()
    return recorder.trace


class _Recorder:
    """Hooks that keep the stream, and cut the graph."""

    def __init__(self, stream: Stream, cut: bool) -> None:
        self.trace = Trace()
        self._stream, self._cut, self._width = stream, cut, stream.width * stream.copies
        self._after: list[Tensor] = []
        self._given: list[Tensor] = []
        self._left = len(stream.layers)

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """The hooks are on."""
        modules, layers = dict(model.named_modules()), set(self._stream.layers)
        with ExitStack() as stack:
            for name in layers:
                stack.callback(modules[name].register_forward_pre_hook(self._enter, with_kwargs=True).remove)
                stack.callback(modules[name].register_forward_hook(self._leave).remove)
            for name, module in modules.items():
                if _is_norm(name, module) and not any(name.startswith(f"{layer}.") for layer in layers):
                    stack.callback(module.register_forward_pre_hook(self._norm, with_kwargs=True).remove)
            yield

    def close(self) -> None:
        """Adds the final norm's input, where the last layer's output becomes it by way of skip paths."""
        for value in self._after[:1]:
            last = self.trace.points[-1]
            if value.shape != last.shape or not torch.equal(value, last):
                self.trace.points.append(value)
        if self._cut and len(self.trace.points) > len(self.trace.leaves) and not self._reaches_end():
            self.trace.points.pop()

    def _reaches_end(self) -> bool:
        end = self.trace.points[-1]
        if not end.requires_grad:
            return False
        (by,) = torch.autograd.grad(end.sum(), self.trace.leaves[-1], retain_graph=True, allow_unused=True)
        return by is not None

    def _keep(self, value: Tensor) -> Tensor:
        """Takes a point down, and gives what the model goes on with."""
        width = self._stream.width
        # A copy, as the model's code may go on to change this very tensor in place.
        kept = value.clone()
        self.trace.points.append(kept if kept.shape[-1] == width else kept.reshape(*kept.shape[:-1], -1, width))
        if not self._cut:
            return value
        with torch._C.DisableTorchFunction():
            leaf = value.detach().clone().requires_grad_(True)
        self.trace.leaves.append(leaf)
        return leaf.clone()

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = _stream_argument(args, kwargs, self._width)
        assert key is not None, "a decoder layer takes the stream"
        if sum(any(value is given for given in self._given) for value in (*args, *kwargs.values())) > 1:
            raise ArchitectureError("the decoder layers hand on more than one stream, which the probe cannot follow")
        if isinstance(key, str):
            return args, kwargs | {key: self._keep(kwargs[key])}
        return (*args[:key], self._keep(args[key]), *args[key + 1 :]), kwargs

    def _leave(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        self._left -= 1
        self._after.clear()
        self._given = [value for value in _floats(output) if value.shape[-1] == self._width]
        return None if self._left else _replace_stream(output, self._width, self._keep)

    def _norm(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        key = _stream_argument(args, kwargs, self._stream.width)
        if key is not None and not self._left:
            self._after.append((kwargs[key] if isinstance(key, str) else args[key]).clone())


def _calls(model: nn.Module, inputs: Inputs) -> list[tuple[str, set[int]]]:
    """Name of every module that runs, a call each, and the widths of the tensors that it both takes and gives."""
    calls: list[tuple[str, set[int]]] = []

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            taken, given = _floats((*args, *kwargs.values())), _floats(output)
            calls.append((name, {t.shape[-1] for t in taken} & {t.shape[-1] for t in given}))

        return hook

    with ExitStack() as stack, torch.no_grad():
        for name, module in model.named_modules():
            stack.callback(module.register_forward_hook(hook_of(name), with_kwargs=True).remove)
        model(**inputs)
    return calls


def _layers(calls: Sequence[str], modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Those of the calls, by name, that are decoder layers'."""
    lists = nn.ModuleList | nn.ModuleDict | nn.Sequential
    listed = {name for name in calls if isinstance(modules.get(name.rpartition(".")[0]), lists)}
    composite = {name for name in listed if next(modules[name].children(), None) is not None}
    outermost = {name for name in composite if not any(name.startswith(f"{other}.") for other in composite)}
    marked = {name for name in outermost if _is_marked(modules[name])}
    return tuple(name for name in calls if name in (marked or outermost))


def _is_marked(module: nn.Module) -> bool:
    """Whether transformers marks the module as one whose activations can be recomputed: a whole layer."""
    return any(kind.__name__ == "GradientCheckpointingLayer" for kind in type(module).__mro__)


def _is_norm(name: str, module: nn.Module) -> bool:
    return bool(_NORM.search(name.rpartition(".")[2]) or _NORM.search(type(module).__name__))


def _floats(value: Any) -> list[Tensor]:
    """What may be the stream among the arguments of a call, or in its output."""
    values = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else (value,)
    return [v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 1]


def _is_stream(value: Any, width: int) -> bool:
    return any(tensor.shape[-1] == width for tensor in _floats((value,)))


def _stream_argument(args: Sequence[Any], kwargs: Mapping[str, Any], width: int) -> int | str | None:
    """Position or name of the stream among a call's arguments."""
    order = [*(n for n in _STREAM_ARGUMENTS if n in kwargs), *range(len(args)), *kwargs]
    return next((k for k in order if _is_stream(kwargs[k] if isinstance(k, str) else args[k], width)), None)


def _replace_stream(output: Any, width: int, act: Callable[[Tensor], Tensor]) -> Any:
    """The output with its stream replaced by what `act` makes of it."""
    if isinstance(output, Tensor):
        return act(output)
    pairs = list(output.items() if isinstance(output, dict) else enumerate(output))
    key = next(key for key, value in pairs if _is_stream(value, width))
    if isinstance(output, dict):
        output[key] = act(output[key])
        return output
    values = [act(value) if at == key else value for at, value in pairs]
    if hasattr(output, "_fields"):
        return type(output)(*values)
    return type(output)(values)
