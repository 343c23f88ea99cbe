"""Edits of single tensors along their hidden axis, applied block by block."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor

from abliterate.checkpoint.header import DTYPES, TensorInfo
from abliterate.edit.columns import ColumnEdit
from abliterate.edit.formula import Formula, is_noise
from abliterate.edit.fused import Fused
from abliterate.edit.projector import Form, Projector
from abliterate.edit.rounding import FEW_BITS, round_whole, settle
from abliterate.edit.rows import RowEdit
from abliterate.edit.span import SpanEdit
from abliterate.edit.sums import tree_sum
from abliterate.errors import EditError

FUSED_BYTES = 3 << 20
"""A call of a kernel costs less than torch's operations do, and smaller blocks stay in the cache between the calls."""

Formulas = dict[tuple[int, torch.dtype], Formula]
"""By the projector, which must outlive them, and the dtype that is stored."""


class Projection(ABC):
    """W <- W - strength * u (v.W) along the hidden axis of one tensor, stored in the tensor's dtype.

    Arithmetic is fp64 for fp32 and fp64 storage and for biases; for other tensors in bf16 and fp16 it is fp32 with
    totals in fp64, and the rounding knows the direction. Blocks of any size give the same bytes.

    Attributes:
        form: of the projector.
        passes: over the stored tensor through `measure` before `apply`.
        independent: blocks may be applied in any order, and by several threads.
        block_bytes: of blocks that such an edit is fastest of.
    """

    passes = 0
    independent = False
    block_bytes = 8 << 20

    def __init__(self, info: TensorInfo, form: Form) -> None:
        self.info, self.form = info, form

    def measure(self, rows: slice, block: Tensor) -> None:  # noqa: B027 - most need not
        """Looks at rows of the stored tensor."""

    @abstractmethod
    def apply(self, rows: slice, block: Tensor) -> Tensor:
        """The rows without their part along u, in the stored dtype; but for those that are `late`."""

    def late(self) -> Iterable[tuple[int, Tensor]]:
        """Rows that were only decided once all others had been applied: they take the place of what `apply` gave."""
        return ()


class LocalProjection(Projection):
    """Of a tensor whose blocks hold the hidden axis whole: embeddings, Conv1D, experts."""

    independent = True

    def __init__(self, info: TensorInfo, axis: int, formula: Formula, form: Form) -> None:
        super().__init__(info, form)
        self._axis, self._formula = axis, formula
        if formula.fused is not None:
            self.block_bytes = FUSED_BYTES

    def apply(self, rows: slice, block: Tensor) -> Tensor:
        """See `Projection`."""
        hidden = block.shape[self._axis]
        if self._axis == block.dim() - 1:
            stored = RowEdit(self._formula).apply(block.reshape(-1, hidden))
        else:
            matrices = block.reshape(-1, hidden, math.prod(block.shape[self._axis + 1 :]))
            stored = torch.stack([ColumnEdit(self._formula).whole(matrix) for matrix in matrices])
        return stored.reshape(block.shape)


class BiasProjection(Projection):
    """Of a single vector, in fp64: nothing averages out in it, so that elements are moved one by one."""

    def __init__(self, info: TensorInfo, formula: Formula, form: Form) -> None:
        super().__init__(info, form)
        self._formula = formula

    def apply(self, rows: slice, block: Tensor) -> Tensor:
        """See `Projection`."""
        v, values = self._formula.v, block.double()
        target = values - self._formula.u * tree_sum(values * v)
        target.masked_fill_(is_noise(values, target), 0.0)
        if not self._formula.directional:
            return target.to(block.dtype)
        return settle(round_whole(target.float()[:, None], v, block.dtype)[:, 0], target, v)


class StreamedProjection(Projection):
    """Of a tensor along its first axis, which its blocks cut: measured once, then edited."""

    passes = 1

    def __init__(self, info: TensorInfo, formula: Formula, form: Form) -> None:
        super().__init__(info, form)
        self._edit = ColumnEdit(formula)

    def measure(self, rows: slice, block: Tensor) -> None:
        """Adds these rows' part of v.W, and keeps those that pay for the rounding of the others."""
        self._edit.measure(rows, block.flatten(1))

    def apply(self, rows: slice, block: Tensor) -> Tensor:
        """See `Projection`."""
        return self._edit.apply(rows, block.flatten(1)).reshape(block.shape)

    def late(self) -> Iterable[tuple[int, Tensor]]:
        """The rows that pay."""
        return ((row, stored.reshape(self.info.shape[1:])) for row, stored in self._edit.late())


class SpanProjection(Projection):
    """Of a tensor that the stream sees through several covectors, or whose columns keep their length."""

    def __init__(
        self,
        info: TensorInfo,
        axis: int,
        projector: Projector,
        strength: float,
        directional: bool,
        keep_norms: bool = False,
    ) -> None:
        super().__init__(info, projector.form)
        vector = len(info.shape) == 1
        self._axis, self._cut = axis, axis == 0 and not vector
        self.passes = 1 if self._cut else 0
        working = torch.float64 if vector else None
        self._edit = SpanEdit(projector, strength, DTYPES[info.dtype], directional, working, keep_norms)

    def measure(self, rows: slice, block: Tensor) -> None:
        """Adds these rows' part of each v.W."""
        self._edit.measure(rows, block.flatten(1))

    def apply(self, rows: slice, block: Tensor) -> Tensor:
        """See `Projection`."""
        if self._cut:
            return self._edit.apply(rows, block.flatten(1)).reshape(block.shape)
        moved = block.movedim(self._axis, 0)
        columns, whole = moved.reshape(len(moved), -1).contiguous(), slice(0, len(moved))
        self._edit.measure(whole, columns)
        return self._edit.apply(whole, columns).reshape(moved.shape).movedim(0, self._axis).contiguous()


def projection(
    info: TensorInfo,
    axis: int,
    projector: Projector,
    strength: float = 1.0,
    directional: bool = True,
    formulas: Formulas | None = None,
    keep_norms: bool = False,
    fused: Fused | None = None,
) -> Projection:
    """The edit of one tensor.

    Args:
        axis: the hidden axis.
        strength: 1 removes the direction; less leaves a share of it.
        directional: for bf16 and fp16, round so that nothing along the direction comes back; False rounds to nearest.
        formulas: of the other tensors that this strength is for, to share with; experts come by the thousand.
        keep_norms: columns along the hidden axis keep their length; a single vector is projected only.
        fused: compiled arithmetic, used where it can be; the bytes are the same.

    Raises:
        EditError: the tensor does not fit the projector, or its dtype cannot be edited.
    """
    if not 0 <= axis < len(info.shape) or info.shape[axis] != projector.v.shape[-1]:
        raise EditError(f"{info.name} {list(info.shape)} has no axis {axis} of length {projector.v.shape[-1]}")
    dtype = DTYPES[info.dtype]
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise EditError(f"{info.name} is stored as {info.dtype}, which cannot be edited")
    directional = directional and dtype in FEW_BITS
    keep_norms = keep_norms and len(info.shape) > 1
    if projector.form == "span" or keep_norms:
        return SpanProjection(info, axis, projector, strength, directional, keep_norms)
    shared, key = {} if formulas is None else formulas, (id(projector), dtype)
    formula = shared.get(key) or shared.setdefault(key, Formula(projector, strength, dtype, directional, fused))
    if len(info.shape) == 1:
        return BiasProjection(info, formula, projector.form)
    if axis == 0:
        return StreamedProjection(info, formula, projector.form)
    return LocalProjection(info, axis, formula, projector.form)
