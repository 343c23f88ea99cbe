"""What is pushed of a folder, and which folders are not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from abliterate.errors import CheckpointError
from abliterate.hub.parcel import Parcel, pack
from abliterate.hub.parcel import checked as checked_parcel
from abliterate.progress import SILENT, Progress


def checked(folder: Path, progress: Progress) -> Parcel:
    return checked_parcel(pack(folder), progress)


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    return shutil.copytree(converted, tmp_path / "copy")


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / "abliteration.json").read_text())
    change(manifest)
    (folder / "abliteration.json").write_text(json.dumps(manifest))


def test_everything_that_a_conversion_writes_is_pushed(folder: Path) -> None:
    parcel = checked(folder, SILENT)
    assert {item.name for item in parcel.items} == {path.name for path in folder.iterdir()}
    assert parcel.left_out == () and parcel.hashed
    assert {"README.md", "README.base.md", "refusal_direction.safetensors"} <= {item.name for item in parcel.items}


def test_what_is_not_accounted_for_is_left_out(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / "optimizer.safetensors").write_bytes(b"x")
    (folder / "sub").mkdir()
    (folder / "sub" / "model.gguf").write_bytes(b"x")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_bytes(b"x")
    parcel = checked(folder, SILENT)
    assert parcel.left_out == ("notes.txt", "optimizer.safetensors", "sub/model.gguf")


@pytest.mark.parametrize("place", [-1, 8 + 3000])
def test_a_flipped_bit_is_found(folder: Path, place: int) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[place] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"not what its manifest says: {shard.name}; convert"):
        checked(folder, SILENT)


def test_another_direction_is_found(folder: Path) -> None:
    file = folder / "refusal_direction.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match=r"manifest says: refusal_direction\.safetensors"):
        checked(folder, SILENT)


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "refusal_direction.safetensors"])
def test_a_missing_file_is_told(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"lacks files that its manifest accounts for: {name}"):
        checked(folder, SILENT)


def test_a_shard_that_the_manifest_does_not_know(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest["output"]["shards"].pop())
    with pytest.raises(CheckpointError, match="not what its manifest says: model-"):
        checked(folder, SILENT)


def test_a_folder_that_was_not_converted(folder: Path) -> None:
    (folder / "abliteration.json").unlink()
    with pytest.raises(CheckpointError, match="was not made by `abliterate convert`"):
        checked(folder, SILENT)


def test_a_failed_conversion(folder: Path) -> None:
    failed = folder.rename(folder.with_name("out.failed"))
    with pytest.raises(CheckpointError, match="certificate failed"):
        checked(failed, SILENT)


def fails(manifest: dict[str, Any]) -> None:
    manifest["certificate"] |= {"holds": False, "exact": False, "claim": "does not hold: worse"}


def has_failed_writers(manifest: dict[str, Any]) -> None:
    manifest["certificate"] |= {"holds": False, "exact": False, "claim": "not exact: half is left"}
    manifest["certificate"]["writers"]["failed"] = ["model.embed_tokens.weight"]


def warns(manifest: dict[str, Any]) -> None:
    manifest["warnings"] = ["certificate failed: the direction is back at layer 1"]


@pytest.mark.parametrize("change", [fails, has_failed_writers, warns])
def test_a_certificate_that_failed(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Whatever the folder is called by then."""
    edit_manifest(folder, change)
    with pytest.raises(CheckpointError, match=r"the certificate of .*copy failed"):
        checked(folder, SILENT)


def test_what_leaves_something_on_purpose_is_pushed(folder: Path) -> None:
    claim = {"holds": False, "exact": False, "claim": "not exact: half of the direction is left"}
    edit_manifest(folder, lambda manifest: manifest["certificate"].update(claim))
    assert checked(folder, SILENT).items


def test_without_hashes_sizes_are_compared(folder: Path) -> None:
    def drop(manifest: dict[str, Any]) -> None:
        manifest["output"]["hashed"] = False
        for shard in manifest["output"]["shards"]:
            shard["sha256"] = None

    edit_manifest(folder, drop)
    assert not checked(folder, SILENT).hashed
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    edit_manifest(folder, lambda manifest: manifest["output"]["shards"][0].update(bytes=1))
    with pytest.raises(CheckpointError, match=shard.name):
        checked(folder, SILENT)


@pytest.mark.parametrize("part", ["output", "certificate", "warnings"])
def test_a_damaged_manifest(folder: Path, part: str) -> None:
    edit_manifest(folder, lambda manifest: manifest.update({part: 3}))
    with pytest.raises(CheckpointError, match="is damaged"):
        checked(folder, SILENT)


def test_names_that_lead_out_of_the_folder_push_nothing(folder: Path) -> None:
    (folder.parent / "secret").write_text("mine")
    edit_manifest(folder, lambda manifest: manifest["output"]["files"].append("../secret"))
    with pytest.raises(CheckpointError, match=r"lacks files that its manifest accounts for: \.\./secret"):
        checked(folder, SILENT)


def test_a_link_out_of_the_folder(folder: Path) -> None:
    (folder.parent / "secret").write_text("{}")
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").symlink_to(folder.parent / "secret")
    with pytest.raises(CheckpointError, match="is a link to no file inside the checkpoint"):
        checked(folder, SILENT)
