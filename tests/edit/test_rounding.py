"""Direction-aware rounding: every element at most a step or two away, next to nothing along v, any blocks alike."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abliterate.edit.rounding import DirectionalRounding, by_size, round_whole, settle

DTYPES = (torch.bfloat16, torch.float16)
SEEDS, FEW_BITS = st.integers(0, 2**32 - 1), st.sampled_from(DTYPES)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def along(v: Tensor, stored: Tensor, target: Tensor) -> float:
    """How far the rounding moved v.W, as a share of the norms."""
    moved = v.double() @ (stored.double() - target.double())
    return float(moved.norm() / (v.double().norm() * target.double().norm()))


def error(stored: Tensor, target: Tensor) -> float:
    return float((stored.double() - target.double()).norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [32, 100, 576, 4096])
def test_little_is_left_along_v_and_weights_hardly_move(hidden: int, dtype: torch.dtype) -> None:
    v, target = normal(1, hidden).double(), normal(2, hidden, 64)
    stored, nearest = round_whole(target, v, dtype), target.to(dtype)
    assert stored.dtype == dtype
    assert along(v, stored, target) < along(v, nearest, target) / 8
    assert error(stored, target) < error(nearest, target) * (1.6 if hidden < 100 else 1.3 if hidden < 576 else 1.12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kept", [0.5, 0.1])
def test_pruned_weights(dtype: torch.dtype, kept: float) -> None:
    """Rows that are all but 0 cannot pay their share; the others do."""
    v, target = normal(1, 4096).double(), normal(2, 4096, 32)
    # What an edit makes of zeros: far smaller than the rest.
    target = torch.where(
        torch.rand(target.shape, generator=torch.Generator().manual_seed(3)) < kept, target, v[:, None].float() * 1e-4
    )
    assert along(v, round_whole(target, v, dtype), target) < along(v, target.to(dtype), target) / 3


@settings(deadline=None, max_examples=50)
@given(SEEDS, st.integers(1, 200), FEW_BITS, st.floats(-20, 4))
def test_no_element_moves_far(seed: int, hidden: int, dtype: torch.dtype, exponent: float) -> None:
    v, target = normal(seed, hidden).double(), normal(seed + 1, hidden, 3) * 10**exponent
    limits = torch.finfo(dtype)
    moved = (round_whole(target, v, dtype).double() - target.double()).abs()
    step = (target.double().abs() * limits.eps).clamp_min(limits.smallest_normal * limits.eps)
    assert bool((moved <= 2 * step).all())


@settings(deadline=None, max_examples=50)
@given(SEEDS, st.integers(1, 200), FEW_BITS)
def test_rows_with_no_part_in_v_are_rounded_to_nearest(seed: int, hidden: int, dtype: torch.dtype) -> None:
    v, target = normal(seed, hidden).double(), normal(seed + 1, hidden, 3)
    v[::2] = 0
    assert torch.equal(round_whole(target, v, dtype)[::2], target[::2].to(dtype))


@settings(deadline=None, max_examples=50)
@given(SEEDS, st.integers(1, 200), FEW_BITS)
def test_what_is_on_the_grid_stays(seed: int, hidden: int, dtype: torch.dtype) -> None:
    v, target = normal(seed, hidden).double(), normal(seed + 1, hidden, 3).to(dtype)
    assert torch.equal(round_whole(target.float(), v, dtype), target)
    assert torch.equal(settle(target[:, 0], target[:, 0].double(), v), target[:, 0])


@settings(deadline=None, max_examples=50)
@given(SEEDS, st.integers(1, 200), st.integers(1, 200), FEW_BITS)
def test_rows_in_any_portions_and_columns_in_any_blocks(seed: int, hidden: int, step: int, dtype: torch.dtype) -> None:
    v, target = normal(seed, hidden).double(), normal(seed + 1, hidden, 9)
    whole = DirectionalRounding(v, dtype).round(target)
    portions = DirectionalRounding(v, dtype)
    assert torch.equal(torch.cat([portions.round(part) for part in target.split(step)]), whole)
    blocks = [DirectionalRounding(v, dtype).round(part) for part in target.split(1 + step % 9, dim=1)]
    assert torch.equal(torch.cat(blocks, dim=1), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_debt_from_elsewhere_is_paid(dtype: torch.dtype) -> None:
    v, target = normal(1, 500).double(), normal(2, 500, 40)
    debt = 0.05 * normal(3, 40)
    moved = v @ (round_whole(target, v, dtype, debt).double() - target.double())
    assert float((moved + debt).norm()) < 0.01 * float(debt.norm())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_rounded_early_leave_the_debt_to_others(dtype: torch.dtype) -> None:
    v, target = normal(1, 300).double(), normal(2, 300, 40)
    first = DirectionalRounding(v[:64], dtype, float(v[64:].square().sum()))
    early = first.round(target[:64])
    owed = v[:64] @ (early.double() - target[:64].double())
    assert first.debt is not None
    torch.testing.assert_close(first.debt.double(), owed, rtol=1e-3, atol=1e-6)
    late = DirectionalRounding(v[64:], dtype, debt=first.debt).round(target[64:])
    assert along(v, torch.cat((early, late)), target) < along(v, target.to(dtype), target) / 5


@pytest.mark.parametrize("tiny", [1e-45, 1e-38, 1e-20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_covector_with_next_to_nothing_in_a_row(dtype: torch.dtype, tiny: float) -> None:
    v, target = torch.tensor([1.0, *[tiny] * 70], dtype=torch.float64), normal(1, 71, 5)
    target[0] = 0.5
    stored = round_whole(target, v, dtype)
    assert bool(torch.isfinite(stored).all()) and bool((stored[0] == 0.5).all())


def test_by_size_is_stable() -> None:
    assert by_size(torch.tensor([1.0, -3.0, 0.0, 3.0, -1.0])).tolist() == [1, 3, 0, 4, 2]


@settings(deadline=None, max_examples=50)
@given(SEEDS, st.integers(2, 300), FEW_BITS)
def test_settle_brings_a_vector_nearer(seed: int, hidden: int, dtype: torch.dtype) -> None:
    v, target = normal(seed, hidden).double(), normal(seed + 1, hidden).double()
    nearest = target.to(dtype)
    kept = nearest.clone()
    stored = settle(nearest, target, v)
    assert torch.equal(nearest, kept)
    assert along(v, stored, target) <= along(v, nearest, target)
    assert bool(((stored.double() - target).abs() <= 2 * target.abs() * torch.finfo(dtype).eps).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_settle_takes_nearly_everything_out_of_a_wide_vector_for_little(dtype: torch.dtype) -> None:
    v, target = normal(1, 2048).double(), normal(2, 2048).double()
    stored = settle(target.to(dtype), target, v)
    assert along(v, stored, target) < along(v, target.to(dtype), target) / 100
    assert error(stored, target) < 1.1 * error(target.to(dtype), target)


@pytest.mark.parametrize("dtype", DTYPES)
def test_settle_leaves_zeros(dtype: torch.dtype) -> None:
    v, target = torch.ones(4, dtype=torch.float64), torch.tensor([0.0, 1.003, 0.0, 1e-3], dtype=torch.float64)
    stored = settle(target.to(dtype), target, v)
    assert stored[[0, 2]].tolist() == [0, 0] and not torch.equal(stored, target.to(dtype))
