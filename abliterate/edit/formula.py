"""W <- W - strength * u (v.W): what edits of rows and of columns share."""

import math
from functools import cached_property

import torch
from torch import Tensor

from abliterate.edit.fused import Fused
from abliterate.edit.payers import OTHERS_PACE, Payers, paces_of
from abliterate.edit.projector import Projector
from abliterate.edit.sums import GROUP

NOISE = 8
"""Of the arithmetic's epsilon: what an edit leaves of an element below that share of it means nothing."""


class Formula:
    """The edit of all tensors of a dtype that have one projector, as arithmetic.

    Args:
        projector: u and v [hidden].
        strength: of the edit.
        dtype: that results are stored in.
        directional: rounded so that nothing along v comes back, in fp32 with totals in fp64; else to the nearest, in
            fp64.
        fused: compiled arithmetic, which comes to the same; of use for bf16 that is rounded so.

    Attributes:
        u, v: [hidden] fp64, strength times u.
        working: what elements are computed in.
        payers: the rows along the hidden axis that pay for the rounding of the others; None where nothing is paid.
        fused: compiled arithmetic; None where torch's is used.
        column_u: u [hidden, 1] in the dtype to work in. `column_v`, `column_others`: v, and v without the payers.
    """

    def __init__(
        self,
        projector: Projector,
        strength: float,
        dtype: torch.dtype,
        directional: bool,
        fused: Fused | None = None,
    ) -> None:
        # Experts by the thousand share one projector.
        self.u = projector.u if strength == 1.0 else projector.u * strength
        self.v, self.dtype, self.directional = projector.v, dtype, directional
        self.strength = strength
        self.working = torch.float32 if directional else torch.float64
        self.fused = fused if directional and dtype == torch.bfloat16 else None
        self.payers = Payers(self.v, dtype, self.fused) if directional else None
        self.column_u = self.u.to(self.working)[:, None]
        self.column_v = self.v.to(self.working)
        self.column_others = self.column_v if self.payers is None else self.payers.others.to(self.working)
        own = self.v[:0] if self.payers is None else self.u[self.payers.rows]
        self._little = own.abs().float() * (2 * NOISE * torch.finfo(self.working).eps)

    @cached_property
    def feedback(self) -> list[tuple[float, float]]:
        """Of each group of rows how much of the debt is added to what is taken along u; and what share stays owed."""
        starts = range(0, len(self.v), GROUP)
        if self.payers is None:
            return [(0.0, 1.0)] * len(starts)
        weights, groups = self.payers.others * self.u, [slice(start, start + GROUP) for start in starts]
        later = math.fsum((self.payers.covector * self.u[self.payers.rows]).tolist())
        paces, values = paces_of(weights, groups, OTHERS_PACE, later), weights.tolist()
        return [(pace, 1.0 - pace * math.fsum(values[group])) for group, pace in zip(groups, paces, strict=True)]

    @cached_property
    def share(self) -> float:
        """What all but the payers pay of each unit that is taken along u; 1 where there are none."""
        assert self.payers is not None
        return math.fsum((self.payers.others * self.u).tolist()) or 1.0

    def unheld(self, along: Tensor) -> Tensor:
        """What stays along v because fp32 holds v.W to 24 bits: much, for a tensor that is little but u."""
        return ((along - along.float()) * self.strength).float()

    def targets(self, held: Tensor, taken: Tensor) -> Tensor:
        """What the payers should be [payers, n], fp32.

        Args:
            held: the payers' rows as stored. `taken`: v.W [n] fp32.
        """
        edited = held.float().sub_(self._taken(taken))
        return edited.masked_fill_(is_noise(held, edited), 0.0)

    def suspects(self, targets: Tensor, taken: Tensor) -> Tensor:
        """Numbers of the columns of which little may be left, and that little noise.

        A column that is little but the direction has payers of which next to nothing is left; in another there may be
        one by chance. Only these columns' elements are then all compared with what the arithmetic resolves.

        Args:
            targets: of the payers [payers, n]. `taken`: v.W [n].
        """
        assert self.payers is not None
        little = self._little[:, None] * taken.abs()
        return (targets.abs() < little).any(0).nonzero()[:, 0]

    def _taken(self, along: Tensor) -> Tensor:
        assert self.payers is not None
        return self.u[self.payers.rows, None].to(along.dtype) * along


def is_noise(values: Tensor, edited: Tensor) -> Tensor:
    """Where so little is left of an element that the arithmetic does not resolve it."""
    return edited.abs() <= values.to(edited.dtype).abs().mul_(NOISE * torch.finfo(edited.dtype).eps)
