"""The certificate's first part: what the stored writers have along their covectors. No forward pass."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from abliterate.architecture.writer import Plan, Writer
from abliterate.checkpoint.files import Checkpoint
from abliterate.checkpoint.read import Change, iter_blocks
from abliterate.edit.cut import Cut, part_of
from abliterate.edit.edits import projectors_of

# DESIGN 3.5: rounding to the storage dtype puts this much back, over the square root of the hidden size.
WRITER_TOLERANCE = {"BF16": 3e-3, "F16": 4e-4}
STREAM_TOLERANCE = {"BF16": 0.02, "F16": 0.02 / 8}
FULL_PRECISION = 1e-6
PARTIAL = 1e-3
"""Of what a strength other than 1 leaves: how near to that it has to be, beyond what rounding may leave."""


@dataclass(frozen=True)
class WriterResidual:
    """||v.W||_F / (||v|| ||W||_F) of one stored tensor.

    Attributes:
        before: of the base; None where it was not measured.
        after: of the edited tensor; 0 for a tensor of zeros.
        tolerance: for its dtype. `holds`: after is within it of what should be left.
        strength: of the edit. `left`: what that leaves; 0 for a strength of 1, None where it cannot be told.
    """

    tensor: str
    dtype: str
    before: float | None
    after: float
    tolerance: float
    holds: bool
    strength: float = 1.0
    left: float | None = 0.0


def tolerance(dtype: str, hidden_size: int, part: Literal["writer", "stream"]) -> float:
    """How much of the direction rounding to a stored dtype may leave (DESIGN 3.5)."""
    table = WRITER_TOLERANCE if part == "writer" else STREAM_TOLERANCE
    return table[dtype] / math.sqrt(hidden_size) if dtype in table else FULL_PRECISION


def writer_residuals(
    checkpoint: Checkpoint,
    plan: Plan,
    cut: Cut | Tensor,
    base: Checkpoint | None = None,
    changes: Mapping[str, Change] | None = None,
) -> tuple[WriterResidual, ...]:
    """Measures every writer (and a stored copy of the tied head) along what it should have lost, streamed in blocks.

    Args:
        cut: what was removed; a direction [hidden] stands for itself, removed whole and everywhere.
        base: the unedited checkpoint, for the figures before.
        changes: by tensor, what its bytes will be that are measured, and of no others; None measures all as they are.
    """
    cut = cut if isinstance(cut, Cut) else Cut.uniform(cut, plan.num_layers)
    projectors = projectors_of(checkpoint, plan, cut)
    writers = [writer for writer in plan.edited if changes is None or writer.tensor in changes]
    removals = [cut.removal(writer, part_of(writer, plan.writers)) for writer in writers]
    found = []
    for writer, removal in zip(writers, removals, strict=True):
        covector = projectors[removal.basis].of(writer).v
        change = changes[writer.tensor] if changes is not None else None
        found.append(_residual(checkpoint, cut, writer, removal.strength, covector, base, change))
    return tuple(found)


def _residual(
    checkpoint: Checkpoint, cut: Cut, writer: Writer, strength: float, covector: Tensor, base: Checkpoint | None,
    change: Change | None,
) -> WriterResidual:  # fmt: skip
    dtype = checkpoint.tensors[writer.tensor].dtype
    before, size_before = None, math.nan
    if base is checkpoint:
        ((before,), size_before), ((after,), size) = _shares(checkpoint, writer, [covector], [None, change])
    else:
        (((after,), size),) = _shares(checkpoint, writer, [covector], [change])
        if base is not None:
            (before,), size_before = shares_along(base, writer, [covector])
    bound, left = tolerance(dtype, cut.hidden_size, "writer"), 0.0 if strength == 1.0 else None
    if left is None and before is not None and not (cut.keep_norms and strength):
        left = abs(1.0 - strength) * before * (size_before / size if size else 1.0)
    holds = left is None or abs(after - left) <= bound + PARTIAL * left
    return WriterResidual(writer.tensor, dtype, before, after, bound, holds, strength, left)


def shares_along(checkpoint: Checkpoint, writer: Writer, covectors: Sequence[Tensor]) -> tuple[list[float], float]:
    """||v.W||_F / (||v|| ||W||_F) along the writer's axis, for each covector, in one pass over the tensor; and ||W||_F.

    Args:
        covectors: each v [hidden], or an orthonormal basis [k, hidden].

    Returns:
        Taken in fp64. Shares are 0 for a tensor of zeros; all are NaN for one with NaN or infinity.

    Raises:
        CheckpointError: the tensor cannot be read.
    """
    return _shares(checkpoint, writer, covectors, [None])[0]


def _shares(
    checkpoint: Checkpoint, writer: Writer, covectors: Sequence[Tensor], changes: Sequence[Change | None]
) -> list[tuple[list[float], float]]:
    """See `shares_along`; of the tensor as each of these changes makes it, in one pass over what is stored."""
    found = [_Shares(covectors, writer.axis) for _ in changes]
    for rows, block in iter_blocks(checkpoint.shard_of(writer.tensor), checkpoint.tensors[writer.tensor]):
        for change, shares in zip(changes, found, strict=True):
            shares.follow(rows, (block if change is None else change(rows, block)).double())
    return [shares.taken() for shares in found]


class _Shares:
    """What a tensor has along each covector, block after block."""

    def __init__(self, covectors: Sequence[Tensor], axis: int) -> None:
        self._parts, self._norm = [_Part(covector, axis) for covector in covectors], 0.0

    def follow(self, rows: slice, values: Tensor) -> None:
        """Takes in a block of rows, fp64."""
        self._norm += float(values.square().sum())
        for part in self._parts:
            part.follow(rows, values)

    def taken(self) -> tuple[list[float], float]:
        """The shares, and the norm."""
        if not math.isfinite(self._norm):
            return [math.nan] * len(self._parts), math.nan
        return [part.share(self._norm) for part in self._parts], math.sqrt(self._norm)


class _Part:
    """What a tensor has along one covector, block after block."""

    def __init__(self, covector: Tensor, axis: int) -> None:
        self._size = 1.0 if covector.dim() > 1 else float(covector.norm())
        self._covectors, self._axis = covector.reshape(-1, covector.shape[-1]), axis
        self._along, self._square = torch.zeros((), dtype=torch.float64), 0.0

    def follow(self, rows: slice, values: Tensor) -> None:
        """Takes in a block of rows, fp64."""
        if self._axis == 0:
            self._along = self._along + torch.tensordot(self._covectors[:, rows], values, dims=1)
        else:
            self._square += float(torch.tensordot(values, self._covectors, dims=([self._axis], [1])).square().sum())

    def share(self, norm: float) -> float:
        """Of a tensor of that squared norm; 0 for zeros."""
        square = self._square + float(self._along.square().sum())
        return math.sqrt(square / norm) / self._size if norm != 0 else 0.0
