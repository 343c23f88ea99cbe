"""One shard on its way: pieces that several workers do at once, each from the input to its place in the output."""

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from torch import Tensor

from abliterate.checkpoint.crew import Crew
from abliterate.checkpoint.diskio import copy_range, new_file, write_all
from abliterate.checkpoint.extend import TensorCopy
from abliterate.checkpoint.finite import is_finite
from abliterate.checkpoint.hashing import FollowingHash, following
from abliterate.checkpoint.header import Header, TensorInfo
from abliterate.checkpoint.read import blocks_of, bytes_of, changed, open_shard, read_exactly, read_rows, rows_in
from abliterate.errors import CheckpointError, EditError
from abliterate.progress import Advance

EDIT_BYTES = 2 << 20
"""Of one block of a tensor that is edited in order: what the edit makes of it stays in the cache of a core."""
APART_BYTES = 8 << 20
"""Of one block that is edited by itself, at most: what is done once a block weighs little."""
COPY_BYTES = 32 << 20
"""Copied by one call: often enough for progress and Ctrl-C."""
AHEAD_BYTES = 64 << 20
"""What the system is asked to read in advance, beyond the piece that is worked on."""


class TensorEdit(Protocol):
    """What becomes of one tensor, block by block. A block is lent: its memory is used again after the call.

    Attributes:
        passes: how many times the whole stored tensor goes through `measure` before `apply`.
        independent: blocks may be applied in any order, by several threads at once; only with 2 and more dimensions.
        block_bytes: of blocks of which the edit is fastest, where it is independent.
    """

    passes: int
    independent: bool
    block_bytes: int

    def measure(self, rows: slice, block: Tensor) -> None:
        """Looks at rows of the stored tensor: `block` [rows, ...] in the stored dtype, `rows` along axis 0."""

    def apply(self, rows: slice, block: Tensor) -> Tensor:
        """The rows as they are to be stored: same shape, same dtype, finite."""

    def late(self) -> Iterable[tuple[int, Tensor]]:
        """Rows [...] that take the place of what `apply` gave for them, decided once all rows had been applied."""


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
class ShardJob:
    """What is to become of one shard.

    Attributes:
        source, target: the headers as they are and as they will be.
        edits: by tensor. `copies`: tensors to add.
        advance: told how many bytes have been measured or written.
    """

    source: Header
    target: Header
    edits: Mapping[str, TensorEdit]
    copies: Sequence[TensorCopy]
    advance: Advance
    hash_files: bool


@dataclass(frozen=True)
class _Piece:
    """Bytes that go from the input to the output together, as offsets in the files.

    Attributes:
        info: the tensor, where they are edited. `rows`: which of it, where not all.
    """

    start: int
    end: int
    target: int
    info: TensorInfo | None = None
    rows: slice | None = None


def write_shard(job: ShardJob, final: Path, workers: Crew) -> ShardRecord:
    """Writes one shard; it has its name only when it is whole and on the disk.

    Raises:
        CheckpointError: a tensor to edit is not finite, or the input changed meanwhile.
        EditError: an edit returned another shape or dtype.
        OutputError: a file of that name is there.
    """
    with ExitStack() as stack:
        source = stack.enter_context(open_shard(job.source, workers.check))
        target = stack.enter_context(new_file(final))
        before = _identity(source)
        pieces = list(_pieces(job))
        files = (source, job.source.path), (target, final)
        hashes = stack.enter_context(following(*files, _shared(job, pieces), job.hash_files))
        _write_header(job, source, target)
        open_files = _Files(job, source, target, workers, _Finished(pieces, hashes or ()))
        workers.run(partial(open_files.do, number, piece) for number, piece in enumerate(pieces))
        digests = _digests(job, hashes)
        if _identity(source) != before:
            raise changed(job.source.path)
    return ShardRecord(final.name, *digests, job.target.file_size, len(job.edits))


def _digests(job: ShardJob, hashes: Sequence[FollowingHash] | None) -> tuple[str | None, str | None]:
    if hashes is None:
        return None, None
    source, target = hashes[0].finish(job.source.file_size), hashes[1].finish(job.target.file_size)
    if job.source.keeper and job.source.keeper.sha256(job.source.path.name) not in (None, source):
        raise changed(job.source.path)
    return source, target


def _write_header(job: ShardJob, source: int, target: int) -> None:
    raw = bytearray(len(job.source.raw))
    read_exactly(source, memoryview(raw), 0, job.source.path)
    if raw != job.source.raw:
        raise changed(job.source.path)
    write_all(target, job.target.raw, 0)
    job.advance(len(job.target.raw))


def _shared(job: ShardJob, pieces: Sequence[_Piece]) -> int:
    """Up to where both files hold the same bytes."""
    if job.source.raw != job.target.raw:
        return 0
    return next((piece.start for piece in pieces if piece.info is not None), job.source.file_size)


def _pieces(job: ShardJob) -> Iterator[_Piece]:
    """The whole data section in order; then the copies."""
    source, target = job.source, job.target
    shift, run = target.data_start - source.data_start, source.data_start
    for info in source.tensors.values():
        if info.name in job.edits and info.nbytes:
            start = source.data_start + info.start
            yield from _copied(run, start, run + shift)
            yield from _edited(info, start, start + shift, job.edits[info.name])
            run = source.data_start + info.end
    yield from _copied(run, source.file_size, run + shift)
    for copy in job.copies:
        info, place = source.tensors[copy.source], target.tensors[copy.target]
        start = source.data_start + info.start
        yield from _copied(start, source.data_start + info.end, target.data_start + place.start)


def _copied(start: int, end: int, target: int) -> Iterator[_Piece]:
    for first in range(start, end, COPY_BYTES):
        yield _Piece(first, min(end, first + COPY_BYTES), target + first - start)


def _edited(info: TensorInfo, start: int, target: int, edit: TensorEdit) -> Iterator[_Piece]:
    if not edit.independent or len(info.shape) < 2:
        yield _Piece(start, start + info.nbytes, target, info)
        return
    row_bytes = info.nbytes // info.shape[0]
    step = rows_in(min(APART_BYTES, edit.block_bytes), row_bytes)
    for first in range(0, info.shape[0], step):
        last = min(info.shape[0], first + step)
        begin, end = first * row_bytes, last * row_bytes
        yield _Piece(start + begin, start + end, target + begin, info, slice(first, last))


@dataclass
class _Finished:
    """Which pieces are done; hashes follow up to the first that is not."""

    pieces: Sequence[_Piece]
    hashes: Sequence[FollowingHash]
    _done: set[int] = field(default_factory=set)
    _next: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, number: int) -> None:
        """A piece is done; waits where hashing is far behind."""
        with self._lock:
            self._done.add(number)
            while self._next in self._done:
                self._next += 1
            last = self.pieces[self._next - 1] if self._next else None
        if last is not None:
            for hash_, ready in zip(self.hashes, (last.end, last.target + last.end - last.start), strict=False):
                hash_.follow(ready)


@dataclass(frozen=True)
class _Files:
    """The input and the output, open."""

    job: ShardJob
    source: int
    target: int
    workers: Crew
    finished: _Finished

    def do(self, number: int, piece: _Piece) -> None:
        """One piece, by a worker."""
        self._read_ahead(piece.end)
        if piece.info is None:
            count = piece.end - piece.start
            copy_range(self.source, self.job.source.path, self.target, count, piece.start, piece.target)
            self.job.advance(count)
        elif piece.rows is None:
            self._edit(piece, piece.info, self.job.edits[piece.info.name])
        else:
            buffer = self.workers.buffer(piece.end - piece.start)
            block = read_rows(self.source, self.job.source, piece.info, piece.rows, buffer)
            self._finite(piece.info, block, "holds")
            self._write(piece.info, self._applied(piece.info, piece.rows, block), piece.target)
        self.finished.add(number)

    def _read_ahead(self, start: int) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.source, start, AHEAD_BYTES, os.POSIX_FADV_WILLNEED)

    def _edit(self, piece: _Piece, info: TensorInfo, edit: TensorEdit) -> None:
        """Measures, then edits block by block; rows that are late come last."""
        for _ in range(edit.passes):
            for rows, block in self._blocks(info):
                self._finite(info, block, "holds")
                edit.measure(rows, block)
                self.job.advance(block.nbytes)
        done = piece.target
        for rows, block in self._blocks(info):
            if not edit.passes:
                self._finite(info, block, "holds")
            done += self._write(info, self._applied(info, rows, block), done)
        for row, values in edit.late():
            self._finite(info, values, "would, once edited, hold")
            write_all(self.target, bytes_of(values.contiguous()), piece.target + row * (info.nbytes // info.shape[0]))

    def _blocks(self, info: TensorInfo) -> Iterator[tuple[slice, Tensor]]:
        for rows, block in blocks_of(self.source, self.job.source, info, EDIT_BYTES, self.workers.buffer(EDIT_BYTES)):
            self.workers.check()
            yield rows, block

    def _applied(self, info: TensorInfo, rows: slice, block: Tensor) -> Tensor:
        shape, dtype = block.shape, block.dtype
        result = self.job.edits[info.name].apply(rows, block)
        if result.shape != shape or result.dtype != dtype:
            raise EditError(
                f"the edit of {info.name} returned {result.dtype} {tuple(result.shape)} for {dtype} {tuple(shape)}"
            )
        result = result.cpu().contiguous()
        self._finite(info, result, "would, once edited, hold")
        return result

    def _write(self, info: TensorInfo, result: Tensor, offset: int) -> int:
        data = bytes_of(result)
        write_all(self.target, data, offset)
        self.job.advance(len(data))
        return len(data)

    def _finite(self, info: TensorInfo, block: Tensor, verb: str) -> None:
        if not is_finite(block):
            raise CheckpointError(
                f"{self.job.source.path}: tensor {info.name} {verb} NaN or infinite values; the weights are damaged, "
                "download them again"
            )


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_size, status.st_mtime_ns
