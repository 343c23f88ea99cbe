"""Tensors that outgrow memory: in files without names, mapped, so that the system can put them out of memory."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from abliterate.checkpoint.diskio import disk_errors

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
