"""What the base's residual writers had along a direction, and what the edited ones still have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abliterate.architecture.writer import Writer
from abliterate.certify.weights import shares_along
from abliterate.checkpoint.files import Checkpoint
from abliterate.difference.places import Places
from abliterate.difference.projecting import Form
from abliterate.difference.tensors import TensorDifference
from abliterate.edit.cut import Cut, orthonormal, part_of
from abliterate.edit.edits import projectors_of
from abliterate.progress import Progress

Covectors = Mapping[str, Tensor]
"""For each writer [hidden], or an orthonormal basis [k, hidden], fp64."""


@dataclass(frozen=True)
class Removed:
    """One writer along what was to be removed.

    Attributes:
        tensor: in the base. `changed`: whether it differs.
        before, after: ||v.W||_F / (||v|| ||W||_F) of the base and of the edited tensor.
    """

    tensor: str
    changed: bool
    before: float
    after: float


def removed(
    base: Checkpoint,
    edited: Checkpoint,
    tensors: Sequence[TensorDifference],
    places: Places,
    wanted: Sequence[Covectors],
    progress: Progress,
) -> list[tuple[Removed, ...]]:
    """Measures every writer that has a covector, on the stored bytes, for each of several directions.

    A writer is read once on each side, however many directions there are; one that is the same, on one side.
    """
    found: list[list[Removed]] = [[] for _ in wanted]
    writers = [t for t in tensors if t.writes and t.state != "incomparable" and any(t.name in each for each in wanted)]
    with progress.bar("along the direction", len(writers), "tensor") as advance:
        for tensor in writers:
            numbers = [number for number, covectors in enumerate(wanted) if tensor.name in covectors]
            along = [wanted[number][tensor.name] for number in numbers]
            axis = places.of(tensor.name).axis
            before, _ = shares_along(base, Writer(tensor.name, "writer", axis, None), along)
            after = before
            if tensor.state != "same":
                after, _ = shares_along(edited, Writer(tensor.other, "writer", axis, None), along)
            for number, one, other in zip(numbers, before, after, strict=True):
                found[number].append(Removed(tensor.name, tensor.differs, one, other))
            advance()
    return list(map(tuple, found))


def recovered_covectors(
    basis: Tensor, form: Form, tensors: Sequence[TensorDifference], places: Places
) -> dict[str, Tensor]:
    """Of directions that were found in the differences, as each writer sees them.

    Args:
        basis: [k, hidden], where `form` says that they were compared (see `Shared`).
    """
    found = {}
    for tensor in tensors:
        if tensor.writes and _fits(tensor, tensor.axis, basis.shape[-1]):
            weights = _seen(tensor, form, places)
            if weights is not None:
                found[tensor.name] = orthonormal(basis.double() * weights).double()
    return found


def _fits(tensor: TensorDifference, axis: int, hidden: int) -> bool:
    return len(tensor.shape) > axis and tensor.shape[axis] == hidden


def _seen(tensor: TensorDifference, form: Form, places: Places) -> Tensor | None:
    """What turns the direction into a covector, entry by entry; None where that is not known of an unchanged tensor."""
    if form == "rows":
        return tensor.weights.get("rows")
    gain = places.of(tensor.name).gain if form == "gain" else None
    return torch.ones((), dtype=torch.float64) if gain is None else gain


def given_covectors(
    base: Checkpoint, places: Places, cut: Cut, tensors: Sequence[TensorDifference]
) -> dict[str, Tensor]:
    """Of directions from a file, as each writer sees them: by the plan, else as they are."""
    if places.plan is None:
        fit = [t for t in tensors if t.writes and _fits(t, t.axis, cut.hidden_size)]
        return {tensor.name: cut.main.double() for tensor in fit}
    projectors, writers = projectors_of(base, places.plan, cut), places.plan.writers
    return {
        writer.tensor: projectors[cut.removal(writer, part_of(writer, writers)).basis].of(writer).v
        for writer in writers
    }


def given_outputs(base: Checkpoint, places: Places, cut: Cut) -> dict[str, Tensor]:
    """What an edit by directions from a file changes in each writer: an orthonormal basis [k, hidden] fp64."""
    if places.plan is None:
        basis = orthonormal(cut.main).double()
        return {name: basis for name, place in places.by_name.items() if place.role in ("embedding", "writer")}
    projectors, writers = projectors_of(base, places.plan, cut), places.plan.writers
    found = {}
    for writer in writers:
        u = projectors[cut.removal(writer, part_of(writer, writers)).basis].of(writer).u
        found[writer.tensor] = orthonormal(u.reshape(-1, cut.hidden_size)).double()
    return found
