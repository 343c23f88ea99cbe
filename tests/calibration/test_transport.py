"""Directions taken along the stream where its own path has gains: to its writers, and back to its end."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abliterate.architecture.covector import pull_back
from abliterate.architecture.writer import Path, Step
from abliterate.calibration.transport import Transport

H = 12
SEEDS = st.integers(0, 2**32 - 1)
CENTER = Step("center")


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gain(seed: int) -> Tensor:
    drawn = normal(seed, H)
    return drawn.sign() * (0.3 + drawn.abs())


def scales(count: int, offset: float = 0.0) -> Path:
    return tuple(Step("scale", str(i), offset) for i in range(count))


def transport(boundaries: Sequence[Path], writers: Sequence[Path] = (), seed: int = 0) -> Transport:
    return Transport(writers, boundaries, lambda name: gain(seed + int(name)))


def unit(v: Tensor) -> Tensor:
    return v.div(v.norm())


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.integers(0, 5), st.sampled_from([0.0, 1.0, 3.0]))
def test_to_the_end_and_back_through_scales(seed: int, count: int, offset: float) -> None:
    path, read = scales(count, offset), lambda name: gain(seed + int(name))
    made, vector = transport([path, ()], seed=seed), unit(normal(seed + 50, H))
    end = made.at_end(0, vector)
    assert end.dtype == torch.float64
    torch.testing.assert_close(pull_back(end[None], path, read)[0], vector, atol=1e-9, rtol=1e-9)
    there = pull_back(vector[None], path, read)[0]
    torch.testing.assert_close(made.at_end(0, there), vector, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(made.at_end(1, vector), vector)


@settings(deadline=None, max_examples=40)
@given(SEEDS)
def test_through_a_layer_norm(seed: int) -> None:
    """What is left of a direction there has no mean; as much of it comes back."""
    path, read = (Step("scale", "0"), CENTER), lambda name: gain(seed + int(name))
    vector = normal(seed + 50, H)
    there = unit(vector - vector.mean())
    end = transport([path], seed=seed).at_end(0, there)
    torch.testing.assert_close(pull_back(end[None], path, read)[0], there, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(transport([path], seed=seed).at_end(0, unit(vector)), end, atol=1e-9, rtol=1e-9)


def test_a_channel_that_a_gain_shuts_is_not_scaled_back() -> None:
    shut = gain(0)
    shut[3], shut[4] = 0.0, 1e-12
    made = Transport([], [(Step("scale", "0"),)], lambda _: shut)
    end = made.at_end(0, unit(normal(1, H)))
    assert end[3] == end[4] == 0 and bool(torch.isfinite(end).all())
    assert float(end.norm()) == pytest.approx(1)
    open_ = [i for i in range(H) if i not in (3, 4)]
    torch.testing.assert_close(unit(end[open_] * shut[open_]), unit(normal(1, H)[open_]))


def test_each_writer_has_its_own_way() -> None:
    writers = [(), scales(1), (*scales(2), CENTER)]
    made = transport([()], writers)
    directions = normal(3, 4, H)
    for i, path in enumerate(writers):
        expected = pull_back(directions, path, lambda name: gain(int(name)))
        torch.testing.assert_close(made.at_writer(i, directions), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_without_a_direction_stay_without(dtype: torch.dtype) -> None:
    made = transport([()], [scales(2)])
    directions = normal(3, 5, H).to(dtype)
    directions[1], directions[4] = 0, 0
    found = made.at_writer(0, directions)
    assert found.dtype == dtype and found.shape == directions.shape
    assert not bool(found[[1, 4]].any()) and bool(found[[0, 2, 3]].any(dim=1).all())
    alone = pull_back(directions[:1].double(), scales(2), lambda name: gain(int(name)))
    torch.testing.assert_close(found[:1], alone.to(dtype))
    assert not bool(made.at_writer(0, torch.zeros(3, H)).any())


@pytest.mark.parametrize("norms", [1, 2, 8])
def test_through_several_layer_norms(norms: int) -> None:
    """Pulled back from the end, the direction is what it was at the layer, less its mean, however many norms follow."""
    path = tuple(step for i in range(norms) for step in (Step("scale", str(i)), CENTER))
    r = unit(normal(9, H))
    back = pull_back(transport([path], seed=3).at_end(0, r)[None], path, lambda name: gain(3 + int(name)))[0]
    torch.testing.assert_close(back.abs(), unit(r - r.mean()).abs(), rtol=0, atol=1e-9)
