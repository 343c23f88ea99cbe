"""Headers: what the safetensors library writes is read exactly, and nothing forged gets through."""

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from picocheckpoint import entry, forge, tensors
from safetensors import safe_open
from safetensors.torch import save_file

from abliterate.checkpoint import regular
from abliterate.checkpoint.header import DTYPES, MAX_HEADER_BYTES, parse_header, read_header
from abliterate.errors import CheckpointError


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("valid") / "model.safetensors"
    save_file(tensors(), path, metadata={"format": "pt"})
    return path


def test_a_header_says_what_the_library_says(valid: Path) -> None:
    header = read_header(valid)
    made = tensors()
    assert set(header.tensors) == set(made)
    assert header.metadata == {"format": "pt"}
    assert header.file_size == valid.stat().st_size
    assert valid.read_bytes().startswith(header.raw) and header.data_start == len(header.raw)
    for name, info in header.tensors.items():
        assert (info.name, info.shape) == (name, tuple(made[name].shape))
        assert DTYPES[info.dtype] == made[name].dtype
        assert (info.numel, info.nbytes) == (made[name].numel(), made[name].nbytes)


def test_tensors_are_in_the_order_of_the_data(valid: Path) -> None:
    starts = [info.start for info in read_header(valid).tensors.values()]
    assert starts == sorted(starts)
    assert list(read_header(valid).tensors) != sorted(read_header(valid).tensors)


GOOD = entry([2], 0, 8)
FORGED: dict[str, tuple[object, int, str]] = {
    "not JSON": (b"{nonsense", 0, "corrupt header"),
    "not UTF-8": (b'{"\xff\xfe":1}', 0, "corrupt header"),
    "a list": (b"[]", 0, "not a JSON object"),
    "leading space": (b' {"a":1}', 0, "not a JSON object"),
    "two values": (b"{} {}", 0, "corrupt header"),
    "too deep": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 0, "corrupt header"),
    "a number of 5000 digits": (b'{"a":' + b"9" * 5000 + b"}", 0, "corrupt header"),
    "a tensor twice": (b'{"a":%s,"a":%s}' % ((json.dumps(GOOD).encode(),) * 2), 8, "appears twice"),
    "a field twice": (b'{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}', 8, "appears twice"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, 0, "__metadata__"),
    "metadata of no kind": ({"__metadata__": []}, 0, "__metadata__"),
    "no entry": ({"a": 3}, 0, "'a' must have dtype"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "'a' must have dtype"),
    "something more": ({"a": {**GOOD, "strides": [1]}}, 8, "'a' must have dtype"),
    "unknown dtype": ({"a": entry([2], 0, 8, "F4")}, 8, "dtype 'F4'"),
    "dtype of no kind": ({"a": {**GOOD, "dtype": ["F32"]}}, 8, "dtype"),
    "negative size": ({"a": {**GOOD, "shape": [-2]}}, 8, "shape"),
    "size that is no whole number": ({"a": {**GOOD, "shape": [2.0]}}, 8, "shape"),
    "size that is a truth": ({"a": {**GOOD, "shape": [True]}}, 8, "shape"),
    "shape of no kind": ({"a": {**GOOD, "shape": "2"}}, 8, "shape"),
    "size minus zero": (b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', 0, "corrupt header"),
    "half a surrogate in metadata": (b'{"__metadata__":{"a":"\\ud800"}}', 0, "half a character"),
    "too many dimensions": ({"a": {**GOOD, "shape": [1] * 100_000}}, 8, "shape"),
    "too many elements": ({"a": entry([2**62, 2**62, 0], 0, 0)}, 0, "too many elements"),
    "offsets backwards": ({"a": {**GOOD, "data_offsets": [8, 0]}}, 8, "bytes by its offsets"),
    "negative offsets": ({"a": {**GOOD, "data_offsets": [-8, 0]}}, 8, "data_offsets"),
    "three offsets": ({"a": {**GOOD, "data_offsets": [0, 8, 8]}}, 8, "data_offsets"),
    "offsets beyond 64 bits": ({"a": {**GOOD, "data_offsets": [2**64, 2**64 + 8]}}, 8, "data_offsets"),
    "shape and offsets differ": ({"a": entry([3], 0, 8)}, 8, "8 bytes by its offsets and 12 by its shape"),
    "overlapping": ({"a": GOOD, "b": entry([2], 4, 12)}, 12, "tensor 'b' overlaps"),
    "the same bytes twice": ({"a": GOOD, "b": GOOD}, 8, "tensor 'b' overlaps"),
    "a gap": ({"a": GOOD, "b": entry([1], 12, 16)}, 16, "tensor 'b' leaves a gap"),
    "a gap at the start": ({"a": entry([1], 4, 8)}, 8, "tensor 'a' leaves a gap"),
    "data cut short": ({"a": GOOD}, 7, "truncated"),
    "data left over": ({"a": GOOD}, 9, "belong to no tensor"),
    "half a surrogate": (b'{"\\ud800":%s}' % json.dumps(GOOD).encode(), 8, "unprintable"),
    "line feed in a name": ({"a\nb": GOOD}, 8, "unprintable"),
}  # fmt: skip


@pytest.mark.parametrize("case", FORGED)
def test_forged_headers_are_refused_by_name(tmp_path: Path, case: str) -> None:
    entries, size, message = FORGED[case]
    path = forge(tmp_path / "model.safetensors", entries, bytes(size))
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800


@pytest.mark.parametrize("size", [0, 7, 8, 9, 200])
def test_truncated_headers(tmp_path: Path, valid: Path, size: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(valid.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="download it again"):
        read_header(path)


def test_a_git_lfs_pointer_is_called_that(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 12\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        read_header(path)


@pytest.mark.parametrize("claimed", [90_000_000, MAX_HEADER_BYTES + 1, 2**62, 2**64 - 1])
def test_a_claimed_size_allocates_nothing(tmp_path: Path, claimed: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(claimed.to_bytes(8, "little") + b"{}")
    if claimed == MAX_HEADER_BYTES + 1:
        os.truncate(path, 2 * MAX_HEADER_BYTES)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="claims a header"):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (tmp_path, fifo, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match=path.name):
            read_header(path)


@pytest.mark.timeout(20)
def test_what_becomes_a_pipe_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    check, seen = regular._check, list[int]()

    def late(path: Path, mode: int) -> None:
        seen.append(mode)
        if len(seen) > 1:
            check(path, mode)

    monkeypatch.setattr(regular, "_check", late)
    with pytest.raises(CheckpointError, match="is not a regular file"):
        read_header(tmp_path / "model.safetensors")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4", ""]) | JSON_VALUES,
        "shape": st.lists(st.integers(-1, 4), max_size=4) | JSON_VALUES,
        "data_offsets": st.lists(st.integers(-1, 64), min_size=2, max_size=2) | JSON_VALUES,
    }
)


def _same_as_library(path: Path) -> None:
    """Either refused in one line that names the file, or read as the library reads it."""
    try:
        header = read_header(path)
    except CheckpointError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(header.tensors)
        for name, info in header.tensors.items():
            assert tuple(file.get_slice(name).get_shape()) == info.shape
    assert parse_header(path, header.raw, header.file_size) == header


ANY_EXAMPLES = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@ANY_EXAMPLES
@given(st.dictionaries(st.text(max_size=3), ENTRIES | JSON_VALUES, max_size=3), st.integers(0, 64))
def test_any_header(tmp_path: Path, entries: dict[str, Any], size: int) -> None:
    _same_as_library(forge(tmp_path / "any.safetensors", entries, bytes(size)))


@ANY_EXAMPLES
@given(st.data())
def test_any_damage(tmp_path: Path, valid: Path, data: st.DataObject) -> None:
    content = bytearray(valid.read_bytes())
    header = int.from_bytes(content[:8], "little") + 8
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, header))
        end = start + data.draw(st.integers(0, 3))
        content[start:end] = data.draw(st.binary(max_size=3) | st.sampled_from([b"0", b"1", b"9", b"}", b'"', b","]))
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    _same_as_library(path)
