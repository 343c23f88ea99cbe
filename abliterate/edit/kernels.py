"""The innermost loops of edits in bf16, compiled by Numba: one pass through memory where torch takes a dozen.

Every element goes through the same operations in the same order as in `rows`, `columns` and `sums`, and nothing is
reassociated or contracted, so that the bytes are the same. bf16 is handled as its bits, the upper half of an fp32.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

_STORED = types.Array(types.uint16, 2, "C")
_TABLE, _LINE = types.Array(types.float32, 2, "C"), types.Array(types.float32, 1, "C")
_ROWS = types.Array(types.int64, 1, "C")
_COLUMNS = 256
"""Worked on together: of a group of rows, what fits the cache of a core."""
_ROWS_AT_ONCE = 16
"""Whose payers are picked together: a cache line of each."""
_ZERO, _EPS = np.float32(0.0), np.float32(2.0**-7)
_LEAST = np.float32(2.0**-133)
"""A step of the grid of bf16, as a share of a number; the step of its subnormal numbers."""


@intrinsic
def _as_float(context: Any, bits: Any) -> Any:
    """The fp32 number that has these bits."""
    return types.float32(types.uint32), lambda _, builder, __, given: builder.bitcast(given[0], ir.FloatType())


@intrinsic
def _as_bits(context: Any, number: Any) -> Any:
    """The bits of an fp32 number."""
    return types.uint32(types.float32), lambda _, builder, __, given: builder.bitcast(given[0], ir.IntType(32))


@njit(inline="always")
def _widened(stored: Any) -> Any:
    """bf16 to fp32."""
    return _as_float(np.uint32(np.uint32(stored) << np.uint32(16)))


@njit(inline="always")
def _nearest(number: Any) -> Any:
    """fp32 to the nearest bf16, ties to even."""
    bits = _as_bits(number)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@njit
def _halve(terms: Any, narrow: int) -> None:
    """Adds up in pairs, as `sums` does, until `narrow` are left."""
    count = len(terms)
    while count > narrow:
        half = count // 2
        _add(terms[:half], terms[half : 2 * half])
        if count % 2:
            terms[0] += terms[count - 1]
        count = half


@njit
def _add(total: Any, terms: Any) -> None:
    """Adds these to those."""
    for place in range(len(total)):
        total[place] += terms[place]


@njit
def _fold(terms: Any, width: int) -> None:
    """Adds up rows in pairs, as `sums` does, into the first."""
    count = len(terms)
    while count > 1:
        half = count // 2
        for row in range(half):
            _add(terms[row, :width], terms[half + row, :width])
        if count % 2:
            _add(terms[0, :width], terms[count - 1, :width])
        count = half


def _row_sums(matrix: Any, covector: Any, sums: Any) -> None:
    """W.v of every row, [rows, narrow] of it."""
    rows, hidden = matrix.shape
    terms = np.empty(hidden, np.float32)
    for row in range(rows):
        values = matrix[row]
        for place in range(hidden):
            terms[place] = _widened(values[place]) * covector[place]
        _halve(terms, sums.shape[1])
        sums[row] = terms[: sums.shape[1]]


def _round_rows(
    matrix: Any, taken: Any, u: Any, others: Any, payers: Any, stored: Any, targets: Any, sums: Any
) -> None:
    """W - taken u to the nearest; that exactly for the payers; what the rounding puts in along `others`, in parts."""
    rows, hidden = matrix.shape
    terms = np.empty(hidden, np.float32)
    for first in range(0, rows, _ROWS_AT_ONCE):
        last = min(rows, first + _ROWS_AT_ONCE)
        for row in range(first, last):
            values, results, share = matrix[row], stored[row], taken[row]
            for place in range(hidden):
                edited = _widened(values[place]) - share * u[place]
                bits = _nearest(edited)
                results[place] = bits
                terms[place] = (_widened(bits) - edited) * others[place]
            _halve(terms, sums.shape[1])
            sums[row] = terms[: sums.shape[1]]
        for number, place in enumerate(payers):
            for row in range(first, last):
                targets[number, row] = _widened(matrix[row, place]) - taken[row] * u[place]


def _group_sum(matrix: Any, covector: Any, sums: Any) -> None:
    """v.W over a group of rows, [n]."""
    rows, total = matrix.shape
    terms = np.empty((rows, _COLUMNS), np.float32)
    for first in range(0, total, _COLUMNS):
        width = min(_COLUMNS, total - first)
        for row in range(rows):
            values, products, factor = matrix[row, first : first + width], terms[row, :width], covector[row]
            for place in range(width):
                products[place] = _widened(values[place]) * factor
        _fold(terms, width)
        sums[first : first + width] = terms[0, :width]


def _round_group(matrix: Any, u: Any, taken: Any, others: Any, stored: Any, sums: Any) -> None:
    """W - u taken to the nearest, and what that puts in along `others`, [n]."""
    rows, total = matrix.shape
    terms = np.empty((rows, _COLUMNS), np.float32)
    for first in range(0, total, _COLUMNS):
        width = min(_COLUMNS, total - first)
        part = taken[first : first + width]
        for row in range(rows):
            values, results = matrix[row, first : first + width], stored[row, first : first + width]
            wrong, share, weight = terms[row, :width], u[row], others[row]
            for place in range(width):
                edited = _widened(values[place]) - share * part[place]
                bits = _nearest(edited)
                results[place] = bits
                wrong[place] = (_widened(bits) - edited) * weight
        _fold(terms, width)
        sums[first : first + width] = terms[0, :width]


def _settle(targets: Any, shares: Any, covector: Any, ends: Any, debt: Any, stored: Any) -> None:
    """The payers' rows, group after group, each shifted by its share of the debt; the debt that is left."""
    total = targets.shape[1]
    terms = np.empty((len(targets), _COLUMNS), np.float32)
    for first in range(0, total, _COLUMNS):
        width, start = min(_COLUMNS, total - first), 0
        owed = debt[first : first + width]
        for end in ends:
            for row in range(start, end):
                wanted, results = targets[row, first : first + width], stored[row, first : first + width]
                wrong, share, weight = terms[row - start, :width], shares[row], covector[row]
                for place in range(width):
                    size = abs(wanted[place])
                    most = max(size * _EPS, min(size, _LEAST))
                    moved = min(max(owed[place] * share, -most), most) + _ZERO  # no -0, as there
                    bits = _nearest(wanted[place] - moved)
                    results[place] = bits
                    wrong[place] = (_widened(bits) - wanted[place]) * weight
            _fold(terms[: end - start], width)
            for place in range(width):
                owed[place] += terms[0, place]
            start = end


def _put(settled: Any, payers: Any, stored: Any) -> None:
    """The payers' part of every row, [payers, rows], to its place in [rows, hidden]."""
    for row in range(len(stored)):
        for number, place in enumerate(payers):
            stored[row, place] = settled[number, row]


_SIGNATURES: Mapping[Callable[..., None], Any] = {
    _row_sums: types.void(_STORED, _LINE, _TABLE),
    _round_rows: types.void(_STORED, _LINE, _LINE, _LINE, _ROWS, _STORED, _TABLE, _TABLE),
    _group_sum: types.void(_STORED, _LINE, _LINE),
    _round_group: types.void(_STORED, _LINE, _LINE, _LINE, _STORED, _LINE),
    _settle: types.void(_TABLE, _LINE, _LINE, _ROWS, _LINE, _STORED),
    _put: types.void(_STORED, _ROWS, _STORED),
}


def _compiled(kernel: Callable[..., None]) -> Callable[..., None]:
    """Compiled at once, and kept on the disk where there is a place for it."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        made: Callable[..., None] = njit(_SIGNATURES[kernel], cache=True, **options)(kernel)
    except (RuntimeError, OSError):  # nowhere to keep it
        made = njit(_SIGNATURES[kernel], **options)(kernel)
    return made


row_sums, round_rows, group_sum, round_group, settle, put = map(_compiled, _SIGNATURES)
