"""What is removed where: strengths by layer and kind, several directions at once, the length of columns kept."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from abliterate.architecture.writer import Plan, Runtime, Writer
from abliterate.certify.weights import tolerance, writer_residuals
from abliterate.checkpoint.files import Checkpoint
from abliterate.checkpoint.header import read_header
from abliterate.direction.files import direction_bytes, load_cut
from abliterate.edit.cut import Cut, orthonormal, part_of
from abliterate.edit.edits import build_edits
from abliterate.edit.projections import projection
from abliterate.edit.projector import span_projector
from abliterate.errors import CalibrationError, EditError
from tests.edit.applying import info_of, run
from tests.edit.test_edits import columns, normal, oblique, plain, quick, share, weight

HIDDEN, LAYERS = 48, 3
WRITERS = (
    Writer("embed.weight", "embedding", 1, None),
    *(Writer(f"layers.{i}.o.weight", "attention", 0, i) for i in range(LAYERS)),
    *(Writer(f"layers.{i}.o.bias", "bias", 0, i) for i in range(LAYERS)),
    *(Writer(f"layers.{i}.down.weight", "mlp", 0, i) for i in range(LAYERS)),
    Writer("layers.3.down.weight", "mlp", 0, 3),
)
PLAN = Plan("p", "p", HIDDEN, LAYERS, False, "embed.weight", "head", (), WRITERS, (), Runtime("Pico", ()))


def made(folder: Path, dtype: str = "F32") -> Checkpoint:
    shapes = {"embedding": (20, HIDDEN), "attention": (HIDDEN, 24), "mlp": (HIDDEN, 31), "bias": (HIDDEN,)}
    tensors = {w.tensor: weight(dtype, *shapes[w.kind], seed=i) for i, w in enumerate(WRITERS)}
    return stored(folder, tensors)


def stored(folder: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint(folder, {}, (read_header(folder / "model.safetensors"),), None)


def values(checkpoint: Checkpoint) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(checkpoint.folder / "model.safetensors")


def applied(checkpoint: Checkpoint, cut: Cut, folder: Path) -> Checkpoint:
    edits, before = build_edits(checkpoint, PLAN, cut), values(checkpoint)
    return stored(folder, {name: run(edits[name], w) if name in edits else w for name, w in before.items()})


def own(seed: int = 0) -> Cut:
    bases = torch.stack([orthonormal(normal(seed + i, 1, HIDDEN)) for i in range(LAYERS + 1)])
    strengths = torch.tensor([[1.0, 0.5], [0.25, 1.0], [0.0, 1.5]], dtype=torch.float64)
    return Cut(bases, (1, 2, 3), strengths, stem=0.0)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_every_writer_loses_its_own_share_of_its_own_direction(tmp_path: Path, dtype: str) -> None:
    base, cut = made(tmp_path / "base", dtype), own()
    after = applied(base, cut, tmp_path / "out")
    old, new = values(base), values(after)
    for writer in WRITERS:
        removal = cut.removal(writer, part_of(writer, WRITERS))
        r, axis = cut.bases[removal.basis, 0].double(), writer.axis
        was, now = (r @ columns(w[writer.tensor], axis) for w in (old, new))
        assert torch.allclose(now, (1 - removal.strength) * was, atol=2e-6 if dtype == "F32" else 2e-3)
        if removal.strength == 0:
            assert torch.equal(old[writer.tensor], new[writer.tensor])
    residuals = writer_residuals(after, PLAN, cut, base)
    assert all(residual.holds for residual in residuals)
    assert [r.left for r in residuals if r.strength == 1.0] == [0.0] * 3


def test_a_bias_goes_with_its_matrix_and_layers_beyond_the_last_with_that() -> None:
    cut, parts = own(), {w.tensor: part_of(w, WRITERS) for w in WRITERS}
    assert part_of(Writer("layers.0.mixer.out.weight", "mixer", 0, 0), WRITERS) == "attention"
    assert parts["layers.1.o.bias"] == "attention" and parts["layers.1.down.weight"] == "mlp"
    assert cut.removal(WRITERS[-1], "mlp") == cut.removal(Writer("x", "mlp", 0, 2), "mlp")
    assert cut.removal(WRITERS[0], "mlp").strength == 0.0


def test_a_writer_that_lost_another_share_is_found(tmp_path: Path) -> None:
    base, cut = made(tmp_path / "base"), own()
    tensors = values(applied(base, cut, tmp_path / "out"))
    other = Cut(cut.bases, cut.layers, cut.strengths + 0.05, cut.stem)
    tensors["layers.0.down.weight"] = values(applied(base, other, tmp_path / "other"))["layers.0.down.weight"]
    residuals = writer_residuals(stored(tmp_path / "mixed", tensors), PLAN, cut, base)
    assert [residual.tensor for residual in residuals if not residual.holds] == ["layers.0.down.weight"]


def test_what_strengths_leave_is_not_to_be_told_without_the_base(tmp_path: Path) -> None:
    base, cut = made(tmp_path / "base"), own()
    found = writer_residuals(applied(base, cut, tmp_path / "out"), PLAN, cut)
    assert {residual.left for residual in found if residual.strength != 1.0} == {None}


@quick
@given(seed=st.integers(0, 1000), count=st.integers(1, 4), dtype=st.sampled_from(["F32", "BF16", "F16", "F64"]))
def test_several_directions_are_all_gone(seed: int, count: int, dtype: str) -> None:
    """In few bits on streams of some width: below 128 four directions can be too many for so few rows to pay for."""
    hidden = 256
    basis = orthonormal(normal(seed, count, hidden))
    after = columns(run(projection(info_of(w := weight(dtype, hidden, 29)), 0, span_projector(basis)), w), 0)
    for r in basis:
        assert float((r.double() @ after).norm() / after.norm()) <= tolerance(dtype, hidden, "writer")


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", [plain, oblique])
def test_columns_keep_their_length_and_have_nothing_along_the_direction(dtype: str, axis: int, kind: object) -> None:
    projector = plain(200) if kind is plain else oblique(200)
    w = weight(dtype, *((200, 40) if axis == 0 else (40, 200)))
    after = run(projection(info_of(w), axis, projector, keep_norms=True), w, rows=17)
    assert share(after, axis, projector) <= tolerance(dtype, 200, "writer")
    before, now = columns(w, axis).norm(dim=0), columns(after, axis).norm(dim=0)
    assert float((now / before - 1).abs().max()) < {"F64": 1e-14, "F32": 1e-6, "BF16": 3e-3, "F16": 4e-4}[dtype]
    shorter = columns(run(projection(info_of(w), axis, projector), w), axis).norm(dim=0)
    assert float((shorter / before - 1).abs().max()) > 0.004, "else nothing was to be kept"
    assert torch.equal(after, run(projection(info_of(w), axis, projector, keep_norms=True), w)), "blocks differ"


def test_a_column_that_is_little_but_the_direction_is_not_blown_up() -> None:
    projector = plain(64)
    w = (projector.u[:, None] * torch.ones(1, 3, dtype=torch.float64)).float()
    after = run(projection(info_of(w), 0, projector, keep_norms=True), w)
    assert float(after.abs().max()) < 1e-5


@pytest.mark.parametrize("cut", [own(), Cut.uniform(orthonormal(normal(3, 2, HIDDEN)), LAYERS)])
def test_an_edit_goes_through_its_file(tmp_path: Path, cut: Cut) -> None:
    (tmp_path / "d").write_bytes(direction_bytes(cut.main[0], cut=cut))
    found = load_cut(tmp_path / "d", HIDDEN, LAYERS, strength=0.3)
    assert torch.equal(found.bases, cut.bases) and torch.equal(found.strengths, cut.strengths)
    assert (found.layers, found.stem, found.keep_norms) == (cut.layers, cut.stem, cut.keep_norms)
    with pytest.raises(CalibrationError, match="does not fit this model"):
        load_cut(tmp_path / "d", HIDDEN, LAYERS + 1)


def test_a_file_of_one_direction_takes_the_strength_that_is_given(tmp_path: Path) -> None:
    (tmp_path / "d").write_bytes(direction_bytes(normal(0, HIDDEN)))
    found = load_cut(tmp_path / "d", HIDDEN, LAYERS, strength=0.3, keep_norms=True)
    assert found.uniform_strength == 0.3 and found.keep_norms and not found.exact


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": (0, 1)}, "do not fit one another"),
        ({"layers": (0, 1, 9)}, "do not fit one another"),
        ({"strengths": torch.full((LAYERS, 2), torch.nan)}, "not finite"),
        ({"bases": torch.ones(4, 2, HIDDEN)}, "not orthonormal"),
        ({"bases": 1.0001 * torch.eye(2, HIDDEN).expand(4, 2, HIDDEN)}, "not orthonormal"),
    ],
)
def test_what_does_not_fit(change: dict[str, object], message: str) -> None:
    with pytest.raises(EditError, match=message):
        Cut(**{"bases": own().bases, "layers": (1, 2, 3), "strengths": own().strengths, **change})  # type: ignore[arg-type]


def test_a_basis_starts_with_the_first_and_leaves_out_what_adds_nothing() -> None:
    given_ = normal(0, 3, HIDDEN)
    basis = orthonormal(torch.stack((given_[0], given_[0] * -2, given_[1], given_[0] + given_[1], given_[2])))
    assert basis.shape == (3, HIDDEN)
    assert torch.allclose(basis @ basis.T, torch.eye(3), atol=1e-6)
    assert torch.allclose(basis[0].double(), given_[0] / given_[0].norm(), atol=1e-6)
    with pytest.raises(EditError, match="zero"):
        orthonormal(torch.zeros(2, HIDDEN))


def test_words_for_what_is_left() -> None:
    assert Cut.uniform(normal(0, HIDDEN), 2).leaves is None
    assert Cut.uniform(normal(0, HIDDEN), 2, -0.5).leaves == "strength -0.5 adds to the direction on purpose"
    assert own().leaves == "each layer loses a direction of its own on purpose, with strengths from 0 to 1.5"
