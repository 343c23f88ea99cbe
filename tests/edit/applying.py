"""An edit of one tensor, as the rewrite applies it."""

import torch
from torch import Tensor

from abliterate.checkpoint.header import DTYPES, TensorInfo
from abliterate.edit.projections import Projection


def info_of(stored: Tensor) -> TensorInfo:
    dtype = next(name for name, known in DTYPES.items() if known == stored.dtype)
    return TensorInfo("w", dtype, tuple(stored.shape), 0, stored.nbytes)


def run(edit: Projection, stored: Tensor, rows: int = 1 << 30) -> Tensor:
    """In blocks, as checkpoint/rewrite.py does: vectors whole, one buffer lent for all blocks."""
    rows = min(rows, len(stored)) if stored.dim() > 1 else len(stored)
    slices = [slice(first, min(len(stored), first + rows)) for first in range(0, len(stored), rows)]
    lent = torch.empty_like(stored[:rows])

    def block(part: slice) -> Tensor:
        return lent[: part.stop - part.start].copy_(stored[part])

    for _ in range(edit.passes):
        for part in slices:
            edit.measure(part, block(part))
    result = torch.cat([edit.apply(part, block(part)) for part in slices])
    for row, stored_late in edit.late():
        result[row] = stored_late
    return result
