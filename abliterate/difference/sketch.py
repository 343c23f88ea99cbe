"""The leading singular values and vectors of a matrix that is only seen in blocks of rows.

Randomized subspace iteration (Halko, Martinsson & Tropp 2011, algorithms 4.3 and 4.4), three passes over the rows. The
singular values found are never above the true ones; what is not found is known exactly, as ||D||_F^2 less the sum of
their squares.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Blocks = Callable[[], Iterator[tuple[slice, Tensor]]]
"""Yields all blocks of rows [rows, columns] fp32, anew at every call."""
SEED = 20240617


@dataclass(frozen=True)
class Sketch:
    """The leading part of a singular value decomposition.

    Attributes:
        values: [k] fp64, falling.
        left: [rows, k] fp32. `right`: [columns, k] fp32. Orthonormal.
        complete: k is the smaller dimension, so that nothing is left out.
    """

    values: Tensor
    left: Tensor
    right: Tensor
    complete: bool


def sketch(blocks: Blocks, rows: int, columns: int, wanted: int) -> Sketch:
    """The `wanted` leading singular values and vectors.

    Args:
        blocks: of the matrix [rows, columns].
        wanted: how many; should be some more than are of interest.
    """
    count = min(wanted, rows, columns)
    if count == min(rows, columns) and columns <= rows:
        return _finish(_times(blocks, rows, torch.eye(columns)), torch.eye(columns), True)
    drawn = torch.randn(columns, count, generator=torch.Generator().manual_seed(SEED))
    left = orthonormal_columns(_times(blocks, rows, drawn))
    right = orthonormal_columns(transposed_times(blocks, columns, left))
    return _finish(_times(blocks, rows, right), right, count == min(rows, columns))


def _finish(image: Tensor, right: Tensor, complete: bool) -> Sketch:
    """From D V [rows, k] and V [columns, k]."""
    scale = float(image.abs().max()) or 1.0
    basis, small = torch.linalg.qr((image / scale).double())
    left, values, turned = torch.linalg.svd(small)
    return Sketch(values * scale, (basis @ left).float(), right @ turned.mT.float(), complete)


def _times(blocks: Blocks, rows: int, factor: Tensor) -> Tensor:
    """D F [rows, k], with F [columns, k]."""
    out = torch.empty(rows, factor.shape[1])
    for place, block in blocks():
        torch.mm(block, factor, out=out[place])
    return out


def transposed_times(blocks: Blocks, columns: int, factor: Tensor) -> Tensor:
    """D^T F [columns, k] fp32, with F [rows, k]; summed in fp64."""
    out = torch.zeros(columns, factor.shape[1], dtype=torch.float64)
    for place, block in blocks():
        out += block.mT @ factor[place]
    return out.float()


def orthonormal_columns(vectors: Tensor) -> Tensor:
    """An orthonormal basis of the columns' span [n, k]; of a span that is smaller, filled up with anything."""
    scale = float(vectors.abs().max()) or 1.0
    basis: Tensor = torch.linalg.qr(vectors / scale)[0]
    return basis
