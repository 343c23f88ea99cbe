"""The projector: v.u = 1, and nothing along r behind the norm's gain, or along any of several covectors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abliterate.edit.projector import Projector, make_projector, span_projector
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


@settings(deadline=None, max_examples=50)
@given(SEEDS, st.integers(2, 40), st.integers(2, 6), st.floats(1e-30, 1e30))
def test_a_span_takes_out_every_covector(seed: int, hidden: int, count: int, scale: float) -> None:
    covectors = normal(seed, count, hidden)
    projector = span_projector(covectors * scale)
    rank = min(count, hidden)
    assert projector.form == "span" and projector.v.shape == projector.u.shape == (rank, hidden)
    assert projector.v.dtype == torch.float64
    torch.testing.assert_close(projector.v @ projector.u.T, torch.eye(rank, dtype=torch.float64))
    weight = normal(seed + 1, hidden, 3)
    left = weight - projector.u.T @ (projector.v @ weight)
    assert float((covectors @ left).abs().max()) < 1e-12 * float(covectors.norm() * weight.norm())


@settings(deadline=None, max_examples=25)
@given(SEEDS, st.integers(4, 40))
def test_a_span_takes_out_nothing_else(seed: int, hidden: int) -> None:
    covectors = normal(seed, 3, hidden)
    projector = span_projector(covectors)
    other = normal(seed + 1, hidden)
    basis = torch.linalg.qr(covectors.T).Q
    other = other - basis @ (basis.T @ other)
    torch.testing.assert_close(other - projector.u.T @ (projector.v @ other), other)


@settings(deadline=None, max_examples=25)
@given(SEEDS)
def test_covectors_that_depend_on_each_other_count_once(seed: int) -> None:
    first, second = normal(seed, 2, 20)
    covectors = torch.stack([first, 1e8 * first, second, 1e-8 * second, first - second, -first])
    projector = span_projector(covectors)
    assert projector.v.shape == (2, 20)
    left = covectors - covectors @ projector.v.T @ projector.u
    assert float((left.norm(dim=1) / covectors.norm(dim=1)).max()) < 1e-12


def test_one_covector_is_no_span() -> None:
    covector = normal(0, 1, 9)
    projector = span_projector(7 * covector)
    assert projector.form == "orthogonal" and projector.v.shape == (9,) and torch.equal(projector.u, projector.v)
    torch.testing.assert_close(projector.v, covector[0] / covector.norm())


def test_large_and_small_covectors_count_alike() -> None:
    projector = span_projector(torch.tensor([[1e-12, 0.0, 0.0], [0.0, 1e12, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(projector.v.T @ projector.v, torch.diag(torch.tensor([1.0, 1.0, 0.0]).double()))


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_a_covector_that_is_none(bad: float) -> None:
    covectors = normal(0, 3, 8)
    covectors[1] = bad
    with pytest.raises(EditError, match="a covector is zero or not finite"):
        span_projector(covectors)
    with pytest.raises(EditError, match="a covector is zero or not finite"):
        span_projector(covectors[1:2])
