"""The edit of a matrix [hidden, n] along several covectors at once; its rows come in blocks, measured once."""

import torch
from torch import Tensor

from abliterate.edit.formula import is_noise
from abliterate.edit.projector import Projector
from abliterate.edit.rounding import DirectionalRounding
from abliterate.edit.sums import CovectorSum


class SpanEdit:
    """One matrix on its way; holds nothing of it before and after.

    Every row takes part in the rounding: what little a single row can pay would have to serve every covector.

    Args:
        projector: u and v [k, hidden].
        working: what elements are computed in; None: fp32 where the rounding is directional, else fp64.
    """

    def __init__(
        self,
        projector: Projector,
        strength: float,
        dtype: torch.dtype,
        directional: bool,
        working: torch.dtype | None = None,
    ) -> None:
        self._v, self._strength, self._dtype, self._directional = projector.v, strength, dtype, directional
        self._u = projector.u if strength == 1.0 else projector.u * strength
        self._working = working or (torch.float32 if directional else torch.float64)
        self._rounding: DirectionalRounding | None = None
        self._forget()

    def measure(self, rows: slice, matrix: Tensor) -> None:
        """Adds these rows' part of each v.W."""
        for total in self._sums:
            total.add(rows, matrix)

    def apply(self, rows: slice, matrix: Tensor) -> Tensor:
        """The rows as they are to be stored."""
        if rows.start == 0:
            self._start()
        target = matrix.to(self._working)
        for u, along in zip(self._u, self._alongs, strict=True):
            edited = target - u[rows, None].to(self._working) * along.to(self._working)
            target = edited.masked_fill_(is_noise(target, edited), 0.0)
        stored = self._rounding.round(target.float()) if self._rounding else target.to(self._dtype)
        if rows.stop == self._v.shape[1]:
            self._forget()
        return stored

    def _start(self) -> None:
        """Takes the sums, and what fp32 does not hold of them as the first debt: much, where W is little but u."""
        self._alongs = [total.total() for total in self._sums]
        if self._directional:
            left = torch.stack([((along - along.float()) * self._strength).float() for along in self._alongs])
            self._rounding = DirectionalRounding(self._v, self._dtype, debt=left)

    def _forget(self) -> None:
        """Holds nothing of the matrix: edits of a whole checkpoint live side by side."""
        self._sums, self._alongs = [CovectorSum(v) for v in self._v], list[Tensor]()
        self._rounding = None
