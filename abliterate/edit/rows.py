"""The edit of a matrix [n, hidden] of which rows are there whole: embeddings, Conv1D, and their like.

Here every row is a column of DESIGN's W. All entries but the payers' are rounded to the nearest at once. Where that
leaves more debt than the row's payers can pay, it is done once more with the debt taken along u as well; where they
still cannot, or little is left of the row, it is edited as a column, with the debt paid on the way.
"""

import torch
from torch import Tensor

from abliterate.edit.columns import ColumnEdit
from abliterate.edit.formula import Formula, is_noise
from abliterate.edit.payers import Payers
from abliterate.edit.sums import PART, narrow, narrowed, total

SPENT = 0.6
"""Of what payers could pay at most: with more debt than that, some may be left."""


class RowEdit:
    """Edits rows, each by itself: in any order, by several threads."""

    def __init__(self, formula: Formula) -> None:
        self._formula = formula
        self._u, self._v = formula.u.to(formula.working), formula.v.to(formula.working)

    def apply(self, matrix: Tensor) -> Tensor:
        """The rows as they are to be stored."""
        stored, along = torch.empty_like(matrix), self._along(matrix)
        if self._formula.payers is not None:
            self._paid(matrix, along, stored, self._formula.payers)
            return stored
        for part, room in _parts(matrix, self._formula.working):
            edited = self._edited(matrix[part], along[part], room)
            stored[part] = edited.masked_fill_(is_noise(matrix[part], edited), 0.0)
        return stored

    def _along(self, matrix: Tensor) -> Tensor:
        """W.v [rows] in fp64."""
        if self._formula.fused is not None:
            return total(self._formula.fused.row_sums(matrix, self._v))
        sums = torch.empty(len(matrix), narrow(matrix.shape[1]), dtype=self._formula.working)
        for part, room in _parts(matrix, self._formula.working):
            sums[part] = narrowed(room[0].copy_(matrix[part]), self._v)
        return total(sums)

    def _edited(self, values: Tensor, taken: Tensor, room: Tensor) -> Tensor:
        """W - (W.v) u [rows, hidden] in the first buffer."""
        torch.mul(taken.to(self._formula.working)[:, None], self._u, out=room[1])
        return room[0].copy_(values).sub_(room[1])

    def _paid(self, matrix: Tensor, along: Tensor, stored: Tensor, payers: Payers) -> None:
        """Rounds all to the nearest, then the payers; rows that owe too much another way."""
        taken, unheld = along.float(), self._formula.unheld(along)
        targets, debt = self._nearest(matrix, taken, stored, payers)
        debt += unheld
        most = SPENT * payers.means(targets)
        poor = (debt.abs() > most).nonzero()[:, 0]
        if len(poor):
            again, more = torch.empty_like(matrix[poor]), debt[poor] / self._formula.share
            owed = self._nearest(matrix[poor], taken[poor] + more, again, payers)[1] - more * self._formula.share
            stored[poor], debt[poor] = again, owed + unheld[poor]
        self._put(payers.settle(targets, debt.clone()), payers.rows, stored)
        special = (debt.abs() > most).index_fill_(0, self._formula.suspects(targets, taken), True).nonzero()[:, 0]
        if len(special):
            stored[special] = ColumnEdit(self._formula).whole(matrix[special].T.contiguous()).T

    def _put(self, settled: Tensor, rows: Tensor, stored: Tensor) -> None:
        """The payers' part of every row, [payers, rows], to its place."""
        if self._formula.fused is not None:
            self._formula.fused.put(settled, rows, stored)
            return
        turned = settled.T.contiguous()  # three times faster to copy from than a view
        for part, _ in _parts(stored, self._formula.working):
            stored[part].index_copy_(1, rows, turned[part])

    def _nearest(self, matrix: Tensor, taken: Tensor, stored: Tensor, payers: Payers) -> tuple[Tensor, Tensor]:
        """Rounds W - taken u; what that is for the payers [payers, rows], and what the others owe once rounded [rows].

        Args:
            taken: W.v, or more where the debt is paid at once.
        """
        others = self._formula.column_others
        if self._formula.fused is not None:
            given = matrix, taken, self._u, others, payers.rows, stored
            targets, sums = self._formula.fused.round_rows(*given)
            return targets, total(sums).float()
        targets = torch.empty(len(payers.rows), len(matrix))
        sums = torch.empty(len(matrix), narrow(matrix.shape[1]))
        for part, room in _parts(matrix, torch.float32):
            edited = self._edited(matrix[part], taken[part], room)
            targets[:, part] = edited.index_select(1, payers.rows).T
            stored[part] = edited
            sums[part] = narrowed(room[1].copy_(stored[part]).sub_(edited), others)
        return targets, total(sums).float()


def _parts(matrix: Tensor, working: torch.dtype) -> list[tuple[slice, Tensor]]:
    """Rows that fit the cache of a core together with two buffers [2, rows, hidden]."""
    rows, hidden = matrix.shape
    step = max(1, PART // hidden)
    room = torch.empty(2, min(step, rows), hidden, dtype=working)
    parts = [slice(start, min(rows, start + step)) for start in range(0, rows, step)]
    return [(part, room[:, : part.stop - part.start]) for part in parts]
