"""Spectra found in blocks are those of the whole matrix."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abliterate.difference.sketch import Blocks, sketch


def blocks(matrix: Tensor, step: int) -> Blocks:
    def made() -> Iterator[tuple[slice, Tensor]]:
        for first in range(0, len(matrix), step):
            rows = slice(first, min(len(matrix), first + step))
            yield rows, matrix[rows]

    return made


def low_rank(rows: int, columns: int, rank: int, seed: int, noise: float = 0.0) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(size, rank, generator=made))[0] for size in (rows, columns))
    values = torch.logspace(0, -1, rank)
    return (left * values) @ right.T + noise * torch.randn(rows, columns, generator=made)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(2, 90),
    columns=st.integers(2, 90),
    rank=st.integers(1, 6),
    step=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_a_low_rank_is_found_exactly(rows: int, columns: int, rank: int, step: int, seed: int) -> None:
    matrix = low_rank(rows, columns, min(rank, rows, columns), seed)
    found = sketch(blocks(matrix, step), rows, columns, 16)
    true = torch.linalg.svdvals(matrix.double())[: len(found.values)]
    assert torch.allclose(found.values, true, atol=1e-6)
    assert torch.allclose((found.left * found.values.float()) @ found.right.T, matrix, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(30, 120), columns=st.integers(30, 120), seed=st.integers(0, 99))
def test_values_are_never_above_the_true_ones_and_what_is_left_is_known(rows: int, columns: int, seed: int) -> None:
    matrix = low_rank(rows, columns, 3, seed, noise=0.001)
    found = sketch(blocks(matrix, 7), rows, columns, 12)
    true = torch.linalg.svdvals(matrix.double())[:12]
    assert bool((found.values <= true * (1 + 1e-5)).all())
    assert torch.allclose(found.values[:3], true[:3], rtol=5e-3)
    left = matrix.double() - matrix.double() @ found.right.double() @ found.right.double().T
    assert float(left.square().sum()) == pytest.approx(
        float(matrix.double().square().sum() - found.values.square().sum()), rel=1e-3, abs=5e-6
    )


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 30), columns=st.integers(1, 30), seed=st.integers(0, 99))
def test_a_small_matrix_is_decomposed_whole(rows: int, columns: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    found = sketch(blocks(matrix, 4), rows, columns, 40)
    assert found.complete and len(found.values) == min(rows, columns)
    assert torch.allclose(found.values, torch.linalg.svdvals(matrix.double()), atol=1e-5)
    for vectors in (found.left, found.right):
        assert torch.allclose(vectors.T @ vectors, torch.eye(vectors.shape[1]), atol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12])
def test_any_scale(scale: float) -> None:
    matrix = low_rank(40, 60, 2, 0) * scale
    found = sketch(blocks(matrix, 9), 40, 60, 16)
    assert found.values[:2].tolist() == pytest.approx([scale, 0.1 * scale], rel=1e-4)
    assert float(found.values[2]) < 1e-5 * scale


def test_nothing_at_all() -> None:
    found = sketch(blocks(torch.zeros(40, 60), 9), 40, 60, 16)
    assert not bool(found.values.any())
