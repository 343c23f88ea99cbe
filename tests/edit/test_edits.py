"""Edits of single tensors and of plans: the formula, the certificate's tolerance, the same bytes for any blocks."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from abliterate.architecture.writer import Plan, Runtime, Step, Writer
from abliterate.certify.weights import tolerance
from abliterate.checkpoint.files import Checkpoint
from abliterate.checkpoint.header import DTYPES, TensorInfo, read_header
from abliterate.edit.cut import Cut
from abliterate.edit.edits import build_edits
from abliterate.edit.projections import (
    LocalProjection,
    SpanProjection,
    StreamedProjection,
    projection,
)
from abliterate.edit.projector import Projector, make_projector, span_projector
from abliterate.errors import EditError
from tests.edit.applying import info_of, run

STORED = ("F32", "F64", "BF16", "F16")
# Shapes with the hidden axis in their midst: (dimensions before it, dimensions after it).
PLACES = (((), (20,)), ((20,), ()), ((), ()), ((3,), (7,)), ((3, 7), ()), ((), (3, 7)))
SEEDS = st.integers(0, 2**32 - 1)
quick = settings(deadline=None, max_examples=25)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(hidden: int, seed: int = 0) -> Projector:
    return make_projector(normal(seed, hidden))


def oblique(hidden: int, seed: int = 0) -> Projector:
    return make_projector(normal(seed, hidden), normal(seed + 1, hidden).abs() + 0.3)


def span(hidden: int, seed: int = 0, count: int = 4) -> Projector:
    return span_projector(normal(seed, count, hidden))


def weight(dtype: str, *shape: int, seed: int = 7) -> Tensor:
    return (0.02 * normal(seed, *shape)).to(DTYPES[dtype])


def edited(stored: Tensor, axis: int, projector: Projector, strength: float = 1.0, directional: bool = True) -> Tensor:
    return run(projection(info_of(stored), axis, projector, strength, directional), stored)


def columns(tensor: Tensor, axis: int) -> Tensor:
    """[hidden, everything else] fp64."""
    return tensor.double().movedim(axis, 0).flatten(1) if tensor.dim() > 1 else tensor.double()[:, None]


def exact(stored: Tensor, axis: int, projector: Projector, strength: float = 1.0) -> Tensor:
    """W - strength u (v.W) [hidden, everything else] fp64."""
    w = columns(stored, axis)
    return w - strength * projector.u[:, None] * (projector.v @ w)


def share(stored: Tensor, axis: int, projector: Projector) -> float:
    w = columns(stored, axis)
    return float((projector.v @ w).norm() / projector.v.norm() / w.norm()) if bool(w.any()) else 0.0


def error(stored: Tensor, axis: int, target: Tensor) -> float:
    return float((columns(stored, axis) - target).norm() / target.norm())


@pytest.mark.parametrize("kind", [plain, oblique])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", STORED)
def test_the_formula_within_tolerance(dtype: str, place: tuple[tuple[int, ...], tuple[int, ...]], kind: object) -> None:
    before, after = place
    for hidden in (33, 200):
        axis, projector = len(before), plain(hidden) if kind is plain else oblique(hidden)
        stored = weight(dtype, *before, hidden, *after)
        result, target = edited(stored, axis, projector), exact(stored, axis, projector)
        assert result.dtype == stored.dtype and result.shape == stored.shape and result.is_contiguous()
        assert error(result, axis, target) < {"F64": 1e-15, "F32": 1e-7, "BF16": 1.5e-2, "F16": 2e-3}[dtype]
        assert share(result, axis, projector) <= tolerance(dtype, hidden, "writer")
        assert share(stored, axis, projector) > tolerance(dtype, hidden, "writer")


@pytest.mark.parametrize("place", PLACES[:3])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_wide_models(dtype: str, place: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Where plain rounding undoes part of the edit."""
    before, after = place
    for hidden in (2048, 4096):
        axis, projector, stored = len(before), plain(hidden), weight(dtype, *before, hidden, *after)
        result, nearest = edited(stored, axis, projector), edited(stored, axis, projector, directional=False)
        target = exact(stored, axis, projector)
        assert share(result, axis, projector) < tolerance(dtype, hidden, "writer") / 4
        assert share(nearest, axis, projector) > 4 * share(result, axis, projector)
        assert error(result, axis, target) < 1.12 * error(nearest, axis, target)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("seed", range(10))
def test_biases(dtype: str, seed: int) -> None:
    for hidden in (48, 576, 4096):
        projector, stored = plain(hidden, seed), weight(dtype, hidden, seed=seed + 100)
        assert share(edited(stored, 0, projector), 0, projector) < tolerance(dtype, hidden, "writer") / 10


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_biases_along_a_direction_of_few_large_entries(dtype: str) -> None:
    """Little can then be paid for what the rounding of those puts in."""
    for seed in range(60):
        projector, stored = make_projector(normal(seed, 128) ** 5), weight(dtype, 128, seed=seed + 100)
        assert share(edited(stored, 0, projector), 0, projector) < tolerance(dtype, 128, "writer") / 10


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("hidden", [48, 1024])
def test_a_bias_that_is_little_but_the_direction(dtype: str, hidden: int) -> None:
    projector = plain(hidden)
    stored = (3 * projector.u).to(DTYPES[dtype])
    assert share(stored, 0, projector) > 0.99
    assert share(edited(stored, 0, projector), 0, projector) <= tolerance(dtype, hidden, "writer")


@pytest.mark.parametrize("axis", [0, 1])
def test_columns_that_are_little_but_the_direction(axis: int) -> None:
    """v.W is then as large as W, and 24 bits of it too few for what is left."""
    projector = plain(4096)
    w = projector.u[:, None] * normal(1, 20)
    stored = (w if axis == 0 else w.T.contiguous()).bfloat16()
    assert share(edited(stored, axis, projector), axis, projector) < tolerance("BF16", 4096, "writer") / 10


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", STORED)
def test_nothing_but_the_direction_becomes_nothing(dtype: str, axis: int) -> None:
    """Not what rounding makes of it, all of which may lie along the direction."""
    w = 0.02 * torch.ones(77, 1, dtype=torch.float64) * normal(1, 5)
    stored = (w if axis == 0 else w.T.contiguous()).to(DTYPES[dtype])
    assert not bool(edited(stored, axis, make_projector(torch.ones(77))).any())


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("axis", [0, 1])
def test_pruned_weights(dtype: str, axis: int) -> None:
    projector, hidden = plain(4096), 4096
    w = weight("F64", hidden, 32).mul_(torch.rand(hidden, 32, generator=torch.Generator().manual_seed(1)) < 0.3)
    stored = (w if axis == 0 else w.T.contiguous()).to(DTYPES[dtype])
    assert share(edited(stored, axis, projector), axis, projector) < tolerance(dtype, hidden, "writer") / 2


@quick
@given(SEEDS, st.sampled_from(STORED), st.sampled_from(PLACES), st.integers(1, 130), st.integers(1, 140), st.booleans())
def test_any_blocks_give_the_same_bytes(
    seed: int, dtype: str, place: tuple[tuple[int, ...], tuple[int, ...]], hidden: int, rows: int, directional: bool
) -> None:
    before, after = place
    stored = weight(dtype, *before, hidden, *after, seed=seed)
    edit = projection(info_of(stored), len(before), plain(hidden, seed + 1), directional=directional)
    whole = run(edit, stored)
    assert torch.equal(run(edit, stored, rows).view(torch.uint8), whole.view(torch.uint8))


@pytest.mark.parametrize("rows", [1, 7, 32, 65, 100])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_many_blocks_in_one_lent_buffer(dtype: str, axis: int, rows: int) -> None:
    stored = weight(dtype, 150, 150)
    edit = projection(info_of(stored), axis, plain(150))
    assert torch.equal(run(edit, stored, rows), run(edit, stored))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", STORED)
def test_a_second_edit_finds_nothing_to_do(dtype: str, place: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    before, after = place
    axis, projector = len(before), plain(300)
    once = edited(weight(dtype, *before, 300, *after), axis, projector)
    twice = edited(once, axis, projector)
    assert error(twice, axis, columns(once, axis)) < {"F64": 1e-15, "F32": 1e-7, "BF16": 2e-4, "F16": 2e-4}[dtype]
    assert share(twice, axis, projector) <= tolerance(dtype, 300, "writer")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("strength", [0.5, 0.25, 1.5])
def test_strength_leaves_its_share(dtype: str, place: tuple[tuple[int, ...], tuple[int, ...]], strength: float) -> None:
    before, after = place
    axis, projector = len(before), plain(256)
    stored = weight(dtype, *before, 256, *after)
    result = edited(stored, axis, projector, strength)
    left, was = projector.v @ columns(result, axis), projector.v @ columns(stored, axis)
    tight = tolerance(dtype, 256, "writer") * float(columns(stored, axis).norm())
    assert float((left - (1 - strength) * was).norm()) < tight
    assert error(result, axis, exact(stored, axis, projector, strength)) < 1.5e-2


@pytest.mark.parametrize("directional", [True, False])
@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("axis", [0, 1])
def test_rows_where_the_direction_is_zero_stay(axis: int, dtype: str, directional: bool) -> None:
    r = normal(0, 150)
    r[::3] = 0
    w = weight(dtype, 150, 20)
    stored = w if axis == 0 else w.T.contiguous()
    result = edited(stored, axis, make_projector(r), directional=directional)
    same = result.movedim(axis, 0) == stored.movedim(axis, 0)
    assert bool(same[::3].all()) and not bool(same[1::3].all(dim=1).any())


@pytest.mark.parametrize("directional", [True, False])
@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("place", PLACES)
def test_zeros_stay_zeros(place: tuple[tuple[int, ...], tuple[int, ...]], dtype: str, directional: bool) -> None:
    before, after = place
    stored = torch.zeros(*before, 100, *after, dtype=DTYPES[dtype])
    for zero in (stored, -stored):
        assert torch.equal(edited(zero, len(before), plain(100), directional=directional), stored)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", STORED)
def test_tokens_without_embedding_stay_without(axis: int, dtype: str) -> None:
    stored = weight(dtype, 100, 100)
    stored.select(1 - axis, 17).zero_()
    result = edited(stored, axis, plain(100))
    assert not bool(result.select(1 - axis, 17).any()) and bool(result.select(1 - axis, 18).any())


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [("F64", 1e100), ("F32", 1e30), ("BF16", 1e30), ("F16", 1e3), ("F64", 1e-100), ("F32", 1e-30), ("BF16", 1e-30)],
)
def test_large_and_small_values(axis: int, dtype: str, scale: float) -> None:
    stored, projector = (normal(3, 96, 96) * scale).to(DTYPES[dtype]), plain(96)
    assert share(edited(stored, axis, projector), axis, projector) <= tolerance(dtype, 96, "writer")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("dtype", "scale"), [("F32", 1e-44), ("BF16", 1e-39), ("F16", 1e-6)])
def test_subnormal_values(place: tuple[tuple[int, ...], tuple[int, ...]], dtype: str, scale: float) -> None:
    """The grid is coarse there, so that the certificate may fail, but nothing breaks, or moves by more than a step."""
    before, after = place
    stored, projector = (normal(3, *before, 96, *after) * scale).to(DTYPES[dtype]), plain(96)
    result = edited(stored, len(before), projector)
    least = torch.finfo(stored.dtype).smallest_normal * torch.finfo(stored.dtype).eps
    moved = (columns(result, len(before)) - exact(stored, len(before), projector)).abs()
    assert float(moved.max()) <= 2 * least + 2 * torch.finfo(stored.dtype).eps * scale * 5


def test_the_block_is_left_alone() -> None:
    for dtype in STORED:
        for axis in (0, 1):
            stored = weight(dtype, 64, 64)
            kept, edit = stored.clone(), projection(info_of(stored), axis, plain(64))
            for _ in range(edit.passes):
                edit.measure(slice(0, 64), stored)
            edit.apply(slice(0, 64), stored)
            assert torch.equal(stored, kept)


def test_an_edit_that_cuts_the_hidden_axis_measures_first() -> None:
    stored = weight("BF16", 64, 64)
    assert isinstance(projection(info_of(stored), 0, plain(64)), StreamedProjection)
    assert isinstance(projection(info_of(stored), 1, plain(64)), LocalProjection)
    assert projection(info_of(stored[:, 0]), 0, plain(64)).passes == 0
    with pytest.raises(EditError, match="only 0 of 64 rows were measured"):
        projection(info_of(stored), 0, plain(64)).apply(slice(0, 64), stored)


@pytest.mark.parametrize(("shape", "axis"), [((8, 6), 1), ((8, 6), 2), ((8, 6), -2), ((6,), 0), ((), 0)])
def test_a_wrong_axis(shape: tuple[int, ...], axis: int) -> None:
    info = TensorInfo("model.w", "F32", shape, 0, 0)
    with pytest.raises(EditError, match=rf"model\.w .* has no axis {axis} of length 8"):
        projection(info, axis, plain(8))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I8", "I32", "BOOL"])
def test_a_dtype_that_cannot_be_edited(dtype: str) -> None:
    with pytest.raises(EditError, match=f"model.w is stored as {dtype}, which cannot be edited"):
        projection(TensorInfo("model.w", dtype, (8, 6), 0, 0), 0, plain(8))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", STORED)
def test_a_span_within_tolerance(dtype: str, place: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Every covector is gone, and the rest is as near to what it was as the dtype allows."""
    before, after = place
    for hidden in (33, 200):
        axis, projector, stored = len(before), span(hidden), weight(dtype, *before, hidden, *after)
        result, w = edited(stored, axis, projector), columns(stored, axis)
        target = w - projector.u.T @ (projector.v @ w)
        assert result.dtype == stored.dtype and result.shape == stored.shape and result.is_contiguous()
        assert error(result, axis, target) < {"F64": 1e-15, "F32": 1e-7, "BF16": 1.5e-2, "F16": 2e-3}[dtype]
        left, size = projector.v @ columns(result, axis), columns(result, axis).norm()
        few = 2 if hidden < 100 and dtype in ("BF16", "F16") else 1  # too few rows to pay four debts from
        assert float(left.norm() / size) <= few * tolerance(dtype, hidden, "writer")
        assert float((projector.v @ w).norm() / w.norm()) > 0.05


@pytest.mark.parametrize("count", [2, 4, 7])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_rounding_knows_all_covectors_of_a_span(dtype: str, axis: int, count: int) -> None:
    projector, stored = span(1024, count=count), weight(dtype, 1024, 1024)
    result, nearest = edited(stored, axis, projector), edited(stored, axis, projector, directional=False)
    target = columns(stored, axis) - projector.u.T @ (projector.v @ columns(stored, axis))
    left, were = (float((projector.v @ columns(each, axis)).norm()) for each in (result, nearest))
    assert left < were / 3 and left < tolerance(dtype, 1024, "writer") / 2 * float(columns(result, axis).norm())
    assert error(result, axis, target) < 1.3 * error(nearest, axis, target)


@quick
@given(SEEDS, st.sampled_from(STORED), st.sampled_from(PLACES), st.integers(8, 130), st.integers(1, 140))
def test_any_blocks_give_the_same_bytes_for_a_span(
    seed: int, dtype: str, place: tuple[tuple[int, ...], tuple[int, ...]], hidden: int, rows: int
) -> None:
    before, after = place
    stored = weight(dtype, *before, hidden, *after, seed=seed)
    edit = projection(info_of(stored), len(before), span(hidden, seed + 1))
    whole = run(edit, stored)
    assert torch.equal(run(edit, stored, rows).view(torch.uint8), whole.view(torch.uint8))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", STORED)
def test_a_tensor_that_is_little_but_the_span(dtype: str, axis: int) -> None:
    projector = span(1024)
    w = projector.v.T @ normal(5, 4, 50) + 1e-4 * normal(6, 1024, 50)
    stored = (w if axis == 0 else w.T.contiguous()).to(DTYPES[dtype])
    assert float((projector.v @ columns(stored, axis)).norm()) > 0.99 * float(columns(stored, axis).norm())
    result = columns(edited(stored, axis, projector), axis)
    assert float((projector.v @ result).norm()) <= tolerance(dtype, 1024, "writer") * float(result.norm())


@pytest.mark.parametrize("axis", [0, 1])
def test_strength_leaves_its_share_of_a_span(axis: int) -> None:
    stored, projector = weight("F64", 64, 64), span(64)
    result = edited(stored, axis, projector, strength=0.75)
    torch.testing.assert_close(projector.v @ columns(result, axis), 0.25 * (projector.v @ columns(stored, axis)))


def test_a_span_that_is_cut_is_measured_first_and_then_forgotten() -> None:
    wide = weight("F32", 64, 5000)
    edit = projection(info_of(wide), 0, span(64))
    assert isinstance(edit, SpanProjection) and edit.passes == 1 and edit.form == "span"
    with pytest.raises(EditError, match="only 0 of 64 rows were measured"):
        edit.apply(slice(0, 64), wide)
    edit.measure(slice(0, 64), wide)
    assert len(pickle.dumps(edit)) > 5000 * 8
    edit.apply(slice(0, 64), wide)
    assert len(pickle.dumps(edit)) < 5000 * 8
    assert projection(info_of(wide[:, :64]), 1, span(64)).passes == 0
    assert projection(info_of(wide[:, 0]), 0, span(64)).passes == 0


@pytest.mark.parametrize(("shape", "axis"), [((4, 9), 1), ((7, 8), 0), ((8,), 1)])
def test_a_span_of_another_width(shape: tuple[int, ...], axis: int) -> None:
    with pytest.raises(EditError, match=rf"has no axis {axis} of length 8"):
        projection(TensorInfo("w", "F32", shape, 0, 0), axis, span(8))


HIDDEN = 16
WRITERS = (
    Writer("embed", "embedding", 1, None),
    Writer("out", "attention", 0, 0, (Step("scale", "norm", 1.0),)),
    Writer("bias", "bias", 0, 0),
)
RUNTIME = Runtime("Pico", ("layers.0",))
PLAN = Plan("pico", "pico", HIDDEN, 1, True, "embed", "head", ("tie_word_embeddings",), WRITERS, (), RUNTIME)


def checkpoint(folder: Path, **changed: Tensor) -> Checkpoint:
    tensors = {
        "embed": weight("F32", 11, HIDDEN, seed=1),
        "out": weight("F32", HIDDEN, 6, seed=2),
        "bias": weight("F32", HIDDEN, seed=3),
        "norm": normal(4, HIDDEN).bfloat16(),
    }
    save_file(tensors | changed, folder / "model.safetensors")
    return Checkpoint(folder, {}, (read_header(folder / "model.safetensors"),), None)


def test_every_writer_is_edited_along_its_axis_behind_its_gain(tmp_path: Path) -> None:
    opened, r = checkpoint(tmp_path), normal(0, HIDDEN)
    edits = build_edits(opened, PLAN, r)
    assert list(edits) == ["embed", "out", "bias"]
    assert [edit.form for edit in edits.values()] == ["plain", "oblique", "plain"]
    result = run(edits["out"], weight("F32", HIDDEN, 6, seed=2))
    reaches = (1 + normal(4, HIDDEN).bfloat16().double())[:, None] * result.double()
    assert float((r @ reaches).norm() / (r.norm() * reaches.norm())) < 1e-6
    for name, axis in (("embed", 1), ("bias", 0)):
        stored = weight("F32", *opened.tensors[name].shape, seed=1 if name == "embed" else 3)
        assert share(run(edits[name], stored), axis, make_projector(r)) < 1e-6


def test_strength_reaches_every_writer(tmp_path: Path) -> None:
    stored = weight("F32", 11, HIDDEN, seed=1)
    opened, r = checkpoint(tmp_path, head=stored), normal(0, HIDDEN)
    edits = build_edits(opened, replace(PLAN, head_copy=True), Cut.uniform(r, PLAN.num_layers, 0.5))
    for name in ("embed", "head"):
        assert share(run(edits[name], stored), 1, make_projector(r)) > 0.4 * share(stored, 1, make_projector(r))


def test_a_copy_of_a_tied_head_takes_the_embedding_s_edit(tmp_path: Path) -> None:
    stored = weight("BF16", 11, HIDDEN, seed=1)
    opened, plan = checkpoint(tmp_path, embed=stored, head=stored.clone()), replace(PLAN, head_copy=True)
    edits = build_edits(opened, plan, normal(0, HIDDEN))
    assert torch.equal(run(edits["head"], stored), run(edits["embed"], stored))
    assert "head" not in build_edits(opened, plan, normal(0, HIDDEN), untie=True)


@pytest.mark.parametrize("untie", [True, False])
def test_a_copy_that_differs_is_refused(tmp_path: Path, untie: bool) -> None:
    other = weight("F32", 11, HIDDEN, seed=1)
    other[10, 3] += 1e-3
    for head in (other, weight("F32", 11, HIDDEN, seed=1).bfloat16()):
        opened = checkpoint(tmp_path, head=head)
        with pytest.raises(EditError, match=r"head is stored and differs from embed.*tie_word_embeddings to false"):
            build_edits(opened, replace(PLAN, head_copy=True), normal(0, HIDDEN), untie=untie)


def test_a_head_of_its_own_is_not_edited(tmp_path: Path) -> None:
    opened = checkpoint(tmp_path, head=weight("F32", 11, HIDDEN, seed=9))
    assert "head" not in build_edits(opened, replace(PLAN, tied=False), normal(0, HIDDEN))


def test_a_direction_of_another_width(tmp_path: Path) -> None:
    with pytest.raises(EditError, match=r"direction has shape \[15\]; this model's stream is 16 wide"):
        build_edits(checkpoint(tmp_path), PLAN, normal(0, 15))


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_nothing_of_a_tensor_is_kept_once_it_is_edited(dtype: str) -> None:
    rows, columns = 64, 50_000
    info = TensorInfo("w", dtype, (rows, columns), 0, rows * columns * DTYPES[dtype].itemsize)
    edit = projection(info, 0, make_projector(torch.randn(rows)))
    weight = torch.randn(rows, columns).to(DTYPES[dtype])
    edit.measure(slice(0, rows), weight)
    assert len(pickle.dumps(edit)) > columns
    edit.apply(slice(0, rows), weight)
    list(edit.late())
    assert len(pickle.dumps(edit)) < columns
