"""Hashes that follow the work are those of the files, however the steps fall."""

import hashlib
import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from abliterate.checkpoint import hashing
from abliterate.checkpoint.hashing import following
from abliterate.errors import CheckpointError

DATA = os.urandom(1000)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ready=st.lists(st.integers(0, 1000), max_size=8).map(sorted), step=st.integers(1, 400))
def test_a_hash_of_a_file_that_grows(tmp_path: Path, ready: list[int], step: int) -> None:
    path = tmp_path / "growing"
    with pytest.MonkeyPatch.context() as patch, path.open("wb+", buffering=0) as file:
        patch.setattr(hashing, "STEP_BYTES", step)
        patch.setattr(hashing, "BUFFER_BYTES", 64)
        with following({file.fileno(): path}, True) as (following_hash,):
            assert following_hash is not None
            for start, end in zip([0, *ready], ready, strict=False):
                file.write(DATA[start:end])
                following_hash.follow(end)
            size = ready[-1] if ready else 0
            assert following_hash.finish(size) == hashlib.sha256(DATA[:size]).hexdigest()


def test_every_file_has_its_own(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(DATA + name.encode())
    with (tmp_path / "a").open("rb") as a, (tmp_path / "b").open("rb") as b:
        paths = {a.fileno(): tmp_path / "a", b.fileno(): tmp_path / "b"}
        with following(paths, True) as hashes:
            found = [hash_.finish(1001) for hash_ in hashes if hash_ is not None]
    assert found == [hashlib.sha256(DATA + name).hexdigest() for name in (b"a", b"b")]


def test_steps_stay_in_order_however_slow_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = hashing.read_exactly

    def slow_start(fd: int, view: memoryview, offset: int, path: Path) -> None:
        time.sleep(0.05 if offset == 0 else 0)
        read(fd, view, offset, path)

    monkeypatch.setattr(hashing, "read_exactly", slow_start)
    monkeypatch.setattr(hashing, "STEP_BYTES", 100)
    (tmp_path / "a").write_bytes(DATA)
    with (
        (tmp_path / "a").open("rb") as a,
        (tmp_path / "a").open("rb") as b,
        following({a.fileno(): tmp_path / "a", b.fileno(): tmp_path / "a"}, True) as (hash_, _),
    ):
        assert hash_ is not None
        hash_.follow(400)
        assert hash_.finish(1000) == hashlib.sha256(DATA).hexdigest()


def test_no_hashes_where_none_are_wanted() -> None:
    with following({0: Path("a"), 1: Path("b")}, False) as hashes:
        assert hashes == (None, None)


def test_a_file_that_ends_early_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(DATA)
    with path.open("rb") as file, following({file.fileno(): path}, True) as (following_hash,):
        assert following_hash is not None
        with pytest.raises(CheckpointError, match="short changed while it was read"):
            following_hash.finish(len(DATA) + 1)
