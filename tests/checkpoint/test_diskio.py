"""Writing: whole or not at all, in the kernel or without it, and every refusal of the system in one line."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from abliterate.checkpoint import diskio
from abliterate.checkpoint.diskio import (
    check_file_target,
    check_space,
    copy_range,
    disk_errors,
    write_all,
    write_file,
)
from abliterate.errors import CheckpointError, OutputError

DATA = bytes(range(256)) * 5


@pytest.mark.parametrize("code", sorted(diskio.FULL))
def test_a_full_disk_is_called_that(tmp_path: Path, code: int) -> None:
    with (
        pytest.raises(OutputError, match=rf"disk full \(.*\): 12,345 bytes are needed in {tmp_path}; free space"),
        disk_errors(tmp_path, 12_345),
    ):
        raise OSError(code, os.strerror(code))


def test_other_errors_name_the_place(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=rf"{tmp_path} cannot be written \(Read-only file system\); choose another"),
        disk_errors(tmp_path, 1),
    ):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_space_is_checked_to_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    check_space(tmp_path, 1000)
    with pytest.raises(OutputError, match=r"disk full: 1,001 bytes are needed in .* and 1,000 are free"):
        check_space(tmp_path, 1001)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        yield fd
    finally:
        os.close(fd)


def refusing(code: int) -> Callable[..., int]:
    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    return refuse


def some(source: int, target: int, count: int, read_at: int, write_at: int) -> int:
    """Copies 3 bytes of those asked for, and nothing after 300."""
    if write_at > 300:
        return 0
    os.pwrite(target, os.pread(source, min(3, count), read_at), write_at)
    return min(3, count)


KERNELS = {f"refuses with {errno.errorcode[code]}": refusing(code) for code in sorted(diskio.NO_KERNEL_COPY)}


@pytest.mark.parametrize("kernel", ["own", "none", "some", *KERNELS])
@pytest.mark.parametrize(("count", "read_at", "write_at"), [(1280, 0, 0), (700, 11, 3), (0, 5, 5)])
def test_ranges_are_copied_with_any_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str, count: int, read_at: int, write_at: int
) -> None:
    if kernel == "none":
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    elif kernel != "own":
        monkeypatch.setattr(os, "copy_file_range", KERNELS.get(kernel, some), raising=False)
    monkeypatch.setattr(diskio, "BUFFER_BYTES", 100)
    (tmp_path / "a").write_bytes(DATA)
    with opened(tmp_path / "a") as source, opened(tmp_path / "b") as target:
        copy_range(source, tmp_path / "a", target, count, read_at, write_at)
    copied = (tmp_path / "b").read_bytes()
    assert copied == (bytes(write_at) + DATA[read_at : read_at + count] if count else b"")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG, errno.EROFS])
def test_errors_of_the_kernel_are_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(os, "copy_file_range", refusing(code), raising=False)
    (tmp_path / "a").write_bytes(DATA)
    with opened(tmp_path / "a") as source, opened(tmp_path / "b") as target, pytest.raises(OSError) as caught:
        copy_range(source, tmp_path / "a", target, 10, 0, 0)
    assert caught.value.errno == code


def test_a_source_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("copy_file_range", "preadv"):
        monkeypatch.setattr(os, name, refusing(errno.EIO), raising=False)
    (tmp_path / "a").write_bytes(DATA)
    with (
        opened(tmp_path / "a") as source,
        opened(tmp_path / "b") as target,
        pytest.raises(CheckpointError, match="a cannot be read: Input/output error"),
    ):
        copy_range(source, tmp_path / "a", target, 10, 0, 0)


def test_a_source_that_ends_early_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(DATA)
    with (
        opened(tmp_path / "a") as source,
        opened(tmp_path / "b") as target,
        pytest.raises(CheckpointError, match="a changed while it was read"),
    ):
        copy_range(source, tmp_path / "a", target, len(DATA) + 1, 0, 0)


def test_short_writes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: whole(fd, data[:7], offset))
    with opened(tmp_path / "a") as fd:
        write_all(fd, DATA, 2)
    assert (tmp_path / "a").read_bytes() == bytes(2) + DATA


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_file(tmp_path / "a", b"old")
    write_file(tmp_path / "a", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"new"]


@pytest.mark.parametrize("raised", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_file_stays_as_it_was_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException
) -> None:
    def fail(path: Path) -> None:
        raise raised

    write_file(tmp_path / "a", b"old")
    monkeypatch.setattr(diskio, "sync", fail)
    with pytest.raises(OutputError if isinstance(raised, OSError) else KeyboardInterrupt):
        write_file(tmp_path / "a", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_where_a_file_can_be_made(tmp_path: Path) -> None:
    check_file_target(tmp_path / "new")
    (tmp_path / "file").touch()
    check_file_target(tmp_path / "file", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    for place, message in (
        (tmp_path, "is a folder; name a file"),
        (tmp_path / "file", "is there already.*--overwrite"),
        (tmp_path / "no" / "a", "no is not a folder, so a cannot be written there; make it first"),
        (tmp_path / "file" / "a", "file is not a folder"),
    ):
        with pytest.raises(OutputError, match=message):
            check_file_target(place, overwrite=False)
    with pytest.raises(OutputError, match=r"is there already; choose another name$"):
        check_file_target(tmp_path / "file")  # of a command without that option


def test_a_folder_that_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(OutputError, match="cannot be written to; choose another place for a"):
        check_file_target(tmp_path / "a")


def test_writes_are_cut_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a megabyte: into a new file Linux writes much more at once at a tenth of the speed."""
    sizes, pwrite, data = list[int](), os.pwrite, os.urandom(5 << 20) + b"odd"

    def counted(fd: int, part: memoryview, offset: int) -> int:
        sizes.append(len(part))
        return pwrite(fd, part, offset)

    monkeypatch.setattr(os, "pwrite", counted)
    with (tmp_path / "f").open("wb") as file:
        write_all(file.fileno(), data, 0)
    assert (tmp_path / "f").read_bytes() == data and max(sizes) <= 1 << 20 and sum(sizes) == len(data)
