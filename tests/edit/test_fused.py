"""Compiled kernels give the bytes that torch's operations give, wherever they are used; without Numba all goes on."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import abliterate.edit as package
from abliterate.checkpoint.header import TensorInfo
from abliterate.edit import edits
from abliterate.edit import fused as module
from abliterate.edit.cut import Cut
from abliterate.edit.formula import Formula
from abliterate.edit.fused import WORTH_BYTES, Fused, fused, worth_it
from abliterate.edit.projections import projection
from abliterate.edit.projector import Projector, make_projector
from abliterate.subject import open_subject
from tests import pico
from tests.edit.applying import info_of, run

needs_numba = pytest.mark.skipif(fused() is None, reason="Numba (the extra `fast`) is not installed")
SEEDS = st.integers(0, 2**32 - 1)
KINDS = ("dense", "pruned", "tiny", "heavy", "along", "zero")
quick = settings(deadline=None, max_examples=40)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(kind: str, seed: int, v: Tensor, n: int) -> Tensor:
    """[hidden, n] in fp64: of all the kinds that take another way through the edit."""
    made = 0.02 * normal(seed, len(v), n)
    if kind == "pruned":
        made[normal(seed + 1, len(v), n).abs() < 1] = 0
    if kind == "tiny":
        made *= 1e-38
    if kind == "heavy":
        made = made**5 * 1e6
    if kind == "along":
        made[:, ::2] = v[:, None] * normal(seed + 2, made[:, ::2].shape[1])
    return made * 0 if kind == "zero" else made


def edited(
    stored: Tensor, axis: int, projector: Projector, kernels: Fused | None, strength: float, rows: int
) -> Tensor:
    return run(projection(info_of(stored), axis, projector, strength, fused=kernels), stored, rows)


def same(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.view(torch.int16), right.view(torch.int16))


@needs_numba
@quick
@given(SEEDS, st.integers(2, 700), st.integers(1, 70), st.sampled_from(KINDS), st.sampled_from((0, 1)), st.data())
def test_the_bytes_are_those_of_torch(
    seed: int, hidden: int, n: int, kind: str, axis: int, data: st.DataObject
) -> None:
    gain = normal(seed + 3, hidden).abs() + 0.3 if data.draw(st.booleans()) else None
    projector = make_projector(normal(seed, hidden), gain)
    stored = weights(kind, seed + 4, projector.v, n).bfloat16()
    stored = stored if axis == 0 else stored.T.contiguous()
    strength, rows = data.draw(st.sampled_from((1.0, 0.7))), data.draw(st.integers(1, len(stored)))
    ways = [edited(stored, axis, projector, kernels, strength, rows) for kernels in (None, fused())]
    assert same(*ways)


@needs_numba
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", ["tiny", "pruned"])
def test_zeros_of_both_signs(kind: str, axis: int) -> None:
    """Comparisons do not tell them apart, bytes do."""
    projector = make_projector(normal(36, 522))
    stored = weights(kind, 40, projector.v, 39).bfloat16()
    stored[:, ::2] = torch.where(stored[:, ::2] == 0, -0.0, stored[:, ::2])
    matrix = stored if axis == 0 else stored.T.contiguous()
    ways = [edited(matrix, axis, projector, kernels, 1.0, 16) for kernels in (None, fused())]
    assert same(*ways)


@needs_numba
@pytest.mark.parametrize("hidden", [576, 4096])
def test_wide_matrices_and_more_columns_than_are_worked_on_together(hidden: int) -> None:
    projector = make_projector(normal(0, hidden))
    stored = weights("dense", 1, projector.v, 777).bfloat16()
    for axis, matrix in enumerate((stored, stored.T.contiguous())):
        assert same(*(edited(matrix, axis, projector, kernels, 1.0, 96) for kernels in (None, fused())))


@needs_numba
@quick
@given(SEEDS, st.integers(1, 4), st.integers(33, 200), st.integers(1, 20))
def test_experts(seed: int, experts: int, hidden: int, n: int) -> None:
    projector = make_projector(normal(seed, hidden))
    stored = torch.stack([weights("dense", seed + i, projector.v, n) for i in range(experts)]).bfloat16()
    assert same(*(edited(stored, 1, projector, kernels, 1.0, 2) for kernels in (None, fused())))


@needs_numba
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_types_are_left_to_torch(dtype: torch.dtype) -> None:
    projector, kernels = make_projector(normal(0, 300)), fused()
    assert kernels is not None
    assert Formula(projector, 1.0, dtype, dtype == torch.float16, kernels).fused is None
    stored = weights("dense", 1, projector.v, 40).to(dtype)
    assert torch.equal(*(edited(stored, 0, projector, given, 1.0, 300) for given in (None, kernels)))


@needs_numba
def test_kernels_are_really_used(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def watched(name: str, way: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            called.append(name)
            return way(*given)

        return call

    for name in ("row_sums", "round_rows", "group_sum", "round_group", "settle", "put"):
        monkeypatch.setattr(Fused, name, watched(name, getattr(Fused, name)))
    projector = make_projector(normal(0, 300))
    stored = weights("dense", 1, projector.v, 40).bfloat16()
    edited(stored, 0, projector, fused(), 1.0, 300)
    assert {"group_sum", "round_group", "settle"} == set(called)
    called.clear()
    edited(stored.T.contiguous(), 1, projector, fused(), 1.0, 40)
    assert {"row_sums", "round_rows", "settle", "put"} <= set(called)


def test_little_work_is_not_worth_loading_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is what they cannot do."""
    kernels, half = object(), WORTH_BYTES // 2
    monkeypatch.setattr(module, "fused", lambda: kernels)

    def tensors(dtype: str, *sizes: int, dimensions: int = 2) -> list[TensorInfo]:
        return [TensorInfo("w", dtype, (1,) * (dimensions - 1) + (size // 2,), 0, size) for size in sizes]

    assert worth_it(tensors("BF16", half, half)) is kernels
    assert worth_it(tensors("BF16", half, half - 2)) is None
    assert worth_it(tensors("F16", half, half)) is None
    assert worth_it(tensors("BF16", half, half, dimensions=1)) is None


@needs_numba
@pytest.mark.parametrize(("cut", "used"), [("one", True), ("several", False), ("norms", False)])
def test_they_are_asked_for_where_one_direction_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: str, used: bool
) -> None:
    monkeypatch.setattr(module, "WORTH_BYTES", 1)
    subject = open_subject(str(pico.save(tmp_path / "m", "llama", dtype=torch.bfloat16)))
    layers, hidden = subject.plan.num_layers, subject.plan.hidden_size
    basis = torch.linalg.qr(normal(0, hidden, 2)).Q.T
    removed = Cut.uniform(basis if cut == "several" else basis[0], layers, keep_norms=cut == "norms")
    asked: list[bool] = []
    monkeypatch.setattr(edits, "worth_it", lambda tensors: asked.append(True))
    assert edits.build_edits(subject.checkpoint, subject.plan, removed)
    assert bool(asked) is used


def test_without_numba_torch_does_it(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    assert fused.__wrapped__() is None
    assert not caplog.records


@needs_numba
def test_with_a_numba_that_fails_too(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    broken = ModuleType("numba")
    broken.__spec__ = importlib.util.find_spec("numba")
    monkeypatch.setitem(sys.modules, "numba", broken)
    monkeypatch.delitem(sys.modules, "abliterate.edit.kernels")
    monkeypatch.delattr(package, "kernels")
    assert fused.__wrapped__() is None
    assert "Numba does not work here (cannot import name" in caplog.text
