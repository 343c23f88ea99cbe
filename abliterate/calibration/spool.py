"""Tensors that outgrow memory: in files without names, mapped, so that the system can put them out of memory."""

import ctypes
import functools
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abliterate.checkpoint.diskio import disk_errors

_MMAP_THRESHOLD = -3
"""M_MMAP_THRESHOLD of glibc's malloc.h."""
LEAST_BYTES = 64 << 10
"""What is smaller stays in memory: a mapping of its own would cost more."""


def mapped(folder: Path, size: int) -> Tensor:
    """`size` bytes of a new file, shared with the disk; the file goes with the last tensor that looks at it.

    It has no name from the start: a killed process leaves nothing.

    Raises:
        OutputError: the disk has no room.
    """
    with disk_errors(folder, size):
        fd, name = tempfile.mkstemp(prefix=".abliterate-spool-", dir=folder)
        try:
            # Without this a full disk would show as a crash when the pages are written.
            os.posix_fallocate(fd, 0, size) if hasattr(os, "posix_fallocate") else os.truncate(fd, size)
            return torch.from_file(name, shared=True, size=size, dtype=torch.uint8)
        finally:
            os.close(fd)
            Path(name).unlink()


@contextmanager
def frugal() -> Iterator[None]:
    """Has the C library take large pieces of memory from the system, and return each as soon as it is freed.

    Afterwards it keeps them for the next time, up to the size that it comes to keep by itself.
    """
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        library.mallopt(_MMAP_THRESHOLD, 32 << 20)


def give_back() -> None:
    """Has it return what else it holds of freed memory: that of one layer would lie beside the next one's."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


@functools.cache
def _glibc() -> Any:
    try:
        library = ctypes.CDLL(None)
        return library if library.malloc_trim and library.mallopt else None
    except (OSError, AttributeError, TypeError):  # another C library
        return None


@dataclass(frozen=True)
class Spool:
    """Where tensors of CPU computations go that wait for their turn.

    Attributes:
        folder: on a disk with room for them.
        budget: bytes that may wait in memory.
    """

    folder: Path
    budget: int

    def outgrows(self, value: Tensor, count: int) -> bool:
        """Whether `count` tensors like this one are too much for memory."""
        return value.device.type == "cpu" and value.nbytes * count > self.budget

    def keep(self, value: Tensor) -> Tensor:
        """The same values in a mapped file; the tensor itself where that makes no sense."""
        if value.device.type != "cpu" or not value.is_contiguous() or value.nbytes < LEAST_BYTES:
            return value
        return mapped(self.folder, value.nbytes).view(value.dtype).view(value.shape).copy_(value)
