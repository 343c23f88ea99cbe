"""Which module of the running model a writer is in, and whether PEFT's LoRA can hold an edit there."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from abliterate.architecture.blueprint import Blueprint, Place
from abliterate.architecture.writer import Plan, Writer

Kind = Literal["linear", "embedding", "experts", "bias"]
NOT_RUN = "transformers does not run it"
COPY = "a stored copy of the tied head, which is the embedding in the running model"


@dataclass(frozen=True)
class Target:
    """Where an edit goes.

    Attributes:
        kind: linear: a matrix that tokens are multiplied with; embedding: one whose rows are looked up; experts: a
            parameter [experts, ...] that holds several tensors of the checkpoint; bias: a vector, stored as a whole.
        module: run-time name; of experts with the parameter's name.
        writers: what is stored of it; of experts stored one by one, in their order.
    """

    kind: Kind
    module: str
    writers: tuple[Writer, ...]


@dataclass(frozen=True)
class LeftOut:
    """A tensor that the adapter does not hold.

    Attributes:
        faithful: the running model is none the worse for it.
    """

    tensor: str
    why: str
    faithful: bool


@dataclass(frozen=True)
class Placed:
    """All writers that lose something."""

    targets: tuple[Target, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def lacking(self) -> tuple[LeftOut, ...]:
        """What is left out though the running model needs it."""
        return tuple(each for each in self.left_out if not each.faithful)


def place_writers(plan: Plan, blueprint: Blueprint, wanted: Iterable[str]) -> Placed:
    """The place of every writer among the wanted tensors."""
    names = set(wanted)
    places = blueprint.places(names)
    modules = dict(blueprint.model.named_modules())
    targets: dict[str, Target] = {}
    left_out: list[LeftOut] = []
    for writer in (each for each in plan.edited if each.tensor in names):
        found = _placed(writer, places[writer.tensor], plan, blueprint, modules)
        if isinstance(found, LeftOut):
            left_out.append(found)
        elif found.kind == "experts" and found.module in targets:
            before = targets[found.module].writers
            targets[found.module] = Target("experts", found.module, (*before, writer))
        else:
            targets[found.module if found.kind != "bias" else f"{found.module}.bias"] = found
    return Placed(tuple(map(_in_order, targets.values())), tuple(left_out))


def _placed(
    writer: Writer, place: Place, plan: Plan, blueprint: Blueprint, modules: Mapping[str, nn.Module]
) -> Target | LeftOut:
    if writer.kind == "head copy":
        return LeftOut(writer.tensor, COPY, True)
    if writer.tensor not in plan.runtime.writers:
        return LeftOut(writer.tensor, NOT_RUN, True)
    parameter = plan.runtime.writers[writer.tensor]
    module, _, name = parameter.rpartition(".")
    shape, where = blueprint.shapes[parameter], modules[module]
    if len(shape) == 3 and (place.stacked or not place.converted):
        turned = bool(getattr(where, "is_transposed", False))
        hidden = 2 if turned else 1
        if place.turned or shape[0] < 2 or shape[hidden] != plan.hidden_size:
            return LeftOut(writer.tensor, "experts in a layout that PEFT does not know", False)
        return Target("experts", parameter, (writer,))
    if place.converted:
        return LeftOut(writer.tensor, f"stored otherwise than it is run, in {parameter}", False)
    if name == "weight" and type(where) in (nn.Linear, Conv1D):
        return Target("linear", module, (writer,))
    if name == "weight" and _is_table(where):
        return Target("embedding", module, (writer,))
    if name == "bias" and len(shape) == 1 and type(where) in (nn.Linear, Conv1D):
        return Target("bias", module, (writer,))
    return LeftOut(writer.tensor, f"in a {type(where).__name__}, which PEFT has no LoRA for", False)


def _is_table(module: nn.Module) -> bool:
    """Rows looked up by the ids that come in, and scaled at most by a number that PEFT knows of."""
    if type(module) is nn.Embedding:
        return True
    return isinstance(module, nn.Embedding) and hasattr(module, "embed_scale")


def _in_order(target: Target) -> Target:
    """Experts by their numbers."""
    by_number = lambda writer: [int(part) for part in re.findall(r"\d+", writer.tensor)]  # noqa: E731
    return Target(target.kind, target.module, tuple(sorted(target.writers, key=by_number)))
