"""Opening files that came from outside: regular ones only, and never waiting for what a pipe or a device may bring."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from abliterate.errors import CheckpointError


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for reading.

    Raises:
        CheckpointError: it is a folder, pipe, device or socket.
        OSError: it cannot be opened or read.
    """
    _check(path, path.stat().st_mode)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # what became a pipe since would block for ever
    with os.fdopen(fd, "rb") as file:
        _check(path, os.fstat(fd).st_mode)
        yield file


def read_regular(path: Path, most: int) -> bytes:
    """A whole file of at most `most` bytes.

    Raises:
        CheckpointError: it is larger, or not a regular file.
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise CheckpointError(f"{path} is larger than {most} bytes, too much for a JSON file")
        return file.read(size)


def is_file(path: Path) -> bool:
    """Whether there is a regular file, whatever the name: one that is too long for the system names none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _check(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} is not a regular file")
