"""Tensors from disk: in blocks of rows, with plain reads (memory is one block, whatever the size), whole, or mapped."""

import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abliterate.checkpoint.header import DTYPES, Header, TensorInfo
from abliterate.checkpoint.keeper import Check, go_on, held
from abliterate.errors import CheckpointError

Change = Callable[[slice, Tensor], Tensor]
"""From rows of a tensor along axis 0, and what is in them, to what they become."""

BLOCK_BYTES = 8 << 20
ROWS = 32
"""Sums along axis 0 are taken in groups of so many rows: a block that ends with a group leaves nothing over."""


def iter_blocks(header: Header, info: TensorInfo, max_bytes: int = BLOCK_BYTES) -> Iterator[tuple[slice, Tensor]]:
    """Yields a tensor in blocks along axis 0.

    Args:
        header: the shard that holds it.
        info: the tensor.
        max_bytes: of one block; at least one row is read even where a row is larger.

    Yields:
        The range of rows, and a CPU tensor [rows, ...] of the stored dtype in memory of its own. Tensors of 0 and 1
        dimensions come as one block (a scalar's range is `slice(0, 1)`); a tensor without elements yields nothing.

    Raises:
        CheckpointError: the shard cannot be read, or ends before the tensor does.
    """
    with open_shard(header) as fd:
        yield from blocks_of(fd, header, info, max_bytes)


def read_tensor(header: Header, info: TensorInfo) -> Tensor:
    """Reads a whole tensor in its stored dtype and shape.

    Raises:
        CheckpointError: the shard cannot be read, or ends before the tensor does.
    """
    with open_shard(header) as fd:
        return _read(fd, header, info, 0, info.nbytes).reshape(info.shape)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a shard that is on disk until `stored[...]` asks for it, as safetensors' own slices are.

    Those map the whole shard as memory that may be written, which no limit smaller than the shard allows.
    """

    header: Header
    info: TensorInfo

    def __getitem__(self, index: Any) -> Tensor:
        """The tensor, its bytes mapped from the file where they lie as its dtype needs; writing changes no file.

        Of a shard that comes and goes they are copied: a file that is mapped takes disk space until it is no more.

        Raises:
            CheckpointError: the shard cannot be read, or is not the file whose header was read.
        """
        begin = self.header.data_start + self.info.start
        inside = begin % mmap.ALLOCATIONGRANULARITY
        dtype = DTYPES[self.info.dtype]
        if self.info.nbytes == 0 or inside % dtype.itemsize or self.header.keeper is not None:
            return read_tensor(self.header, self.info)[index]
        with open_shard(self.header) as fd:
            try:
                room = mmap.mmap(fd, self.info.nbytes + inside, access=mmap.ACCESS_COPY, offset=begin - inside)
            except OSError as error:
                raise CheckpointError(f"{self.header.path} cannot be read: {error.strerror}") from error
        values = torch.frombuffer(room, dtype=dtype, offset=inside, count=self.info.nbytes // dtype.itemsize)
        return values.reshape(self.info.shape)[index]


def blocks_of(
    fd: int, header: Header, info: TensorInfo, max_bytes: int, buffer: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """`iter_blocks` on a shard that is already open.

    Args:
        fd: the shard.
        header: of the shard.
        info: the tensor.
        max_bytes: of one block.
        buffer: uint8 [bytes] to read every block into where it is large enough: a block then holds until the next one.
    """
    if info.numel == 0:
        return
    if len(info.shape) < 2:
        yield slice(0, info.numel), _read(fd, header, info, 0, info.nbytes, buffer).reshape(info.shape)
        return
    rows, row_bytes = info.shape[0], info.nbytes // info.shape[0]
    step = rows_in(max_bytes, row_bytes)
    for first in range(0, rows, step):
        last = min(rows, first + step)
        yield slice(first, last), read_rows(fd, header, info, slice(first, last), buffer)


def rows_in(max_bytes: int, row_bytes: int) -> int:
    """How many rows a block holds, at least one; whole groups of ROWS where it holds one."""
    rows = max(1, max_bytes // max(1, row_bytes))
    return rows if rows < ROWS else rows // ROWS * ROWS


def read_rows(fd: int, header: Header, info: TensorInfo, rows: slice, buffer: Tensor | None = None) -> Tensor:
    """Rows along axis 0 of a tensor of 2 and more dimensions; see `blocks_of`."""
    row_bytes = info.nbytes // info.shape[0]
    block = _read(fd, header, info, rows.start * row_bytes, rows.stop * row_bytes, buffer)
    return block.reshape(rows.stop - rows.start, *info.shape[1:])


@contextmanager
def open_shard(header: Header, check: Check = go_on) -> Iterator[int]:
    """Opens a shard for reading, fetching it first where it is not on the disk.

    Args:
        check: called often while it is fetched; stops that by raising.

    Yields:
        The file descriptor.

    Raises:
        CheckpointError: it cannot be opened, or is not the file whose header was read.
        HubError: it cannot be fetched.
    """
    with held([header], check) as (path,):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # it may have become a pipe
        except OSError as error:
            raise CheckpointError(f"{header.path} cannot be read: {error.strerror}") from error
        try:
            if os.fstat(fd).st_size != header.file_size:
                raise changed(header.path)
            yield fd
        finally:
            os.close(fd)


def read_exactly(fd: int, view: memoryview, offset: int, path: Path) -> None:
    """Fills `view` from `offset` in the file.

    Raises:
        CheckpointError: the file ends early, or cannot be read.
    """
    done = 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        if count == 0:
            raise changed(path)
        done += count


def changed(path: Path) -> CheckpointError:
    """The error for a file that is no longer what it was."""
    return CheckpointError(f"{path} changed while it was read; start again when nothing writes to it")


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    array: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _read(fd: int, header: Header, info: TensorInfo, first: int, last: int, buffer: Tensor | None = None) -> Tensor:
    """Bytes [first, last) of a tensor as a flat tensor of its dtype."""
    size = last - first
    room = buffer[:size] if buffer is not None and len(buffer) >= size else torch.empty(size, dtype=torch.uint8)
    read_exactly(fd, bytes_of(room), header.data_start + info.start + first, header.path)
    return room.view(DTYPES[info.dtype])
