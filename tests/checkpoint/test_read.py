"""Blocks: together they are the tensor, and no block is larger than asked for."""

import os
from pathlib import Path

import pytest
import torch
from picocheckpoint import entry, forge, tensors, write

from abliterate.checkpoint.files import open_checkpoint
from abliterate.checkpoint.header import read_header
from abliterate.checkpoint.read import StoredTensor, bytes_of, iter_blocks, read_tensor
from abliterate.errors import CheckpointError


@pytest.mark.parametrize("name", tensors())
@pytest.mark.parametrize("max_bytes", [1, 40, 1 << 20])
def test_blocks_are_the_tensor(tmp_path: Path, name: str, max_bytes: int) -> None:
    header = open_checkpoint(write(tmp_path / "m")).shards[0]
    info, expected = header.tensors[name], tensors()[name]
    blocks = list(iter_blocks(header, info, max_bytes))
    for rows, block in blocks:
        part = expected[rows] if expected.dim() else expected
        assert block.dtype == expected.dtype and block.shape == part.shape
        assert torch.equal(block.view(-1).view(torch.uint8), part.reshape(-1).view(torch.uint8))
        if expected.dim() > 1:
            assert block.nbytes <= max_bytes or len(block) == 1
    covered = [row for rows, _ in blocks for row in range(rows.start, rows.stop)]
    assert covered == list(range((len(expected) if expected.dim() else 1) if expected.numel() else 0))
    whole = read_tensor(header, info)
    assert whole.dtype == expected.dtype and whole.shape == expected.shape
    assert torch.equal(whole.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


def test_blocks_are_the_readers_own(tmp_path: Path) -> None:
    header = open_checkpoint(write(tmp_path / "m")).shards[0]
    kept = [block for _, block in iter_blocks(header, header.tensors["model.0.out.weight"], 24)]
    assert torch.equal(torch.cat(kept), tensors()["model.0.out.weight"])


def test_a_file_that_became_shorter_is_noticed(tmp_path: Path) -> None:
    header = open_checkpoint(write(tmp_path / "m")).shards[0]
    os.truncate(header.path, header.file_size - 1)
    with pytest.raises(CheckpointError, match=r"model\.safetensors changed"):
        read_tensor(header, header.tensors["model.scale"])


def test_a_file_that_becomes_shorter_between_blocks_is_noticed(tmp_path: Path) -> None:
    header = open_checkpoint(write(tmp_path / "m")).shards[0]
    blocks = iter_blocks(header, header.tensors["model.0.out.weight"], 24)
    next(blocks)
    os.truncate(header.path, header.data_start)
    with pytest.raises(CheckpointError, match=r"model\.safetensors changed"):
        list(blocks)


def test_a_file_that_went_away_is_named(tmp_path: Path) -> None:
    header = open_checkpoint(write(tmp_path / "m")).shards[0]
    header.path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        read_tensor(header, header.tensors["model.scale"])


@pytest.mark.timeout(20)
def test_a_file_that_became_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    header = open_checkpoint(write(tmp_path / "m")).shards[0]
    header.path.unlink()
    os.mkfifo(header.path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors changed"):
        read_tensor(header, header.tensors["model.scale"])


@pytest.mark.parametrize("name", tensors())
def test_a_stored_tensor_is_read_when_asked_for_and_no_file_changes_with_it(tmp_path: Path, name: str) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "m"))
    shard, info = checkpoint.shard_of(name), checkpoint.tensors[name]
    before = shard.path.read_bytes()
    found = StoredTensor(shard, info)[...]
    expected = read_tensor(shard, info)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert bytes_of(found) == bytes_of(expected)
    found.reshape(-1).view(torch.uint8).fill_(7)
    assert shard.path.read_bytes() == before


def test_a_stored_tensor_that_lies_at_an_odd_byte_is_read(tmp_path: Path) -> None:
    data = bytes(range(1, 20))
    header = read_header(
        forge(tmp_path / "odd.safetensors", {"a": entry([3], 0, 3, "BOOL"), "b": entry([2, 2], 3, 19)}, data)
    )
    found = StoredTensor(header, header.tensors["b"])[...]
    assert found.data_ptr() % 4 == 0 and bytes(bytes_of(found)) == data[3:]
