"""A checkpoint folder: configuration, shards and index, checked against one another before anything builds on them."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from abliterate.checkpoint.elsewhere import weights_at
from abliterate.checkpoint.header import Header, TensorInfo, read_header
from abliterate.checkpoint.jsontext import MAX_DEPTH, is_shallow
from abliterate.checkpoint.keeper import Keeper
from abliterate.checkpoint.regular import is_file, read_regular
from abliterate.errors import CheckpointError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
MAX_JSON_BYTES = 100_000_000
MAX_CONFIG_BYTES = 10_000_000
HOW_TO_CONVERT = "load it with transformers and write it again with save_pretrained, which makes safetensors"
OTHER_WEIGHTS: Sequence[str] = (
    "*.bin", "*.bin.index.json", "*.pth", "*.pt", "*.ckpt", "*.gguf", "*.ggml", "*.h5", "*.msgpack", "*.ot",
    "*.onnx", "*.onnx_data", "*.tflite", "*.mlmodel", "*.mlpackage/*", "*.nemo", "consolidated*.safetensors",
)  # fmt: skip
"""Weights in other formats than the one that is converted, as `fnmatch` patterns: neither fetched nor carried over."""
DIRECTION_FILE = "refusal_direction.safetensors"
"""Written beside the weights."""
IGNORED_FOLDERS = frozenset({".git", ".cache"})
"""What `git` and the Hub client keep for themselves in a folder; never part of a checkpoint."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose parts agree with one another.

    Attributes:
        folder: where it is.
        config: config.json.
        shards: headers of its safetensors files, in the order of their names.
        index: the index file; None where there is a single shard without one.
    """

    folder: Path
    config: Mapping[str, Any]
    shards: tuple[Header, ...]
    index: Path | None

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor, in the order of shards and of their data."""
        return {name: info for shard in self.shards for name, info in shard.tensors.items()}

    @cached_property
    def _homes(self) -> Mapping[str, Header]:
        return {name: shard for shard in self.shards for name in shard.tensors}

    def shard_of(self, name: str) -> Header:
        """The shard that holds a tensor.

        Raises:
            CheckpointError: no shard does.
        """
        if name not in self._homes:
            raise CheckpointError(f"{self.folder} has no tensor {name}")
        return self._homes[name]

    @property
    def keeper(self) -> Keeper | None:
        """Has the shards on the disk when they are asked for; None where they are in the folder."""
        return self.shards[0].keeper

    @property
    def nbytes(self) -> int:
        """Size of all shards, headers included."""
        return sum(shard.file_size for shard in self.shards)


def open_checkpoint(folder: Path, keeper: Keeper | None = None) -> Checkpoint:
    """Reads configuration, index and headers of a checkpoint folder, and no weights.

    Of a folder that a conversion left without its weights the error says where on the Hub those are.

    Args:
        folder: where it is.
        keeper: has the shards, whose files in the folder hold their headers alone; None where they are whole.

    Raises:
        CheckpointError: something is missing, damaged, contradictory, points outside the folder, or quantized.
    """
    try:
        checkpoint = _open(folder)
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder} cannot be read: {error.strerror}") from error
    except CheckpointError as error:
        place = weights_at(folder)
        if place is None or _has_weights(folder):
            raise
        raise CheckpointError(f"{folder} holds no weights: they are on the Hub as {place}, so name that") from error
    return replace(checkpoint, shards=tuple(replace(shard, keeper=keeper) for shard in checkpoint.shards))


def _has_weights(folder: Path) -> bool:
    return any(path.name != DIRECTION_FILE for path in folder.glob("*.safetensors"))


def _open(folder: Path) -> Checkpoint:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder of a checkpoint or a Hub id")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}, so it is no checkpoint; download it whole")
    check_links(folder)
    config = read_json(folder / CONFIG, MAX_CONFIG_BYTES)
    _refuse_quantized(folder, config)
    index = _find_index(folder)
    if index is None:
        return Checkpoint(folder, config, (read_header(_single_shard(folder)),), None)
    placed = _weight_map(index)
    shards = tuple(read_header(folder / name) for name in sorted(set(placed.values())))
    _check_index(index, placed, shards)
    return Checkpoint(folder, config, shards, index)


def read_json(path: Path, most: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        CheckpointError: the file is missing, larger than `most` bytes, nested too deep, or holds something else.
    """
    try:
        value = json.loads(read_regular(path, most).decode("utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({' '.join(str(error).split())[:200]}): download it again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object: download it again")
    if not is_shallow(value):
        raise CheckpointError(f"{path} is nested more than {MAX_DEPTH} deep: download it again")
    return value


def files_in(folder: Path) -> Iterator[Path]:
    """Every file below the folder, sorted, without what `git` and the Hub client keep there."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in IGNORED_FOLDERS)
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        yield from (Path(parent) / name for name in sorted([*names, *links]))


def check_links(folder: Path) -> None:
    """Refuses links out of the folder: they would carry files of this machine into what is published.

    Raises:
        CheckpointError: naming the link. Links into the Hub client's cache are how its snapshots are made, and fine.
    """
    root = folder.resolve()
    for path in files_in(folder):
        if path.is_symlink() and not _stays(path, root):
            raise CheckpointError(
                f"{path} is a link to no file inside the checkpoint; put the file itself there, or remove the link"
            )


def _stays(link: Path, root: Path) -> bool:
    """Inside the folder, or a file of the Hub client's cache (models--ORG--NAME/blobs/HASH)."""
    try:
        target = link.resolve()
    except (OSError, RuntimeError):  # it leads to itself
        return False
    blob = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    return target.is_file() and (blob or target.is_relative_to(root))


def _refuse_quantized(folder: Path, config: Mapping[str, Any]) -> None:
    nested = [value for value in config.values() if isinstance(value, dict)]
    for part in (config, *nested):
        quantization = part.get("quantization_config") or part.get("compression_config")
        if quantization:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            raise CheckpointError(
                f"{folder} is quantized with {str(method or 'an unnamed method')[:80]!r}, which is not handled yet; "
                "convert the unquantized checkpoint"
            )


def _find_index(folder: Path) -> Path | None:
    found = sorted(path for path in folder.iterdir() if path.name.endswith(INDEX_SUFFIX))
    standard = [path for path in found if path.name == f"model{INDEX_SUFFIX}"]
    if len(found) > 1 and not standard:
        raise CheckpointError(
            f"{folder} has several indices ({', '.join(p.name for p in found)}); keep the one to convert"
        )
    index = next(iter(standard or found), None)
    if index and (folder / SINGLE).exists() and set(_weight_map(index).values()) != {SINGLE}:
        raise CheckpointError(f"{folder} has both {SINGLE} and {index.name} with other shards; keep the one to convert")
    return index


def _single_shard(folder: Path) -> Path:
    if (folder / SINGLE).exists():
        return folder / SINGLE
    names = sorted(path.name for path in folder.iterdir())
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        raise CheckpointError(
            f"{folder} has neither {SINGLE} nor an index of shards, only {others[0]}; download it whole"
        )
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    found = f", only {pickled[0]}" if pickled else ""
    raise CheckpointError(f"{folder} has no safetensors weights{found}; {HOW_TO_CONVERT}")


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor to shard. The names of shards are data from outside: plain file names only."""
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to shards: download it again")
    for name in sorted(set(placed.values())):
        if not is_plain_shard(name):
            raise CheckpointError(
                f"{index} names {name[:200]!a} as a shard, which is not a plain name of a .safetensors file"
            )
        if name == DIRECTION_FILE:
            raise CheckpointError(f"{index} names a shard {name}, which is what a conversion adds: rename the shard")
        if not is_file(index.parent / name):
            raise CheckpointError(f"{index} names the shard {name}, which is missing: download it")
    alike = next((name for name, count in Counter(map(str.casefold, set(placed.values()))).items() if count > 1), None)
    if alike is not None:
        raise CheckpointError(f"{index} names two shards {alike} that differ in case alone; rename one of them")
    return placed


def is_plain_shard(name: str) -> bool:
    """Whether a name from outside is that of a safetensors file in the folder itself."""
    return (
        name.isprintable()
        and name.endswith(".safetensors")
        and not any(mark in name for mark in "/\\:")
        and len(name) < 256
    )


def _check_index(index: Path, placed: Mapping[str, str], shards: tuple[Header, ...]) -> None:
    counts = Counter(name for shard in shards for name in shard.tensors)
    twice = next((name for name, count in counts.items() if count > 1), None)
    if twice is not None:
        homes = [shard.path.name for shard in shards if twice in shard.tensors]
        raise CheckpointError(f"{index.parent}: tensor {twice} is in {homes[0]} and in {homes[1]}; keep one of them")
    for shard in shards:
        for name in shard.tensors:
            if placed.get(name) != shard.path.name:
                raise CheckpointError(f"{shard.path} holds tensor {name}, which {index.name} does not place there")
    missing = next((name for name in placed if name not in counts), None)
    if missing is not None:
        raise CheckpointError(f"{index} places tensor {missing[:200]!a} in {placed[missing]}, which does not hold it")
