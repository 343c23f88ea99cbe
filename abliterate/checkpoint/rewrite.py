"""Shard in, shard out: untouched bytes copied in the kernel, edited tensors in blocks, the header byte for byte."""

import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from abliterate.checkpoint.diskio import check_space, copy_range, disk_errors, sync, write_all
from abliterate.checkpoint.extend import TensorCopy, check_copies, extended_header, extended_index
from abliterate.checkpoint.files import Checkpoint
from abliterate.checkpoint.finite import is_finite
from abliterate.checkpoint.hashing import FollowingHash, following
from abliterate.checkpoint.header import DTYPES, Header, TensorInfo
from abliterate.checkpoint.read import blocks_of, bytes_of, changed, open_shard, read_exactly
from abliterate.errors import CheckpointError, EditError, OutputError
from abliterate.progress import SILENT, Advance, Progress

__all__ = ["ShardRecord", "TensorCopy", "TensorEdit", "rewrite_checkpoint"]

log = logging.getLogger(__name__)

EDIT_BYTES = 2 << 20
"""Of one block of an edited tensor: with an edit's wider intermediates it stays in the cache of a core."""
COPY_BYTES = 32 << 20
"""Copied by one call: often enough for progress and Ctrl-C."""


class TensorEdit(Protocol):
    """What becomes of one tensor, block by block. A block is lent: its memory is used again after the call.

    Attributes:
        passes: how many times the whole stored tensor goes through `measure` before `apply`.
    """

    passes: int

    def measure(self, rows: slice, block: Tensor) -> None:
        """Looks at rows of the stored tensor: `block` [rows, ...] in the stored dtype, `rows` along axis 0."""

    def apply(self, rows: slice, block: Tensor) -> Tensor:
        """The rows as they are to be stored: same shape, same dtype, finite."""


@dataclass(frozen=True)
class ShardRecord:
    """A shard that was written.

    Attributes:
        name: of the file, in the input and in the output.
        sha256_in: of the input file; None where hashing was switched off.
        sha256_out: of the output file, as read back from the system.
        bytes: size of the output file.
        edited: how many tensors were edited.
    """

    name: str
    sha256_in: str | None
    sha256_out: str | None
    bytes: int
    edited: int


@dataclass(frozen=True)
class _Region:
    """Bytes that go from the input to the output together, as offsets in the files; `info` where they are edited."""

    start: int
    end: int
    target: int
    info: TensorInfo | None = None


@dataclass(frozen=True)
class _Job:
    """One shard on its way."""

    source: Header
    target: Header
    edits: Mapping[str, TensorEdit]
    copies: Sequence[TensorCopy]
    advance: Advance
    hash_files: bool


def rewrite_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    edits: Mapping[str, TensorEdit],
    copies: Sequence[TensorCopy] = (),
    progress: Progress = SILENT,
    hash_files: bool = True,
    done: Callable[[ShardRecord], None] | None = None,
    skip: Mapping[str, ShardRecord] | None = None,
) -> tuple[ShardRecord, ...]:
    """Writes every shard, and the index, into the folder `out`; each file has its name only when it is whole.

    Args:
        checkpoint: what to read.
        out: an existing folder without files of those names, but for shards to skip.
        edits: by tensor; every other tensor is copied byte for byte.
        copies: tensors to add, each at the end of the shard that holds its source.
        progress: counts bytes read for measuring and bytes written.
        hash_files: take sha256 of every shard, in and out, along the way.
        done: called with every shard's record as soon as it has its final name.
        skip: records of shards, by name, that are in `out` already and are not written again.

    Returns:
        One record a shard, in the order of `checkpoint.shards`.

    Raises:
        CheckpointError: an edit or copy does not fit the checkpoint, a tensor to edit is not finite (before or after),
            or a file changed meanwhile. Shards that were done by then stay in `out`.
        EditError: an edit returned another shape or dtype.
        OutputError: there is too little space, or `out` cannot be written.
    """
    _check_edits(checkpoint, edits)
    check_copies(checkpoint, copies)
    records = dict(skip or {})
    shards = [shard for shard in checkpoint.shards if shard.path.name not in records]
    held = {name for shard in shards for name in shard.tensors}
    needed = sum(shard.file_size for shard in shards)
    needed += sum(checkpoint.tensors[copy.source].nbytes for copy in copies if copy.source in held)
    measured = sum(edit.passes * checkpoint.tensors[name].nbytes for name, edit in edits.items() if name in held)
    with disk_errors(out, needed), progress.bar("rewrite", needed + measured, "B") as advance:
        check_space(out, needed)
        for job in [_job(shard, edits, copies, advance, hash_files) for shard in shards]:
            name = job.source.path.name
            records[name] = _write_shard(job, out / name)
            if done is not None:
                done(records[name])
        if checkpoint.index is not None:
            _write_index(extended_index(checkpoint, checkpoint.index, copies), out / checkpoint.index.name)
        sync(out)
    return tuple(records[shard.path.name] for shard in checkpoint.shards)


def _check_edits(checkpoint: Checkpoint, edits: Mapping[str, TensorEdit]) -> None:
    for name in edits:
        shard = checkpoint.shard_of(name)
        dtype = shard.tensors[name].dtype
        if not DTYPES[dtype].is_floating_point:
            raise CheckpointError(f"{shard.path}: tensor {name} is stored as {dtype}, which cannot be edited")


def _job(
    shard: Header,
    edits: Mapping[str, TensorEdit],
    copies: Sequence[TensorCopy],
    advance: Advance,
    hash_files: bool,
) -> _Job:
    mine = [copy for copy in copies if copy.source in shard.tensors]
    own = {name: edits[name] for name in shard.tensors if name in edits}
    return _Job(shard, extended_header(shard, mine), own, mine, advance, hash_files)


def _write_shard(job: _Job, final: Path) -> ShardRecord:
    with ExitStack() as stack:
        source = stack.enter_context(open_shard(job.source))
        target = stack.enter_context(_new_file(final))
        before = _identity(source)
        hashes = stack.enter_context(following({source: job.source.path, target: final}, job.hash_files))
        _write_data(job, source, target, hashes)
        sizes = (job.source.file_size, job.target.file_size)
        digests = tuple(hash_.finish(size) if hash_ else None for hash_, size in zip(hashes, sizes, strict=True))
        if _identity(source) != before:
            raise changed(job.source.path)
    log.info("wrote %s: %d tensors edited", final.name, len(job.edits))
    return ShardRecord(final.name, digests[0], digests[1], job.target.file_size, len(job.edits))


def _write_data(job: _Job, source: int, target: int, hashes: Sequence[FollowingHash | None]) -> None:
    raw = bytearray(len(job.source.raw))
    read_exactly(source, memoryview(raw), 0, job.source.path)
    if raw != job.source.raw:
        raise changed(job.source.path)
    write_all(target, job.target.raw, 0)
    job.advance(len(job.target.raw))
    for region in _regions(job.source, job.target, job.edits, job.copies):
        steps = _copy(job, source, target, region) if region.info is None else _edit(job, source, target, region)
        for done in steps:
            for hash_, start in zip(hashes, (region.start, region.target), strict=True):
                if hash_ is not None:
                    hash_.follow(start + done)


def _regions(
    source: Header, target: Header, edited: Collection[str], copies: Sequence[TensorCopy]
) -> Iterator[_Region]:
    """The whole data section in order, runs of untouched tensors as one region; then the copies."""
    shift, run = target.data_start - source.data_start, source.data_start
    for info in source.tensors.values():
        if info.name in edited and info.nbytes:
            start, end = source.data_start + info.start, source.data_start + info.end
            if run < start:
                yield _Region(run, start, run + shift)
            yield _Region(start, end, start + shift, info)
            run = end
    if run < source.file_size:
        yield _Region(run, source.file_size, run + shift)
    for copy in copies:
        info, place = source.tensors[copy.source], target.tensors[copy.target]
        yield _Region(source.data_start + info.start, source.data_start + info.end, target.data_start + place.start)


def _copy(job: _Job, source: int, target: int, region: _Region) -> Iterator[int]:
    """Copies in steps; yields how many bytes of the region are done."""
    size = region.end - region.start
    for done in range(0, size, COPY_BYTES):
        count = min(COPY_BYTES, size - done)
        copy_range(source, job.source.path, target, count, region.start + done, region.target + done)
        job.advance(count)
        yield done + count


def _edit(job: _Job, source: int, target: int, region: _Region) -> Iterator[int]:
    """Measures, then edits block by block; yields how many bytes of the region are done."""
    info = region.info
    assert info is not None
    edit, done = job.edits[info.name], 0
    buffer = torch.empty(EDIT_BYTES, dtype=torch.uint8)
    for _ in range(edit.passes):
        for rows, block in blocks_of(source, job.source, info, EDIT_BYTES, buffer):
            _check_finite(job, info, block, "holds")
            edit.measure(rows, block)
            job.advance(block.nbytes)
    for rows, block in blocks_of(source, job.source, info, EDIT_BYTES, buffer):
        if not edit.passes:
            _check_finite(job, info, block, "holds")
        data = bytes_of(_edited(job, info, edit, rows, block))
        write_all(target, data, region.target + done)
        done += len(data)
        job.advance(len(data))
        yield done


def _edited(job: _Job, info: TensorInfo, edit: TensorEdit, rows: slice, block: Tensor) -> Tensor:
    shape, dtype = block.shape, block.dtype
    result = edit.apply(rows, block)
    if result.shape != shape or result.dtype != dtype:
        raise EditError(
            f"the edit of {info.name} returned {result.dtype} {tuple(result.shape)} for {dtype} {tuple(shape)}"
        )
    result = result.cpu().contiguous()
    _check_finite(job, info, result, "would, once edited, hold")
    return result


def _check_finite(job: _Job, info: TensorInfo, block: Tensor, verb: str) -> None:
    if not is_finite(block):
        raise CheckpointError(
            f"{job.source.path}: tensor {info.name} {verb} NaN or infinite values; the weights are damaged, "
            "download them again"
        )


@contextmanager
def _new_file(final: Path) -> Iterator[int]:
    """Yields a file under a temporary name, which becomes `final` once it is on the disk, or is removed."""
    if final.exists():
        raise OutputError(f"{final} is there already; write into an empty folder")
    partial = final.with_name(f".{final.name}.partial")
    partial.unlink(missing_ok=True)
    fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            yield fd
            os.fsync(fd)
        finally:
            os.close(fd)
        partial.rename(final)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _write_index(content: bytes, final: Path) -> None:
    with _new_file(final) as fd:
        write_all(fd, content, 0)


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_size, status.st_mtime_ns
