"""The certificate's first part: what the stored writers have along their covectors. No forward pass."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from abliterate.architecture.writer import Plan, Writer
from abliterate.checkpoint.files import Checkpoint
from abliterate.checkpoint.read import iter_blocks
from abliterate.edit.edits import Projectors

# DESIGN 3.5: rounding to the storage dtype puts this much back, over the square root of the hidden size.
WRITER_TOLERANCE = {"BF16": 3e-3, "F16": 4e-4}
STREAM_TOLERANCE = {"BF16": 0.02, "F16": 0.02 / 8}
FULL_PRECISION = 1e-6


@dataclass(frozen=True)
class WriterResidual:
    """||v.W||_F / (||v|| ||W||_F) of one stored tensor.

    Attributes:
        before: of the base; None where it was not measured.
        after: of the edited tensor; 0 for a tensor of zeros.
        tolerance: for its dtype. `holds`: after <= tolerance.
    """

    tensor: str
    dtype: str
    before: float | None
    after: float
    tolerance: float
    holds: bool


def tolerance(dtype: str, hidden_size: int, part: Literal["writer", "stream"]) -> float:
    """How much of the direction rounding to a stored dtype may leave (DESIGN 3.5)."""
    table = WRITER_TOLERANCE if part == "writer" else STREAM_TOLERANCE
    return table[dtype] / math.sqrt(hidden_size) if dtype in table else FULL_PRECISION


def writer_residuals(
    checkpoint: Checkpoint, plan: Plan, direction: Tensor, base: Checkpoint | None = None
) -> tuple[WriterResidual, ...]:
    """Measures every writer (and a stored copy of the tied head), streamed in blocks.

    Args:
        direction: r [hidden].
        base: the unedited checkpoint, for the figures before.
    """
    projectors = Projectors(checkpoint, plan.hidden_size, direction)
    return tuple(_residual(checkpoint, plan, writer, projectors, base) for writer in plan.edited)


def _residual(
    checkpoint: Checkpoint, plan: Plan, writer: Writer, projectors: Projectors, base: Checkpoint | None
) -> WriterResidual:
    covector = projectors.of(writer).v
    dtype = checkpoint.tensors[writer.tensor].dtype
    after = share_along(checkpoint, writer, covector)
    before = share_along(base, writer, covector) if base is not None else None
    bound = tolerance(dtype, plan.hidden_size, "writer")
    return WriterResidual(writer.tensor, dtype, before, after, bound, after <= bound)


def share_along(checkpoint: Checkpoint, writer: Writer, covector: Tensor) -> float:
    """||v.W||_F / (||v|| ||W||_F) along the writer's axis, in fp64; 0 for zeros, NaN for NaN or infinity.

    Args:
        covector: v [hidden], or an orthonormal basis [k, hidden].
    """
    info, size = checkpoint.tensors[writer.tensor], 1.0 if covector.dim() > 1 else float(covector.norm())
    covector = covector.reshape(-1, covector.shape[-1])
    along = torch.zeros((), dtype=torch.float64)
    square, norm = 0.0, 0.0
    for rows, block in iter_blocks(checkpoint.shard_of(writer.tensor), info):
        values = block.double()
        norm += float(values.square().sum())
        if writer.axis == 0:
            along = along + torch.tensordot(covector[:, rows], values, dims=1)
        else:
            square += float(torch.tensordot(values, covector, dims=([writer.axis], [1])).square().sum())
    square += float(along.square().sum())
    if not math.isfinite(norm):
        return math.nan
    return math.sqrt(square / norm) / size if norm != 0 else 0.0
