"""Sums that come out the same, to the last bit, however the data is cut into blocks, on any number of threads.

Only element-wise additions and multiplications, in an order that depends on nothing but the length: what a library
calls a sum or a product of matrices is free to add up in any order, and does so by size, thread and processor.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from abliterate.errors import EditError

GroupSum = Callable[[Tensor, Tensor], Tensor]
"""v.W of a whole group of rows, as `fold` adds it up."""

GROUP = 32
"""Rows that are added up before they go into the running total; counted from row 0, not from where a block starts."""
PART = 1 << 19
"""Elements that are worked on together: enough for what every operation costs beside its work to be little."""
NARROW = 8
"""What is left of rows is turned round to be added up: operations on shorter rows are slow."""


def tree_sum(terms: Tensor) -> Tensor:
    """Sum over axis 0 in pairs: element-wise additions only, whose order depends on nothing but the length."""
    return fold(terms.clone())


def fold(terms: Tensor) -> Tensor:
    """`tree_sum` in the memory of its terms: a view of the first."""
    count = len(terms)
    while count > 1:
        half = count // 2
        terms[:half].add_(terms[half : 2 * half])
        if count % 2:
            terms[0].add_(terms[count - 1])
        count = half
    return terms[0]


def narrowed(terms: Tensor, covector: Tensor) -> Tensor:
    """Sums of a few products each of W and v along the last axis, [rows, few]: `total` adds them up.

    Args:
        terms: W [rows, n] in the dtype to work in; overwritten, the result is a view of it.
        covector: v [n], likewise.
    """
    return _halved(terms.mul_(covector), narrow(terms.shape[1]))


def narrow(width: int) -> int:
    """How many sums `narrowed` leaves of rows that wide: of up to GROUP terms or so, as in columns."""
    while width > NARROW and width > GROUP * NARROW // 2:
        width //= 2
    return width


def total(parts: Tensor) -> Tensor:
    """W.v [rows] in fp64, of what `narrowed` gave."""
    return fold(_halved(parts.double(), NARROW).T.contiguous())


def _halved(terms: Tensor, width: int) -> Tensor:
    """Columns added up in pairs, in the memory of the terms, while there are more than `width`."""
    count = terms.shape[1]
    while count > width:
        half = count // 2
        terms[:, :half].add_(terms[:, half : 2 * half])
        if count % 2:
            terms[:, 0].add_(terms[:, count - 1])
        count = half
    return terms[:, :count]


class CovectorSum:
    """v.W over axis 0 of a tensor whose rows come in blocks: groups of rows in `working`, their sum in fp64.

    Args:
        covector: v [rows].
        group_sum: for whole groups, where there is a faster way.
    """

    def __init__(
        self, covector: Tensor, working: torch.dtype = torch.float64, group_sum: GroupSum | None = None
    ) -> None:
        self._covector, self._group_sum = covector.to(working)[:, None], group_sum
        self._next, self._filled = 0, 0
        self._terms = self._total = torch.empty(0)

    def add(self, rows: slice, block: Tensor) -> None:
        """Takes the next rows, `block` [rows, n]; row 0 starts anew.

        Raises:
            EditError: these are not the next rows.
        """
        if rows.start == 0:
            self._next, self._filled = 0, 0
            self._terms = torch.empty(GROUP, *block.shape[1:], dtype=self._covector.dtype)
            self._total = torch.zeros(block.shape[1:], dtype=torch.float64)
        if rows.start != self._next:
            raise EditError(f"rows from {rows.start} came when row {self._next} was next: blocks must come in order")
        first = 0
        while first < len(block):
            taken = min(GROUP - self._filled, len(block) - first)
            if taken == GROUP and self._group_sum is not None:
                rows = slice(self._next, self._next + GROUP)
                self._total += self._group_sum(block[first : first + GROUP], self._covector[rows, 0])
                first, self._next = first + GROUP, self._next + GROUP
                continue
            part = self._terms[self._filled : self._filled + taken]
            part.copy_(block[first : first + taken])
            part.mul_(self._covector[self._next : self._next + taken])
            first, self._next, self._filled = first + taken, self._next + taken, self._filled + taken
            if self._filled == GROUP:
                self._flush()

    def total(self) -> Tensor:
        """v.W [n].

        Raises:
            EditError: rows are missing.
        """
        if self._next != len(self._covector):
            raise EditError(f"only {self._next} of {len(self._covector)} rows were measured")
        if self._filled:
            self._flush()
        return self._total

    def _flush(self) -> None:
        self._total += fold(self._terms[: self._filled])
        self._filled = 0
