"""Headers and indices of an output that has tensors which the input does not have."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from abliterate.checkpoint.files import INDEX_SUFFIX, Checkpoint, read_json
from abliterate.checkpoint.header import DTYPES, LENGTH_BYTES, Header, parse_header
from abliterate.checkpoint.jsontext import dump_like
from abliterate.errors import CheckpointError


@dataclass(frozen=True)
class TensorCopy:
    """A tensor of the output that holds the original bytes of `source` under the name `target`."""

    source: str
    target: str


def check_copies(checkpoint: Checkpoint, copies: Sequence[TensorCopy]) -> None:
    """Refuses copies of absent tensors, and names that are taken.

    Raises:
        CheckpointError: naming the tensor.
    """
    taken = set(checkpoint.tensors)
    for copy in copies:
        checkpoint.shard_of(copy.source)
        if copy.target in taken:
            raise CheckpointError(f"{checkpoint.folder} already has a tensor {copy.target}, so none can be added")
        taken.add(copy.target)


def extended_header(header: Header, copies: Sequence[TensorCopy]) -> Header:
    """The header with one entry more a copy, at the end of the data; every other byte of its JSON stays.

    Raises:
        CheckpointError: the new tensor would not be aligned, or the header grows beyond what is allowed.
    """
    if not copies:
        return header
    text, end, size = header.raw[LENGTH_BYTES:].rstrip(b" \t\r\n"), header.data_bytes, 0
    for copy in copies:
        info = header.tensors[copy.source]
        if (end + size) % DTYPES[info.dtype].itemsize:
            raise CheckpointError(f"{header.path} ends at an odd place, so {copy.target} cannot be put after it")
        entry = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [end + size, end + size + info.nbytes]}
        added = f",{json.dumps(copy.target)}:{json.dumps(entry, separators=(',', ':'))}}}"
        text, size = text[:-1].rstrip(b" \t\r\n") + added.encode(), size + info.nbytes
    text += b" " * (-len(text) % LENGTH_BYTES)
    raw = len(text).to_bytes(LENGTH_BYTES, "little") + text
    return parse_header(header.path, raw, len(raw) + end + size)


def single_index(header: Header) -> bytes:
    """The index of a checkpoint that is one shard, for folders that hold other safetensors files beside it.

    Loaders that read every safetensors file of a folder (vLLM's, say) read no more than an index names.
    """
    content = {
        "metadata": {"total_size": header.data_bytes},
        "weight_map": dict.fromkeys(sorted(header.tensors), header.path.name),
    }
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def write_single_index(header: Header, folder: Path) -> None:
    """Writes `single_index` beside the shard."""
    (folder / f"{header.path.stem}{INDEX_SUFFIX}").write_bytes(single_index(header))


def extended_index(checkpoint: Checkpoint, index: Path, copies: Sequence[TensorCopy]) -> bytes:
    """The index with the copies in it, sorted where it was; byte for byte the same where there are none.

    Raises:
        CheckpointError: the index cannot be read.
    """
    if not copies:
        return index.read_bytes()
    content = read_json(index)
    placed: Mapping[str, str] = content["weight_map"]
    added = {copy.target: checkpoint.shard_of(copy.source).path.name for copy in copies}
    names = [*placed, *added] if list(placed) != sorted(placed) else sorted([*placed, *added])
    content["weight_map"] = {name: added.get(name) or placed[name] for name in names}
    infos = [checkpoint.tensors[copy.source] for copy in copies]
    totals = {"total_size": sum(i.nbytes for i in infos), "total_parameters": sum(i.numel for i in infos)}
    metadata = content.get("metadata")
    for key, more in totals.items():
        total = metadata.get(key) if isinstance(metadata, dict) else None
        if isinstance(metadata, dict) and isinstance(total, int | float) and abs(total) < 2**63:
            metadata[key] = total + more
    return dump_like(index.read_bytes(), content)
