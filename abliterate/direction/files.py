"""Direction files: safetensors with the pick as `direction` [hidden], the candidate grid and the scores beside it."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from abliterate.checkpoint.header import DTYPES, Header, TensorInfo, read_header
from abliterate.checkpoint.read import read_tensor
from abliterate.checkpoint.regular import is_file
from abliterate.direction.means import Directions
from abliterate.direction.selection import Candidate
from abliterate.edit.cut import Cut
from abliterate.errors import AbliterateError, CalibrationError, CheckpointError


def direction_bytes(
    direction: Tensor,
    directions: Directions | None = None,
    candidates: Sequence[Candidate] = (),
    metadata: Mapping[str, object] | None = None,
    cut: Cut | None = None,
) -> bytes:
    """The file's bytes.

    Tensors: `direction` [hidden] fp32, unit norm; and where there is a grid: `directions` [positions, layers, hidden]
    fp32 (differences of means, row p is position p - positions), `bypass`, `induce` and `kl` [positions, layers] fp32
    (NaN where not measured). Of an edit that is more than one direction and one strength also `edit.bases` [n, k,
    hidden] fp32, `edit.layers` [layers] int64 and `edit.strengths` [layers, 2] fp64 (attention, MLP), with the strength
    outside of layers as `stem` and whether norms are kept in the metadata: see `Cut`.
    """
    tensors = {"direction": direction.float().contiguous()}
    if directions is not None:
        tensors["directions"] = directions.grid.contiguous()
        for name in ("bypass", "induce", "kl"):
            tensors[name] = _score_grid(directions, candidates, name)
    metadata = dict(metadata or {})
    if cut is not None and not cut.simple:
        tensors |= {
            "edit.bases": cut.bases.clone(),
            "edit.layers": torch.tensor(cut.layers),
            "edit.strengths": cut.strengths,
        }
        metadata |= {"stem": cut.stem, "keep_norms": cut.keep_norms}
    text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    return saved(tensors, {"format": "pt", **text})


def saved(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with its metadata sorted: the library writes it in another order every time."""
    content: bytes = save(dict(tensors), dict(metadata))
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[end:]


def _score_grid(directions: Directions, candidates: Sequence[Candidate], name: str) -> Tensor:
    positions, layers = directions.grid.shape[:2]
    grid = torch.full((positions, layers), math.nan)
    for candidate in candidates:
        value = getattr(candidate, name)
        if value is not None:
            grid[positions + candidate.position, candidate.layer] = value
    return grid


def load_cut(path: Path, hidden_size: int, layers: int, strength: float = 1.0, keep_norms: bool = False) -> Cut:
    """What a direction file says is to be removed.

    Args:
        strength, keep_norms: for a file that holds a direction only.

    Raises:
        CalibrationError: see `load_direction`; or the edit in it does not fit the model.
    """
    direction = load_direction(path, hidden_size)
    header = read_header(path)
    names = [f"edit.{part}" for part in ("bases", "layers", "strengths")]
    if not any(name in header.tensors for name in names):
        return Cut.uniform(direction, layers, strength, keep_norms)
    try:
        _check_edit(header, names, hidden_size, layers)
        bases, numbers, strengths = (read_tensor(header, header.tensors[name]) for name in names)
        stem, keep = json.loads(header.metadata["stem"]), json.loads(header.metadata["keep_norms"])
        return Cut(bases.float(), tuple(numbers.tolist()), strengths.double(), float(stem), bool(keep))
    except (KeyError, ValueError, TypeError, AbliterateError) as error:
        raise CalibrationError(f"{path}: the edit in it does not fit this model: {error}") from error


def _check_edit(header: Header, names: Sequence[str], hidden_size: int, layers: int) -> None:
    """Nothing of another size is read."""
    bases, numbers, strengths = (header.tensors[name].shape for name in names)
    if len(bases) != 3 or bases[0] > layers + 1 or bases[2] != hidden_size or bases[1] > hidden_size:
        raise CalibrationError(f"bases of shape {list(bases)} for {layers} layers {hidden_size} wide")
    if tuple(numbers) != (layers,) or tuple(strengths) != (layers, 2):
        raise CalibrationError(f"{list(numbers)} layers and {list(strengths)} strengths for {layers} layers")


def load_direction(path: Path, hidden_size: int) -> Tensor:
    """The unit direction [hidden] fp32 in a file's tensor `direction`.

    Raises:
        CalibrationError: no such file or tensor, the wrong width, zero, or not finite.
    """
    if not is_file(path):
        raise CalibrationError(f"no direction file {path}")
    try:
        direction = _read_direction(path, hidden_size)
    except CheckpointError as error:
        raise CalibrationError(f"{path} is not a safetensors file: {error}") from error
    norm = float(direction.norm())
    if not math.isfinite(norm) or norm == 0:
        raise CalibrationError(f"{path}: direction is {'zero' if norm == 0 else 'not finite'}")
    unit: Tensor = (direction / norm).float()
    return unit


def _read_direction(path: Path, hidden_size: int) -> Tensor:
    """The stored direction [hidden] fp64; nothing else of the file is read, and nothing of another size."""
    header = read_header(path)
    if "direction" not in header.tensors:
        raise CalibrationError(f"{path} has no tensor named direction, only {', '.join(sorted(header.tensors)[:5])}")
    info = header.tensors["direction"]
    _check_vector(path, info, hidden_size)
    return read_tensor(header, info).double().reshape(hidden_size)


def _check_vector(path: Path, info: TensorInfo, hidden_size: int) -> None:
    if [size for size in info.shape if size != 1] != [hidden_size] * (hidden_size != 1):
        raise CalibrationError(
            f"{path}: direction has shape {list(info.shape)}; the model's hidden size is {hidden_size}"
        )
    if not DTYPES[info.dtype].is_floating_point:
        raise CalibrationError(f"{path}: direction is stored as {info.dtype}; a direction is real numbers")
