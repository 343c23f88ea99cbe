"""A patch is data from strangers: it is refused in one line, or read, and nothing it names is ever a place."""

import json
import re
import shutil
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from abliterate import conversion
from abliterate.checkpoint.header import read_header
from abliterate.errors import PatchError
from abliterate.patch.applying import apply_patch
from abliterate.patch.file import read_patch
from tests import pico
from tests.commandline import names, snapshot
from tests.fuzz.checks import confined, refusal

FUZZ = settings(
    max_examples=60, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and its patch."""
    folder = tmp_path_factory.mktemp("file")
    pico.save(folder / "base", "llama", dtype=torch.bfloat16)
    direction = pico.direction_file(folder / "r.safetensors")
    file = folder / "a.patch"
    conversion.convert(str(folder / "base"), folder / "edited", direction=direction, evaluate=False, patch=file)
    return folder


def parts(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str], dict[str, Any]]:
    header = read_header(file)
    return load_file(file), dict(header.metadata), json.loads(header.metadata["patch"])


def packed(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(zlib.compress(content, 9)), dtype=torch.uint8)


Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors, about: about.update(schema="abliteration-patch/2"), "use the version that made it"),
        (lambda tensors, about: about["edit"].update(head="gone"), "neither tied, untied nor separate"),
        (lambda tensors, about: about["edit"].update(head="untied"), "cannot become"),
        (lambda tensors, about: about["base"].update(commit="--upload-pack"), "commit"),
        (lambda tensors, about: about["base"].update(files={}), "lists no files"),
        (lambda tensors, about: about["base"]["files"].pop("config.json"), "does not come out|would|nothing was"),
        (lambda tensors, about: about["base"]["files"].update({"../r.safetensors": _RECORD}), "has no ../r"),
        (lambda tensors, about: about["output"].update({"/etc/x": _RECORD}), "/etc/x does not come out"),
        (lambda tensors, about: about["output"]["config.json"].update(sha256="0" * 64), "config.json does not come"),
        (lambda tensors, about: about["output"]["config.json"].update(bytes=-1), "no hash and size"),
        (lambda tensors, about: about["output"].pop("model.safetensors"), "names no hash for model.safetensors"),
        (lambda tensors, about: about["tool"].update(torch=["x"]), "no text"),
        (lambda tensors, about: tensors.update({"files/../../x": packed(b"x")}), "it holds '../../x'"),
        (lambda tensors, about: tensors.update({"files/config.json": packed(b"{}")}), "it holds 'config.json'"),
        (lambda tensors, about: tensors.update({"files/README.md": packed(bytes(30_000_000))}), "too large"),
        (lambda tensors, about: tensors.update({"files/README.md": packed(b"x")[:-3]}), "too large, or cut off"),
        (lambda tensors, about: tensors.update({"files/README.md": torch.zeros(9)}), "no packed file"),
        (lambda tensors, about: tensors.update({"targets": packed(b"model.norm.weight")}), "edits other tensors"),
        (lambda tensors, about: tensors.pop("targets"), "targets"),
        (lambda tensors, about: tensors.pop("files/abliteration.json"), "lacks"),
        (lambda tensors, about: tensors.pop("direction"), "no tensor named direction"),
        (lambda tensors, about: tensors.update(direction=torch.zeros(48)), "direction is zero"),
        (lambda tensors, about: tensors["direction"].mul_(-0.5), "does not come out"),
    ],
)
def test_what_is_wrong_is_told(room: Path, change: Change, said: str, tmp_path: Path) -> None:
    tensors, metadata, about = parts(room / "a.patch")
    change(tensors, about)
    save_file(tensors, tmp_path / "b.patch", {**metadata, "patch": json.dumps(about)})
    before = snapshot(room)
    with confined(tmp_path):
        refusal(lambda: read_patch(tmp_path / "b.patch"))
    line = refusal(lambda: apply_patch(tmp_path / "b.patch", str(room / "base"), tmp_path / "out"))
    assert line is not None and re.search(said, line), line
    assert names(tmp_path) == ["b.patch"] and snapshot(room) == before


_RECORD = {"sha256": "0" * 64, "bytes": 1}


def test_what_is_unpacked_is_bounded(room: Path, tmp_path: Path) -> None:
    """A gigabyte of zeros packs into one megabyte."""
    tensors, metadata, _ = parts(room / "a.patch")
    pack = zlib.compressobj(9)
    bomb = b"".join(pack.compress(bytes(1 << 20)) for _ in range(1024)) + pack.flush()
    tensors["files/README.md"] = torch.frombuffer(bytearray(bomb), dtype=torch.uint8)
    save_file(tensors, tmp_path / "b.patch", metadata)
    tracemalloc.start()
    with pytest.raises(PatchError, match="too large"):
        read_patch(tmp_path / "b.patch")
    assert tracemalloc.get_traced_memory()[1] < 100_000_000
    tracemalloc.stop()


@given(data=st.data())
@FUZZ
def test_any_bytes(room: Path, data: st.DataObject) -> None:
    """Bytes changed, cut out or put in, most of them in the header."""
    content = bytearray((room / "a.patch").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 4000))
        gone = data.draw(st.integers(0, 8))
        content[start : start + gone] = data.draw(st.binary(max_size=8))
    file = room / "fuzzed.patch"
    file.write_bytes(content)
    refusal(lambda: read_patch(file))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(data=st.data())
@FUZZ
def test_any_description(room: Path, data: st.DataObject) -> None:
    """A value anywhere in the description replaced by any other, or its key taken away."""
    tensors, metadata, about = parts(room / "a.patch")
    place: Any = about
    while True:
        key = data.draw(st.sampled_from(sorted(place)))
        if not isinstance(place[key], dict) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    if data.draw(st.booleans()):
        place[key] = data.draw(JSON)
    else:
        del place[key]
    file, out = room / "fuzzed.patch", room / "out"
    save_file(tensors, file, {**metadata, "patch": json.dumps(about)})
    line = refusal(lambda: apply_patch(file, str(room / "base"), out))
    assert out.exists() == (line is None)
    shutil.rmtree(out, ignore_errors=True)


@given(data=st.data())
@FUZZ
def test_any_manifest(room: Path, data: st.DataObject) -> None:
    """The plots are drawn from it."""
    tensors, metadata, about = parts(room / "a.patch")
    manifest = json.loads((room / "edited" / "abliteration.json").read_text())
    candidate = {"position": -1, "layer": 1, "bypass": 0.1, "induce": 0.1, "kl": 0.1, "status": "picked", "prompts": 1}
    manifest["selection"] = {"candidates": [candidate], "method": "screened", "relaxed": False} | data.draw(
        st.dictionaries(st.sampled_from(["candidates", "pick", "thresholds", "baseline", "reason"]), JSON)
    )
    candidate[data.draw(st.sampled_from(sorted(candidate)))] = data.draw(JSON)
    content = json.dumps(manifest).encode()
    tensors["files/abliteration.json"], about["redrawn"] = packed(content), ["selection.png"]
    file, out = room / "fuzzed.patch", room / "out"
    save_file(tensors, file, {**metadata, "patch": json.dumps(about)})
    assert refusal(lambda: apply_patch(file, str(room / "base"), out)) is not None
    assert not out.exists()
