"""What stored writers have along their covectors: right on every axis, and never right by accident."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from abliterate.architecture.writer import Plan, Runtime, Step, Writer
from abliterate.certify import weights
from abliterate.certify.weights import shares_along, tolerance, writer_residuals
from abliterate.checkpoint.files import Checkpoint
from abliterate.checkpoint.header import read_header
from abliterate.checkpoint.read import iter_blocks

HIDDEN = 12
SHAPES = (
    ((HIDDEN,), 0), ((HIDDEN, 5), 0), ((5, HIDDEN), 1), ((HIDDEN, HIDDEN), 0), ((HIDDEN, HIDDEN), 1),
    ((HIDDEN, 4, 3), 0), ((4, HIDDEN, 3), 1), ((4, 3, HIDDEN), 2), ((4, HIDDEN, HIDDEN), 1), ((4, HIDDEN, HIDDEN), 2),
)  # fmt: skip


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def checkpoint(folder: Path, **tensors: Tensor) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint(folder, {}, (read_header(folder / "model.safetensors"),), None)


def writer(axis: int) -> Writer:
    return Writer("w", "mlp", axis, 0)


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "iter_blocks", lambda header, info: iter_blocks(header, info, 100))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_share_is_right_on_every_axis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], axis: int, dtype: torch.dtype
) -> None:
    small_blocks(monkeypatch)
    stored, v = normal(0, *shape).to(dtype), 3 * normal(1, HIDDEN)
    columns = stored.double().movedim(axis, 0).reshape(HIDDEN, -1)
    expected = float((v @ columns).norm() / (v.norm() * columns.norm()))
    assert shares_along(checkpoint(tmp_path, w=stored), writer(axis), [v])[0][0] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_all_along_the_covector_is_one_and_nothing_is_zero(tmp_path: Path, shape: tuple[int, ...], axis: int) -> None:
    v = torch.zeros(HIDDEN, dtype=torch.float64)
    v[[2, 7]] = torch.tensor([3.0, 4.0], dtype=torch.float64)
    stored = torch.zeros(shape)
    stored.movedim(axis, 0)[2], stored.movedim(axis, 0)[7] = 0.3, 0.4
    assert shares_along(checkpoint(tmp_path, w=stored), writer(axis), [v])[0][0] == pytest.approx(1)
    stored.movedim(axis, 0)[2], stored.movedim(axis, 0)[7] = 4, -3
    assert shares_along(checkpoint(tmp_path, w=stored), writer(axis), [v])[0][0] == 0


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_zeros_have_no_share(tmp_path: Path, shape: tuple[int, ...], axis: int) -> None:
    assert shares_along(checkpoint(tmp_path, w=torch.zeros(shape)), writer(axis), [normal(1, HIDDEN)])[0][0] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_what_is_not_finite_never_holds(tmp_path: Path, shape: tuple[int, ...], axis: int, bad: float) -> None:
    """Not even off the direction, where it would not count."""
    stored = torch.zeros(shape)
    stored.movedim(axis, 0)[3] = bad
    opened, r = checkpoint(tmp_path, w=stored), torch.zeros(HIDDEN)
    r[0] = 1
    (residual,) = writer_residuals(opened, plan(writer(axis)), r)
    assert math.isnan(residual.after) and not residual.holds


def test_values_too_large_for_their_squares_prove_nothing(tmp_path: Path) -> None:
    stored, v = torch.full((HIDDEN, 2), 2e154, dtype=torch.float64), torch.zeros(HIDDEN, dtype=torch.float64)
    stored[0], v[0] = 1e153, 1
    assert math.isnan(shares_along(checkpoint(tmp_path, w=stored), writer(0), [v])[0][0])


@pytest.mark.parametrize(
    ("dtype", "part", "expected"),
    [
        ("F32", "writer", 1e-6), ("F64", "writer", 1e-6), ("BF16", "writer", 3e-3 / 8), ("F16", "writer", 4e-4 / 8),
        ("F32", "stream", 1e-6), ("F64", "stream", 1e-6), ("BF16", "stream", 0.02 / 8), ("F16", "stream", 0.0025 / 8),
    ],
)  # fmt: skip
def test_tolerances(dtype: str, part: str, expected: float) -> None:
    assert tolerance(dtype, 64, part) == pytest.approx(expected)  # type: ignore[arg-type]


def plan(*writers: Writer) -> Plan:
    flags, runtime = ("tie_word_embeddings",), Runtime("Pico", ("layers.0",))
    return Plan("pico", "pico", HIDDEN, 1, False, "w", "head", flags, writers, (), runtime)


def test_every_writer_is_measured_behind_its_gain_and_held_to_its_dtype(tmp_path: Path) -> None:
    r, g = torch.zeros(HIDDEN), torch.ones(HIDDEN)
    r[0], r[1], g[1] = 1, 1, 3
    through = torch.zeros(HIDDEN, 2)
    through[0], through[1] = 3, -1
    tensors = {"w": through, "half": through.T.contiguous().bfloat16(), "norm": (g - 1).bfloat16()}
    writers = (Writer("w", "mlp", 0, 0, (Step("scale", "norm", 1.0),)), Writer("half", "embedding", 1, None))
    base = {**tensors, "w": torch.ones(HIDDEN, 2), "half": torch.ones(2, HIDDEN).bfloat16()}
    edited = checkpoint(tmp_path / "edited", **tensors)
    first, second = writer_residuals(edited, plan(*writers), r, checkpoint(tmp_path / "base", **base))
    assert (first.tensor, first.dtype, first.tolerance) == ("w", "F32", 1e-6)
    assert first.after < 1e-15 and first.holds
    assert first.before == pytest.approx(4 / math.sqrt(10 * HIDDEN))
    assert (second.tensor, second.dtype) == ("half", "BF16")
    assert second.tolerance == pytest.approx(3e-3 / math.sqrt(HIDDEN))
    assert second.after == pytest.approx(2 / math.sqrt(20)) and not second.holds
    assert writer_residuals(edited, plan(*writers), r)[0].before is None


def test_the_tolerance_is_the_border(tmp_path: Path) -> None:
    r = torch.zeros(HIDDEN, dtype=torch.float64)
    r[0] = 1
    for share, holds in ((0.9e-6, True), (1.1e-6, False)):
        stored = torch.zeros(HIDDEN)
        stored[0], stored[1] = share, 1
        (residual,) = writer_residuals(checkpoint(tmp_path, w=stored), plan(writer(0)), r)
        assert residual.after == pytest.approx(share) and residual.holds is holds


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_the_share_along_several_covectors_is_that_of_their_span(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], axis: int, dtype: torch.dtype
) -> None:
    small_blocks(monkeypatch)
    stored, basis = normal(0, *shape).to(dtype), torch.linalg.qr(normal(1, HIDDEN, 3)).Q.T
    columns = stored.double().movedim(axis, 0).reshape(HIDDEN, -1)
    expected = float((basis @ columns).norm() / columns.norm())
    opened = checkpoint(tmp_path, w=stored)
    assert shares_along(opened, writer(axis), [basis])[0][0] == pytest.approx(expected, rel=1e-9)
    assert shares_along(opened, writer(axis), [basis[:1]])[0][0] == pytest.approx(
        shares_along(opened, writer(axis), [basis[0]])[0][0], rel=1e-9
    )


def test_one_covector_of_several_is_enough_to_fail(tmp_path: Path) -> None:
    """Behind a convolution of two taps the stream sees a writer twice, through another covector each time."""
    r, taps, stored = torch.zeros(HIDDEN), torch.zeros(HIDDEN, 1, 2), torch.zeros(HIDDEN, 4)
    r[0], r[1] = 0.6, 0.8
    taps[0, 0, 0], taps[1, 0, 1] = 1, -1  # the lag sees channel 0 alone, and so does the present token
    tensors = {"conv": taps, "w": stored}
    through = Writer("w", "mlp", 0, 0, (Step("taps", "conv"),))
    for channel, holds in ((5, True), (1, True), (0, False)):
        stored.zero_()
        stored[channel] = 1
        (residual,) = writer_residuals(checkpoint(tmp_path, **tensors), plan(through), r)
        assert residual.holds is holds and residual.after == pytest.approx(0 if holds else 1)
    taps[1, 0, 1] = 0
    stored.zero_()
    stored[0], stored[1] = 0.8, -0.6
    (residual,) = writer_residuals(checkpoint(tmp_path, **tensors), plan(through), r)
    assert not residual.holds, "orthogonal to the direction, and seen by the lag all the same"
