"""A plan and a direction to the edit of every writer."""

import torch
from torch import Tensor

from abliterate.architecture.covector import gain_along, pull_back
from abliterate.architecture.writer import Path, Plan, Writer
from abliterate.checkpoint.files import Checkpoint
from abliterate.checkpoint.read import iter_blocks, read_tensor
from abliterate.edit.cut import Cut, part_of
from abliterate.edit.fused import Fused, worth_it
from abliterate.edit.projections import Formulas, Projection, projection
from abliterate.edit.projector import Projector, make_projector, span_projector
from abliterate.errors import EditError


class Projectors:
    """The projectors of a checkpoint's writers, made once for all writers that the stream sees through the same steps.

    Args:
        direction: r [hidden] at the end of the stream, or an orthonormal basis [k, hidden] there.

    Raises:
        EditError: the direction does not fit.
    """

    def __init__(self, checkpoint: Checkpoint, hidden_size: int, direction: Tensor) -> None:
        if direction.dim() > 2 or direction.shape[-1:] != (hidden_size,):
            shape = direction.shape[1:] if direction.dim() == 2 and len(direction) == 1 else direction.shape
            raise EditError(f"the direction has shape {list(shape)}; this model's stream is {hidden_size} wide")
        self._checkpoint, self._basis = checkpoint, direction.reshape(-1, hidden_size)
        self._made: dict[tuple[Path, Path], Projector] = {}

    def of(self, writer: Writer) -> Projector:
        """The projector of a writer; gains are the stored weights plus their offset, in fp64, as the model has them."""
        key = (writer.skip, writer.gain)
        if key not in self._made:
            self._made[key] = self._make(*key)
        return self._made[key]

    def along(self, path: Path) -> Tensor:
        """The directions pulled back through a path: unit covectors [n, hidden] fp64."""
        return pull_back(self._basis.double(), path, self._read)

    def boundaries(self, plan: Plan) -> Tensor | None:
        """The directions at each layer's input and at the end; None where all are the same.

        Returns:
            [layers + 1, hidden] of one direction, [layers + 1, k, hidden] of several.
        """
        if not plan.boundaries:
            return None
        found = torch.stack([self.along(path) for path in plan.boundaries])
        return found[:, 0] if found.shape[1] == 1 else found

    def _make(self, skip: Path, gain: Path) -> Projector:
        covectors = self.along(skip)
        if len(covectors) == 1 and all(step.kind == "scale" for step in gain):
            return make_projector(covectors[0], gain_along(gain, self._read))
        return span_projector(pull_back(covectors, gain, self._read))

    def _read(self, name: str) -> Tensor:
        return read_tensor(self._checkpoint.shard_of(name), self._checkpoint.tensors[name])


def build_edits(checkpoint: Checkpoint, plan: Plan, cut: Cut | Tensor, untie: bool = False) -> dict[str, Projection]:
    """The edit of every residual writer, by tensor name; what is removed with strength 0 is not edited.

    Args:
        cut: what is removed; a direction [hidden] stands for itself, removed whole and everywhere.
        untie: the head is to keep the unedited embedding; a stored copy of a tied head is then not edited. Otherwise it
            takes the embedding's edit, so that every program reads the same head.

    Raises:
        EditError: the directions do not fit, or a stored copy of the tied head differs from the embedding.
    """
    edits = _Edits(checkpoint, plan, cut if isinstance(cut, Cut) else Cut.uniform(cut, plan.num_layers))
    if plan.head_copy:
        _check_copy(checkpoint, plan)
    copied = plan.head_copy and not untie
    writers = plan.edited if copied else plan.writers
    fused = worth_it([checkpoint.tensors[writer.tensor] for writer in writers]) if not edits.spans else None
    made = {writer.tensor: edits.of(writer, fused) for writer in writers}
    return {name: edit for name, edit in made.items() if edit is not None}


class _Edits:
    """The edits of one checkpoint: what they can share is made once."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, cut: Cut) -> None:
        self._checkpoint, self._plan, self._cut = checkpoint, plan, cut
        self._projectors = projectors_of(checkpoint, plan, cut)
        self._formulas: dict[float, Formulas] = {}

    @property
    def spans(self) -> bool:
        """Whether all are edits that no single direction makes; a writer's gains can make others such."""
        return self._cut.keep_norms or self._cut.bases.shape[1] > 1

    def of(self, writer: Writer, fused: Fused | None = None) -> Projection | None:
        """The edit of one writer; None where it stays as it is."""
        removal = self._cut.removal(writer, part_of(writer, self._plan.writers))
        if removal.strength == 0:
            return None
        formulas = self._formulas.setdefault(removal.strength, {})
        projector, info = self._projectors[removal.basis].of(writer), self._checkpoint.tensors[writer.tensor]
        keep = self._cut.keep_norms
        return projection(info, writer.axis, projector, removal.strength, True, formulas, keep, fused)


def projectors_of(checkpoint: Checkpoint, plan: Plan, cut: Cut) -> list[Projectors]:
    """Those of each basis."""
    return [Projectors(checkpoint, plan.hidden_size, basis) for basis in cut.bases]


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
