"""Shard in, shard out: untouched bytes copied in the kernel, edited tensors in blocks, the header byte for byte."""

import errno
import hashlib
import json
import logging
import os
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from abliterate.checkpoint.files import Checkpoint, read_json
from abliterate.checkpoint.header import Header, TensorInfo
from abliterate.checkpoint.read import BLOCK_BYTES, blocks_of
from abliterate.errors import CheckpointError, OutputError
from abliterate.progress import SILENT, Advance, Progress

log = logging.getLogger(__name__)
COPY_CHUNK = 1 << 24


class TensorEdit(Protocol):
    """What becomes of one tensor, block by block.

    Attributes:
        passes: how many times the whole tensor has to go through `measure` before `apply`.
    """

    passes: int

    def measure(self, rows: slice, block: Tensor) -> None:
        """Looks at rows [rows, ...] of the stored tensor."""

    def apply(self, rows: slice, block: Tensor) -> Tensor:
        """Rows as they are to be stored: same shape, same dtype."""


@dataclass(frozen=True)
class TensorCopy:
    """A tensor of the output that holds the original bytes of `source` under the name `target`."""

    source: str
    target: str


@dataclass(frozen=True)
class ShardRecord:
    """A shard that was written: hashes of what came in and what went out, size in bytes, how many tensors changed."""

    name: str
    sha256_in: str | None
    sha256_out: str | None
    bytes: int
    edited: int


def rewrite_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    edits: Mapping[str, TensorEdit],
    copies: Sequence[TensorCopy] = (),
    progress: Progress = SILENT,
    hash_files: bool = True,
) -> tuple[ShardRecord, ...]:
    """Writes every shard, and the index, into the folder `out`.

    Raises:
        CheckpointError: an edit or copy names a tensor that is not there, or an edited tensor is not finite.
        OutputError: the disk is full or cannot be written to.
    """
    for name in [*edits, *(copy.source for copy in copies)]:
        checkpoint.shard_of(name)
    taken = next((copy.target for copy in copies if copy.target in checkpoint.tensors), None)
    if taken:
        raise CheckpointError(f"{checkpoint.folder} already has a tensor {taken}")
    _check_space(checkpoint, out, copies)
    records = []
    with progress.bar("rewrite", checkpoint.nbytes, "B") as advance, _disk_errors(checkpoint, out):
        for shard in checkpoint.shards:
            mine = [copy for copy in copies if copy.source in shard.tensors]
            job = _Shard(shard, out, {n: e for n, e in edits.items() if n in shard.tensors}, mine, advance)
            records.append(job.write(hash_files))
        _write_index(checkpoint, out, copies)
    return tuple(records)


def _check_space(checkpoint: Checkpoint, out: Path, copies: Sequence[TensorCopy]) -> None:
    needed = checkpoint.nbytes + sum(checkpoint.tensors[copy.source].nbytes for copy in copies)
    free = shutil.disk_usage(out).free
    if free < needed:
        raise OutputError(f"disk full: {needed:,} bytes are needed for {out.parent}, {free:,} are free")


class _disk_errors:  # noqa: N801
    """Turns what the system says about writing into one line."""

    def __init__(self, checkpoint: Checkpoint, out: Path) -> None:
        self.needed, self.out = checkpoint.nbytes, out

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            what = (
                f"disk full: {self.needed:,} bytes are needed" if full else f"cannot write: {error.strerror or error}"
            )
            raise OutputError(f"{what} ({self.out.parent})") from error


@dataclass(frozen=True)
class _Shard:
    """One shard on its way."""

    header: Header
    out: Path
    edits: Mapping[str, TensorEdit]
    copies: Sequence[TensorCopy]
    advance: Advance

    def write(self, hash_files: bool) -> ShardRecord:
        """Under a temporary name first, so that a shard has its name only when whole."""
        final = self.out / self.header.path.name
        partial = final.with_name(f".{final.name}.partial")
        raw = extended_header(self.header, self.copies)
        with self.header.path.open("rb") as source, partial.open("wb") as target:
            _write_all(target.fileno(), raw, 0)
            self._data(source.fileno(), target.fileno(), len(raw))
            os.fsync(target.fileno())
        partial.rename(final)
        _fsync_folder(self.out)
        hashes = (sha256_of(self.header.path), sha256_of(final)) if hash_files else (None, None)
        return ShardRecord(final.name, *hashes, final.stat().st_size, len(self.edits))

    def _data(self, source: int, target: int, start: int) -> None:
        run_start = 0
        for info in self.header.tensors.values():
            if info.name in self.edits:
                self._copy(
                    source, target, self.header.data_start + run_start, start + run_start, info.start - run_start
                )
                self._edit(source, target, info, start + info.start)
                run_start = info.end
        end = self.header.file_size - self.header.data_start
        self._copy(source, target, self.header.data_start + run_start, start + run_start, end - run_start)
        for copy in self.copies:
            info = self.header.tensors[copy.source]
            self._copy(source, target, self.header.data_start + info.start, start + end, info.nbytes)
            end += info.nbytes

    def _copy(self, source: int, target: int, read_at: int, write_at: int, count: int) -> None:
        while count > 0:
            done = _copy_range(source, target, read_at, write_at, min(count, COPY_CHUNK))
            if done == 0:
                raise CheckpointError(f"{self.header.path} became shorter while it was read")
            read_at, write_at, count = read_at + done, write_at + done, count - done
            self.advance(done)

    def _edit(self, source: int, target: int, info: TensorInfo, write_at: int) -> None:
        edit = self.edits[info.name]
        for _ in range(edit.passes):
            for rows, block in blocks_of(source, self.header, info, BLOCK_BYTES):
                edit.measure(rows, block)
        for rows, block in blocks_of(source, self.header, info, BLOCK_BYTES):
            edited = edit.apply(rows, block)
            if edited.shape != block.shape or edited.dtype != block.dtype:
                raise CheckpointError(f"{info.name}: an edit may not change shape or dtype")
            if not bool(torch.isfinite(edited).all()):
                raise CheckpointError(
                    f"{self.header.path} has NaN or infinite values in {info.name}; the weights are damaged"
                )
            data = edited.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            _write_all(target, data, write_at)
            write_at += len(data)
            self.advance(len(data))


def extended_header(header: Header, copies: Sequence[TensorCopy]) -> bytes:
    """The header's own bytes, or with copies the same entries and one more for each, at the end."""
    if not copies:
        return header.raw
    content: dict[str, Any] = json.loads(header.raw[8:])
    end = header.file_size - header.data_start
    for copy in copies:
        info = header.tensors[copy.source]
        content[copy.target] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [end, end + info.nbytes],
        }
        end += info.nbytes
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _copy_range(source: int, target: int, read_at: int, write_at: int, count: int) -> int:
    """In the kernel where the system can, else through a buffer."""
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source, target, count, read_at, write_at)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):
                raise
    data = os.pread(source, min(count, BLOCK_BYTES), read_at)
    _write_all(target, data, write_at)
    return len(data)


def _write_all(target: int, data: bytes, write_at: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(target, view, write_at)
        view, write_at = view[done:], write_at + done


def sha256_of(path: Path) -> str:
    """Hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_index(checkpoint: Checkpoint, out: Path, copies: Sequence[TensorCopy]) -> None:
    """Byte for byte, or with the new tensors and their size added."""
    if checkpoint.index is None:
        return
    target = out / checkpoint.index.name
    if not copies:
        shutil.copyfile(checkpoint.index, target)
        return
    index = read_json(checkpoint.index)
    for copy in copies:
        index["weight_map"][copy.target] = checkpoint.shard_of(copy.source).path.name
    size = sum(checkpoint.tensors[copy.source].nbytes for copy in copies)
    metadata = index.get("metadata")
    if isinstance(metadata, dict) and isinstance(metadata.get("total_size"), int | float):
        metadata["total_size"] = int(metadata["total_size"]) + size
    target.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
