"""Hashes that follow the work are those of the files, however the steps fall."""

import hashlib
import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from abliterate.checkpoint import hashing
from abliterate.checkpoint.hashing import following
from abliterate.errors import CheckpointError

DATA = os.urandom(1000)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ready=st.lists(st.integers(0, 1000), max_size=8).map(sorted),
    shared=st.integers(0, 1000),
    step=st.integers(1, 200),
    lag=st.integers(1, 400),
)
def test_hashes_of_a_file_and_of_one_that_grows(
    tmp_path: Path, ready: list[int], shared: int, step: int, lag: int
) -> None:
    """They share their beginning, up to some offset that may lie behind both."""
    size = ready[-1] if ready else 0
    other = DATA[:shared] + bytes(byte ^ 1 for byte in DATA[shared:])
    (tmp_path / "in").write_bytes(DATA)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashing, "BUFFER_BYTES", step)
        patch.setattr(hashing, "LAG_BYTES", lag)
        with (tmp_path / "in").open("rb") as read, (tmp_path / "out").open("wb+", buffering=0) as written:
            files = (read.fileno(), tmp_path / "in"), (written.fileno(), tmp_path / "out")
            with following(*files, min(shared, size), True) as hashes:
                assert hashes is not None
                for start, end in zip([0, *ready], ready, strict=False):
                    written.write(other[start:end])
                    for hash_ in hashes:
                        hash_.follow(end)
                assert hashes[0].finish(size) == hashlib.sha256(DATA[:size]).hexdigest()
                assert hashes[1].finish(size) == hashlib.sha256(other[:size]).hexdigest()


def test_what_both_files_hold_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, places = hashing.read_exactly, list[tuple[str, int]]()

    def noted(fd: int, view: memoryview, offset: int, path: Path) -> None:
        places.append((path.name, offset))
        read(fd, view, offset, path)

    monkeypatch.setattr(hashing, "read_exactly", noted)
    monkeypatch.setattr(hashing, "BUFFER_BYTES", 100)
    for name in "ab":
        (tmp_path / name).write_bytes(DATA)
    with (
        (tmp_path / "a").open("rb") as a,
        (tmp_path / "b").open("rb") as b,
        following((a.fileno(), tmp_path / "a"), (b.fileno(), tmp_path / "b"), 700, True) as hashes,
    ):
        assert hashes is not None
        assert len({hash_.finish(1000) for hash_ in hashes}) == 1
    assert [offset for name, offset in places if name == "a"] == list(range(0, 1000, 100))
    assert [offset for name, offset in places if name == "b"] == [700, 800, 900]


def test_the_work_waits_for_a_hash_that_is_far_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, begun, go = hashing.read_exactly, threading.Event(), threading.Event()

    def slow(fd: int, view: memoryview, offset: int, path: Path) -> None:
        begun.set()
        go.wait(10)
        read(fd, view, offset, path)

    monkeypatch.setattr(hashing, "read_exactly", slow)
    monkeypatch.setattr(hashing, "LAG_BYTES", 500)
    (tmp_path / "a").write_bytes(DATA)
    with (tmp_path / "a").open("rb") as a:
        file = (a.fileno(), tmp_path / "a")
        with following(file, file, 1000, True) as hashes:
            assert hashes is not None
            hashes[0].follow(400)
            assert begun.wait(10)
            threading.Timer(0.05, go.set).start()
            started = time.monotonic()
            hashes[0].follow(1000)
            assert go.is_set() and time.monotonic() - started > 0.03
            assert hashes[1].finish(1000) == hashlib.sha256(DATA).hexdigest()


def test_threads_end_when_the_work_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(DATA)
    before = threading.active_count()
    with (tmp_path / "a").open("rb") as a, pytest.raises(KeyboardInterrupt):
        file = (a.fileno(), tmp_path / "a")
        with following(file, file, 800, True) as hashes:
            assert hashes is not None
            hashes[0].follow(300)
            raise KeyboardInterrupt
    assert threading.active_count() == before


def test_no_hashes_where_none_are_wanted() -> None:
    with following((0, Path("a")), (1, Path("b")), 0, False) as hashes:
        assert hashes is None


@pytest.mark.parametrize("shared", [0, 500, 1001])
def test_a_file_that_ends_early_is_noticed(tmp_path: Path, shared: int) -> None:
    path = tmp_path / "short"
    path.write_bytes(DATA)
    with path.open("rb") as file, following((file.fileno(), path), (file.fileno(), path), shared, True) as hashes:
        assert hashes is not None
        for hash_ in hashes:
            with pytest.raises(CheckpointError, match="short changed while it was read"):
                hash_.finish(len(DATA) + 1)
