"""The edit of a tensor as two thin matrices: W - strength * u (v.W) is W + B A with B = -strength * u and A = v.W."""

from dataclasses import dataclass

import torch
from torch import Tensor

from abliterate.checkpoint.files import Checkpoint
from abliterate.checkpoint.read import iter_blocks
from abliterate.edit.projector import Projector
from abliterate.progress import Advance


@dataclass(frozen=True)
class Factors:
    """The edit of one matrix, or of all experts that are stored as one tensor.

    Attributes:
        a: [k, n] fp32, or [experts, k, n]. `b`: [hidden, k] fp32.
        before, after: share of W along the covectors, ‖v.W‖ / ‖W‖, without and with the factors as they are stored.
    """

    a: Tensor
    b: Tensor
    before: float
    after: float


def factors_of(
    checkpoint: Checkpoint, tensor: str, axis: int, projector: Projector, strength: float, advance: Advance
) -> Factors:
    """Reads the tensor once, in blocks.

    Args:
        axis: the hidden one.
        advance: told of every byte.
    """
    u, v = (side.reshape(-1, side.shape[-1]) for side in (projector.u, projector.v))
    info = checkpoint.tensors[tensor]
    parts, square = [], torch.zeros((), dtype=torch.float64)
    for rows, block in iter_blocks(checkpoint.shard_of(tensor), info):
        values = block.double()
        square += values.square().sum()
        covectors = v[:, rows] if axis == 0 else v
        parts.append(torch.tensordot(covectors, values, dims=([1], [axis])))  # [k, the other axes]
        advance(block.nbytes)
    along = torch.stack(parts).sum(0) if axis == 0 else torch.cat(parts, dim=1)
    a, b = along.float(), -(strength * u).T.float()
    left = along + torch.tensordot(v @ b.double(), a.double(), dims=([1], [0]))
    norm = float(square.sqrt()) or 1.0
    a = a.transpose(0, 1).contiguous() if a.dim() == 3 else a.contiguous()
    return Factors(a, b.contiguous(), float(along.norm()) / norm, float(left.norm()) / norm)
