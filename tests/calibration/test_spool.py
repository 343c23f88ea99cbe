"""Tensors in files without names."""

import gc
import os
from pathlib import Path

import pytest
import torch

from abliterate.calibration import spool
from abliterate.calibration.spool import Spool, mapped
from abliterate.errors import OutputError


def test_values_and_shapes_stay(tmp_path: Path) -> None:
    kept = Spool(tmp_path, 0)
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        value = torch.randn(3, 50, 700).to(dtype)
        found = kept.keep(value)
        assert torch.equal(found, value) and found.dtype == dtype and found.data_ptr() != value.data_ptr()
        found += 1
        assert not torch.equal(found, value)
    assert not list(tmp_path.iterdir())


def test_what_makes_no_sense_stays_where_it_is(tmp_path: Path) -> None:
    kept = Spool(tmp_path, 0)
    for value in (torch.zeros(5), torch.zeros(400, 300).T, torch.empty(0), torch.empty(400, 300, device="meta")):
        assert kept.keep(value) is value


def test_memory_is_not_ours(tmp_path: Path) -> None:
    """It counts as the file's, so that the system can take it back."""

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    before, size = anonymous(), 200 << 20
    room = mapped(tmp_path, size)
    room.fill_(7)
    assert anonymous() - before < size // 10 and int(room[-1]) == 7


def test_disk_comes_back_with_the_last_view(tmp_path: Path) -> None:
    def used() -> int:
        status = os.statvfs(tmp_path)
        return (status.f_blocks - status.f_bfree) * status.f_frsize

    size = 400 << 20
    before = used()
    view = mapped(tmp_path, size)[5:10]
    during = used()
    assert int(view.sum()) == 0
    del view
    gc.collect()
    assert during - before > size * 3 // 4 and during - used() > size * 3 // 4


def test_a_full_disk_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spool.os, "posix_fallocate", full)
    with pytest.raises(OutputError, match="disk full"):
        mapped(tmp_path, 1 << 20)
    assert not list(tmp_path.iterdir())
    with pytest.raises(OutputError):
        mapped(tmp_path / "missing", 10)


def test_the_budget_is_of_all_that_wait(tmp_path: Path) -> None:
    value = torch.zeros(1000, dtype=torch.float32)
    assert not Spool(tmp_path, 40_000).outgrows(value, 10) and Spool(tmp_path, 40_000).outgrows(value, 11)
    assert not Spool(tmp_path, 0).outgrows(torch.empty(9, device="meta"), 10**9)
