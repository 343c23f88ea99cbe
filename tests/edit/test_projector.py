"""The projector: v.u = 1, and nothing along r behind the norm's gain."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abliterate.edit.projector import Projector, make_projector
from abliterate.errors import EditError

SEEDS, WIDTHS = st.integers(0, 2**32 - 1), st.integers(1, 40)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gain(seed: int, hidden: int) -> Tensor:
    """Of either sign, nowhere near 0."""
    drawn = normal(seed, hidden)
    return drawn.sign() * (0.3 + drawn.abs())


def edited(weight: Tensor, projector: Projector) -> Tensor:
    return weight - projector.u[:, None] * (projector.v @ weight)


@settings(deadline=None, max_examples=50)
@given(SEEDS, WIDTHS, st.floats(1e-30, 1e30))
def test_plain_is_the_unit_direction(seed: int, hidden: int, scale: float) -> None:
    r = normal(seed, hidden)
    projector = make_projector(r * scale)
    assert projector.form == "plain"
    torch.testing.assert_close(projector.u, r / r.norm())
    assert torch.equal(projector.u, projector.v) and projector.u.dtype == torch.float64


@settings(deadline=None, max_examples=50)
@given(SEEDS, WIDTHS, st.booleans())
def test_behind_a_gain_nothing_is_left_along_r(seed: int, hidden: int, small: bool) -> None:
    r, g = normal(seed, hidden), gain(seed + 1, hidden)
    if small:
        g[seed % hidden] *= 1e-4
    projector = make_projector(r, g)
    assert float(projector.v @ projector.u) == pytest.approx(1, abs=1e-12)
    weight = normal(seed + 2, hidden, 3)
    left = (r / r.norm()) @ (g[:, None] * edited(weight, projector))
    assert float(left.abs().max()) < 1e-12 * float(g.norm() * weight.norm())


@settings(deadline=None, max_examples=50)
@given(SEEDS, WIDTHS)
def test_oblique_changes_what_comes_out_along_r_only(seed: int, hidden: int) -> None:
    r, g = normal(seed, hidden), gain(seed + 1, hidden)
    projector, weight = make_projector(r, g), normal(seed + 2, hidden, 3)
    assert projector.form == "oblique"
    unit = (r / r.norm())[:, None]
    ablated = g[:, None] * weight - unit * (unit.T @ (g[:, None] * weight))
    torch.testing.assert_close(g[:, None] * edited(weight, projector), ablated)


@settings(deadline=None, max_examples=50)
@given(SEEDS, st.integers(2, 40))
def test_a_gain_near_zero_makes_it_orthogonal(seed: int, hidden: int) -> None:
    r, g = normal(seed, hidden), torch.ones(hidden, dtype=torch.float64)
    g[seed % hidden] = -0.02
    assert make_projector(r, g).form == "oblique"
    g[seed % hidden] = -0.005
    projector = make_projector(r, g)
    assert projector.form == "orthogonal" and torch.equal(projector.u, projector.v)
    torch.testing.assert_close(projector.v, g * r / (g * r).norm())


def test_a_gain_near_zero_does_not_matter_where_the_direction_is_zero() -> None:
    projector = make_projector(torch.tensor([3.0, 0.0, 4.0]), torch.tensor([1.0, 0.0, 2.0]))
    assert projector.form == "oblique"
    torch.testing.assert_close(projector.u, torch.tensor([0.6, 0.0, 0.4], dtype=torch.float64))
    torch.testing.assert_close(projector.v, torch.tensor([0.6, 0.0, 1.6], dtype=torch.float64))


@pytest.mark.parametrize("bad", [[0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0], [1e200, 1e200]])
def test_a_direction_that_is_none(bad: list[float]) -> None:
    with pytest.raises(EditError, match="the direction is zero or not finite"):
        make_projector(torch.tensor(bad, dtype=torch.float64))


@pytest.mark.parametrize("bad", [[0.0, 0.0], [0.0, 1.0], [math.nan, 1.0], [1.0, math.inf]])
def test_a_gain_that_is_none(bad: list[float]) -> None:
    with pytest.raises(EditError, match="gain is zero along the direction, or not finite"):
        make_projector(torch.tensor([1.0, 0.0]), torch.tensor(bad))
