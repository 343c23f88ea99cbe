"""The first pass over a pair: how large the difference is, what rounding can have done, whether norms were kept."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from abliterate.difference.matrix import Block, PairMatrix
from abliterate.difference.noise import Noise, StoredGrid
from abliterate.difference.quantised import Levels

CASTS = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Survey:
    """Sums over all elements of a pair of matrices.

    Attributes:
        elements, changed: how many there are, and how many differ. `changed_rows`: along axis 0 of the matrix.
        base, edited, difference: squared Frobenius norms. `product`: sum of base times edited.
        largest: of the differences, absolute.
        finite: no NaN or infinity on either side.
        noise: what rounding of both sides may have done.
        grids: dtypes that the values of both sides were rounded to, which may be coarser than the stored ones.
        row_norms, column_norms: squared norms of the base's and of the edited rows [2, rows], columns [2, columns].
        rounded_to: dtypes that make the edited side out of the base exactly.
        rounds_from: dtypes that make the base out of the edited side exactly.
        levels: bits that the edited values look quantised to in groups, while the base's do not; None: they do not.
    """

    elements: int
    changed: int
    changed_rows: int
    base: float
    edited: float
    difference: float
    product: float
    largest: float
    finite: bool
    noise: Noise
    grids: tuple[str, str]
    row_norms: Tensor
    column_norms: Tensor
    rounded_to: tuple[str, ...]
    rounds_from: tuple[str, ...]
    levels: int | None

    @property
    def relative(self) -> float:
        """Size of the difference beside the base."""
        return math.sqrt(self.difference / self.base) if self.base else math.inf if self.difference else 0.0

    @property
    def cosine(self) -> float:
        """Between base and edited, all elements as one vector; NaN where one is zero."""
        size = math.sqrt(self.base * self.edited)
        return self.product / size if size else math.nan

    def norm_change(self, axis: int) -> float:
        """Root mean square of what happened to the norms of rows (0) or columns (1), relative."""
        before, after = (self.row_norms, self.column_norms)[axis]
        there = before > 0
        if not bool(there.any()):
            return math.nan
        return float(((after[there] / before[there]).sqrt() - 1).square().mean().sqrt())


class Surveyor:
    """Takes in the blocks of a pair."""

    def __init__(self, matrix: PairMatrix) -> None:
        rows, columns = matrix.shape
        pair = matrix.pair
        self._grids = StoredGrid(pair.base.dtype, rows, columns), StoredGrid(pair.edited.dtype, rows, columns)
        self._rows = torch.zeros(2, rows, dtype=torch.float64)
        self._columns = torch.zeros(2, columns, dtype=torch.float64)
        self._down, self._up = dict(CASTS), dict(CASTS)
        self._changed = self._changed_rows = 0
        self._difference = self._product = self._largest = 0.0
        self._finite = True
        self._elements = rows * columns
        self._levels = Levels()

    def follow(self, block: Block) -> Tensor | None:
        """Takes in a block; returns its difference, None where something in it is not finite."""
        difference = block.difference
        if not bool(torch.isfinite(difference).all()):
            self._finite = False
            return None
        for side, (values, grid) in enumerate(zip((block.base, block.edited), self._grids, strict=True)):
            grid.follow(block.rows, values.float())
            squares = values.square()
            self._rows[side, block.rows] = squares.sum(1, dtype=torch.float64)
            self._columns[side] += squares.sum(0, dtype=torch.float64)
        self._follow_difference(block, difference)
        self._down = {k: v for k, v in self._down.items() if torch.equal(_cast(block.base, v), block.edited)}
        self._up = {k: v for k, v in self._up.items() if torch.equal(_cast(block.edited, v), block.base)}
        self._levels.follow(block.base, block.edited, difference)
        return difference

    def _follow_difference(self, block: Block, difference: Tensor) -> None:
        differs = difference != 0
        self._changed += int(differs.sum())
        self._changed_rows += int(differs.any(1).sum())
        self._difference += float(difference.double().square().sum())
        self._product += float((block.base * block.edited).sum(dtype=torch.float64))
        self._largest = max(self._largest, float(difference.abs().max()))

    def finish(self) -> Survey:
        """What was found."""
        base, edited = (float(side.sum()) for side in self._rows)
        return Survey(
            elements=self._elements,
            changed=self._changed,
            changed_rows=self._changed_rows,
            base=base,
            edited=edited,
            difference=self._difference,
            product=self._product,
            largest=self._largest,
            finite=self._finite,
            noise=self._grids[0].noise() + self._grids[1].noise(),
            grids=(self._grids[0].dtype, self._grids[1].dtype),
            row_norms=self._rows,
            column_norms=self._columns,
            rounded_to=tuple(self._down),
            rounds_from=tuple(self._up),
            levels=self._levels.bits,
        )


def survey(matrix: PairMatrix) -> Survey:
    """One pass over a pair; ends early where something is not finite."""
    surveyor = Surveyor(matrix)
    for block in matrix.blocks():
        if surveyor.follow(block) is None:
            break
    return surveyor.finish()


def _cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to a dtype and back."""
    return values.to(dtype).to(values.dtype)
