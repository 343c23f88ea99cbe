"""Sums that come out the same, to the last bit, however the data is cut into blocks, on any number of threads."""

import torch
from torch import Tensor

from abliterate.errors import EditError

GROUP = 32
"""Rows that are added up before they go into the running total; counted from row 0, not from where a block starts."""


def tree_sum(terms: Tensor) -> Tensor:
    """Sum over axis 0 in pairs: element-wise additions only, whose order depends on nothing but the length."""
    while len(terms) > 1:
        half = len(terms) // 2
        total = terms[:half] + terms[half : 2 * half]
        if len(terms) % 2:
            total[0] += terms[-1]
        terms = total
    return terms[0]


class CovectorSum:
    """v.W over axis 0 of a tensor whose rows come in blocks, in fp64.

    Args:
        covector: v [rows].
    """

    def __init__(self, covector: Tensor) -> None:
        self._covector = covector.double()
        self._next, self._pending, self._total = 0, torch.empty(0), torch.zeros(())

    def add(self, rows: slice, block: Tensor) -> None:
        """Takes the next rows, `block` [rows, n]; row 0 starts anew.

        Raises:
            EditError: these are not the next rows.
        """
        if rows.start == 0:
            self._next, self._pending = 0, block.new_empty(0, *block.shape[1:], dtype=torch.float64)
            self._total = block.new_zeros(block.shape[1:], dtype=torch.float64)
        if rows.start != self._next:
            raise EditError(f"rows from {rows.start} came when row {self._next} was next: blocks must come in order")
        first = 0
        while first < len(block):
            taken = min(GROUP - len(self._pending), len(block) - first)
            piece = block[first : first + taken].double() * self._covector[self._next : self._next + taken, None]
            self._pending = torch.cat((self._pending, piece)) if len(self._pending) else piece
            first, self._next = first + taken, self._next + taken
            if len(self._pending) == GROUP:
                self._flush()

    def total(self) -> Tensor:
        """v.W [n].

        Raises:
            EditError: rows are missing.
        """
        if self._next != len(self._covector):
            raise EditError(f"only {self._next} of {len(self._covector)} rows were measured")
        if len(self._pending):
            self._flush()
        return self._total

    def _flush(self) -> None:
        self._total = self._total + tree_sum(self._pending)
        self._pending = self._pending[:0]
