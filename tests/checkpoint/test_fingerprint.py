"""A file that was changed, swapped, added or removed shows, whatever its size."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from abliterate.checkpoint import fingerprint as module
from abliterate.checkpoint.files import open_checkpoint
from abliterate.checkpoint.fingerprint import fingerprint
from abliterate.errors import CheckpointError
from tests import pico

SHARD = "model.safetensors"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = pico.save(tmp_path / "base", "llama")
    (folder / "notes.txt").write_text("plain words")
    return folder


def seen(base: Path) -> dict[str, str]:
    return fingerprint(open_checkpoint(base))


def flip(path: Path, place: int) -> None:
    """Changes one bit, and hides it from whoever looks at sizes and times only."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_it_is_the_same_twice(base: Path) -> None:
    assert seen(base) == seen(base)
    assert set(seen(base)) == {path.name for path in base.iterdir()}


CHANGES: dict[str, Callable[[Path], object]] = {
    "a word": lambda base: (base / "notes.txt").write_text("other words"),
    "a bit of a small file": lambda base: flip(base / "notes.txt", 3),
    "the time of a shard": lambda base: os.utime(base / SHARD, ns=(1, 1)),
    "the last bit of a shard": lambda base: flip(base / SHARD, -1),
    "a file more": lambda base: (base / "more.txt").touch(),
    "a file less": lambda base: (base / "notes.txt").unlink(),
    "a file in a folder": lambda base: ((base / "sub").mkdir(), (base / "sub" / "x.py").touch()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("whole", [1 << 20, 0])
def test_a_change_shows(base: Path, change: str, whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WHOLE_BYTES", whole)
    monkeypatch.setattr(module, "SAMPLE_BYTES", 8)
    before = seen(base)
    CHANGES[change](base)
    assert seen(base) != before


def test_a_large_file_that_was_trained_on(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other weights of the same size, with the same header and time: the samples tell."""
    monkeypatch.setattr(module, "WHOLE_BYTES", 1000)
    before, status = seen(base), (base / SHARD).stat()
    pico.save(base, "llama", seed=1)
    os.utime(base / SHARD, ns=(status.st_atime_ns, status.st_mtime_ns))
    now = seen(base)
    assert (base / SHARD).stat().st_size == status.st_size and now[SHARD].split()[:2] == before[SHARD].split()[:2]
    assert now[SHARD] != before[SHARD]


def test_only_samples_of_large_files_are_read(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (base / "large.bin.txt").open("wb") as file:
        file.truncate(1 << 40)
    assert seen(base)["large.bin.txt"].startswith(f"{1 << 40} ")


def test_a_file_that_cannot_be_read(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(base)

    def fail(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        fingerprint(checkpoint)
