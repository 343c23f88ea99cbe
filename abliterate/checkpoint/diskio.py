"""Writing that either reaches the disk or says why not."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from abliterate.checkpoint.read import read_exactly
from abliterate.errors import OutputError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
NO_KERNEL_COPY = frozenset({errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EIO})
"""What a plain copy may get around; of EIO it tells which of the two files cannot be read or written."""
BUFFER_BYTES = 1 << 20
WRITE_BYTES = 1 << 20
"""Written by one call: for much more, Linux looks for large pieces of free memory, at a tenth of the speed."""


@contextmanager
def disk_errors(place: Path, needed: int) -> Iterator[None]:
    """Turns what the system says about writing below `place`, where `needed` bytes go, into one line.

    Raises:
        OutputError: instead of any OSError.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        if error.errno in FULL:
            message = f"disk full ({reason}): {needed:,} bytes are needed in {place}; free space or choose another OUT"
        else:
            message = f"{place} cannot be written ({reason}); choose another OUT or mend that"
        raise OutputError(message) from error


def check_space(place: Path, needed: int) -> None:
    """Refuses work that cannot end well.

    Raises:
        OutputError: fewer than `needed` bytes are free on the file system of `place`.
    """
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OutputError(
            f"disk full: {needed:,} bytes are needed in {place} and {free:,} are free; free space or choose another OUT"
        )


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Writes all of `data` at `offset`."""
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view[:WRITE_BYTES], offset)
        view, offset = view[count:], offset + count


def copy_range(source: int, source_path: Path, target: int, count: int, read_at: int, write_at: int) -> None:
    """Copies `count` bytes between open files: in the kernel where the system can, else through a small buffer.

    Raises:
        CheckpointError: the source ends early.
        OSError: writing failed.
    """
    done = _copy_in_kernel(source, target, count, read_at, write_at)
    buffer = memoryview(bytearray(min(BUFFER_BYTES, count - done)))
    while done < count:
        part = buffer[: count - done]
        read_exactly(source, part, read_at + done, source_path)
        write_all(target, part, write_at + done)
        done += len(part)


def _copy_in_kernel(source: int, target: int, count: int, read_at: int, write_at: int) -> int:
    """Copies as much as the kernel will; returns how many bytes that was."""
    done = 0
    while done < count and hasattr(os, "copy_file_range"):
        try:
            copied = os.copy_file_range(source, target, count - done, read_at + done, write_at + done)
        except OSError as error:
            if error.errno in NO_KERNEL_COPY:
                return done
            raise
        if copied == 0:
            return done
        done += copied
    return done


@contextmanager
def new_file(final: Path) -> Iterator[int]:
    """Yields a file under a temporary name, which becomes `final` once it is on the disk, or is removed.

    Raises:
        OutputError: `final` is there.
    """
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


def check_file_target(path: Path, overwrite: bool | None = None) -> None:
    """Whether a file can be made at `path`, before the work that fills it.

    Args:
        overwrite: replace one that is there; None where there is no such option.

    Raises:
        OutputError: it is there and not to be overwritten, its folder is not there or cannot be written to, or a folder
            has its name.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name a file to write")
    if path.exists() and not overwrite:
        hint = "" if overwrite is None else ", or replace it with --overwrite"
        raise OutputError(f"{path} is there already; choose another name{hint}")
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent} is not a folder, so {path.name} cannot be written there; make it first")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path.parent} cannot be written to; choose another place for {path.name}")


def write_file(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, in place of what has its name.

    Raises:
        OutputError: the disk is full or cannot be written to.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with disk_errors(path.parent, len(content)):
            partial.write_bytes(content)
            sync(partial)
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Has the system write a file or folder to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
