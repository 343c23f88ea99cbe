"""Sums: right, and the same to the last bit for any blocks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abliterate.edit.sums import GROUP, CovectorSum, tree_sum
from abliterate.errors import EditError


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def summed(covector: Tensor, weight: Tensor, step: int) -> Tensor:
    total = CovectorSum(covector)
    for first in range(0, len(weight), step):
        total.add(slice(first, min(len(weight), first + step)), weight[first : first + step])
    return total.total()


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 70), st.integers(1, 5))
def test_tree_sum_is_the_sum(seed: int, rows: int, columns: int) -> None:
    terms = normal(seed, rows, columns)
    before = terms.clone()
    torch.testing.assert_close(tree_sum(terms), terms.sum(0))
    assert torch.equal(terms, before)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 70), st.integers(2, 40), st.integers(1, 39))
def test_tree_sum_does_not_depend_on_other_columns(seed: int, rows: int, columns: int, cut: int) -> None:
    terms = normal(seed, rows, columns)
    parts = [tree_sum(part) for part in terms.split(cut, dim=1)]
    assert torch.equal(tree_sum(terms), torch.cat(parts))


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 3 * GROUP + 1),
    st.integers(1, 2 * GROUP),
    st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64)),
)
def test_the_sum_is_v_times_w_for_any_blocks(seed: int, rows: int, step: int, dtype: torch.dtype) -> None:
    covector, weight = normal(seed, rows), normal(seed + 1, rows, 3).to(dtype)
    whole = summed(covector, weight, rows)
    assert whole.dtype == torch.float64
    torch.testing.assert_close(whole, covector @ weight.double(), rtol=1e-11, atol=1e-13)
    assert torch.equal(summed(covector, weight, step), whole)


def test_row_0_starts_anew() -> None:
    covector, weight = normal(0, 50), normal(1, 50, 4)
    total = CovectorSum(covector)
    total.add(slice(0, 40), weight[:40])
    total.add(slice(0, 50), weight)
    assert torch.equal(total.total(), summed(covector, weight, 50))
    assert torch.equal(total.total(), summed(covector, weight, 50))


def test_blocks_that_are_not_next_are_refused() -> None:
    total = CovectorSum(normal(0, 50))
    total.add(slice(0, 10), normal(1, 10, 4))
    with pytest.raises(EditError, match="rows from 20 came when row 10 was next"):
        total.add(slice(20, 30), normal(1, 10, 4))


@pytest.mark.parametrize("rows", [0, 10])
def test_a_sum_of_too_few_rows_is_refused(rows: int) -> None:
    total = CovectorSum(normal(0, 50))
    if rows:
        total.add(slice(0, rows), normal(1, rows, 4))
    with pytest.raises(EditError, match=f"only {rows} of 50 rows were measured"):
        total.total()
