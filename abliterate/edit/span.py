"""The edit of a matrix [hidden, n] along several covectors at once, or with the length of its columns kept.

Its rows come in blocks, measured once. A column that is projected gets shorter; scaled back to the length that it had,
it still has nothing along the covectors, so both hold at once (which adding a part along them back would not).
"""

import torch
from torch import Tensor

from abliterate.edit.formula import is_noise
from abliterate.edit.projector import Projector
from abliterate.edit.rounding import DirectionalRounding
from abliterate.edit.sums import CovectorSum

LEAST_LEFT = 1e-6
"""Of a column's squared length: where less is left, it is noise and not made longer."""


class SpanEdit:
    """One matrix on its way; holds nothing of it before and after.

    Every row takes part in the rounding: what little a single row can pay would have to serve every covector.

    Args:
        projector: u and v, [hidden] or [k, hidden].
        working: what elements are computed in; None: fp32 where the rounding is directional, else fp64.
        keep_norms: columns keep their length.
    """

    def __init__(
        self,
        projector: Projector,
        strength: float,
        dtype: torch.dtype,
        directional: bool,
        working: torch.dtype | None = None,
        keep_norms: bool = False,
    ) -> None:
        u, self._v = (side.reshape(-1, side.shape[-1]) for side in (projector.u, projector.v))
        self._u = u if strength == 1.0 else u * strength
        self._strength, self._dtype, self._directional = strength, dtype, directional
        self._working = working or (torch.float32 if directional else torch.float64)
        self._keep_norms = keep_norms
        self._rounding: DirectionalRounding | None = None
        self._forget()

    def measure(self, rows: slice, matrix: Tensor) -> None:
        """Adds these rows' part of each v.W, and of the columns' lengths where these are kept."""
        for total in (*self._sums, *self._crosses):
            total.add(rows, matrix)
        if self._keep_norms:
            self._squares.add(rows, matrix.double().square())

    def apply(self, rows: slice, matrix: Tensor) -> Tensor:
        """The rows as they are to be stored."""
        if rows.start == 0:
            self._start()
        target = matrix.to(self._working)
        for u, along in zip(self._u, self._alongs, strict=True):
            edited = target - u[rows, None].to(self._working) * along.to(self._working)
            target = edited.masked_fill_(is_noise(target, edited), 0.0)
        if self._keep_norms:
            target = target * self._scale.to(self._working)
        stored = self._rounding.round(target.float()) if self._rounding else target.to(self._dtype)
        if rows.stop == self._v.shape[1]:
            self._forget()
        return stored

    def _start(self) -> None:
        """Takes the sums, and what fp32 does not hold of them as the first debt: much, where W is little but u."""
        self._alongs = [total.total() for total in self._sums]
        left = torch.stack([((along - along.float()) * self._strength).float() for along in self._alongs])
        if self._keep_norms:
            self._scale = self._stretch(torch.stack(self._alongs))
            left = left * self._scale.float()
        if self._directional:
            covectors = self._v if len(self._v) > 1 else self._v[0]
            self._rounding = DirectionalRounding(covectors, self._dtype, debt=left if len(self._v) > 1 else left[0])

    def _stretch(self, along: Tensor) -> Tensor:
        """How much longer each column was than it is without `along` [k, n]: sqrt(|w|^2 / |w - sum of u_i a_i|^2)."""
        before = self._squares.total()
        crosses = torch.stack([total.total() for total in self._crosses])
        after = before - 2 * (along * crosses).sum(0) + (along * (self._u @ self._u.T @ along)).sum(0)
        kept = after > LEAST_LEFT * before
        return torch.where(kept, before / torch.where(kept, after, 1.0), 1.0).sqrt()

    def _forget(self) -> None:
        """Holds nothing of the matrix: edits of a whole checkpoint live side by side."""
        self._sums, self._alongs = [CovectorSum(v) for v in self._v], list[Tensor]()
        self._crosses = [CovectorSum(u) for u in self._u] if self._keep_norms else []
        self._squares = CovectorSum(torch.ones_like(self._v[0])) if self._keep_norms else CovectorSum(self._v[0])
        self._scale = torch.empty(0)
        self._rounding = None
