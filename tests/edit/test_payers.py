"""Payers: the rest to the nearest, next to nothing left along v, nobody moved far, any blocks alike."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abliterate.edit.payers import Payers, choose_payers, paces_of
from abliterate.edit.projections import projection
from abliterate.edit.projector import make_projector
from abliterate.edit.rounding import round_whole
from tests.edit.applying import info_of, run

SEEDS, FEW_BITS = st.integers(0, 2**32 - 1), st.sampled_from((torch.bfloat16, torch.float16))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=50)
@given(SEEDS, st.integers(2, 5000))
def test_payers_are_few_and_different_and_large_ones_come_first(seed: int, hidden: int) -> None:
    v = normal(seed, hidden)
    v[::3] = 0
    rows = choose_payers(v)
    assert len(set(rows.tolist())) == len(rows) <= max(64, 2 * hidden**0.5) + 8 * 13
    sizes = v[rows].abs()
    assert bool((sizes > 0).all()) and bool((sizes[1:] <= sizes[:-1]).all())
    assert float(sizes[0]) == float(v.abs().max())


def test_a_direction_of_one_entry_has_one_payer() -> None:
    v = torch.zeros(500, dtype=torch.float64)
    v[7] = 1
    assert choose_payers(v).tolist() == [7]


def test_paces_are_what_a_group_can_pay_at_most() -> None:
    groups = [slice(0, 2), slice(2, 3), slice(3, 4)]
    assert paces_of(torch.tensor([1.0, 3.0, 0.0, 4.0]), groups, 3.0, 4.0) == [0.25, 0.0, 0.25]
    assert paces_of(torch.tensor([1.0, 3.0, 0.0, 4.0]), groups, 1.0, 92.0) == [0.01, 0.0, 1 / 96]


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.integers(1, 700), FEW_BITS, st.floats(-20, 4))
def test_no_payer_moves_far(seed: int, hidden: int, dtype: torch.dtype, exponent: float) -> None:
    v, targets = normal(seed, hidden), normal(seed + 1, hidden, 5).float() * 10**exponent
    payers, limits = Payers(v, dtype), torch.finfo(dtype)
    targets = targets[payers.rows]
    moved = (payers.settle(targets, 1e3 * normal(seed + 2, 5).float()).double() - targets.double()).abs()
    step = (targets.double().abs() * limits.eps).clamp_min(limits.smallest_normal * limits.eps)
    assert bool((moved <= 2 * step).all())


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.integers(64, 700), FEW_BITS)
def test_a_debt_is_paid(seed: int, hidden: int, dtype: torch.dtype) -> None:
    v, all_targets = normal(seed, hidden), normal(seed + 1, hidden, 20).float()
    payers = Payers(v, dtype)
    targets = all_targets[payers.rows]
    debt = 0.3 * payers.means(targets)
    stored = payers.settle(targets, debt.clone())
    left = debt.double() + payers.covector @ (stored.double() - targets.double())
    assert float(left.norm()) < 0.02 * float(debt.norm())


def edited(stored: Tensor, axis: int, v: Tensor, rows: int) -> Tensor:
    return run(projection(info_of(stored), axis, make_projector(v)), stored, rows)


KINDS = st.sampled_from(("dense", "pruned", "heavy", "rank 1", "small"))


def weight(kind: str, v: Tensor, seed: int, columns: int) -> Tensor:
    """[hidden, columns]."""
    w, unit = 0.02 * normal(seed, len(v), columns), v / v.norm()
    if kind == "pruned":
        return w * (normal(seed + 1, *w.shape) > 0.5)
    if kind == "heavy":
        return w * normal(seed + 1, *w.shape).exp()
    if kind == "rank 1":
        return unit[:, None] * normal(seed + 1, columns) + 1e-3 * w
    return w - 0.97 * unit[:, None] * (unit @ w) if kind == "small" else w


@settings(deadline=None, max_examples=40)
@given(SEEDS, KINDS, st.integers(1, 600), st.integers(1, 600), FEW_BITS, st.sampled_from((0, 1)))
def test_blocks_of_any_size_give_the_same_bytes(
    seed: int, kind: str, hidden: int, rows: int, dtype: torch.dtype, axis: int
) -> None:
    v = normal(seed, hidden)
    w = weight(kind, v, seed + 1, 40).to(dtype)
    stored = w if axis == 0 else w.T.contiguous()
    assert torch.equal(
        edited(stored, axis, v, rows).view(torch.int16), edited(stored, axis, v, 10**6).view(torch.int16)
    )


@pytest.mark.parametrize("kind", ["dense", "pruned", "heavy", "rank 1", "small"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("hidden", [576, 4096])
def test_little_is_left_and_weights_move_no_more_than_with_every_row_paying(kind: str, axis: int, hidden: int) -> None:
    """Beside `round_whole` of the same target, in which every row takes part."""
    v = normal(0, hidden)
    unit, w = v / v.norm(), weight(kind, v, 1, 96).bfloat16()
    target = w.double() - unit[:, None] * (unit @ w.double())
    result = edited(w if axis == 0 else w.T.contiguous(), axis, v, 10**6)
    new = (result if axis == 0 else result.T).double()
    old = round_whole(target.float(), unit, torch.bfloat16).double()
    assert float((unit @ new).norm() / new.norm()) < 3e-3 / hidden**0.5 / 5
    assert float((new - target).norm()) < 1.03 * float((old - target).norm())


def test_threads_of_torch_change_nothing() -> None:
    v = normal(0, 2048)
    w = weight("dense", v, 1, 300).bfloat16()
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append((edited(w, 0, v, 100), edited(w.T.contiguous(), 1, v, 70)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for pair in made[1:] for a, b in zip(pair, made[0], strict=True))
