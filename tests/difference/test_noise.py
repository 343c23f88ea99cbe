"""Rounding of stored dtypes never counts as rank, and little else is taken for it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterate.difference.kinds import ADDED
from abliterate.difference.noise import StoredGrid, far_moves

STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32}


def grid(dtype: str, values: torch.Tensor, step: int = 7) -> StoredGrid:
    found = StoredGrid(dtype, *values.shape)
    for first in range(0, len(values), step):
        found.follow(slice(first, first + len(values[first : first + step])), values[first : first + step])
    return found


def rounded(seed: int, rows: int, columns: int, dtype: str, heavy: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights in fp64, and stored; with `heavy` a few rows and columns are far larger, as in real models."""
    made = torch.Generator().manual_seed(seed)
    weights = torch.randn(rows, columns, generator=made, dtype=torch.float64) * 0.02
    if heavy:
        weights[torch.randint(rows, (2,), generator=made)] *= 20
        weights[:, torch.randint(columns, (2,), generator=made)] *= 30
    return weights, weights.to(STORED[dtype]).double()


@settings(deadline=None, max_examples=60)
@given(
    dtype=st.sampled_from(["BF16", "F16", "F8_E4M3", "F32"]),
    rows=st.integers(2, 80),
    columns=st.integers(2, 200),
    heavy=st.booleans(),
    seed=st.integers(0, 999),
)
def test_rounding_stays_below_the_edge(dtype: str, rows: int, columns: int, heavy: bool, seed: int) -> None:
    weights, stored = rounded(seed, rows, columns, dtype, heavy)
    noise = grid(dtype, stored.float()).noise()
    assert float(torch.linalg.svdvals(stored - weights)[0]) < noise.edge


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_the_energy_is_that_of_rounding(dtype: str) -> None:
    weights, stored = rounded(0, 200, 300, dtype, False)
    expected = grid(dtype, stored.float()).noise().energy
    assert expected == pytest.approx(float((stored - weights).square().sum()), rel=0.05)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_the_edge_is_no_more_than_a_few_times_the_noise(dtype: str) -> None:
    """A bound that is never reached would hide what is there."""
    weights, stored = rounded(0, 200, 300, dtype, False)
    assert grid(dtype, stored.float()).noise().edge < 2.2 * float(torch.linalg.svdvals(stored - weights)[0])


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_values_tell_the_grid_that_they_were_rounded_to(dtype: str) -> None:
    _, stored = rounded(0, 50, 60, dtype, False)
    found = grid("F32", stored.float())
    assert found.dtype == dtype
    assert found.noise().energy == pytest.approx(grid(dtype, stored.float()).noise().energy)
    assert grid("F32", stored.float() * 1.1).dtype == "F32"


@settings(deadline=None, max_examples=60)
@given(
    dtype=st.sampled_from(["BF16", "F16"]),
    between=st.sampled_from(["BF16", "F16", "F32"]),
    scale=st.floats(1.0, 2.0),
    size=st.floats(1e-4, 3.0),
    seed=st.integers(0, 999),
)
def test_rounding_moves_no_weight_far(dtype: str, between: str, scale: float, size: float, seed: int) -> None:
    """Also of the smallest, which fp16 in between stores with steps of one size."""
    base = _weights(seed, size).to(STORED[dtype])
    edited = ((base.float() * scale).to(STORED[between]).float() / scale).to(STORED[dtype])
    coarser = "BF16" if "BF16" in (dtype, between) else "F16"
    assert far_moves(base.float(), edited.float(), (dtype, coarser)) == 0


@settings(deadline=None, max_examples=60)
@given(dtype=st.sampled_from(["BF16", "F16"]), part=st.floats(0.02, 0.5), seed=st.integers(0, 999))
def test_steps_of_one_size_move_small_weights_far(dtype: str, part: float, seed: int) -> None:
    """However small they are beside the steps of most weights."""
    weights = _weights(seed, 0.02)
    added = part * torch.finfo(STORED[dtype]).eps * 0.02 * torch.sign(_weights(seed + 1, 1.0))
    base, edited = (side.to(STORED[dtype]).float() for side in (weights, weights.to(STORED[dtype]).float() + added))
    assert far_moves(base, edited, (dtype, dtype)) > ADDED * int((base != edited).sum())


def _weights(seed: int, size: float) -> torch.Tensor:
    return torch.randn(200, 300, generator=torch.Generator().manual_seed(seed)) * size
