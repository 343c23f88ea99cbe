"""Rounding that knows the direction (DESIGN 3.4): nearly every row to the nearest, and a few that pay for the others.

Rounding every element to the nearest puts part of v.W back; where the edit moves elements by less than half a step of
the grid it is even undone. Each column keeps its debt, what the roundings so far have put in along v. Rows are rounded
in groups; the debt before a group is added to what the edit takes from it, a few times faster than evenly. That costs
no operation more than the edit itself, and keeps the debt within what few rows can pay: the payers, rounded at the end,
each shifted by no more than a step of the grid before it is rounded.

Payers with the largest entries of v come first, since a shift of theirs by a fraction of a step moves v.W most. Rows of
ever smaller entries follow, each paying what the one before could not divide, so that what is left is what the smallest
of them owes. Where many of them can pay nothing, as in pruned weights, the others have to, hence the pace.
"""

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from abliterate.edit.fused import Fused
from abliterate.edit.rounding import by_size
from abliterate.edit.sums import fold

LARGE, SINGLES, TOGETHER = 64, 16, 8
"""Payers with large entries, at least; how many of them at the end, and how many groups before, pay one by one or
share one debt."""
FINER = 8
"""Small payers for every halving of the rank by abs(v)."""
PACE, OTHERS_PACE = 3, 4
"""How many times faster than evenly payers, and all others, pay. With these and their neighbours least is left, and
weights change least, on weights of all widths and kinds: dense, pruned, heavy-tailed, all but rank 1."""
_TINY = 1e-60


def choose_payers(covector: Tensor) -> Tensor:
    """Row numbers in the order in which they pay; of a short covector all where it is not 0."""
    order = by_size(covector)
    order = order[covector[order] != 0]
    large = _large(len(covector))
    rest = len(order) - large
    if rest <= 0:
        return order
    ranks = {int(rest * 2 ** (-step / FINER)) for step in range(1, FINER * rest.bit_length())} - {0}
    return torch.cat((order[:large], order[[len(order) - rank for rank in sorted(ranks, reverse=True)]]))


def _large(rows: int) -> int:
    return max(LARGE, 2 * math.isqrt(rows) // TOGETHER * TOGETHER)


class Payers:
    """The rows that pay, and how.

    Args:
        covector: v [rows] of the whole hidden axis.
        dtype: to round to.
        fused: compiled arithmetic, for bf16.

    Attributes:
        rows: their numbers, in the order in which they pay.
        covector: v at these rows. `others`: v with 0 there.
        ascending: the rows' numbers and places in that order, by number.
    """

    def __init__(self, covector: Tensor, dtype: torch.dtype, fused: Fused | None = None) -> None:
        self.rows = choose_payers(covector)
        self.covector, self.others = covector[self.rows], covector.clone()
        self.others[self.rows] = 0.0
        self.ascending = sorted((row, place) for place, row in enumerate(self.rows.tolist()))
        self._fused = fused
        self._dtype, self._v = dtype, self.covector.float()[:, None]
        shared = max(0, min(_large(len(covector)), len(self.rows)) - SINGLES) // TOGETHER * TOGETHER
        ends = [*range(TOGETHER, shared + 1, TOGETHER), *range(shared + 1, len(self.rows) + 1)]
        groups = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        self._sizes, self._ends = [group.stop - group.start for group in groups], torch.tensor(ends)
        paces = torch.tensor(paces_of(self.covector.square(), groups, PACE), dtype=torch.float64)
        self._shares = (self.covector * paces.repeat_interleave(torch.tensor(self._sizes))).float()[:, None]

    def settle(self, targets: Tensor, debt: Tensor) -> Tensor:
        """The rows as they are to be stored, [payers, n].

        Args:
            targets: what they should be [payers, n], fp32.
            debt: [n] fp32, what the rounding of all other rows put in along v; what is left of it afterwards.
        """
        if self._fused is not None:
            return self._fused.settle(targets, self._shares[:, 0], self._v[:, 0], self._ends, debt)
        stored, most = torch.empty_like(targets, dtype=self._dtype), self._most(targets)
        views = [torch.split(whole, self._sizes) for whole in (targets, stored, most, -most, self._shares, self._v)]
        room = torch.empty(TOGETHER, targets.shape[1])
        for target, result, up, down, share, v in zip(*views, strict=True):
            moved = room[: len(target)]
            torch.mul(debt, share, out=moved)
            torch.clamp(moved, down, up, out=moved).add_(0.0)  # no -0, whichever zero a processor prefers
            torch.sub(target, moved, out=moved)
            result.copy_(moved)
            moved.copy_(result)
            debt += fold(moved.sub_(target).mul_(v))
        return stored

    def means(self, targets: Tensor) -> Tensor:
        """How much debt the rows could pay at most, [n] fp32."""
        return fold(self._most(targets).mul_(self._v.abs()))

    def _most(self, targets: Tensor) -> Tensor:
        """How far rows may be shifted: a step of the grid, of the subnormal grid at least, but nothing leaves 0."""
        limits, size = torch.finfo(self._dtype), targets.abs()
        return torch.maximum(size * limits.eps, size.clamp_max_(limits.smallest_normal * limits.eps))


def paces_of(weights: Tensor, groups: Sequence[slice], pace: float, later: float = 0.0) -> list[float]:
    """Of each group pace / (sum of weights from its start on, and `later`), but no more than it can pay."""
    values = weights.tolist()
    owns = [math.fsum(values[group]) for group in groups]
    lefts = list(accumulate(reversed(owns), initial=later))[:0:-1]
    return [
        min(pace / max(left, _TINY), 1 / own) if own > _TINY else 0.0 for own, left in zip(owns, lefts, strict=True)
    ]
