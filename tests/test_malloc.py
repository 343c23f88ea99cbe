"""The C library's memory is asked for what it gives."""

from pathlib import Path

import pytest

from abliterate import malloc
from abliterate.checkpoint.crew import crew
from abliterate.checkpoint.files import open_checkpoint
from abliterate.checkpoint.rewrite import rewrite_checkpoint
from tests import pico


def test_the_allocator_is_as_it_was_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes after it would else take every piece from the system."""
    asked: list[tuple[int, int]] = []

    class Library:
        def mallopt(self, name: int, value: int) -> None:
            asked.append((name, value))

    monkeypatch.setattr(malloc, "_glibc", Library)
    with pytest.raises(ValueError, match="midway"), malloc.frugal(4 << 20):
        assert asked == [(-3, 4 << 20)]
        raise ValueError("midway")
    assert asked[1:] == [(-3, 32 << 20)]
    monkeypatch.setattr(malloc, "_glibc", lambda: None)
    with malloc.frugal():
        malloc.give_back()


def test_workers_of_the_rewrite_give_large_pieces_back(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Library:
        def mallopt(self, _name: int, value: int) -> None:
            asked.append(value)

    monkeypatch.setattr(malloc, "_glibc", Library)
    with crew():
        assert asked == [4 << 20]
    assert asked == [4 << 20, 32 << 20]


def test_after_every_shard_what_is_left_goes_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trimmed: list[int] = []

    class Library:
        def mallopt(self, _name: int, _value: int) -> None:
            pass

        def malloc_trim(self, left: int) -> None:
            trimmed.append(left)

    checkpoint = open_checkpoint(pico.save(tmp_path / "base", "llama", shards=3))
    monkeypatch.setattr(malloc, "_glibc", Library)
    (tmp_path / "out").mkdir()
    rewrite_checkpoint(checkpoint, tmp_path / "out", {})
    assert trimmed == [0] * len(checkpoint.shards) and len(trimmed) > 1
