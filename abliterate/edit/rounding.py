"""Direction-aware rounding in which every row takes part, of vectors and along several covectors (DESIGN 3.4).

It leaves a part along the covector that is as small as in many bits. For matrices along one covector `payers` has a
faster way, in which few rows do the paying.

Rounding every element to the nearest puts part of v.W back. Where the edit moves elements by less than half a step of
the grid it is even undone in part: on wide models plain rounding to bf16 misses the certificate's tolerance, and of
biases, single vectors in which nothing averages out, many do on any model.

Here rows along the hidden axis are rounded one group after another. Each column keeps its debt, the part along v that
the roundings so far have put in; every row is shifted, before it is rounded, by its share of the debt, and by no more
than a step of the grid. Shares in proportion to v_i change least. Paid a few times faster than the rows still to come
would have to, the debt also vanishes where most of them can pay nothing, as in pruned weights, and little is left to
the last rows; what is left at the end is what the very last one owes. Sums are taken in an order that depends on the
rows' numbers alone (see `sums`), so that the bytes do not depend on how rows or columns are cut into blocks, or on
threads.
"""

import torch
from torch import Tensor

from abliterate.edit.sums import tree_sum

FEW_BITS = frozenset((torch.bfloat16, torch.float16))
"""The dtypes that plain rounding is too coarse for."""
GROUP, SINGLES = 32, 64
"""Rows that share one debt; and how many at the end are rounded one by one, each paying for the one before."""
PACE = 4
"""How many times faster than evenly the debt is paid. Of the paces from 1 to 16, on weights of all widths, this one and
its neighbours leave least and change weights least; at 1, pruned weights miss the certificate's tolerance."""
MOST_STEPS, FURTHEST = 64, 2
"""Of `settle`: how often it moves an element, and how far from where it should be one may get, in steps."""
_TINY = 1e-60


class DirectionalRounding:
    """Rounds rows in their order; large entries of v should come early, for the last rows' debt is paid by none.

    Args:
        covector: v of these rows, in this order; rows where it is 0 are rounded to the nearest. Several, orthonormal,
            come as [k, rows]: each has a debt of its own, and rows pay all of them.
        dtype: to round to.
        energy: sum of squares of v over rows that come later, elsewhere.
        debt: [n], of rows that were rounded before; [k, n] for several.
    """

    def __init__(self, covector: Tensor, dtype: torch.dtype, energy: float = 0.0, debt: Tensor | None = None) -> None:
        covectors = covector.reshape(-1, covector.shape[-1])
        self._several = covector.dim() > 1
        self._v = covectors.float()[:, :, None]
        self._ends = _group_ends(covectors.shape[1])
        self._shares = torch.stack([_shares(v.double(), self._ends, energy) for v in covectors])
        limits = torch.finfo(dtype)
        self._dtype, self._step, self._least = dtype, limits.eps, limits.smallest_normal * limits.eps
        self._next, self._group = 0, 0
        self._owed: list[list[Tensor]] = [[] for _ in covectors]
        self._debts = None if debt is None else debt.reshape(len(covectors), -1)

    @property
    def debt(self) -> Tensor | None:
        """What the roundings so far have put in along v: [n], or [k, n]."""
        return self._debts if self._debts is None or self._several else self._debts[0]

    def round(self, target: Tensor) -> Tensor:
        """The next rows in the dtype; `target` [rows, n] is what they should be, in fp32."""
        debts = self._debts if self._debts is not None else target.new_zeros(len(self._v), target.shape[1])
        rounded, first = torch.empty_like(target, dtype=self._dtype), 0
        while first < len(target):
            last = min(len(target), first + self._ends[self._group] - self._next)
            rounded[first:last], debts = self._part(target[first:last], debts)
            first = last
        self._debts = debts
        return rounded

    def _part(self, target: Tensor, debts: Tensor) -> tuple[Tensor, Tensor]:
        """Rounds rows of one group; when they complete it, the debts are settled."""
        rows = slice(self._next, self._next + len(target))
        size = target.abs()
        # A step of the subnormal grid at least, but nothing leaves 0.
        limit = torch.maximum(size * self._step, size.clamp_max_(self._least))
        shift = debts[0] * self._shares[0, rows]
        for debt, share in zip(debts[1:], self._shares[1:, rows], strict=True):
            shift += debt * share
        rounded = (target - shift.clamp_(min=-limit, max=limit)).to(self._dtype)
        wrong = rounded.float().sub_(target)
        for owed, v in zip(self._owed, self._v, strict=True):
            owed.append(wrong * v[rows])
        self._next = rows.stop
        if self._next == self._ends[self._group]:
            sums = [tree_sum(torch.cat(owed) if len(owed) > 1 else owed[0]) for owed in self._owed]
            debts = debts + torch.stack(sums)
            self._owed, self._group = [[] for _ in self._owed], self._group + 1
        return rounded, debts


def _group_ends(rows: int) -> list[int]:
    """Where groups end: every GROUP rows, and at every row from SINGLES before the last on."""
    grouped = max(0, rows - SINGLES)
    return [*range(GROUP, grouped + 1, GROUP), *range(grouped // GROUP * GROUP + 1, rows + 1)]


def _shares(v: Tensor, ends: list[int], energy: float) -> Tensor:
    """v_i times PACE / (sum of v_k^2 from the start of i's group on), but no more than a group can pay [rows, 1]."""
    square = v.square()
    sizes = torch.tensor([end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)])
    numbers = torch.arange(len(ends)).repeat_interleave(sizes)
    group = square.new_zeros(len(ends)).index_add_(0, numbers, square)
    left = group.flip(0).cumsum(0).flip(0) + energy
    pace = torch.minimum(PACE / left.clamp_min(_TINY), 1 / group.clamp_min(_TINY))
    return (v * pace[numbers]).float()[:, None]


def by_size(covector: Tensor) -> Tensor:
    """Row numbers in the order of falling abs(v), the first of equals first."""
    return covector.abs().argsort(descending=True, stable=True)


def round_whole(target: Tensor, covector: Tensor, dtype: torch.dtype, debt: Tensor | None = None) -> Tensor:
    """Rounds a tensor [hidden, n], fp32, that is in memory with its whole hidden axis; `debt` [n] is paid as well."""
    order = by_size(covector)
    rounded = DirectionalRounding(covector[order], dtype, debt=debt).round(target[order])
    return rounded[order.argsort()]


def settle(stored: Tensor, target: Tensor, covector: Tensor) -> Tensor:
    """A rounded vector, single elements moved to a neighbour on the grid while that brings v.b nearer to the target's.

    Args:
        stored: b [hidden] as rounded. `target`: what it should be, in fp64.
    """
    v = covector.double()
    for _ in range(MOST_STEPS):
        owed = (v * (stored.double() - target)).sum()
        ways = torch.stack([torch.nextafter(stored, torch.full_like(stored, end)) for end in (-torch.inf, torch.inf)])
        after = (owed + v * (ways.double() - stored.double())).abs()
        near = (ways.double() - target).abs() <= target.abs() * FURTHEST * torch.finfo(stored.dtype).eps
        best = int(after.masked_fill(~near, torch.inf).argmin())
        if not bool(after.flatten()[best] < owed.abs()):
            return stored
        stored = stored.clone()
        stored[best % len(stored)] = ways.flatten()[best]
    return stored
