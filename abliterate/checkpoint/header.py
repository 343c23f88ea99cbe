"""Safetensors headers, read as hostile input: every size is checked against the file before it is trusted.

Format: https://huggingface.co/docs/safetensors/index#format (8 bytes of length, JSON, data).
"""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

from abliterate.checkpoint.keeper import Keeper
from abliterate.checkpoint.regular import open_regular
from abliterate.errors import CheckpointError

_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "BOOL": "bool", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, attribute) for name, attribute in _NAMES.items() if hasattr(torch, attribute)
}
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""
LENGTH_BYTES = 8
MAX_DIMENSIONS = 64
_SURROGATE = re.compile("[\ud800-\udfff]")
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in its shard.

    Attributes:
        name: as stored.
        dtype: as safetensors names it, a key of `DTYPES`.
        shape: its dimensions.
        start: first byte, counted from the start of the data section.
        end: one past the last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """The header of one shard.

    Attributes:
        path: the shard.
        raw: the 8 bytes of length and the JSON, as they are in the file.
        tensors: by name, in the order of the data.
        metadata: the `__metadata__` entry, empty where there is none.
        data_start: offset of the data section in the file; equals `len(raw)`.
        file_size: of the whole file, in bytes.
        keeper: has the file on the disk when it is asked for; None where it is at `path`.
    """

    path: Path
    raw: bytes
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int
    file_size: int
    keeper: Keeper | None = field(default=None, compare=False, repr=False)

    @property
    def data_bytes(self) -> int:
        """Size of the data section."""
        return self.file_size - self.data_start


def read_header(path: Path) -> Header:
    """Reads and checks the header of a shard.

    Raises:
        CheckpointError: the file cannot be read, is no safetensors file, is truncated, or contradicts itself.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = _header_length(path, file.read(LENGTH_BYTES), size)
            file.seek(0)
            raw = file.read(LENGTH_BYTES + length)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {_reason(error)}") from error
    return parse_header(path, raw, size)


def parse_header(path: Path, raw: bytes, file_size: int) -> Header:
    """Checks a header that is already in memory.

    Args:
        path: for messages, and kept in the result.
        raw: the 8 bytes of length and the JSON.
        file_size: of the whole file, header and data.

    Raises:
        CheckpointError: the header contradicts itself or the file's size.
    """
    length = _header_length(path, raw[:LENGTH_BYTES], file_size)
    if len(raw) != LENGTH_BYTES + length:
        raise CheckpointError(f"{path} ends inside its header: it is truncated; download it again")
    entries = _parse_json(path, raw[LENGTH_BYTES:])
    metadata = _metadata(path, entries.pop("__metadata__", {}))
    infos = sorted((_tensor(path, name, entry) for name, entry in entries.items()), key=lambda t: (t.start, t.end))
    _check_layout(path, infos, file_size - len(raw))
    return Header(path, raw, {info.name: info for info in infos}, metadata, len(raw), file_size)


def _header_length(path: Path, prefix: bytes, file_size: int) -> int:
    if len(prefix) < LENGTH_BYTES:
        raise CheckpointError(f"{path} has {file_size} bytes, too few for a safetensors file: download it again")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path} claims a header of {length} bytes, over the limit of {MAX_HEADER_BYTES}: it is no safetensors file"
            f"{_pointer_hint(prefix)}"
        )
    if length < 2 or length > file_size - LENGTH_BYTES:
        raise CheckpointError(
            f"{path} claims a header of {length} bytes but has {file_size} in all: it is truncated or corrupt; "
            "download it again"
        )
    return length


def _pointer_hint(prefix: bytes) -> str:
    return " but a Git LFS pointer; run `git lfs pull`" if prefix == b"version " else "; download it again"


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise CheckpointError(f"{path} has a header that is not a JSON object: it is corrupt; download it again")
    try:
        entries = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_whole
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a corrupt header ({_reason(error)}): download it again") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path} has a header that is not a JSON object: it is corrupt; download it again")
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{_short(twice)} appears twice")
    return entries


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _whole(digits: str) -> int:
    if digits == "-0":  # a float to other readers
        raise ValueError("-0 is not a whole number")
    return int(digits)


def _metadata(path: Path, value: object) -> Mapping[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CheckpointError(f"{path} has a __metadata__ that does not map text to text: it is corrupt")
    if any(_SURROGATE.search(text) for pair in value.items() for text in pair):
        raise CheckpointError(f"{path} has a __metadata__ with half a character in it: it is corrupt")
    return value


def _tensor(path: Path, name: str, entry: object) -> TensorInfo:
    try:
        return _checked_tensor(name, entry)
    except ValueError as error:
        raise CheckpointError(f"{path}: tensor {_short(name)} {error}; the file is corrupt or not supported") from error


def _checked_tensor(name: str, entry: object) -> TensorInfo:
    if not name.isprintable():
        raise ValueError("has a name with unprintable characters")
    if not isinstance(entry, dict) or set(entry) != _ENTRY_KEYS:
        raise ValueError("must have dtype, shape and data_offsets, and nothing else")
    dtype, offsets = entry["dtype"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"has dtype {_short(dtype)}, which is not known")
    shape = _shape(entry["shape"])
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(value) for value in offsets):
        raise ValueError("has data_offsets that are not two whole numbers")
    info = TensorInfo(name, dtype, shape, offsets[0], offsets[1])
    expected = info.numel * DTYPES[dtype].itemsize
    if info.nbytes != expected:
        raise ValueError(f"takes {_short(info.nbytes)} bytes by its offsets and {expected} by its shape")
    return info


def _shape(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > MAX_DIMENSIONS or not all(_is_size(size) for size in value):
        raise ValueError(f"has a shape that is not a list of at most {MAX_DIMENSIONS} whole numbers")
    if math.prod(size or 1 for size in value) >= 2**63:
        raise ValueError("has a shape with too many elements")
    return tuple(value)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _check_layout(path: Path, infos: list[TensorInfo], data_bytes: int) -> None:
    """No gap, no overlap, nothing after the last tensor."""
    end = 0
    for info in infos:
        if info.start != end:
            kind = "overlaps the tensor before it" if info.start < end else "leaves a gap before it"
            raise CheckpointError(
                f"{path}: tensor {_short(info.name)} {kind} (starts at {info.start}, not {end}); the file is corrupt"
            )
        end = info.end
    if end != data_bytes:
        kind = "truncated" if end > data_bytes else "followed by bytes that belong to no tensor"
        raise CheckpointError(
            f"{path}: its tensors take {end} bytes and it has {data_bytes}: the data is {kind}; download it again"
        )


def _short(value: object) -> str:
    """For messages: quoted, one line, not too long, whatever the value; what is nested is not walked."""
    if isinstance(value, int) and abs(value) < 2**64:
        return f"{value:d}"
    if not isinstance(value, str):
        return f"of type {type(value).__name__}"
    return ascii(value[:100])[:100] + ("…" if len(value) > 100 else "")


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200] or type(error).__name__
