"""What is free, what a model needs, and what comes of it."""

import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from abliterate.calibration import memory
from abliterate.calibration.memory import MARGIN, Need, available, need_of, place
from abliterate.errors import AbliterateError
from abliterate.sizes import parse_memory, shown

CPU = torch.device("cpu")
GB = 10**9
NEED = Need((2 * GB,) * 10, 3 * GB)


@pytest.mark.parametrize(
    ("text", "size"),
    [("16GB", 16 * GB), ("500MB", 500 * 10**6), ("8GiB", 8 << 30), ("1.5g", 1.5 * GB), ("123456", 123456),
     ("2 TB", 2 * 10**12), ("64ki", 64 << 10), ("auto", "auto"), ("resident", "resident"), ("streamed", "streamed")],
)  # fmt: skip
def test_sizes_as_people_write_them(text: str, size: Any) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "lots", "-1GB", "0", "0GB", "16 G B", "1e9", "GB", "16XB", "auto ", "i"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(AbliterateError, match="or a size such as 16GB"):
        parse_memory(text)


def test_sizes_are_shown() -> None:
    assert shown(1_540_000_000) == "1.5 GB"


def test_what_a_model_needs() -> None:
    shapes = {"embed.weight": (10, 4), "layers.0.w": (4, 4), "layers.1.w": (4, 8), "layers.1.b": (4,), "norm": (4,)}
    need = need_of(shapes, ["layers.0", "layers.1"], 2)
    assert need == Need((32, 72), 88) and need.total == 192
    assert need_of({"layers.10.w": (3,)}, ["layers.1", "layers.10"], 4).layers == (0, 12)


@pytest.mark.parametrize(
    ("size", "streamed", "held"),
    [
        (23 * GB + MARGIN, False, 0),
        (23 * GB + MARGIN - 1, True, 9),  # the embedding is in a mapped file, two layers come and go
        (4 * GB + MARGIN + 3 * 2 * GB, True, 3),
        (4 * GB + MARGIN + 3 * 2 * GB - 1, True, 2),
        (4 * GB + MARGIN, True, 0),
        (1, True, 0),
    ],
)
def test_a_size_is_used_for_layers_that_stay(size: int, streamed: bool, held: int) -> None:
    placed = place(size, NEED, CPU)
    assert (placed.streamed, placed.held, placed.spread) == (streamed, held, False)
    assert placed.ahead is (streamed and size >= 4 * GB + MARGIN), "a second layer only where there is room for it"
    assert "23.0 GB" in placed.reason and shown(size) in placed.reason


def test_auto_goes_by_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda device: 23 * GB + MARGIN)
    assert not place("auto", NEED, CPU).streamed
    monkeypatch.setattr(memory, "available", lambda device: 20 * GB)
    placed = place("auto", NEED, CPU)
    assert placed.streamed and placed.held == 5, "0.8 of 20 GB, less the margin and two layers"


def test_what_is_asked_for_is_done() -> None:
    assert not place("resident", NEED, CPU).streamed
    placed = place("streamed", Need((1,), 1), CPU)
    assert placed.streamed and placed.held == 0 and not placed.ahead


def test_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that one GPU does not hold are spread over all, where those do; else they are streamed."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    free = {0: 10 * GB, 1: 10 * GB, 2: 10 * GB}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[getattr(device, "index", device) or 0], 0))
    cuda = torch.device("cuda")
    placed = place("auto", NEED, cuda)
    assert placed.spread and not placed.streamed
    assert place("resident", NEED, cuda).spread
    free[2] = 3 * GB
    placed = place("auto", NEED, cuda)
    assert placed.streamed and placed.ahead and not placed.spread
    assert not place("auto", Need((GB,), GB), cuda).spread


def test_limits_of_containers_and_of_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(memory, "_CGROUPS", ((str(limit), str(used)),))
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=50 * GB))
    assert available(CPU) == 50 * GB
    for most, left in (("max\n", 50 * GB), (f"{8 * GB}\n", 6 * GB), (f"{2**62}\n", 50 * GB), (str(GB), 0)):
        limit.write_text(most)
        used.write_text(f"{2 * GB}\n")
        assert available(CPU) == left
    limit.unlink()
    monkeypatch.setattr(
        memory.resource,
        "getrlimit",
        lambda kind: (7 * GB if kind == resource.RLIMIT_AS else -1, resource.RLIM_INFINITY),
    )
    assert 0 < available(CPU) < 7 * GB
