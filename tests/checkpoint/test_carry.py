"""Carrying over: everything that is not weights arrives byte for byte, and the configuration keeps its form."""

import errno
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from picocheckpoint import entry, forge, snapshot, write

from abliterate.checkpoint.carry import carry_over, update_config
from abliterate.checkpoint.files import open_checkpoint
from abliterate.errors import CheckpointError, OutputError

OTHERS = {
    "tokenizer.json": b"\x00any bytes\xff",
    "modeling_own.py": b"class Own: ...\n",
    "code/deeper/configuration_own.py": b"own = 1\n",
    ".gitattributes": b"*.safetensors filter=lfs\n",
    "figures/plot.png": b"\x89PNG",
    "empty.txt": b"",
}
OTHER_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model-Q4.gguf", "original/consolidated.00.pth",
                 "onnx/model.onnx", "tf_model.h5", "flax_model.msgpack", "core.mlpackage/Data/weight",
                 "consolidated.safetensors", "old/consolidated-1.safetensors")  # fmt: skip


def put(folder: Path, name: str, content: bytes = b"x") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def carried(base: Path, out: Path) -> tuple[str, ...]:
    out.mkdir()
    return carry_over(open_checkpoint(base), out)


@pytest.mark.parametrize("shards", [1, 2])
def test_files_of_any_kind_and_depth(tmp_path: Path, shards: int, caplog: pytest.LogCaptureFixture) -> None:
    base = write(tmp_path / "m", shards)
    for name, content in OTHERS.items():
        put(base, name, content)
    put(base, ".git/config")
    put(base, ".cache/huggingface/download/x.metadata")
    names = carried(base, tmp_path / "out")
    expected = OTHERS | {"config.json": (base / "config.json").read_bytes()}
    assert snapshot(tmp_path / "out") == expected
    assert names == tuple(sorted(expected))
    assert not caplog.records


@pytest.mark.parametrize("name", OTHER_WEIGHTS)
def test_weights_in_other_formats_are_left_out_with_a_warning(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    base = write(tmp_path / "m")
    put(base, name)
    assert carried(base, tmp_path / "out") == ("config.json",)
    assert snapshot(tmp_path / "out").keys() == {"config.json"}
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert caplog.messages == [f"{name} is left out: unedited weights in another format"]


def test_names_of_folders_above_the_checkpoint_mean_nothing(tmp_path: Path) -> None:
    base = write(tmp_path / "consolidated.mlpackage" / "m")
    forge(base / "vision.safetensors", {"other": entry([1], 0, 4)}, bytes(4))
    assert carried(base, tmp_path / "out") == ("config.json", "vision.safetensors")


def test_a_second_copy_of_the_weights_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = write(tmp_path / "m")
    shutil.copy(base / "model.safetensors", base / "again.safetensors")
    put(base, "variant.safetensors.index.json", b"{}")
    base.joinpath("model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(open_checkpoint_names(base), "model.safetensors")})
    )
    put(base, "odd.safetensors", b"not safetensors at all")
    assert carried(base, tmp_path / "out") == ("config.json", "odd.safetensors")
    assert caplog.messages == [
        "again.safetensors is left out: it repeats tensors of the checkpoint, unedited",
        "variant.safetensors.index.json is left out: an index of weights that are not carried over",
    ]


def open_checkpoint_names(base: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(base / "model.safetensors", "pt") as file:
        return list(file.keys())


def test_what_is_no_file_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = write(tmp_path / "m")
    os.mkfifo(base / "pipe")
    assert carried(base, tmp_path / "out") == ("config.json",)
    assert caplog.messages == ["pipe is left out: it is not a regular file"]


def test_files_that_the_output_writes_itself_are_kept_beside(tmp_path: Path) -> None:
    base = write(tmp_path / "m")
    own = ("README.md", "abliteration.json", "selection.png", "refusal_direction.safetensors")
    for name in (*own, "docs/README.md"):
        put(base, name, name.encode())
    names = carried(base, tmp_path / "out")
    found = snapshot(tmp_path / "out")
    assert {name: found[name].decode() for name in found if name != "config.json"} == {
        "README.base.md": "README.md",
        "abliteration.base.json": "abliteration.json",
        "selection.base.png": "selection.png",
        "refusal_direction.base.safetensors": "refusal_direction.safetensors",
        "docs/README.md": "docs/README.md",
    }
    assert names == tuple(sorted(found))


def test_names_that_are_taken_move_on(tmp_path: Path) -> None:
    base = write(tmp_path / "m")
    for name in ("README.md", "README.base.md", "README.base.base.md"):
        put(base, name, name.encode())
    carried(base, tmp_path / "out")
    found = {name: data for name, data in snapshot(tmp_path / "out").items() if name != "config.json"}
    assert found == {
        "README.base.md": b"README.md",
        "README.base.base.md": b"README.base.md",
        "README.base.base.base.md": b"README.base.base.md",
    }


def test_links_within_the_checkpoint_become_files(tmp_path: Path) -> None:
    base = write(tmp_path / "m")
    put(base, "code/a.py", b"a")
    (base / "b.py").symlink_to("code/a.py")
    assert carried(base, tmp_path / "out") == ("b.py", "code/a.py", "config.json")
    assert not (tmp_path / "out/b.py").is_symlink()
    assert (tmp_path / "out/b.py").read_bytes() == b"a"


def test_links_of_the_hub_cache_become_files(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    base = write(repository / "snapshots" / ("0" * 40))
    put(base, "code/own.py", b"own")
    before = snapshot(base)
    (repository / "blobs").mkdir()
    for number, name in enumerate(before):
        (base / name).rename(repository / "blobs" / str(number))
        (base / name).symlink_to(repository / "blobs" / str(number))
    carried(base, tmp_path / "out")
    assert snapshot(tmp_path / "out") == {name: data for name, data in before.items() if name != "model.safetensors"}
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


@pytest.mark.parametrize("target", ["secret", ".", "gone", "blobs/secret"])
def test_links_out_of_the_checkpoint_that_came_later_are_refused(tmp_path: Path, target: str) -> None:
    put(tmp_path, "secret")
    put(tmp_path, "blobs/secret")
    checkpoint = open_checkpoint(write(tmp_path / "m"))
    (tmp_path / "m/notes.txt").symlink_to(tmp_path / target)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"notes\.txt is a link to no file inside the checkpoint"):
        carry_over(checkpoint, tmp_path / "out")
    assert snapshot(tmp_path / "out") == {}


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write(tmp_path / "m")

    def copyfile(path: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: Permission denied"):
        carried(base, tmp_path / "out")


@pytest.mark.parametrize("names", [(), ("source",), ("source", None, "target")])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> None:
    """However the system says it: about no file, about the open target, or about both, as a copy in the kernel does."""
    base = write(tmp_path / "m")

    def copyfile(path: Path, target: Path) -> None:
        about = [{"source": str(path), "target": str(target)}.get(name or "") for name in names]
        error = OSError(errno.ENOSPC, "No space left on device", *(about if len(about) > 1 else ()))
        raise error

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    with pytest.raises(OutputError, match=r"disk full \(No space left on device\): [\d,]+ bytes are needed in .*out"):
        carried(base, tmp_path / "out")


ORDERED: dict[str, Any] = {"z": 1, "tie_word_embeddings": True, "a": {"y": [1, 2], "tie": None}, "é": "ü"}


@pytest.mark.parametrize("indent", [None, 1, 2, 4, "\t"])
@pytest.mark.parametrize("ending", ["", "\n"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_changed_config_keeps_order_indent_and_ending(
    tmp_path: Path, indent: int | str | None, ending: str, ascii_only: bool
) -> None:
    def text(config: dict[str, Any]) -> bytes:
        return (json.dumps(config, indent=indent, ensure_ascii=ascii_only) + ending).encode()

    path = put(tmp_path, "config.json", text(ORDERED))
    update_config(tmp_path, {"tie_word_embeddings": False, "a.tie": False, "new": 3})
    nested = {**ORDERED["a"], "tie": False}
    assert path.read_bytes() == text({**ORDERED, "tie_word_embeddings": False, "a": nested, "new": 3})


def test_a_part_of_the_config_that_is_not_there(tmp_path: Path) -> None:
    put(tmp_path, "config.json", b'{"a": 3}')
    for key in ("text_config.tie", "a.tie"):
        with pytest.raises(CheckpointError, match=rf"has no part {key.partition('.')[0]} to set {key} in"):
            update_config(tmp_path, {key: False})
    assert (tmp_path / "config.json").read_bytes() == b'{"a": 3}'


def test_half_a_character_in_the_config_stays(tmp_path: Path) -> None:
    path = put(tmp_path, "config.json", '{"a": "é\\ud800", "tie": true}'.encode())
    update_config(tmp_path, {"tie": False})
    assert path.read_bytes() == '{"a": "é\\ud800", "tie": false}'.encode()


def test_names_that_would_move_the_cursor_are_escaped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = write(tmp_path / "m")
    put(base, "\x1b[2J\n.bin")
    assert carried(base, tmp_path / "out") == ("config.json",)
    assert caplog.messages == [r"\x1b[2J .bin is left out: unedited weights in another format"]


def test_what_is_there_already_is_not_replaced(tmp_path: Path) -> None:
    """As where the file system of OUT takes a name of the base for that of a shard, but for its case."""
    checkpoint = open_checkpoint(write(tmp_path / "m"))
    put(tmp_path / "m", "notes.txt")
    put(tmp_path / "out", "notes.txt", b"mine")
    with pytest.raises(OutputError, match=r"notes\.txt is there already"):
        carry_over(checkpoint, tmp_path / "out")
    assert (tmp_path / "out/notes.txt").read_bytes() == b"mine"
