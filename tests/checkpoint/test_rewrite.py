"""Rewriting: edited tensors change, every other byte stays, and nothing half written is left."""

import errno
import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from picocheckpoint import CONFIG, DTYPES, Scaled, snapshot, tensors, write
from safetensors.torch import load_file, save_file
from torch import Tensor

from abliterate.checkpoint import shard
from abliterate.checkpoint.files import open_checkpoint
from abliterate.checkpoint.header import read_header
from abliterate.checkpoint.rewrite import ShardRecord, TensorCopy, TensorEdit, rewrite_checkpoint
from abliterate.errors import AbliterateError, CheckpointError, EditError, OutputError
from abliterate.progress import Progress

EDITED = ("model.embed.weight", "model.0.out.weight", "model.0.out.bias", "model.0.experts", "model.scale")
OUT_WEIGHT = "model.0.out.weight"


def folder_for(base: Path) -> Path:
    out = base.with_name("out")
    out.mkdir()
    return out


def run(base: Path, edits: Mapping[str, TensorEdit], copies: tuple[TensorCopy, ...] = ()) -> tuple[ShardRecord, ...]:
    """Rewrites into `out` beside the base."""
    return rewrite_checkpoint(open_checkpoint(base), folder_for(base), edits, copies)


def loaded(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same(left: Tensor, right: Tensor) -> bool:
    """Same dtype, shape and bits."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


def halved(tensor: Tensor) -> Tensor:
    return (tensor.double() / 2).to(tensor.dtype)


@pytest.mark.parametrize("shards", [1, 3])
def test_without_edits_every_byte_stays(tmp_path: Path, shards: int) -> None:
    base = write(tmp_path / "m", shards)
    records = run(base, {})
    expected = {name: data for name, data in snapshot(base).items() if name != "config.json"}
    assert snapshot(tmp_path / "out") == expected
    assert [record.name for record in records] == sorted(name for name in expected if name.endswith(".safetensors"))
    assert [record.edited for record in records] == [0] * shards


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("passes", [0, 1, 2])
def test_only_edited_tensors_change(tmp_path: Path, shards: int, passes: int) -> None:
    base = write(tmp_path / "m", shards)
    records = run(base, {name: Scaled(passes) for name in EDITED})
    for path in sorted(base.glob("*.safetensors")):
        assert read_header(tmp_path / "out" / path.name).raw == read_header(path).raw
    result = loaded(tmp_path / "out")
    for name, tensor in tensors().items():
        assert same(result[name], halved(tensor) if name in EDITED else tensor), name
    assert sum(record.edited for record in records) == len(EDITED)


def test_edits_see_rows_in_order_and_the_stored_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "EDIT_BYTES", 60)
    base = write(tmp_path / "m")
    edit = Scaled(passes=2)
    run(base, {OUT_WEIGHT: edit})
    assert edit.applied == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
    assert [rows for rows, _ in edit.measured] == edit.applied * 2
    shown = torch.cat([block for _, block in edit.measured])
    assert torch.equal(shown, torch.cat([tensors()[OUT_WEIGHT]] * 2))


def test_records_hold_the_hashes_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "COPY_BYTES", 32)
    monkeypatch.setattr(shard, "EDIT_BYTES", 32)
    base = write(tmp_path / "m", 2)
    for record in run(base, {OUT_WEIGHT: Scaled(1)}):
        before, after = (folder / record.name for folder in (base, tmp_path / "out"))
        assert record.sha256_in == hashlib.sha256(before.read_bytes()).hexdigest()
        assert record.sha256_out == hashlib.sha256(after.read_bytes()).hexdigest()
        assert record.bytes == after.stat().st_size


def test_hashing_can_be_left_out(tmp_path: Path) -> None:
    base = write(tmp_path / "m")
    (record,) = rewrite_checkpoint(open_checkpoint(base), folder_for(base), {}, hash_files=False)
    assert record.sha256_in is None and record.sha256_out is None


def with_embedding(folder: Path) -> Path:
    """Two shards, the embedding in the first; an index whose totals and order are to be kept."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    parts = {"a.safetensors": {"embed": torch.randn(5, 4).bfloat16(), "norm": torch.ones(4)}}
    parts["b.safetensors"] = {"out": torch.randn(4, 4)}
    for name, part in parts.items():
        save_file(part, folder / name, metadata={"format": "pt"})
    placed = {tensor: name for name, part in parts.items() for tensor in part}
    totals = {"total_size": 40 + 16 + 64, "total_parameters": 20 + 4 + 16, "note": "kept"}
    text = json.dumps({"metadata": totals, "weight_map": dict(sorted(placed.items()))}, indent=1)
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def test_copies_hold_the_unedited_bytes_and_are_in_the_index(tmp_path: Path) -> None:
    base = with_embedding(tmp_path / "m")
    run(base, {"embed": Scaled(), "out": Scaled(1)}, (TensorCopy("embed", "head"),))
    before, after = loaded(base), loaded(tmp_path / "out")
    assert same(after["head"], before["embed"]) and same(after["embed"], halved(before["embed"]))
    assert list(read_header(tmp_path / "out/a.safetensors").tensors)[-1] == "head"
    assert (tmp_path / "out/b.safetensors").stat().st_size == (base / "b.safetensors").stat().st_size
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"] == {n: "b.safetensors" if n == "out" else "a.safetensors" for n in sorted(after)}
    assert list(index["weight_map"]) == ["embed", "head", "norm", "out"]
    assert index["metadata"] == {"total_size": 160, "total_parameters": 60, "note": "kept"}
    assert set(open_checkpoint(with_config(tmp_path / "out")).tensors) == set(after)


def with_config(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


class Meddling(Scaled):
    """An edit during which something happens."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__()
        self.act = act

    def apply(self, rows: slice, block: Tensor) -> Tensor:
        self.act()
        return super().apply(rows, block)


def touch(path: Path) -> None:
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [touch, lambda path: os.truncate(path, path.stat().st_size - 1)])
def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path, change: Callable[[Path], None]) -> None:
    base = write(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"model\.safetensors changed while it was read"):
        run(base, {OUT_WEIGHT: Meddling(lambda: change(base / "model.safetensors"))})
    assert snapshot(tmp_path / "out") == {}


def test_a_file_that_changed_since_its_header_was_read_is_noticed(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "m"))
    raw = checkpoint.shards[0].raw
    with (tmp_path / "m/model.safetensors").open("r+b") as file:
        file.write(raw.replace(b"out", b"tou"))
    with pytest.raises(CheckpointError, match="changed while it was read"):
        rewrite_checkpoint(checkpoint, folder_for(tmp_path / "m"), {})
    assert snapshot(tmp_path / "out") == {}


class Returning(Scaled):
    """Returns something of its own."""

    def __init__(self, make: Callable[[Tensor], Tensor], passes: int = 0) -> None:
        super().__init__(passes)
        self.make = make

    def apply(self, rows: slice, block: Tensor) -> Tensor:
        return self.make(block)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda block: block[:-1], EditError, r"returned torch\.float32 \(7, 6\) for torch\.float32 \(8, 6\)"),
        (lambda block: block.double(), EditError, r"returned torch\.float64 \(8, 6\)"),
        (lambda block: block.T, EditError, r"returned torch\.float32 \(6, 8\)"),
        (lambda block: block * float("nan"), CheckpointError, "would, once edited, hold NaN"),
        (lambda block: block / 0, CheckpointError, "would, once edited, hold NaN"),
    ],
)
def test_what_an_edit_may_not_return(
    tmp_path: Path, make: Callable[[Tensor], Tensor], error: type[AbliterateError], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(write(tmp_path / "m"), {OUT_WEIGHT: Returning(make)})
    assert snapshot(tmp_path / "out") == {}


def test_an_edit_may_return_a_view(tmp_path: Path) -> None:
    run(write(tmp_path / "m"), {OUT_WEIGHT: Returning(lambda block: block.T.contiguous().T)})
    assert same(loaded(tmp_path / "out")[OUT_WEIGHT], tensors()[OUT_WEIGHT])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.embed.weight", OUT_WEIGHT, "model.0.experts", "model.0.in.weight"])
@pytest.mark.parametrize("passes", [0, 1])
def test_stored_values_that_are_not_finite(tmp_path: Path, bad: float, name: str, passes: int) -> None:
    base, made = write(tmp_path / "m"), tensors()
    made[name].view(-1)[-1] = bad
    save_file(made, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"tensor {name} holds NaN or infinite values"):
        run(base, {name: Scaled(passes)})
    assert snapshot(tmp_path / "out") == {}


def test_nan_in_a_tensor_that_is_not_edited_is_left_alone(tmp_path: Path) -> None:
    base, made = write(tmp_path / "m"), tensors()
    made[OUT_WEIGHT].fill_(float("nan"))
    save_file(made, base / "model.safetensors")
    run(base, {"model.0.out.bias": Scaled()})
    assert same(loaded(tmp_path / "out")[OUT_WEIGHT], made[OUT_WEIGHT])


@pytest.mark.parametrize(
    ("name", "message"),
    [("nope", "no tensor nope"), ("model.0.steps", "stored as I64"), ("model.0.mask", "stored as BOOL")],
)
def test_edits_that_do_not_fit(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        run(write(tmp_path / "m"), {name: Scaled()})
    assert snapshot(tmp_path / "out") == {}


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_files_that_are_there_are_refused(tmp_path: Path, name: str) -> None:
    base = write(tmp_path / "m", 1 if name == "model.safetensors" else 2)
    checkpoint, out = open_checkpoint(base), folder_for(base)
    (out / name).write_text("mine")
    with pytest.raises(OutputError, match=f"{name} is there already"):
        rewrite_checkpoint(checkpoint, out, {})
    assert (out / name).read_text() == "mine"


def test_a_partial_file_of_an_earlier_run_is_replaced(tmp_path: Path) -> None:
    base = write(tmp_path / "m")
    checkpoint, out = open_checkpoint(base), folder_for(base)
    (out / ".model.safetensors.partial").write_text("left over")
    rewrite_checkpoint(checkpoint, out, {})
    assert snapshot(out) == {"model.safetensors": (base / "model.safetensors").read_bytes()}


def full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("act", "raised", "message"),
    [(full_disk, OutputError, r"disk full.*bytes are needed in .*free space"), (interrupt, KeyboardInterrupt, None)],
)
def test_what_was_half_written_is_removed(
    tmp_path: Path, act: Callable[[], None], raised: type[BaseException], message: str | None
) -> None:
    with pytest.raises(raised, match=message):
        run(write(tmp_path / "m"), {"model.0.in.weight": Meddling(act)})
    assert snapshot(tmp_path / "out") == {}


def test_too_little_space_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=100))
    with pytest.raises(OutputError, match=r"disk full: [\d,]+ bytes are needed in .*out and 100 are free"):
        run(write(tmp_path / "m"), {})
    assert snapshot(tmp_path / "out") == {}


class Counting:
    """A progress that only counts."""

    def __init__(self) -> None:
        self.total, self.done = 0, 0

    @contextmanager
    def bar(self, description: str, total: int, unit: str = "it") -> Iterator[Callable[[int], None]]:
        self.total = total
        yield self.count

    def count(self, amount: int = 1) -> None:
        self.done += amount


def test_progress_ends_at_its_total(tmp_path: Path) -> None:
    base, counted = write(tmp_path / "m", 2), Counting()
    edits = {name: Scaled(passes) for passes, name in enumerate(EDITED)}
    rewrite_checkpoint(open_checkpoint(base), folder_for(base), edits, progress=cast(Progress, counted))
    assert counted.done == counted.total > open_checkpoint(base).nbytes


SHAPES = st.lists(st.integers(0, 5), max_size=3)
TENSORS = st.dictionaries(
    st.text("abc.", min_size=1, max_size=4), st.tuples(SHAPES, st.sampled_from(DTYPES)), min_size=1, max_size=6
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(made=TENSORS, data=st.data())
def test_any_checkpoint(tmp_path: Path, made: dict[str, tuple[list[int], torch.dtype]], data: st.DataObject) -> None:
    stored = {name: torch.randn(shape).to(dtype) for name, (shape, dtype) in made.items()}
    edited = data.draw(st.sets(st.sampled_from(sorted(stored))))
    base, out = tmp_path / "m", tmp_path / "out"
    for folder in (base, out):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    save_file(stored, with_config(base) / "model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("EDIT_BYTES", "COPY_BYTES", "APART_BYTES"):
            patch.setattr(shard, name, data.draw(st.integers(1, 80)))
        edits = {name: Scaled(data.draw(st.integers(0, 1))) for name in edited}
        (record,) = rewrite_checkpoint(open_checkpoint(base), out, edits)
    result = loaded(out)
    assert all(same(result[name], halved(stored[name]) if name in edited else stored[name]) for name in stored)
    assert record.sha256_out == hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


class Apart(Scaled):
    """Halves blocks in any order; says which threads came."""

    def __init__(self, act: Callable[[slice], object] = lambda rows: None) -> None:
        super().__init__()
        self.independent, self.block_bytes, self.act = True, 8 << 20, act

    def apply(self, rows: slice, block: Tensor) -> Tensor:
        self.act(rows)
        return super().apply(rows, block)


class Late(Scaled):
    """Halves every element; some rows only at the end, `apply` gives zeros for them."""

    late_rows = (5, 0, 7)

    def apply(self, rows: slice, block: Tensor) -> Tensor:
        stored = super().apply(rows, block)
        for row in self.late_rows:
            if rows.start <= row < rows.stop:
                stored[row - rows.start] = 0
        return stored

    def late(self) -> Iterator[tuple[int, Tensor]]:
        made = tensors()[OUT_WEIGHT]
        yield from ((row, halved(made[row])) for row in self.late_rows)


def test_blocks_that_are_edited_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "APART_BYTES", 50)
    edits = {name: Apart() for name in ("model.embed.weight", "model.0.experts", "model.0.out.bias", "model.scale")}
    (record,) = run(write(tmp_path / "m"), edits)
    result = loaded(tmp_path / "out")
    assert all(same(result[name], halved(tensors()[name])) for name in edits)
    assert sorted(rows.start for rows in edits["model.embed.weight"].applied) == [0, 3, 6, 9]
    assert record.sha256_out == hashlib.sha256((tmp_path / "out/model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_rows_that_are_late_take_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(shard, "EDIT_BYTES", rows * 24)
    (record,) = run(write(tmp_path / "m"), {OUT_WEIGHT: Late(1)})
    assert same(loaded(tmp_path / "out")[OUT_WEIGHT], halved(tensors()[OUT_WEIGHT]))
    assert record.sha256_out == hashlib.sha256((tmp_path / "out/model.safetensors").read_bytes()).hexdigest()


def test_rows_that_are_late_are_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Late, "late", lambda self: iter([(3, torch.full((6,), torch.nan))]))
    with pytest.raises(CheckpointError, match=f"tensor {OUT_WEIGHT} would, once edited, hold NaN"):
        run(write(tmp_path / "m"), {OUT_WEIGHT: Late(1)})
    assert snapshot(tmp_path / "out") == {}


def test_told_of_every_shard_that_has_its_name(tmp_path: Path) -> None:
    base = write(tmp_path / "m", 5)
    out, told = folder_for(base), list[ShardRecord]()

    def done(record: ShardRecord) -> None:
        assert (out / record.name).stat().st_size == record.bytes
        told.append(record)

    records = rewrite_checkpoint(open_checkpoint(base), out, {OUT_WEIGHT: Scaled(1)}, done=done)
    assert sorted(told, key=lambda record: record.name) == list(records)


def test_shards_that_are_done_are_left_alone(tmp_path: Path) -> None:
    base = write(tmp_path / "m", 3)
    out, edits = folder_for(base), {name: Scaled(1) for name in EDITED}
    records = rewrite_checkpoint(open_checkpoint(base), out, edits)
    whole = snapshot(out)
    for path in (out / records[0].name, out / records[2].name, out / "model.safetensors.index.json"):
        path.unlink()
    (out / records[1].name).write_bytes(b"left alone")
    counted, skip = Counting(), {records[1].name: records[1]}
    again = rewrite_checkpoint(open_checkpoint(base), out, edits, progress=cast(Progress, counted), skip=skip)
    assert again == records and counted.done == counted.total < open_checkpoint(base).nbytes * 2
    assert snapshot(out) == whole | {records[1].name: b"left alone"}


@pytest.mark.parametrize("act", [full_disk, interrupt, lambda: (_ for _ in ()).throw(ValueError("broken"))])
def test_an_error_in_one_piece_stops_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]
) -> None:
    """In whichever piece of whichever shard; nothing half written is left, no thread, and torch's are as before."""
    monkeypatch.setattr(shard, "APART_BYTES", 24)
    monkeypatch.setattr(shard, "COPY_BYTES", 32)
    base, threads = write(tmp_path / "m", 3), threading.active_count()
    checkpoint, before = open_checkpoint(base), torch.get_num_threads()
    for name in ("model.embed.weight", OUT_WEIGHT, "model.0.experts"):
        for row in (0, 2):
            out = tmp_path / f"{name}{row}"
            out.mkdir()
            edits = {each: Apart() for each in EDITED[:3]}
            edits[name] = Apart(lambda rows, row=row: act() if rows.start >= row else None)
            with pytest.raises((OutputError, KeyboardInterrupt, ValueError), match=r"disk full|broken|^$"):
                rewrite_checkpoint(checkpoint, out, edits)
            left = snapshot(out)
            assert all(file.endswith(".safetensors") and not file.startswith(".") for file in left)
            assert all(len(data) == (base / file).stat().st_size for file, data in left.items())
            assert threading.active_count() == threads and torch.get_num_threads() == before


def test_ctrl_c_stops_workers_that_are_busy(tmp_path: Path) -> None:
    """Pressed where the user presses it: in the main thread, while workers work."""
    base, slow = write(tmp_path / "m"), threading.Event()
    big = {f"w{number}": torch.randn(64, 64) for number in range(40)}
    save_file(big, base / "model.safetensors")

    def act(rows: slice) -> None:
        if not slow.is_set():
            slow.set()
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)

    begun = [Apart(act) for _ in big]
    with pytest.raises(KeyboardInterrupt):
        run(base, dict(zip(big, begun, strict=True)))
    assert snapshot(tmp_path / "out") == {}
    assert sum(len(edit.applied) for edit in begun) < len(big)


def test_a_disk_that_is_full_for_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = list[int]()

    def copy_range(*args: object) -> None:
        copies.append(1)
        if len(copies) == 3:
            full_disk()

    monkeypatch.setattr(shard, "copy_range", copy_range)
    monkeypatch.setattr(shard, "COPY_BYTES", 16)
    with pytest.raises(OutputError, match="disk full"):
        run(write(tmp_path / "m", 3), {})
    assert snapshot(tmp_path / "out") == {}
