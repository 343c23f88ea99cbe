"""One process at a time; where the file system has no locks, as far as can be told."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from abliterate.checkpoint.workfolder import WorkFolder, held, in_use
from abliterate.errors import OutputError


@pytest.fixture
def work(tmp_path: Path) -> WorkFolder:
    return WorkFolder.of(tmp_path / "out")


def dead() -> int:
    """The id of a process that has ended."""
    return int(subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True).stdout)


def test_it_says_who_is_at_work(work: WorkFolder) -> None:
    assert not in_use(work)
    with held(work):
        assert in_use(work)
        assert work.lock.read_text() == f"{os.getpid()} {socket.gethostname()}\n"
        told = f"another run \\(process {os.getpid()} on {socket.gethostname()}\\) is writing {work.out}"
        with pytest.raises(OutputError, match=told), held(work):
            pass
        assert in_use(work)
    assert not in_use(work)
    with held(work):
        pass


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"12", b"no number"])
def test_a_lock_that_says_nothing(work: WorkFolder, content: bytes) -> None:
    with held(work):
        work.lock.write_bytes(content)
        with pytest.raises(OutputError, match=r"another run \(process unknown\)|\(process no on number\)"), held(work):
            pass


def test_a_folder_that_goes_while_it_is_taken(work: WorkFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run ends between opening the lock and having it: what was locked is no longer there."""
    real, calls = fcntl.flock, []

    def flock(fd: int, how: int) -> None:
        real(fd, how)
        calls.append(fd)
        if len(calls) == 1:
            work.lock.unlink()
            work.path.rmdir()

    monkeypatch.setattr(fcntl, "flock", flock)
    with held(work):
        assert len(calls) == 2 and work.lock.read_text().startswith(str(os.getpid()))


def test_a_folder_that_always_goes(work: WorkFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: work.lock.unlink())
    with pytest.raises(OutputError, match="cannot be locked"), held(work):
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_locks_the_process_that_is_named_counts(
    work: WorkFolder, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with held(work):  # nobody is named
        assert "file system without locks: make sure that no other run writes" in caplog.text
    for pid, host, free in (
        (os.getppid(), socket.gethostname(), False),
        (dead(), socket.gethostname(), True),
        (os.getppid(), "elsewhere", True),
    ):
        work.lock.write_text(f"{pid} {host}\n")
        if free:
            with held(work):
                assert work.lock.read_text() == f"{os.getpid()} {socket.gethostname()}\n"
        else:
            with pytest.raises(OutputError, match=f"another run \\(process {pid} on"), held(work):
                pass


def test_clearing_leaves_the_lock_and_what_was_moved_aside(work: WorkFolder, tmp_path: Path) -> None:
    with held(work):
        for name in ("out/a", "stages/b", "old/c", "old.failed/d", "e"):
            (work.path / name).parent.mkdir(exist_ok=True)
            (work.path / name).touch()
        work.journal.touch()
        (tmp_path / "mine").mkdir()
        (work.path / "link").symlink_to(tmp_path / "mine")
        work.clear()
        assert sorted(path.name for path in work.path.iterdir()) == ["lock", "old", "old.failed"]
        work.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_journal_goes_first(work: WorkFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill while the rest goes must not leave a journal that vouches for what is gone."""
    with held(work):
        work.new.mkdir()
        work.journal.touch()
        assert work.unfinished
        monkeypatch.setattr(Path, "iterdir", lambda _: (_ for _ in ()).throw(OSError("killed here")))
        work.remove()
        assert not work.journal.exists() and not work.unfinished
