"""Whether singular values are what storing a difference of lower rank makes of it.

Where the steps of an edit are about as large as those of the stored grid, rounding errors are no independent noise: of
weights that lie on the grid they are a function of the step alone, and of a rank-1 step r_i a_j that function is itself
a matrix of a few ranks, some times above the edge. So the leading part of a difference is stored again, added to the
base and rounded as the edited side is, and what comes out of that is no rank of the edit.
"""

from collections.abc import Iterator

from torch import Tensor

from abliterate.checkpoint.header import DTYPES
from abliterate.difference.matrix import PairMatrix
from abliterate.difference.sketch import Sketch, sketch

OVER = 1.25
"""By so much a singular value has to be above that of the difference that was stored again."""


def own_rank(matrix: PairMatrix, seen: Sketch, rank: int, grid: str) -> int:
    """How many of the leading `rank` singular values rounding of those before them does not explain.

    Args:
        seen: of the difference.
        grid: the dtype that the edited side was rounded to.
    """
    counted = min(1, rank)
    while counted < rank:
        again = _stored_again(matrix, seen, counted, rank, grid)
        more = counted + int((seen.values[counted:rank] > OVER * again.values[counted:rank]).sum())
        if more == counted:
            return counted
        counted = more
    return counted


def _stored_again(matrix: PairMatrix, seen: Sketch, count: int, rank: int, grid: str) -> Sketch:
    left, right = seen.left[:, :count] * seen.values[:count].float(), seen.right[:, :count]

    def blocks() -> Iterator[tuple[slice, Tensor]]:
        for rows, base in matrix.base_blocks():
            yield rows, (base + left[rows] @ right.mT).to(DTYPES[grid]).float() - base

    # as many as the difference itself was looked at for: its last ones are the least exact
    return sketch(blocks, *matrix.shape, max(rank, len(seen.values)))
