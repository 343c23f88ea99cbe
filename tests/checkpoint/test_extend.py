"""Headers and indices with tensors added: the rest of them stays as it was, byte for byte where it can."""

import json
from pathlib import Path
from typing import Any

import pytest
from picocheckpoint import CONFIG, entry, forge

from abliterate.checkpoint.extend import TensorCopy, check_copies, extended_header, extended_index
from abliterate.checkpoint.files import Checkpoint, open_checkpoint
from abliterate.checkpoint.header import read_header
from abliterate.errors import CheckpointError

SPACED = b'{"__metadata__" : {"format":"pt"},  "b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}  }  '
HEAD = TensorCopy("b", "head \u00e9")


def test_without_copies_the_header_is_the_same(tmp_path: Path) -> None:
    header = read_header(forge(tmp_path / "a.safetensors", SPACED, bytes(8)))
    assert extended_header(header, []) is header


def test_copies_go_to_the_end_and_the_text_before_them_stays(tmp_path: Path) -> None:
    header = read_header(forge(tmp_path / "a.safetensors", SPACED, bytes(8)))
    longer = extended_header(header, [HEAD, TensorCopy("b", "again")])
    assert longer.raw[8:].startswith(SPACED.rstrip()[:-1].rstrip() + b',"head')
    assert [(i.name, i.dtype, i.shape, i.start, i.end) for i in longer.tensors.values()] == [
        ("b", "F32", (2,), 0, 8),
        ("head \u00e9", "F32", (2,), 8, 16),
        ("again", "F32", (2,), 16, 24),
    ]
    assert longer.metadata == header.metadata and longer.data_start % 8 == 0
    written = tmp_path / "b.safetensors"
    written.write_bytes(longer.raw + bytes(24))
    assert read_header(written).raw == longer.raw and longer.file_size == written.stat().st_size


def test_an_end_that_is_not_aligned_is_refused(tmp_path: Path) -> None:
    entries = {"b": entry([2], 0, 8), "mask": entry([3], 8, 11, "BOOL")}
    header = read_header(forge(tmp_path / "a.safetensors", entries, bytes(11)))
    with pytest.raises(CheckpointError, match=r"a\.safetensors ends at an odd place, so head cannot be put after it"):
        extended_header(header, [TensorCopy("b", "head")])
    assert "copy" in extended_header(header, [TensorCopy("mask", "copy")]).tensors


def indexed(folder: Path, index: dict[str, Any], indent: int | None = 2) -> Checkpoint:
    """Two shards with `b` in the first and `a` in the second, and this index."""
    forge(folder / "1.safetensors", {"b": entry([2], 0, 8)}, bytes(8))
    forge(folder / "2.safetensors", {"a": entry([3], 0, 12)}, bytes(12))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=indent) + "\n")
    return open_checkpoint(folder)


UNSORTED, SORTED = {"b": "1.safetensors", "a": "2.safetensors"}, {"a": "2.safetensors", "b": "1.safetensors"}
COPIES = (TensorCopy("b", "aa"), TensorCopy("a", "c"))


def extended(checkpoint: Checkpoint, copies: tuple[TensorCopy, ...] = COPIES) -> bytes:
    assert checkpoint.index is not None
    return extended_index(checkpoint, checkpoint.index, copies)


@pytest.mark.parametrize(("placed", "order"), [(SORTED, ["a", "aa", "b", "c"]), (UNSORTED, ["b", "a", "aa", "c"])])
def test_the_index_keeps_its_order(tmp_path: Path, placed: dict[str, str], order: list[str]) -> None:
    found = json.loads(extended(indexed(tmp_path, {"weight_map": placed})))
    assert list(found["weight_map"]) == order
    assert found["weight_map"]["aa"] == "1.safetensors" and found["weight_map"]["c"] == "2.safetensors"


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"total_size": 20, "total_parameters": 5}, {"total_size": 40, "total_parameters": 10}),
        ({"total_size": 20.0, "mine": "kept"}, {"total_size": 40.0, "mine": "kept"}),
        ({"total_size": "20"}, {"total_size": "20"}),
        ({}, {}),
        (None, None),
    ],
)
def test_totals_grow_where_there_are_any(tmp_path: Path, metadata: object, expected: object) -> None:
    found = json.loads(extended(indexed(tmp_path, {"metadata": metadata, "weight_map": SORTED, "more": [1]})))
    assert found["metadata"] == expected and found["more"] == [1]
    assert list(found) == ["metadata", "weight_map", "more"]


@pytest.mark.parametrize("indent", [None, 1, 4])
def test_the_manner_of_the_index_stays(tmp_path: Path, indent: int | None) -> None:
    checkpoint = indexed(tmp_path, {"weight_map": SORTED}, indent)
    text = extended(checkpoint).decode()
    assert text == json.dumps(json.loads(text), indent=indent) + "\n"


def test_without_copies_the_index_is_the_same(tmp_path: Path) -> None:
    checkpoint = indexed(tmp_path, {"weight_map": UNSORTED}, 3)
    assert checkpoint.index is not None
    assert extended(checkpoint, ()) == checkpoint.index.read_bytes()


@pytest.mark.parametrize(
    ("copies", "message"),
    [
        ([TensorCopy("nope", "head")], "no tensor nope"),
        ([TensorCopy("a", "b")], "already has a tensor b"),
        ([TensorCopy("a", "head"), TensorCopy("b", "head")], "already has a tensor head"),
    ],
)
def test_copies_that_do_not_fit(tmp_path: Path, copies: list[TensorCopy], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_copies(indexed(tmp_path, {"weight_map": SORTED}), copies)


@pytest.mark.parametrize("total", [10**4300 - 1, 2**63])
def test_a_total_that_is_none_stays(tmp_path: Path, total: int) -> None:
    """Python writes no number of more than 4300 digits."""
    checkpoint = indexed(tmp_path, {"metadata": {"total_size": total}, "weight_map": SORTED})
    assert checkpoint.index is not None
    content = json.loads(extended_index(checkpoint, checkpoint.index, [TensorCopy("a", "head")]))
    assert content["metadata"] == {"total_size": total}
