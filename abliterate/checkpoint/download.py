"""One file of the Hub to the disk: taken up where it was cut, and under its name only when its hash is the Hub's."""

import os
from pathlib import Path
from typing import Any

from abliterate.checkpoint.diskio import write_all
from abliterate.checkpoint.keeper import Check
from abliterate.checkpoint.locate import explained
from abliterate.checkpoint.remote import Remote, RemoteFile
from abliterate.errors import HubError
from abliterate.progress import Advance, Progress

BLOCK_BYTES = 1 << 20


def fetch(remote: Remote, file: RemoteFile, partial: Path, final: Path, progress: Progress, check: Check) -> int:
    """Makes `final` of what is in `partial` and what the Hub sends.

    What an earlier run left in `partial` is not trusted: where the whole has another hash than the Hub's, all of it is
    fetched anew.

    Args:
        check: called often; stops the work by raising.

    Returns:
        Bytes that the Hub sent.

    Raises:
        HubError: the Hub cannot be reached or sends something else than it says, or the disk is full.
    """
    with explained(remote.model_id, remote.commit, HubError), progress.bar(f"fetch {file.name}", file.size, "B") as bar:
        sent, right = _go_on(remote, file, partial, bar, check)
        if not right and sent < file.size:
            more, right = _go_on(remote, file, partial, bar, check)
            sent += more
        if not right:
            raise HubError(
                f"{file.name} of {remote.model_id} does not arrive with the hash that the Hub names for it; try again "
                "later, and if that does not help, tell its owner"
            )
        partial.rename(final)
    return sent


def is_right(file: RemoteFile, path: Path, check: Check) -> bool:
    """Whether the file at `path` has the size and the hash that the Hub names.

    Raises:
        OSError: it cannot be read.
    """
    if path.stat().st_size != file.size:
        return False
    hasher = file.hasher()
    with path.open("rb") as content:
        while block := content.read(BLOCK_BYTES):
            check()
            hasher.update(block)
    return hasher.hexdigest() == file.digest


def _go_on(remote: Remote, file: RemoteFile, partial: Path, advance: Advance, check: Check) -> tuple[int, bool]:
    """Fetches what is missing of `partial`: how much that was, and whether the whole is right; what is wrong goes."""
    fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        hasher, left = file.hasher(), os.fstat(fd).st_size
        if left > file.size:
            os.ftruncate(fd, 0)
            left = 0
        _feed(fd, hasher, left, check)
        advance(left)
        for at, block in remote.stream(file.name, left, file.size, check):
            write_all(fd, block, at)
            hasher.update(block)
            advance(len(block))
        right = hasher.hexdigest() == file.digest
        if right:
            os.fsync(fd)
        else:
            os.ftruncate(fd, 0)
            advance(-file.size)
        return file.size - left, right
    finally:
        os.close(fd)


def _feed(fd: int, hasher: Any, size: int, check: Check) -> None:
    at = 0
    while at < size:
        check()
        block = os.pread(fd, min(BLOCK_BYTES, size - at), at)
        hasher.update(block)
        at += len(block)
