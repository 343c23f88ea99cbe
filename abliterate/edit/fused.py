"""Edits in bf16 by compiled kernels (extra `fast`), where they are there and there is enough to do: the same bytes."""

import functools
import importlib.util
import logging
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from abliterate.checkpoint.header import TensorInfo
from abliterate.edit.sums import narrow
from abliterate.errors import first_line

log = logging.getLogger(__name__)

WORTH_BYTES = 256 << 20
"""Of weights to edit: loading Numba and its kernels takes as long as editing some hundred megabytes without."""


class Fused:
    """The kernels on torch's tensors: matrices in bf16, vectors in fp32, all contiguous.

    They run without Python's lock, so that workers do not wait for each other.
    """

    def __init__(self, kernels: ModuleType) -> None:
        self._kernels = kernels

    def row_sums(self, matrix: Tensor, covector: Tensor) -> Tensor:
        """W.v of every row of W [rows, hidden] as `sums.narrowed` leaves it, [rows, few] fp32."""
        sums = torch.empty(len(matrix), narrow(matrix.shape[1]))
        self._kernels.row_sums(_bits(matrix), covector.numpy(), sums.numpy())
        return sums

    def round_rows(
        self, matrix: Tensor, taken: Tensor, u: Tensor, others: Tensor, payers: Tensor, stored: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rounds W - taken u into `stored` [rows, hidden].

        Returns:
            What it is before that for the payers, [payers, rows] fp32; what the rounding put in along `others`, [rows,
            few] fp32.
        """
        targets, sums = torch.empty(len(payers), len(matrix)), torch.empty(len(matrix), narrow(matrix.shape[1]))
        given = taken.numpy(), u.numpy(), others.numpy(), payers.numpy()
        self._kernels.round_rows(_bits(matrix), *given, _bits(stored), targets.numpy(), sums.numpy())
        return targets, sums

    def settle(self, targets: Tensor, shares: Tensor, covector: Tensor, ends: Tensor, debt: Tensor) -> Tensor:
        """The payers' rows as they are to be stored, [payers, n]; `debt` [n] is what is left of it then.

        Args:
            targets: what they should be [payers, n]. `shares`, `covector`: [payers].
            ends: of the groups that pay together.
        """
        stored = torch.empty_like(targets, dtype=torch.bfloat16)
        given = shares.numpy(), covector.numpy(), ends.numpy(), debt.numpy()
        self._kernels.settle(targets.numpy(), *given, _bits(stored))
        return stored

    def put(self, settled: Tensor, payers: Tensor, stored: Tensor) -> None:
        """Puts the payers' part of every row, [payers, rows], into `stored` [rows, hidden]."""
        self._kernels.put(_bits(settled), payers.numpy(), _bits(stored))

    def group_sum(self, matrix: Tensor, covector: Tensor) -> Tensor:
        """v.W over the rows of W [rows, n] as `sums.fold` leaves it, [n] fp32."""
        sums = torch.empty(matrix.shape[1])
        self._kernels.group_sum(_bits(matrix), covector.numpy(), sums.numpy())
        return sums

    def round_group(self, matrix: Tensor, u: Tensor, taken: Tensor, others: Tensor, stored: Tensor) -> Tensor:
        """Rounds W - u taken into `stored` [rows, n]; what that put in along `others`, [n] fp32."""
        sums = torch.empty(matrix.shape[1])
        given = u.numpy(), taken.numpy(), others.numpy()
        self._kernels.round_group(_bits(matrix), *given, _bits(stored), sums.numpy())
        return sums


def _bits(matrix: Tensor) -> Any:
    return matrix.view(torch.int16).numpy().view(np.uint16)


def worth_it(tensors: Iterable[TensorInfo]) -> Fused | None:
    """The kernels, to edit these; None where they are not there, or the work is done before they are."""
    nbytes = sum(info.nbytes for info in tensors if info.dtype == "BF16" and len(info.shape) > 1)
    return fused() if nbytes >= WORTH_BYTES else None


@functools.cache
def fused() -> Fused | None:
    """The kernels, compiled the first time; None where Numba is not there, or fails in whatever way."""
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        from abliterate.edit import kernels
    except Exception as error:
        log.warning("Numba does not work here (%s): edits take longer, and come to the same", first_line(error))
        return None
    return Fused(kernels)
