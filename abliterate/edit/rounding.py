"""Direction-aware rounding: in few bits, with a part along the covector that is as small as in many (DESIGN 3.4).

Rounding every element to the nearest puts part of v.W back. Where the edit moves elements by less than half a step of
the grid it is even undone in part: on wide models plain rounding to bf16 misses the certificate's tolerance, and of
biases, single vectors in which nothing averages out, many do on any model.

Here rows along the hidden axis are rounded one group after another. Each column keeps its debt, the part along v that
the roundings so far have put in; every row is shifted, before it is rounded, by its share v_i / (sum of v_k^2 over the
rows still to come) of the debt, and by no more than a step or two of the grid. That is the least change that pays the
debt. Shifts stay far below a step until the last rows, so that nearly everything is rounded to the nearest anyway,
and what is left at the end is what the very last rows owe. Sums are taken in an order that depends on the rows' numbers
alone (see `sums`), so that the bytes do not depend on how rows or columns are cut into blocks, or on threads.
"""

import torch
from torch import Tensor

from abliterate.edit.sums import tree_sum

FEW_BITS = frozenset((torch.bfloat16, torch.float16))
"""The dtypes that plain rounding is too coarse for."""
GROUP, SINGLES = 32, 64
"""Rows that share one debt; and how many at the end are rounded one by one, each paying for the one before."""
MOST_STEPS = 64
_TINY = torch.finfo(torch.float64).tiny


class DirectionalRounding:
    """Rounds rows in their order; large entries of v should come early, for the last rows' debt is paid by none.

    Args:
        covector: v of these rows, in this order; rows where it is 0 are rounded to the nearest.
        dtype: to round to.
        energy: sum of squares of v over rows that come later, elsewhere.
        debt: [n], of rows that were rounded before.
    """

    def __init__(self, covector: Tensor, dtype: torch.dtype, energy: float = 0.0, debt: Tensor | None = None) -> None:
        self._v = covector.float()[:, None]
        self._ends = _group_ends(len(covector))
        self._shares = _shares(covector.double(), self._ends, energy)
        limits = torch.finfo(dtype)
        self._dtype, self._step, self._least = dtype, limits.eps, limits.smallest_normal * limits.eps
        self._next, self._group, self._owed = 0, 0, list[Tensor]()
        self.debt = debt

    def round(self, target: Tensor) -> Tensor:
        """The next rows in the dtype; `target` [rows, n] is what they should be, in fp32."""
        if self.debt is None:
            self.debt = target.new_zeros(target.shape[1])
        rounded, first = torch.empty_like(target, dtype=self._dtype), 0
        while first < len(target):
            last = min(len(target), first + self._ends[self._group] - self._next)
            rounded[first:last] = self._part(target[first:last], self.debt)
            first = last
        return rounded

    def _part(self, target: Tensor, debt: Tensor) -> Tensor:
        """Rounds rows of one group; when they complete it, the debt is settled."""
        rows = slice(self._next, self._next + len(target))
        limit = target.abs().mul_(self._step).add_(self._least)
        shift = (debt * self._shares[rows]).clamp_(min=-limit, max=limit)
        rounded = (target - shift).to(self._dtype)
        self._owed.append(rounded.float().sub_(target).mul_(self._v[rows]))
        self._next = rows.stop
        if self._next == self._ends[self._group]:
            self.debt = debt + tree_sum(torch.cat(self._owed) if len(self._owed) > 1 else self._owed[0])
            self._owed, self._group = [], self._group + 1
        return rounded


def _group_ends(rows: int) -> list[int]:
    """Where groups end: every GROUP rows, and at every row from SINGLES before the last on."""
    grouped = max(0, rows - SINGLES)
    return [*range(GROUP, grouped + 1, GROUP), *range(grouped // GROUP * GROUP + 1, rows + 1)]


def _shares(v: Tensor, ends: list[int], energy: float) -> Tensor:
    """v_i / (sum of v_k^2 from the start of i's group on) [rows, 1]."""
    left = v.square().flip(0).cumsum(0).flip(0) + energy
    starts = [0, *ends[:-1]]
    sizes = torch.tensor([end - start for start, end in zip(starts, ends, strict=True)])
    return (v / left[starts].clamp_min(_TINY).repeat_interleave(sizes)).float()[:, None]


def by_size(covector: Tensor) -> Tensor:
    """Row numbers in the order of falling abs(v), the first of equals first."""
    return covector.abs().argsort(descending=True, stable=True)


def round_whole(target: Tensor, covector: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds a tensor [hidden, n], fp32, that is in memory with its whole hidden axis."""
    order = by_size(covector)
    rounded = torch.empty_like(target, dtype=dtype)
    rounded[order] = DirectionalRounding(covector[order], dtype).round(target[order])
    return rounded


def settle(stored: Tensor, target: Tensor, covector: Tensor) -> Tensor:
    """A rounded vector, single elements moved to a neighbour on the grid while that brings v.b nearer to the target's.

    Args:
        stored: b [hidden] as rounded. `target`: what it should be, in fp64.
    """
    v = covector.double()
    for _ in range(MOST_STEPS):
        owed = (v * (stored.double() - target)).sum()
        ways = torch.stack([torch.nextafter(stored, torch.full_like(stored, end)) for end in (-torch.inf, torch.inf)])
        # A step away from a number is at most as large as the number: nothing leaves 0, or leaps to a subnormal.
        after = (owed + v * (ways.double() - stored.double())).abs()
        best = int(after.masked_fill(~(stored != 0), torch.inf).argmin())
        if not bool(after.flatten()[best] < owed.abs()):
            return stored
        stored = stored.clone()
        stored[best % len(stored)] = ways.flatten()[best]
    return stored
