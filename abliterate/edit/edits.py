"""A plan and a direction to the edit of every writer, applied block by block."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from abliterate.architecture.covector import gain_of, pull_back
from abliterate.architecture.writer import Path, Plan, Writer
from abliterate.checkpoint.files import Checkpoint
from abliterate.checkpoint.header import DTYPES, TensorInfo
from abliterate.checkpoint.read import iter_blocks, read_tensor
from abliterate.edit.projector import Projector, make_projector, span_projector
from abliterate.edit.rounding import FEW_BITS, DirectionalRounding, by_size, round_whole, settle
from abliterate.edit.sums import CovectorSum, tree_sum
from abliterate.errors import EditError

HELD = 64
"""Rows with the largest abs(v) that are kept from measuring and rounded first, so that the others can pay for them."""


class Projection(ABC):
    """W <- W - strength * u (v.W) along the hidden axis of one tensor, stored in the tensor's dtype.

    Arithmetic is fp64 for fp32 and fp64 storage and for biases; for other tensors in bf16 and fp16 the sums are fp64,
    the rest fp32, and the rounding knows the direction. Blocks of any size give the same bytes.

    Attributes:
        form: of the projector.
        passes: over the stored tensor through `measure` before `apply`.
    """

    passes = 0

    def __init__(self, info: TensorInfo, axis: int, projector: Projector, strength: float, directional: bool) -> None:
        self.info, self.form, self._axis, self._v = info, projector.form, axis, projector.v
        # Experts by the thousand share one projector.
        self._u = projector.u if strength == 1.0 else projector.u * strength
        self._strength, self._dtype = strength, DTYPES[info.dtype]
        self._directional = directional and self._dtype in FEW_BITS
        self._working = torch.float32 if self._directional and len(info.shape) > 1 else torch.float64

    @abstractmethod
    def measure(self, rows: slice, block: Tensor) -> None:
        """Looks at rows of the stored tensor."""

    @abstractmethod
    def apply(self, rows: slice, block: Tensor) -> Tensor:
        """The rows without their part along u, in the stored dtype."""

    def _edited(self, values: Tensor, u: Tensor, along: Tensor) -> Tensor:
        """W - u (v.W) in the working dtype; what cancels to less than the arithmetic resolves is 0."""
        values = values.to(self._working)
        edited = values - u.to(self._working) * along.to(self._working)
        resolved = values.abs().mul_(8 * torch.finfo(self._working).eps)
        return edited.masked_fill_(edited.abs() <= resolved, 0.0)

    def _left(self, along: Tensor) -> Tensor:
        """What `_edited` leaves along v because fp32 holds v.W to 24 bits: much, for a tensor that is little but u."""
        return ((along - along.float()) * self._strength).float()


class LocalProjection(Projection):
    """Of a tensor whose blocks hold the hidden axis whole: embeddings, Conv1D, biases, experts."""

    def measure(self, rows: slice, block: Tensor) -> None:
        """Nothing needs to be known before."""

    def apply(self, rows: slice, block: Tensor) -> Tensor:
        """See `Projection`."""
        moved = block.movedim(self._axis, 0)
        columns = moved.reshape(len(self._v), -1).contiguous()
        along = tree_sum(columns.double() * self._v[:, None])
        target = self._edited(columns, self._u[:, None], along)
        if not self._directional:
            stored = target.to(self._dtype)
        elif len(self.info.shape) > 1:
            stored = round_whole(target, self._v, self._dtype, self._left(along))
        else:
            stored = settle(round_whole(target.float(), self._v, self._dtype)[:, 0], target[:, 0], self._v)
        return stored.reshape(moved.shape).movedim(0, self._axis).contiguous()


class StreamedProjection(Projection):
    """Of a tensor along its first axis, which its blocks cut: measured once, then edited."""

    passes = 1

    def __init__(self, info: TensorInfo, axis: int, projector: Projector, strength: float, directional: bool) -> None:
        super().__init__(info, axis, projector, strength, directional)
        self._early: list[int] = by_size(self._v)[:HELD].tolist() if self._directional else []
        self._forget()

    def measure(self, rows: slice, block: Tensor) -> None:
        """Adds these rows' part of v.W, and keeps those that are rounded first."""
        matrix = block.flatten(1)
        self._sum.add(rows, matrix)
        for row in self._early:
            if rows.start <= row < rows.stop:
                self._held[row] = matrix[row - rows.start].clone()

    def apply(self, rows: slice, block: Tensor) -> Tensor:
        """See `Projection`."""
        matrix = block.flatten(1)
        if rows.start == 0:
            self._start()
        target = self._edited(matrix, self._u[rows, None], self._along)
        stored = self._rounding.round(target) if self._rounding else target.to(self._dtype)
        for row in self._early:
            if rows.start <= row < rows.stop:
                stored[row - rows.start] = self._held[row]
        if rows.stop == len(self._v):
            self._forget()
        return stored.reshape(block.shape)

    def _forget(self) -> None:
        """Holds nothing of the tensor: edits of a whole checkpoint live side by side."""
        self._sum, self._along = CovectorSum(self._v), torch.empty(0)
        self._held: dict[int, Tensor] = {}
        self._rounding: DirectionalRounding | None = None

    def _start(self) -> None:
        """Takes the sum; rounds the rows that were kept, and leaves what they owe to the others."""
        self._along = self._sum.total()
        if not self._directional:
            return
        others = self._v.clone()
        others[self._early] = 0.0
        energy, debt = float(others.square().sum()), self._left(self._along)
        first = DirectionalRounding(self._v[self._early], self._dtype, energy, debt)
        kept = torch.stack([self._held[row] for row in self._early])
        rounded = first.round(self._edited(kept, self._u[self._early, None], self._along))
        self._held = dict(zip(self._early, rounded, strict=True))
        self._rounding = DirectionalRounding(others, self._dtype, debt=first.debt)


class SpanProjection(Projection):
    """Of a tensor that the stream sees through several covectors, orthonormal [k, hidden]."""

    def __init__(self, info: TensorInfo, axis: int, projector: Projector, strength: float, directional: bool) -> None:
        super().__init__(info, axis, projector, strength, directional)
        self._cut = axis == 0 and len(info.shape) > 1
        self.passes = 1 if self._cut else 0
        self._rounding: DirectionalRounding | None = None
        self._forget()

    def measure(self, rows: slice, block: Tensor) -> None:
        """Adds these rows' part of each v.W."""
        for total in self._sums:
            total.add(rows, block.flatten(1))

    def apply(self, rows: slice, block: Tensor) -> Tensor:
        """See `Projection`."""
        axis = 0 if self._cut else self._axis
        moved = block.movedim(axis, 0)
        columns = moved.reshape(len(moved), -1).contiguous()
        if not self._cut or rows.start == 0:
            self._start(columns)
        part = rows if self._cut else slice(None)
        target = columns
        for u, along in zip(self._u, self._alongs, strict=True):
            target = self._edited(target, u[part, None], along)
        stored = self._rounding.round(target.float()) if self._rounding else target.to(self._dtype)
        if not self._cut or rows.stop == self.info.shape[0]:
            self._forget()
        return stored.reshape(moved.shape).movedim(0, axis).contiguous()

    def _start(self, columns: Tensor) -> None:
        """Takes the sums, and what fp32 does not hold of them as the first debt."""
        if self._cut:
            self._alongs = [total.total() for total in self._sums]
        else:
            self._alongs = [tree_sum(columns.double() * v[:, None]) for v in self._v]
        if self._directional:
            left = torch.stack([self._left(along) for along in self._alongs])
            self._rounding = DirectionalRounding(self._v, self._dtype, debt=left)

    def _forget(self) -> None:
        """Holds nothing of the tensor; see `StreamedProjection`."""
        self._sums, self._alongs = [CovectorSum(v) for v in self._v], list[Tensor]()
        self._rounding = None


def projection(
    info: TensorInfo, axis: int, projector: Projector, strength: float = 1.0, directional: bool = True
) -> Projection:
    """The edit of one tensor.

    Args:
        axis: the hidden axis.
        strength: 1 removes the direction; less leaves a share of it.
        directional: for bf16 and fp16, round so that nothing along the direction comes back; False rounds to nearest.

    Raises:
        EditError: the tensor does not fit the projector, or its dtype cannot be edited.
    """
    if not 0 <= axis < len(info.shape) or info.shape[axis] != projector.v.shape[-1]:
        raise EditError(f"{info.name} {list(info.shape)} has no axis {axis} of length {projector.v.shape[-1]}")
    if not DTYPES[info.dtype].is_floating_point or DTYPES[info.dtype].itemsize < 2:
        raise EditError(f"{info.name} is stored as {info.dtype}, which cannot be edited")
    if projector.form == "span":
        return SpanProjection(info, axis, projector, strength, directional)
    kind = StreamedProjection if axis == 0 and len(info.shape) > 1 else LocalProjection
    return kind(info, axis, projector, strength, directional)


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
    edits = {
        writer.tensor: projection(checkpoint.tensors[writer.tensor], writer.axis, projectors.of(writer), strength)
        for writer in plan.writers
    }
    if plan.head_copy:
        _check_copy(checkpoint, plan)
    edited = plan.embedding_writer
    if plan.head_copy and not untie and edited is not None:
        edits[plan.head] = projection(checkpoint.tensors[plan.head], edited.axis, projectors.of(edited), strength)
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
