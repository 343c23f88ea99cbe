"""A direction at the end of the stream to the projector of every writer."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from abliterate.architecture.writer import Plan, Runtime, Step, Writer
from abliterate.certify.weights import writer_residuals
from abliterate.checkpoint.files import Checkpoint
from abliterate.checkpoint.header import read_header
from abliterate.checkpoint.rewrite import rewrite_checkpoint
from abliterate.edit.edits import Projectors, build_edits
from abliterate.errors import EditError

H, TAPS = 64, 4
CENTER = Step("center")


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gain(seed: int) -> Tensor:
    drawn = normal(seed, H)
    return drawn.sign() * (0.3 + drawn.abs())


R = normal(0, H) / normal(0, H).norm()
TENSORS = {
    "g": (gain(1) - 1.0).bfloat16(),
    "k": gain(2).float(),
    "conv": normal(3, H, 1, TAPS).float(),
    "small": gain(4).float(),
}
TENSORS["small"][5] = 1e-5
G, K, CONV = Step("scale", "g", 1.0), Step("scale", "k"), Step("taps", "conv")
g, k = TENSORS["g"].double() + 1.0, TENSORS["k"].double()


def checkpoint(folder: Path, **more: Tensor) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    save_file(TENSORS | more, folder / "model.safetensors")
    return Checkpoint(folder, {}, (read_header(folder / "model.safetensors"),), None)


@pytest.fixture
def projectors(tmp_path: Path) -> Projectors:
    return Projectors(checkpoint(tmp_path), H, R.float())


def writer(gain: tuple[Step, ...] = (), skip: tuple[Step, ...] = ()) -> Writer:
    return Writer("w", "mlp", 0, 0, gain, skip)


def unit(v: Tensor) -> Tensor:
    return v.div(v.norm())


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_straight_into_the_stream(projectors: Projectors) -> None:
    found = projectors.of(writer())
    assert found.form == "plain" and found.v.dtype == torch.float64
    close(found.v, R)
    assert torch.equal(found.u, found.v)


def test_behind_one_norm_and_behind_two(projectors: Projectors) -> None:
    one, two = projectors.of(writer((G,))), projectors.of(writer((G, K)))
    assert one.form == two.form == "oblique"
    close(one.v, g * R)
    close(one.u, R / g)
    close(two.v, g * k * R)
    close(two.u, R / (g * k))


def test_a_gain_near_zero_makes_it_orthogonal(projectors: Projectors) -> None:
    found = projectors.of(writer((Step("scale", "small"),)))
    assert found.form == "orthogonal"
    close(found.v, unit(TENSORS["small"].double() * R))


def test_behind_a_layer_norm(projectors: Projectors) -> None:
    """The mean comes off first, which the oblique form cannot undo."""
    found = projectors.of(writer((K, CENTER)))
    assert found.form == "orthogonal" and torch.equal(found.u, found.v)
    close(found.v, unit(k * R - (k * R).mean()))


def test_behind_a_convolution(projectors: Projectors) -> None:
    found = projectors.of(writer((CONV,)))
    assert found.form == "span" and found.v.shape == (TAPS, H)
    taps = TENSORS["conv"][:, 0].double()
    for i in range(TAPS):
        lag = R * (taps[:, i] + (1.0 if i == TAPS - 1 else 0.0))
        close(lag - found.u.T @ (found.v @ lag), torch.zeros(H).double())


def test_the_skip_path_turns_the_direction_first(projectors: Projectors) -> None:
    skip = (K, CENTER, G)
    turned = unit(g * (k * R - (k * R).mean()))
    close(projectors.along(skip)[0], turned)
    plain = projectors.of(writer(skip=skip))
    assert plain.form == "plain"
    close(plain.v, turned)
    behind = projectors.of(writer((K,), skip))
    assert behind.form == "oblique"
    close(behind.v, k * turned)
    close(projectors.of(writer((K, CENTER), skip)).v, unit(k * turned - (k * turned).mean()))


def test_writers_behind_the_same_steps_share_a_projector(projectors: Projectors) -> None:
    first, second = writer((G,), (K,)), Writer("other", "bias", 0, 7, (G,), (K,))
    assert projectors.of(first) is projectors.of(second)
    assert projectors.of(writer((K,), (G,))) is not projectors.of(first)
    assert projectors.of(writer((), (G,))) is not projectors.of(writer((G,), ()))


def plan(*writers: Writer, boundaries: tuple[tuple[Step, ...], ...] = ()) -> Plan:
    runtime = Runtime("Pico", ("layers.0", "layers.1"))
    return Plan("p", "p", H, 2, False, "w", "head", ("tied",), writers, (), runtime, boundaries)


def test_the_direction_at_every_boundary(projectors: Projectors) -> None:
    assert projectors.boundaries(plan(writer())) is None
    found = projectors.boundaries(plan(writer(), boundaries=((K, CENTER, G, CENTER), (K, CENTER), ())))
    assert found is not None and found.shape == (3, H)
    first = k * R - (k * R).mean()
    close(found[2], R)
    close(found[1], unit(first))
    close(found[0], unit(g * first - (g * first).mean()))
    close(found.norm(dim=1), torch.ones(3).double())


@pytest.mark.parametrize("shape", [(H - 1,), (1, H - 1), (1, 1, H), (H, 1), ()])
def test_a_direction_of_another_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(EditError, match=rf"direction has shape .*; this model's stream is {H} wide"):
        Projectors(checkpoint(tmp_path), H, torch.ones(shape))


def test_a_gain_that_takes_the_direction_away(tmp_path: Path) -> None:
    opened = checkpoint(tmp_path, nothing=torch.zeros(H))
    zero = Step("scale", "nothing")
    with pytest.raises(EditError, match="a norm's gain is zero along the direction"):
        Projectors(opened, H, R).of(writer((zero,)))
    with pytest.raises(EditError, match=r"^nothing, between a writer and the stream, is zero along the direction"):
        Projectors(opened, H, R).of(writer((), (zero,)))
    with pytest.raises(EditError, match=r"^the mean over channels, between"):
        Projectors(opened, H, torch.ones(H)).of(writer((CENTER,)))


PATHS = [((), ()), ((G,), ()), ((K, CENTER), ()), ((CONV,), ()), ((G, CONV), (K, CENTER)), ((K,), (G, CENTER, K))]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edits_and_their_certificate_agree(tmp_path: Path, axis: int, dtype: torch.dtype) -> None:
    """Stored, read again and measured: each writer is clean behind its own steps, and was not before."""
    shape = (H, 200) if axis == 0 else (200, H)
    tensors = {str(i): normal(10 + i, *shape).to(dtype) for i in range(len(PATHS))}
    writers = [Writer(str(i), "mlp", axis, 0, *paths) for i, paths in enumerate(PATHS)]
    base = checkpoint(tmp_path / "base", **tensors)
    edits = build_edits(base, plan(*writers), R)
    assert [edit.form for edit in edits.values()] == ["plain", "oblique", "orthogonal", "span", "span", "oblique"]
    out = tmp_path / "out"
    out.mkdir()
    rewrite_checkpoint(base, out, edits)
    after = Checkpoint(out, {}, (read_header(out / "model.safetensors"),), None)
    residuals = writer_residuals(after, plan(*writers), R, base)
    assert all(residual.before is not None and residual.before > 0.05 for residual in residuals)
    assert [residual.tensor for residual in residuals if not residual.holds] == [], residuals
