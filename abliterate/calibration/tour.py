"""Where the residual stream can be reached in a loaded model, found by one short forward pass."""

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from abliterate.architecture.covector import ReadTensor
from abliterate.architecture.writer import Plan, Writer, layer_of
from abliterate.calibration.hooks import Place, Stream, tensors_in
from abliterate.calibration.runner import Bar, Resident, Runner
from abliterate.calibration.transport import Transport
from abliterate.errors import AbliterateError, ArchitectureError, CalibrationError, first_line

ROWS, TOKENS = 2, 4
EACH, POSITIONS = "tokens", "positions"


def find_stream(
    model: nn.Module, plan: Plan, tied_head: bool = False, read: ReadTensor | None = None, runner: Runner | None = None
) -> Stream:
    """The modules that the plan's writers and layers stand for.

    A writer is reached where its output first is as wide as the stream, token by token: at its own module, at the
    module that gathers the experts, or at the norm that follows.

    Args:
        read: stored tensors by name; needed where the skip path has gains.
        runner: runs the forward pass.

    Raises:
        ArchitectureError: a name of the plan has no module.
    """
    modules = dict(model.named_modules())
    choices = {writer.tensor: list(_choices(writer, plan)) for writer in plan.writers}
    wanted = {name for names in choices.values() for name in names if name in modules}
    with _watched(modules, wanted, plan.hidden_size) as seen:
        for _ in (runner or Resident()).run([lambda: _run(model)], Bar()):
            pass
    usable = {name for name, fits in seen.items() if fits}
    found: dict[str, list[Writer]] = {}
    unreached = []
    for writer in plan.writers:
        name = next((name for name in choices[writer.tensor] if name in usable), None)
        if name is not None:
            found.setdefault(name, []).append(writer)
        elif any(name in seen or name not in modules for name in choices[writer.tensor]) and writer.kind != "projector":
            unreached.append(writer.tensor)
    layers = [modules.get(name) for name in plan.runtime.layers]
    if not layers or None in layers:
        raise ArchitectureError(f"{type(model).__name__} has no module {plan.runtime.layers[:1]}")
    head: Any = model.get_output_embeddings() if tied_head else None  # type: ignore[operator]
    return Stream(
        writers=tuple(modules[name] for name in found),
        names=tuple(_label(writers[0]) for writers in found.values()),
        layers=tuple(layers),  # type: ignore[arg-type]
        hidden_size=plan.hidden_size,
        head=head,
        unreached=tuple(unreached),
        positionwise=frozenset(i for i, name in enumerate(found) if seen[name] == POSITIONS),
        transport=_transport(read or _parameters_of(model, plan), plan, [writers[0] for writers in found.values()]),
        sometimes=frozenset(plan.sometimes),
        places=tuple(map(_place, found.values())),
    )


def _transport(read: ReadTensor, plan: Plan, writers: Sequence[Writer]) -> Transport | None:
    if not plan.boundaries:
        return None
    return Transport([writer.skip for writer in writers], plan.boundaries, functools.cache(read))


def _parameters_of(model: nn.Module, plan: Plan) -> ReadTensor:
    """Stored tensors as the model holds them, for one that was not loaded from a checkpoint."""
    parameters = dict(model.named_parameters())
    # Not all of them: what is returned outlives the model.
    held = {name: parameters[parameter] for name, parameter in plan.runtime.steps.items() if parameter in parameters}
    return lambda name: held[name].detach().cpu()


def _label(writer: Writer) -> str:
    """What the writer is called in messages: its module's on-disk name, or the norm's behind it."""
    step = next((step.tensor for step in writer.gain if step.tensor), None)
    return (step or writer.tensor).removesuffix(".weight").removesuffix(".bias")


def _place(writers: Sequence[Writer]) -> Place:
    """Of what is put out at one module: a bias goes with the weight beside it."""
    first = next((writer for writer in writers if writer.kind != "bias"), writers[0])
    return first.layer, first.kind


def _choices(writer: Writer, plan: Plan) -> Iterator[str]:
    """Names of modules where the output may be reached, the innermost first."""
    nearest = next((step.tensor for step in writer.gain if step.tensor in plan.runtime.steps), None)
    parameter = plan.runtime.steps.get(nearest or "") or plan.runtime.writers.get(writer.tensor)
    if parameter is None:
        return
    top = layer_of(parameter, plan.runtime.layers) or ""
    name = parameter.rpartition(".")[0]
    while name and name != top:
        yield name
        if not top:
            return
        name = name.rpartition(".")[0]


@contextmanager
def _watched(modules: Mapping[str, nn.Module], names: set[str], hidden: int) -> Iterator[dict[str, str]]:
    """Collects for the modules that run what the rows of their outputs are; nothing where they are not usable."""
    seen: dict[str, str] = {}

    def look(name: str, output: Any) -> None:
        # What is no tensor, or a tuple that starts with one, cannot be replaced by a hook.
        first = next(tensors_in(output), None) if isinstance(output, Tensor | tuple | list) else None
        rows = "" if first is None else _rows_of(first, hidden)
        seen[name] = rows if seen.get(name, rows) == rows else ""

    with ExitStack() as stack:
        for name in names:
            hook = modules[name].register_forward_hook(lambda _m, _a, out, name=name: look(name, out))
            stack.callback(hook.remove)
        yield seen


def _rows_of(output: Tensor, hidden: int) -> str:
    """Whether an output has a row for every token, or one for every position that all prompts share."""
    if not output.is_floating_point() or output.shape[-1] != hidden:
        return ""
    if output.dim() > 2:
        return EACH if output.shape[0] in (ROWS, 1) else ""
    return {ROWS * TOKENS: EACH, TOKENS: POSITIONS}.get(output.shape[0], "")


def _run(model: nn.Module) -> None:
    device = next(p.device for p in model.parameters() if not p.is_meta)
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    tokens = next(embedding.parameters()).shape[0]
    ids = torch.arange(ROWS * TOKENS, device=device).reshape(ROWS, TOKENS) % tokens
    run(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False})


def run(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """A forward pass with those of the inputs that the model takes.

    Raises:
        CalibrationError: the model's code fails.
    """
    with failing(model):
        return model(**accepted(model, inputs))


@contextmanager
def failing(model: nn.Module) -> Iterator[None]:
    """Whatever the model's own code raises, in one line.

    Raises:
        CalibrationError: it raised something.
    """
    try:
        yield
    except (torch.OutOfMemoryError, AbliterateError):
        raise
    except Exception as error:  # code of hundreds of architectures raises errors of every kind
        raise CalibrationError(
            f"{type(model).__name__} of transformers {transformers.__version__} does not run: {first_line(error)}"
        ) from error


def accepted(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the inputs that the model's forward pass takes."""
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return dict(inputs)
    return {key: value for key, value in inputs.items() if key in parameters}
