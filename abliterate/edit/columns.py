"""The edit of a matrix [hidden, n] whose rows come in blocks: measured once, then edited."""

from bisect import bisect_left
from collections.abc import Iterator

import torch
from torch import Tensor

from abliterate.edit.formula import Formula, is_noise
from abliterate.edit.payers import Payers
from abliterate.edit.sums import GROUP, CovectorSum, fold

COLUMNS = 2048
"""Whose payers are settled together: a bound on memory, columns do not depend on each other."""


class ColumnEdit:
    """One matrix on its way; holds nothing of it before and after."""

    def __init__(self, formula: Formula) -> None:
        self._formula, self._payers = formula, formula.payers
        self._hidden, self._u = len(formula.v), formula.column_u
        self._feedback, self._others = formula.feedback, formula.column_others
        self._suspects = torch.empty(0, dtype=torch.long)
        self._forget()

    def whole(self, matrix: Tensor) -> Tensor:
        """All rows at once."""
        rows = slice(0, len(matrix))
        self.measure(rows, matrix)
        stored = self.apply(rows, matrix)
        late = list(self.late())
        if late:
            stored[[row for row, _ in late]] = torch.stack([values for _, values in late])
        return stored

    def measure(self, rows: slice, matrix: Tensor) -> None:
        """Adds these rows' part of v.W, and keeps the payers."""
        self._sum.add(rows, matrix)
        if self._payers is None:
            return
        if rows.start == 0:
            self._held = matrix.new_empty(len(self._payers.rows), matrix.shape[1])
        known = self._payers.ascending
        for row, place in known[bisect_left(known, (rows.start, 0)) : bisect_left(known, (rows.stop, 0))]:
            self._held[place] = matrix[row - rows.start]

    def apply(self, rows: slice, matrix: Tensor) -> Tensor:
        """The rows as they are to be stored, but for the payers."""
        if rows.start == 0:
            self._start()
        stored, row = torch.empty_like(matrix), rows.start
        while row < rows.stop:
            end = min(rows.stop, row // GROUP * GROUP + GROUP)
            part, group = slice(row - rows.start, end - rows.start), slice(row, end)
            if self._payers is None:
                self._nearest(matrix[part], group, stored[part])
            else:
                self._rounded(matrix[part], group, stored[part], self._payers)
            row = end
        if self._payers is None and rows.stop == self._hidden:
            self._forget()
        return stored

    def late(self) -> Iterator[tuple[int, Tensor]]:
        """The payers' rows."""
        if self._payers is None:
            return
        held, along = self._held, self._along.float()
        for part in self._parts():
            targets = self._formula.targets(held[:, part], along[part])
            held[:, part] = self._payers.settle(targets, self._debt[part])
        self._forget()
        yield from zip(self._payers.rows.tolist(), held, strict=True)

    def _start(self) -> None:
        """Takes the sum, and looks for columns of which little may be left."""
        self._along = self._sum.total()
        self._terms = torch.empty(2, GROUP, len(self._along), dtype=self._formula.working)
        self._taken = self._along.to(self._formula.working)
        if self._payers is None:
            return
        self._debt = self._formula.unheld(self._along)
        found = [self._found(part) + part.start for part in self._parts()]
        self._suspects = torch.cat([self._suspects, *found])
        self._taken = self._taken + self._debt * self._feedback[0][0]

    def _found(self, part: slice) -> Tensor:
        targets = self._formula.targets(self._held[:, part], self._taken[part])
        return self._formula.suspects(targets, self._taken[part])

    def _parts(self) -> list[slice]:
        return [slice(first, first + COLUMNS) for first in range(0, len(self._along), COLUMNS)]

    def _nearest(self, values: Tensor, group: slice, stored: Tensor) -> None:
        edited, taken = self._terms[:, : len(values)]
        edited.copy_(values)
        edited.sub_(torch.mul(self._u[group], self._taken, out=taken))
        stored.copy_(edited.masked_fill_(is_noise(values, edited), 0.0))

    def _rounded(self, values: Tensor, group: slice, stored: Tensor, payers: Payers) -> None:
        """Rounds rows of one group to the nearest, the debt paid as fast as it is; sums up what they owe at its end."""
        whole = group.start % GROUP == 0 and (group.stop % GROUP == 0 or group.stop == self._hidden)
        if whole and self._formula.fused is not None and not len(self._suspects):
            u, others = self._u[group, 0], self._others[group]
            self._owe(group, self._formula.fused.round_group(values, u, self._taken, others, stored))
            return
        first = group.start % GROUP
        edited, wrong = self._terms[0, : len(values)], self._terms[1, first : first + len(values)]
        edited.copy_(values)
        edited.sub_(torch.mul(self._u[group], self._taken, out=wrong))
        if len(self._suspects):
            some = edited[:, self._suspects]
            edited[:, self._suspects] = some.masked_fill_(is_noise(values[:, self._suspects], some), 0.0)
        stored.copy_(edited)
        wrong.copy_(stored)
        wrong.sub_(edited).mul_(self._others[group, None])
        if group.stop % GROUP == 0 or group.stop == self._hidden:
            self._owe(group, fold(self._terms[1, : first + len(values)]))

    def _owe(self, group: slice, wrong: Tensor) -> None:
        """Adds to the debt what the rounding of a whole group put in, of which this is the end."""
        number = group.start // GROUP
        self._debt.mul_(self._feedback[number][1]).add_(wrong)
        if group.stop < self._hidden:
            self._taken = self._along.float() + self._debt * self._feedback[number + 1][0]

    def _forget(self) -> None:
        """Holds nothing of the matrix: edits of a whole checkpoint live side by side."""
        fused = self._formula.fused
        group_sum = fused.group_sum if fused is not None else None
        self._sum = CovectorSum(self._formula.column_v, self._formula.working, group_sum)
        self._along = self._taken = self._held = self._terms = self._debt = torch.empty(0)
        self._suspects = torch.empty(0, dtype=torch.long)
