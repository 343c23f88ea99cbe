"""The work folder beside OUT: what an unfinished run needs to go on, held by one process at a time."""

import errno
import fcntl
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from abliterate.errors import OutputError

log = logging.getLogger(__name__)

HELD = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES})
"""What the system says of a lock that another process has; anything else is a file system without locks."""
TRIES = 100


@dataclass(frozen=True)
class WorkFolder:
    """`.NAME.abliterate-work` and what is in it.

    Attributes:
        path: the folder.
        out: the OUT that it belongs to, with links resolved.
    """

    path: Path
    out: Path

    @classmethod
    def of(cls, out: Path) -> "WorkFolder":
        """The one work folder of an OUT whose links are resolved."""
        return cls(out.parent / f".{out.name}.abliterate-work", out)

    @property
    def new(self) -> Path:
        """What becomes OUT. It is made before the journal, so that a journal without it tells of a finished run."""
        return self.path / "out"

    @property
    def stages(self) -> Path:
        """Results of finished stages."""
        return self.path / "stages"

    @property
    def journal(self) -> Path:
        """What is finished, and of which run."""
        return self.path / "journal.json"

    @property
    def lock(self) -> Path:
        """Held by who works here; says who that is."""
        return self.path / "lock"

    @property
    def unfinished(self) -> bool:
        """Whether a run was stopped here that had finished a part of its work."""
        return self.journal.exists() and self.new.is_dir()

    def aside(self, target: Path) -> Path:
        """Where what was at `target`, OUT or OUT.failed, waits until the new one has its place."""
        return self.path / ("old" if target == self.out else "old.failed")

    def clear(self) -> None:
        """Removes everything but the lock and what was moved aside; the journal first, since it vouches for the rest.

        Raises:
            OSError: something cannot be removed.
        """
        self.journal.unlink(missing_ok=True)
        for path in self.path.iterdir():
            if path != self.lock and not path.name.startswith("old"):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def remove(self) -> None:
        """Removes the folder, as far as that can be done; to be called by who holds it."""
        with suppress(OSError):
            self.clear()
            for path in self.path.glob("old*"):
                shutil.rmtree(path)
            self.lock.unlink()
            self.path.rmdir()


@contextmanager
def held(work: WorkFolder) -> Iterator[None]:
    """Makes the folder where it is missing, and keeps other processes out of it for as long as this one lives.

    Raises:
        OutputError: another run is at work there.
        OSError: the folder cannot be made.
    """
    fd = _locked(work)
    try:
        yield
    finally:
        os.close(fd)


def in_use(work: WorkFolder) -> bool:
    """Whether another run is at work there."""
    try:
        fd = os.open(work.lock, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _take(fd, work)
    finally:
        os.close(fd)


def _locked(work: WorkFolder) -> int:
    """The lock file, open and locked; retried where another run took its folder away meanwhile."""
    for _ in range(TRIES):
        if work.path.is_symlink():
            raise OutputError(f"{work.path} is a link, and no work folder; remove it")
        work.path.mkdir(exist_ok=True)
        try:
            fd = os.open(work.lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue
        if not _take(fd, work):
            holder = _holder(fd)
            os.close(fd)
            raise OutputError(f"another run ({holder}) is writing {work.out}; wait for it, or choose another OUT")
        if _is_at(fd, work.lock):
            with suppress(OSError):  # it is there for messages
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
            return fd
        os.close(fd)
    raise OutputError(f"{work.path} cannot be locked; other runs come and go there: choose another OUT")


def _take(fd: int, work: WorkFolder) -> bool:
    """Locks the file; False where another process has it. Without locks it is a guess by the process that is named."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            return False
        log.warning("%s is on a file system without locks: make sure that no other run writes %s", work.path, work.out)
        return not _lives(fd)
    return True


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _holder(fd: int) -> str:
    pid, _, host = os.pread(fd, 400, 0).decode(errors="replace").strip().partition(" ")
    return f"process {pid} on {host}" if pid and host else "process unknown"


def _lives(fd: int) -> bool:
    """Whether the process that the lock file names is there, on this machine, and is not this one."""
    pid, _, host = os.pread(fd, 400, 0).decode(errors="replace").strip().partition(" ")
    if not pid.isdigit() or host != socket.gethostname() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
