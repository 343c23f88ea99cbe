"""A plan and a direction to the edit of every writer."""

import torch
from torch import Tensor

from abliterate.architecture.covector import gain_of, pull_back
from abliterate.architecture.writer import Path, Plan, Writer
from abliterate.checkpoint.files import Checkpoint
from abliterate.checkpoint.read import iter_blocks, read_tensor
from abliterate.edit.projections import Formulas, Projection, projection
from abliterate.edit.projector import Projector, make_projector, span_projector
from abliterate.errors import EditError


class Projectors:
    """The projectors of a checkpoint's writers, made once for all writers that the stream sees through the same steps.

    Args:
        direction: r [hidden], at the end of the stream.

    Raises:
        EditError: the direction does not fit.
    """

    def __init__(self, checkpoint: Checkpoint, hidden_size: int, direction: Tensor) -> None:
        if tuple(direction.shape) != (hidden_size,):
            raise EditError(
                f"the direction has shape {list(direction.shape)}; this model's stream is {hidden_size} wide"
            )
        self._checkpoint, self._direction = checkpoint, direction
        self._made: dict[tuple[Path, Path], Projector] = {}

    def of(self, writer: Writer) -> Projector:
        """The projector of a writer; gains are the stored weights plus their offset, in fp64, as the model has them."""
        key = (writer.skip, writer.gain)
        if key not in self._made:
            self._made[key] = self._make(*key)
        return self._made[key]

    def along(self, path: Path) -> Tensor:
        """The direction pulled back through a path: unit covectors [k, hidden] fp64."""
        r = self._direction.double()[None]
        return pull_back(r, path, self._read)

    def boundaries(self, plan: Plan) -> Tensor | None:
        """r at each layer's input and at the end of the stream, [layers + 1, hidden]; None where it is the same."""
        if not plan.boundaries:
            return None
        return torch.cat([self.along(path) for path in plan.boundaries])

    def _make(self, skip: Path, gain: Path) -> Projector:
        covector = self.along(skip)
        if all(step.kind == "scale" for step in gain):
            return make_projector(covector[0], self._gain(gain))
        return span_projector(pull_back(covector, gain, self._read))

    def _gain(self, gain: Path) -> Tensor | None:
        product: Tensor | None = None
        for step in gain:
            assert step.tensor is not None
            g = gain_of(step, self._read(step.tensor))
            product = g if product is None else product * g
        return product

    def _read(self, name: str) -> Tensor:
        return read_tensor(self._checkpoint.shard_of(name), self._checkpoint.tensors[name])


def build_edits(
    checkpoint: Checkpoint, plan: Plan, direction: Tensor, strength: float = 1.0, untie: bool = False
) -> dict[str, Projection]:
    """The edit of every residual writer, by tensor name.

    Args:
        direction: r [hidden].
        strength: 1 removes the direction; less leaves a share of it.
        untie: the head is to keep the unedited embedding; a stored copy of a tied head is then not edited. Otherwise it
            takes the embedding's edit, so that every program reads the same head.

    Raises:
        EditError: the direction does not fit, or a stored copy of the tied head differs from the embedding.
    """
    projectors = Projectors(checkpoint, plan.hidden_size, direction)
    formulas: Formulas = {}

    def edit(tensor: str, writer: Writer) -> Projection:
        info = checkpoint.tensors[tensor]
        return projection(info, writer.axis, projectors.of(writer), strength, formulas=formulas)

    edits = {writer.tensor: edit(writer.tensor, writer) for writer in plan.writers}
    if plan.head_copy:
        _check_copy(checkpoint, plan)
    edited = plan.embedding_writer
    if plan.head_copy and not untie and edited is not None:
        edits[plan.head] = edit(plan.head, edited)
    return edits


def _check_copy(checkpoint: Checkpoint, plan: Plan) -> None:
    """The stored head is the embedding, value by value."""
    names = (plan.embedding, plan.head)
    streams = [iter_blocks(checkpoint.shard_of(name), checkpoint.tensors[name]) for name in names]
    same_type = checkpoint.tensors[names[0]].dtype == checkpoint.tensors[names[1]].dtype
    if not same_type or not all(torch.equal(a[1], b[1]) for a, b in zip(*streams, strict=True)):
        raise EditError(
            f"config.json ties the head to the embedding, but {plan.head} is stored and differs from {plan.embedding}: "
            f"programs disagree on which one counts. Set {plan.tied_flags[0]} to false in config.json to keep both, or "
            f"remove {plan.head}"
        )
