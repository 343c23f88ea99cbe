"""A plan and a direction to the edit of every writer, applied block by block."""

from collections.abc import Mapping

import torch
from torch import Tensor

from abliterate.architecture.writer import Plan, Writer
from abliterate.checkpoint.files import Checkpoint
from abliterate.checkpoint.header import TensorInfo
from abliterate.checkpoint.read import read_tensor
from abliterate.edit.projector import Form, Projector, make_projector


class Projection:
    """W <- W - strength * u (v.W) along one axis of one tensor, in fp64, stored in the tensor's dtype.

    Along axis 0 the rows of a block hold only part of v.W, so the tensor goes through `measure` once before `apply`;
    along the last axis every row stands for itself.
    """

    def __init__(self, info: TensorInfo, axis: int, projector: Projector, strength: float = 1.0) -> None:
        self.info, self.axis, self.projector, self.strength = info, axis, projector, strength
        self.passes = 1 if axis == 0 else 0
        self._along: Tensor | None = None

    @property
    def form(self) -> Form:
        """The projector's form."""
        return self.projector.form

    def measure(self, rows: slice, block: Tensor) -> None:
        """Adds these rows' part of v.W [in]."""
        part = self.projector.v[rows] @ block.double().flatten(1) if block.dim() > 1 else self.projector.v @ block.double()
        self._along = part if self._along is None else self._along + part

    def apply(self, rows: slice, block: Tensor) -> Tensor:
        """Rows without their part along u."""
        values = block.double()
        if self.axis == 0:
            assert self._along is not None
            u = self.projector.u[rows] if block.dim() > 1 else self.projector.u
            correction = torch.outer(u, self._along).reshape(values.shape) if block.dim() > 1 else u * self._along
        else:
            correction = (values @ self.projector.v)[..., None] * self.projector.u
        return (values - self.strength * correction).to(block.dtype)


def projector_of(checkpoint: Checkpoint, writer: Writer, direction: Tensor) -> Projector:
    """The projector of a writer, its gain read from the checkpoint and taken as the model takes it."""
    if writer.gain is None:
        return make_projector(direction)
    name = writer.gain.tensor
    weight = read_tensor(checkpoint.shard_of(name), checkpoint.tensors[name])
    return make_projector(direction, weight.double() + writer.gain.offset)


def build_edits(
    checkpoint: Checkpoint, plan: Plan, direction: Tensor, strength: float = 1.0
) -> Mapping[str, Projection]:
    """The edit of every residual writer, by tensor name.

    Args:
        direction: r [hidden].
        strength: 1 removes the direction; less leaves a share of it.
    """
    return {
        writer.tensor: Projection(
            checkpoint.tensors[writer.tensor], writer.axis, projector_of(checkpoint, writer, direction), strength
        )
        for writer in plan.writers
    }
