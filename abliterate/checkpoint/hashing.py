"""Hashes of files that are being read and written, taken in threads that follow the work through the page cache."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from abliterate.checkpoint.header import Header
from abliterate.checkpoint.keeper import held
from abliterate.checkpoint.read import read_exactly
from abliterate.checkpoint.regular import is_file
from abliterate.errors import AbliterateError
from abliterate.progress import Advance

LAG_BYTES = 512 << 20
"""How far the work may be ahead: what is hashed is then still in the page cache, not to be read from the disk again."""
BUFFER_BYTES, BLOCK_BYTES = 256 << 10, 1 << 20


class FollowingHash:
    """sha256 of an open file in a thread of its own, as far as `follow` has been told that it is ready.

    Args:
        fd: the file.
        path: of the file.
        after: another file's hash that this one takes over at offset `shared`, up to where both hold the same bytes.
    """

    def __init__(self, fd: int, path: Path, after: "FollowingHash | None" = None, shared: int = 0) -> None:
        self._fd, self._path, self._after = fd, path, after
        self._hash, self._done, self._ready = hashlib.sha256(), shared, 0
        self._whole, self._stopped = False, False
        self._fork_at, self._fork = 0, hashlib.sha256()
        self._error: AbliterateError | None = None
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"sha256 {path.name}")
        if after is not None:
            after._fork_at = shared

    def start(self) -> None:
        """Begins; before that, all that follow this one must be known."""
        self._thread.start()

    def follow(self, ready: int) -> None:
        """Says that bytes up to offset `ready` are there; waits where hashing is far behind."""
        with self._news:
            self._ready = max(self._ready, ready)
            self._news.notify_all()
            self._news.wait_for(lambda: self._ready - self._done <= LAG_BYTES or self._over)

    def finish(self, size: int) -> str:
        """The hash of the file's first `size` bytes, in hexadecimal.

        Raises:
            CheckpointError: the file ends early, or cannot be read.
        """
        with self._news:
            self._ready, self._whole = size, True
            self._news.notify_all()
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._hash.hexdigest()

    def stop(self) -> None:
        """Ends the thread, done or not."""
        with self._news:
            self._stopped = True
            self._news.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def _over(self) -> bool:
        return self._stopped or self._error is not None

    def _run(self) -> None:
        try:
            if self._after is not None:
                self._hash = self._after.forked()
            buffer = memoryview(bytearray(BUFFER_BYTES))
            while self._next():
                self._update(buffer)
        except AbliterateError as error:
            with self._news:
                self._error = error
                self._news.notify_all()

    def forked(self) -> "hashlib._Hash":
        """A copy of the hash at the offset that the follower takes over at; waits for it."""
        with self._news:
            self._news.wait_for(lambda: self._done >= self._fork_at or self._over)
            if self._error is not None:
                raise self._error
            return self._fork.copy()

    def _next(self) -> bool:
        """Waits for bytes to hash; False where none will come."""
        with self._news:
            self._news.wait_for(lambda: self._ready > self._done or self._whole or self._stopped)
            return self._ready > self._done and not self._stopped

    def _update(self, buffer: memoryview) -> None:
        end = min(self._ready, self._done + len(buffer))
        if self._done < self._fork_at:
            end = min(end, self._fork_at)
        part = buffer[: end - self._done]
        read_exactly(self._fd, part, self._done, self._path)
        self._hash.update(part)
        with self._news:
            self._done = end
            if end == self._fork_at:
                self._fork = self._hash.copy()
            self._news.notify_all()


def file_sha256(path: Path, advance: Advance) -> str | None:
    """The hash of a file in hexadecimal, `advance` told of every byte; None where there is none.

    Raises:
        OSError: it cannot be read.
    """
    if not is_file(path):
        return None
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def shard_sha256(shard: Header, advance: Advance) -> str | None:
    """`file_sha256` of a shard; where the Hub vouches for one that is not on the disk, what it says."""
    known = shard.keeper.sha256(shard.path.name) if shard.keeper else None
    if known is not None:
        advance(shard.file_size)
        return known
    with held([shard]) as (path,):
        return file_sha256(path, advance)


@contextmanager
def following(
    source: tuple[int, Path], target: tuple[int, Path], shared: int, enabled: bool
) -> Iterator[tuple[FollowingHash, FollowingHash] | None]:
    """Yields the hashes of a file that is read and of one that is written; None where not `enabled`.

    Args:
        source, target: descriptor and path.
        shared: up to where both hold the same bytes, which are hashed once.
    """
    if not enabled:
        yield None
        return
    with ExitStack() as stack:
        read = FollowingHash(*source)
        written = FollowingHash(*target, after=read, shared=shared)
        # The one that is waited for is stopped first.
        for hash_ in (written, read):
            hash_.start()
            stack.callback(hash_.stop)
        yield read, written
