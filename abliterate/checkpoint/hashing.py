"""Hashes of files that are being read and written, taken in threads that follow the work through the page cache."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from abliterate.checkpoint.read import read_exactly

STEP_BYTES = 16 << 20
BUFFER_BYTES = 256 << 10


class FollowingHash:
    """sha256 of an open file, as far as `follow` has been told that it is ready.

    It stays at most one step behind, so that what it reads is still in the page cache.
    """

    def __init__(self, fd: int, path: Path, threads: ThreadPoolExecutor) -> None:
        self._fd, self._path, self._threads = fd, path, threads
        self._hash = hashlib.sha256()
        self._begun = 0
        self._pending: Future[None] | None = None

    def follow(self, ready: int) -> None:
        """Hashes up to offset `ready` in the background; waits for the step before where that is not done."""
        if ready - self._begun >= STEP_BYTES:
            self._start(ready)

    def finish(self, size: int) -> str:
        """The hash of the file's first `size` bytes, in hexadecimal."""
        self._start(size)
        self._wait()
        return self._hash.hexdigest()

    def _start(self, end: int) -> None:
        self._wait()
        self._pending = self._threads.submit(self._update, self._begun, end)
        self._begun = end

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def _update(self, start: int, end: int) -> None:
        buffer = memoryview(bytearray(BUFFER_BYTES))
        for offset in range(start, end, BUFFER_BYTES):
            part = buffer[: end - offset]
            read_exactly(self._fd, part, offset, self._path)
            self._hash.update(part)


@contextmanager
def following(files: dict[int, Path], enabled: bool) -> Iterator[tuple[FollowingHash | None, ...]]:
    """Yields one hash a file (descriptor to path), each in a thread of its own; None for each where not `enabled`."""
    if not enabled:
        yield (None,) * len(files)
        return
    with ThreadPoolExecutor(len(files), thread_name_prefix="sha256") as threads:
        yield tuple(FollowingHash(fd, path, threads) for fd, path in files.items())
