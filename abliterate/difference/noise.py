"""What rounding to a stored dtype may put into a difference, and how large a singular value that can make.

A weight x on a grid of m bits of mantissa is off by at most half a step, 2^(floor(log2 abs(x)) - m) / 2; over many
weights that is noise of variance step^2 / 12. Of a matrix of independent entries of variances b_ij^2 the largest
singular value is, up to a small term, at most max_i sqrt(sum_j b_ij^2) + max_j sqrt(sum_i b_ij^2) (Bandeira & van
Handel 2016, "Sharp nonasymptotic bounds on the norm of random matrices with independent entries"): the edge. What is
above is no rounding.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

MANTISSA = {
    "F64": 52, "F32": 23, "F16": 10, "BF16": 7, "F8_E4M3": 3, "F8_E4M3FNUZ": 3, "F8_E5M2": 2, "F8_E5M2FNUZ": 2,
    "F8_E8M0": 0,
}  # fmt: skip
"""Bits behind the point."""
SMALLEST = {"F16": 2.0**-14, "F8_E4M3": 2.0**-6, "F8_E5M2": 2.0**-14}
"""The smallest normal number: below it steps stay the same."""
ROOM = 1.25
"""Over the bound, for small matrices, and for rounding that a few rows pay for so that nothing comes back along r."""
COARSER = {"BF16": torch.bfloat16, "F16": torch.float16}
EXPONENT = 0x7F800000
STEPS = 2.0
"""Rounding of both sides moves a weight by one step at most; the other is for rounding in between."""
FINEST = 2.0**-24
"""The step of fp16 next to 0, which may be what was in between: moves of less than two of these are not counted."""


@dataclass(frozen=True)
class Noise:
    """Variances that rounding can have given a difference, summed.

    Attributes:
        rows, columns: [rows] and [columns] fp64.
    """

    rows: Tensor
    columns: Tensor

    def __add__(self, other: "Noise") -> "Noise":
        return Noise(self.rows + other.rows, self.columns + other.columns)

    @property
    def energy(self) -> float:
        """Expected squared Frobenius norm."""
        return float(self.rows.sum())

    @property
    def edge(self) -> float:
        """What no singular value of the noise comes near to."""
        return ROOM * (math.sqrt(float(self.rows.max())) + math.sqrt(float(self.columns.max())))


class StoredGrid:
    """Follows the blocks of one side's tensor, and says in the end how finely it is really stored.

    Values that a coarser dtype holds as well were rounded to that one before, whatever they are stored in now.
    """

    def __init__(self, dtype: str, rows: int, columns: int) -> None:
        self._dtype = dtype
        self._coarser = {"F32", "F64"} & {dtype} and set(COARSER)
        self._rows = torch.zeros(rows, dtype=torch.float64)
        self._columns = torch.zeros(columns, dtype=torch.float64)

    def follow(self, rows: slice, values: Tensor) -> Self:
        """Takes in the next block [rows, columns] fp32."""
        self._coarser = {name for name in self._coarser if torch.equal(values.to(COARSER[name]).float(), values)}
        powers = _leading(values).clamp_(min=SMALLEST.get(self._dtype, 0.0)).square_()
        self._rows[rows] = powers.sum(1, dtype=torch.float64)
        self._columns += powers.sum(0, dtype=torch.float64)
        return self

    @property
    def dtype(self) -> str:
        """The coarsest dtype that holds all values seen."""
        return min((self._dtype, *self._coarser), key=lambda name: MANTISSA[name])

    def noise(self) -> Noise:
        """Of rounding to that dtype."""
        share = 4.0 ** -MANTISSA[self.dtype] / 12
        return Noise(self._rows * share, self._columns * share)


def far_moves(before: Tensor, after: Tensor, dtypes: tuple[str, str]) -> int:
    """How many weights moved further than rounding of both sides, to these dtypes, can have moved them.

    Rounding moves a weight by a share of itself. What training or an adapter adds does not ask how large a weight is:
    of small weights it moves many by more than their own steps, however little it adds.

    Args:
        before, after: fp32, of any shape.
    """
    share = STEPS * 2.0 ** -min(MANTISSA[name] for name in dtypes)
    moved, size = (after - before).abs(), _leading(before.abs().maximum(after.abs()))
    return int((moved > (share * size).clamp_min_(STEPS * FINEST)).sum())


def _leading(values: Tensor) -> Tensor:
    """The largest power of two that is not above each value; 0 for 0."""
    return (values.contiguous().view(torch.int32) & EXPONENT).view(torch.float32)
