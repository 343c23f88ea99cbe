"""Direction files: what is written is read back, and nothing else is taken for a direction."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from abliterate.direction.files import direction_bytes, load_direction
from abliterate.direction.means import Directions, Mean
from abliterate.direction.selection import Candidate
from abliterate.errors import CalibrationError

HIDDEN = 16


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def saved(path: Path, direction: Tensor, name: str = "direction") -> Path:
    save_file({name: direction.contiguous()}, path)
    return path


def refused(path: Path, hidden: int = HIDDEN) -> str:
    with pytest.raises(CalibrationError) as caught:
        load_direction(path, hidden)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    unit = torch.nn.functional.normalize(drawn(HIDDEN), dim=0)
    path = tmp_path / "r.safetensors"
    path.write_bytes(direction_bytes(unit))
    found = load_direction(path, HIDDEN)
    assert found.dtype == torch.float32 and list(load_file(path)) == ["direction"]
    torch.testing.assert_close(found, unit, rtol=0, atol=1e-7)


def test_the_grid_and_the_scores_lie_beside_it(tmp_path: Path) -> None:
    grid = drawn(3, 4, HIDDEN)
    mean = Mean(grid.double(), 10, 10)
    candidates = [Candidate(-3, 1, -2.0, 1.5, 0.25), Candidate(-1, 3, 0.5), Candidate(-2, 0, 7.0, None, 0.75)]
    path = tmp_path / "r.safetensors"
    metadata = {"position": -3, "layer": 1, "relaxed": False, "note": 'é "quoted"\n'}
    path.write_bytes(direction_bytes(grid[0, 1].clone(), Directions(grid, mean, mean), candidates, metadata))
    tensors = load_file(path)
    assert set(tensors) == {"direction", "directions", "bypass", "induce", "kl"}
    assert torch.equal(tensors["directions"], grid)
    nan = float("nan")
    expected = torch.full((3, 4, 3), nan)
    expected[0, 1], expected[2, 3], expected[1, 0] = (
        torch.tensor(row) for row in ([-2, 1.5, 0.25], [0.5, nan, nan], [7, nan, 0.75])
    )
    for number, name in enumerate(("bypass", "induce", "kl")):
        torch.testing.assert_close(tensors[name], expected[..., number], equal_nan=True, rtol=0, atol=0)
    with safe_open(path, "pt") as file:
        found = file.metadata()
    assert found == {"format": "pt", "position": "-3", "layer": "1", "relaxed": "false", "note": metadata["note"]}
    assert json.loads(found["relaxed"]) is False


def test_the_same_direction_gives_the_same_bytes() -> None:
    grid = drawn(2, 2, HIDDEN)
    directions = Directions(grid, Mean(grid.double(), 1, 1), Mean(grid.double(), 1, 1))
    unit, scores = directions.unit(-2, 0), [Candidate(-1, 0, 1.0)]
    # safetensors itself writes metadata in another order every time
    metadata = {"position": -2, "layer": 0, "relaxed": True, "note": 'é "quoted"\n'}
    assert len({direction_bytes(unit, directions, scores, metadata) for _ in range(30)}) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 300.0])
def test_any_length_and_dtype_is_made_a_unit_vector(tmp_path: Path, dtype: torch.dtype, scale: float) -> None:
    stored = (drawn(HIDDEN) * scale).to(dtype)
    if not stored.any():
        pytest.skip("too small for the dtype")
    found = load_direction(saved(tmp_path / "r.safetensors", stored), HIDDEN)
    assert float(found.double().norm()) == pytest.approx(1, abs=1e-6)
    assert float(found.double() @ stored.double()) == pytest.approx(float(stored.double().norm()), rel=1e-5)


@pytest.mark.parametrize("shape", [(1, HIDDEN), (HIDDEN, 1), (1, 1, HIDDEN)])
def test_axes_of_one_do_not_matter(tmp_path: Path, shape: tuple[int, ...]) -> None:
    vector = drawn(HIDDEN)
    found = load_direction(saved(tmp_path / "r.safetensors", vector.view(shape)), HIDDEN)
    torch.testing.assert_close(found, vector / vector.norm())


@pytest.mark.parametrize("shape", [(HIDDEN + 1,), (HIDDEN - 1,), (2, HIDDEN), (HIDDEN, HIDDEN), (), (0,)])
def test_the_wrong_width(tmp_path: Path, shape: tuple[int, ...]) -> None:
    said = refused(saved(tmp_path / "r.safetensors", torch.ones(shape)))
    assert f"direction has shape {list(shape)}; the model's hidden size is {HIDDEN}" in said


def test_zero(tmp_path: Path) -> None:
    assert refused(saved(tmp_path / "r.safetensors", torch.zeros(HIDDEN))).endswith("direction is zero")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_not_finite(tmp_path: Path, bad: float) -> None:
    vector = drawn(HIDDEN)
    vector[3] = bad
    assert refused(saved(tmp_path / "r.safetensors", vector)).endswith("direction is not finite")


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", (1 << 62).to_bytes(8, "little") + b"{}"])
def test_not_safetensors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.safetensors"
    path.write_bytes(content)
    assert "is not a safetensors file" in refused(path)


def test_a_file_cut_short(tmp_path: Path) -> None:
    path = saved(tmp_path / "r.safetensors", drawn(HIDDEN))
    path.write_bytes(path.read_bytes()[:-4])
    assert "is not a safetensors file" in refused(path)


def test_no_such_file_and_no_such_tensor(tmp_path: Path) -> None:
    assert "no direction file" in refused(tmp_path / "none.safetensors")
    assert "no direction file" in refused(tmp_path)
    said = refused(saved(tmp_path / "r.safetensors", drawn(HIDDEN), "refusal"))
    assert "has no tensor named direction, only refusal" in said


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_what_is_no_real_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    assert "a direction is real numbers" in refused(saved(tmp_path / "r.safetensors", torch.ones(HIDDEN).to(dtype)))


def test_nothing_but_the_direction_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vector, wide = drawn(HIDDEN), drawn(64, HIDDEN)
    save_file({"direction": vector, "directions": wide}, tmp_path / "r.safetensors")
    read, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *arguments: read.append(preadv(*arguments)) or read[-1])
    load_direction(tmp_path / "r.safetensors", HIDDEN)
    assert sum(read) == vector.nbytes
    save_file({"direction": wide}, tmp_path / "r.safetensors")
    refused(tmp_path / "r.safetensors")
    assert sum(read) == vector.nbytes


def test_names_of_other_tensors_are_shown_in_one_short_line(tmp_path: Path) -> None:
    assert len(refused(saved(tmp_path / "r.safetensors", drawn(HIDDEN), "x" * 10_000))) < 1000
