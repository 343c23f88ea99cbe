"""Checkpoint folders: whole ones are opened, anything missing, contradictory or pointing elsewhere is refused."""

import json
import os
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from picocheckpoint import CONFIG, entry, forge, tensors, write

from abliterate.checkpoint.files import MAX_JSON_BYTES, open_checkpoint
from abliterate.checkpoint.jsontext import MAX_DEPTH
from abliterate.errors import CheckpointError

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_a_single_file(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "m"))
    assert [shard.path.name for shard in checkpoint.shards] == ["model.safetensors"]
    assert checkpoint.index is None and checkpoint.config == CONFIG
    assert set(checkpoint.tensors) == set(tensors())
    assert checkpoint.nbytes == (tmp_path / "m/model.safetensors").stat().st_size


def test_shards(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", shards=3)
    checkpoint = open_checkpoint(folder)
    placed = json.loads((folder / INDEX).read_text())["weight_map"]
    assert checkpoint.index == folder / INDEX and len(checkpoint.shards) == 3
    assert {name: checkpoint.shard_of(name).path.name for name in checkpoint.tensors} == placed
    assert checkpoint.nbytes == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    with pytest.raises(CheckpointError, match="no tensor nope"):
        checkpoint.shard_of("nope")


def test_a_snapshot_of_the_hub_cache(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    folder = write(repository / "snapshots" / ("0" * 40), shards=2)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(repository / "blobs" / str(number))
        path.symlink_to(Path("../../blobs") / str(number))
    assert set(open_checkpoint(folder).tensors) == set(tensors())


def _edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/model.safetensors", "sub/model.safetensors", "..", "", ".", "config.json",
     "..\\outside.safetensors", "C:outside.safetensors", "a\0.safetensors", "a\n.safetensors"],
)  # fmt: skip
def test_an_index_may_only_name_files_of_the_folder(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "m", shards=2)
    forge(tmp_path / "outside.safetensors", {"extra": entry([1], 0, 4)}, bytes(4))
    (folder / "sub").mkdir()
    forge(folder / "sub/model.safetensors", {"extra": entry([1], 0, 4)}, bytes(4))
    _edit_index(folder, lambda placed: placed.update(extra=name))
    with pytest.raises(CheckpointError, match=r"index\.json names .* not a plain name"):
        open_checkpoint(folder)


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", shards=2)
    (folder / SECOND).unlink()
    with pytest.raises(CheckpointError, match=f"{INDEX} names the shard {SECOND}, which is missing"):
        open_checkpoint(folder)


def test_a_tensor_of_the_index_that_no_shard_holds(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", shards=2)
    _edit_index(folder, lambda placed: placed.update(ghost=FIRST))
    with pytest.raises(CheckpointError, match=f"places tensor 'ghost' in {FIRST}, which does not hold it"):
        open_checkpoint(folder)


def test_a_tensor_of_a_shard_that_the_index_lacks(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", shards=2)
    _edit_index(folder, lambda placed: placed.pop("model.scale"))
    with pytest.raises(CheckpointError, match=r"holds tensor model\.scale, which .* does not place there"):
        open_checkpoint(folder)


def test_a_tensor_placed_in_the_wrong_shard(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", shards=2)
    _edit_index(folder, lambda p: p.update({"model.scale": SECOND if p["model.scale"] == FIRST else FIRST}))
    with pytest.raises(CheckpointError, match=r"holds tensor model\.scale, which .* does not place there"):
        open_checkpoint(folder)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", shards=2)
    forge(folder / "third.safetensors", {"model.scale": entry([1], 0, 4), "extra": entry([1], 4, 8)}, bytes(8))
    _edit_index(folder, lambda placed: placed.update(extra="third.safetensors"))
    with pytest.raises(CheckpointError, match=r"tensor model\.scale is in .* and in third\.safetensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}', "\xff"]
)
def test_a_damaged_index(tmp_path: Path, text: str) -> None:
    folder = write(tmp_path / "m", shards=2)
    (folder / INDEX).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match="download it again"):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", "[" * 100_000])
def test_a_damaged_config(tmp_path: Path, text: str) -> None:
    folder = write(tmp_path / "m")
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json .*download it again"):
        open_checkpoint(folder)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_checkpoint(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(tmp_path)


def test_only_pickled_weights(tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no safetensors weights, only pytorch_model\.bin; .*save_pretrained"):
        open_checkpoint(folder)


def test_safetensors_of_another_name(tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match=r"only consolidated\.safetensors"):
        open_checkpoint(folder)


def test_two_checkpoints_in_one_folder(tmp_path: Path) -> None:
    folder = write(write(tmp_path / "m"), shards=2)
    with pytest.raises(CheckpointError, match=r"both model\.safetensors and model\.safetensors\.index\.json"):
        open_checkpoint(folder)


def test_an_index_of_the_single_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors(), "model.safetensors")}))
    assert open_checkpoint(folder).index == folder / INDEX


@pytest.mark.parametrize(
    ("part", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"load_in_4bit": True}}, "an unnamed method"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_config": "odd"}, "an unnamed method"),
    ],
)
def test_quantized_checkpoints_are_refused_by_name(tmp_path: Path, part: dict[str, object], method: str) -> None:
    folder = write(tmp_path / "m", config={**CONFIG, **part})
    with pytest.raises(CheckpointError, match=f"is quantized with '{re.escape(method)}'"):
        open_checkpoint(folder)


def test_an_empty_quantization_is_none(tmp_path: Path) -> None:
    open_checkpoint(write(tmp_path / "m", config={**CONFIG, "quantization_config": None}))


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of this machine")
    folder = write(tmp_path / "m")
    (folder / "notes.txt").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"notes\.txt is a link"):
        open_checkpoint(folder)
    (folder / "notes.txt").unlink()
    (folder / "notes").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="notes is a link"):
        open_checkpoint(folder)
    (folder / "notes").unlink()
    (folder / "notes.json").symlink_to("config.json")
    open_checkpoint(folder)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", shards=2)
    os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - 1)
    with pytest.raises(CheckpointError, match=f"{SECOND}.*truncated"):
        open_checkpoint(folder)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", [INDEX, "model.safetensors", "config.json"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "m")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=r"is not a regular file|no config"):
        open_checkpoint(folder)


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    (folder / "notes.txt").symlink_to("notes.txt")
    with pytest.raises(CheckpointError, match=r"notes\.txt is a link to no file"):
        open_checkpoint(folder)


def test_a_name_that_is_too_long_for_the_system_names_no_shard(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", shards=2)
    _edit_index(folder, lambda placed: placed.update(extra="€" * 200 + ".safetensors"))
    with pytest.raises(CheckpointError, match="which is missing"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("refusal_direction.safetensors", "is what a conversion adds"),
        (FIRST.upper().removesuffix("SAFETENSORS") + "safetensors", "differ in case alone"),
    ],
)
def test_shards_that_the_output_could_not_keep_apart(tmp_path: Path, name: str, message: str) -> None:
    folder = write(tmp_path / "m", shards=2)
    forge(folder / name, {"extra": entry([1], 0, 4)}, bytes(4))
    _edit_index(folder, lambda placed: placed.update(extra=name))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_that_is_too_deep_or_too_large(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "m", shards=2)
    content = json.loads((folder / name).read_text())
    for depth, message in ((MAX_DEPTH - 1, None), (MAX_DEPTH, "is nested more than"), (900, "is nested more than")):
        (folder / name).write_text(json.dumps(content | {"deep": json.loads("[" * depth + "]" * depth)}))
        if message is None:
            open_checkpoint(folder)
            continue
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(folder)
    os.truncate(folder / name, MAX_JSON_BYTES + 1)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="is larger than"):
        open_checkpoint(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_folder_that_cannot_be_looked_into(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="File name too long"):
        open_checkpoint(tmp_path / ("x" * 300))
