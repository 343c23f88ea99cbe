"""Anything at all as a checkpoint's files: one line of refusal, or what the safetensors library reads; never more.

`FUZZ_EXAMPLES=100000 pytest tests/checkpoint/test_fuzz.py` looks further, with other inputs every time.
"""

import contextlib
import json
import math
import os
import shutil
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from picocheckpoint import CONFIG, Scaled, write
from safetensors import deserialize
from safetensors.torch import save

import abliterate
from abliterate.architecture.blueprint import read_blueprint
from abliterate.checkpoint.carry import carry_over, update_config
from abliterate.checkpoint.files import open_checkpoint, read_json
from abliterate.checkpoint.header import DTYPES
from abliterate.checkpoint.rewrite import TensorCopy, rewrite_checkpoint
from abliterate.direction.files import load_direction
from abliterate.measuring import _recorded_tokens
from abliterate.publish.manifest import MANIFEST_NAME, manifest_schema
from abliterate.verification import _recorded
from tests.fuzz.checks import check_header, confined, read_all, refusal

pytestmark = pytest.mark.timeout(120)
OWN = Path(abliterate.__file__).parent
"""The schema of a manifest lies there."""
MORE = int(os.environ.get("FUZZ_EXAMPLES", "0"))


def fuzz(examples: int) -> settings:
    """The same examples every time, so that a change is tested and not its luck; others where more are asked for."""
    return settings(
        max_examples=MORE or examples,
        derandomize=not MORE,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@dataclass(frozen=True)
class Raw:
    """JSON text that no value gives."""

    text: str


def render(value: Any) -> str:
    """JSON of nested values, an object as a tuple of pairs, so that a key can be there twice."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, tuple):
        return "{" + ",".join(f"{json.dumps(key)}:{render(inner)}" for key, inner in value) + "}"
    return "[" + ",".join(map(render, value)) + "]" if isinstance(value, list) else json.dumps(value)


@contextmanager
def little_memory(size: int, more: int = 400_000) -> Iterator[None]:
    """Fails where more is allocated than a file of `size` bytes is good for, in Python or by torch."""
    asked, empty = [0], torch.empty

    def counted(*sizes: Any, **given: Any) -> torch.Tensor:
        made = empty(*sizes, **given)
        asked[0] += 0 if made.is_meta else made.untyped_storage().nbytes()
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", counted)
        tracemalloc.start()
        try:
            yield
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 40 * size + more, peak
    assert asked[0] <= 2 * size + more, asked


def any_text(most: int = 6) -> st.SearchStrategy[str]:
    """Control characters, halves of surrogate pairs and what turns text around included."""
    return st.text(st.characters(exclude_categories=()), max_size=most)


NAMES = (
    st.sampled_from(
        [
            "",
            "x",
            "weight",
            "__metadata__",
            "a\nb",
            "\x1b[2J",
            "\ud800",
            "\u202eabc",
            "\0",
            "é",
            "x" * 5000,
            "../x",
            "𝕏",
        ]
    )
    | any_text()
)
NUMBERS = st.sampled_from(
    [0, 1, 2, 8, -1, 7, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**400, True, 0.5, 1e300,
     None, "8", *map(Raw, ("-0", "1e2", "1.0", "NaN", "-Infinity", "1E400", "9" * 5000, "0x8", "08", "", "+1"))]
) | st.integers(-3, 200)  # fmt: skip
DEPTHS = st.sampled_from([1, 60, 66, *range(900, 1001, 9), 5000]).map(lambda depth: Raw("[" * depth + "]" * depth))
ODD = NUMBERS | NAMES | DEPTHS | st.sampled_from([[], (), [[]], [()], (("a", ()),), [1] * 65])


@st.composite
def shards(draw: st.DrawFn) -> bytes:
    """A well-formed file, and then damaged in up to three ways."""
    entries: list[Any] = []
    end = 0
    for number in range(draw(st.integers(0, 4))):
        dtype, shape = draw(st.sampled_from(sorted(DTYPES))), draw(st.lists(st.integers(0, 3), max_size=3))
        size = math.prod(shape) * DTYPES[dtype].itemsize
        name = draw(st.just(f"w{number}") | NAMES)
        entries.append((name, (("dtype", dtype), ("shape", shape), ("data_offsets", [end, end + size]))))
        end += size
    if draw(st.booleans()):
        entries.insert(0, ("__metadata__", tuple(draw(st.lists(st.tuples(NAMES, NAMES | NAMES | ODD), max_size=3)))))
    for _ in range(draw(st.integers(0, 2))):
        entries = damaged(draw, entries)
    data = bytes(i % 251 for i in range(end))
    return draw(bent(lengthened(tuple(entries), " " * draw(st.integers(0, 8))) + data))


def lengthened(entries: Any, padding: str = "") -> bytes:
    """A header with its length in front."""
    text = (render(entries) + padding).encode()
    return len(text).to_bytes(8, "little") + text


def damaged(draw: st.DrawFn, entries: list[Any]) -> list[Any]:
    """One entry twice, gone, under another name or with something else in it."""
    if not entries:
        return [(draw(NAMES), draw(ODD))]
    place = draw(st.integers(0, len(entries) - 1))
    name, entry = entries[place]
    ways: list[Callable[[], list[Any]]] = [
        lambda: [(name, entry)] * 2,
        list,
        lambda: [(draw(NAMES), entry)],
        lambda: [(name, draw(ODD))],
    ]
    if isinstance(entry, tuple) and len(entry) == 3:
        field = draw(st.integers(0, 2))
        key, value = entry[field]
        other = draw(ODD | st.lists(NUMBERS, max_size=3) | st.just(value + value if isinstance(value, list) else value))
        ways.append(lambda: [(name, (*entry[:field], (key, other), *entry[field + 1 :]))])
        ways.append(lambda: [(name, (*entry, (draw(st.sampled_from(["dtype", "more"])), value)))])
    return entries[:place] + draw(st.sampled_from(ways))() + entries[place + 1 :]


@st.composite
def bent(draw: st.DrawFn, content: bytes) -> bytes:
    """Cut short, longer, with another length in front, with bytes changed; most often as it is."""
    way = draw(st.sampled_from(["", "", "", "", "cut", "longer", "length", "bytes", "other"]))
    if way == "cut":
        return content[: draw(st.integers(0, len(content)))]
    if way == "longer":
        return content + draw(st.binary(min_size=1, max_size=9))
    if way == "length":
        said = int.from_bytes(content[:8], "little")
        wrong = st.sampled_from([0, 1, 2, said - 1, said + 1, len(content), 10**8, 10**8 + 1, 2**63, 2**64 - 1])
        return (draw(wrong) % 2**64).to_bytes(8, "little") + content[8:]
    if way == "bytes" and content:
        place = draw(st.integers(0, len(content) - 1))
        return content[:place] + draw(st.binary(max_size=3)) + content[place + draw(st.integers(0, 3)) :]
    return draw(st.binary(max_size=40)) if way == "other" else content


def test_any_shard(tmp_path: Path) -> None:
    seen: Counter[bool] = Counter()

    @fuzz(350)
    @example(lengthened((("w", (("dtype", "F32"), ("shape", [Raw("-0")]), ("data_offsets", [0, 0]))),)))
    @example(lengthened((("__metadata__", (("a", "\ud800"),)),)))
    @example(lengthened((("w", (("dtype", "F32"), ("shape", [1]), ("data_offsets", [4, 8]))),)) + bytes(8))
    @given(shards())
    def run(content: bytes) -> None:
        with confined(tmp_path), little_memory(len(content)):
            seen[check_header(tmp_path / "any.safetensors", content) is None] += 1

    run()
    assert min(seen[True], seen[False]) > sum(seen.values()) / 8, seen


def test_nested_as_deep_as_json_can_be_read(tmp_path: Path) -> None:
    """Just below the depth at which reading fails, whatever else walks it must not."""
    seen = set()
    for depth in range(sys.getrecursionlimit() - 150, sys.getrecursionlimit()):
        deep = Raw("[" * depth + "]" * depth)
        for place in ((("dtype", deep), ("shape", []), ("data_offsets", [0, 4])), deep, (("a", deep),)):
            line = check_header(tmp_path / "any.safetensors", lengthened((("w", place),)) + bytes(4))
            seen.add("recursion" in (line or ""))
    assert seen == {True, False}


OUTSIDE = "outside/secret.safetensors"
EXTRAS: dict[str, Callable[[Path], object]] = {
    "link.safetensors": lambda path: path.symlink_to(Path("../..") / OUTSIDE),
    "linked.txt": lambda path: path.symlink_to(Path("../..") / OUTSIDE),
    "linked": lambda path: path.symlink_to("../../outside"),
    "itself.safetensors": lambda path: path.symlink_to(path.name),
    "pipe.safetensors": os.mkfifo,
    "pipe": os.mkfifo,
    "folder.safetensors": Path.mkdir,
    "inner.safetensors": lambda path: path.symlink_to("a.safetensors"),
    "A.safetensors": lambda path: path.write_bytes(save({"x": torch.ones(2)})),
    "other.safetensors.index.json": os.mkfifo,
    "second.safetensors.index.json": lambda path: path.write_text("{}"),
    "abliteration.json": lambda path: path.write_text("{}"),
    "refusal_direction.safetensors": lambda path: path.write_bytes(save({"z": torch.ones(2)})),
    "bell\x07\n.txt": lambda path: path.write_text("x"),
    os.fsdecode(b"\xff.txt"): lambda path: path.write_text("x"),
    ".model.safetensors.partial": lambda path: path.write_text("x"),
}
SHARD_NAMES = st.sampled_from(
    ["a.safetensors", "b.safetensors", "../../outside/secret.safetensors", "/etc/passwd", "..", ".", "", "config.json",
     "a.safetensors/", "./a.safetensors", "sub/../a.safetensors", "A.safetensors", "model.safetensors.index.json", "\0",
     ".safetensors", "€" * 200 + ".safetensors", "x" * 300 + ".safetensors", "a\n.safetensors", "\ud800.safetensors",
     "~.safetensors", "gone.safetensors", *EXTRAS]
) | any_text().map(lambda name: f"{name}.safetensors")  # fmt: skip


@st.composite
def folders(draw: st.DrawFn) -> tuple[bytes, bytes, list[str]]:
    """Configuration, index, and what else lies in the folder."""
    config = draw(st.just(CONFIG) | st.dictionaries(NAMES, NUMBERS | NAMES, max_size=3).map(lambda more: CONFIG | more))
    placed = [("x", "a.safetensors"), ("y", "b.safetensors"), ("z", "b.safetensors")]
    for _ in range(draw(st.integers(0, 2))):
        tensor = draw(st.sampled_from(["x", "y", "z"]) | NAMES)
        placed.append((tensor, draw(SHARD_NAMES | st.sampled_from(["a.safetensors", "b.safetensors"]) | ODD)))
    total = draw(st.just(24) | ODD)
    index = (("metadata", (("total_size", total), ("note", draw(NAMES)))), ("weight_map", tuple(placed)))
    whole = draw(st.just(index) | st.just(index) | st.just(index[1:]) | ODD)
    return render(tuple(config.items())).encode(), render(whole).encode(), draw(st.lists(st.sampled_from([*EXTRAS])))


def placing(name: str, *extras: str) -> tuple[bytes, bytes, list[str]]:
    """A folder whose index names one more shard, for the tensor that lies outside."""
    shards = (("x", "a.safetensors"), ("y", "b.safetensors"), ("z", "b.safetensors"), ("secret", name))
    return render(tuple(CONFIG.items())).encode(), render((("weight_map", shards),)).encode(), list(extras)


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """What may be read lies below it, and beside it what may not."""
    (tmp_path / OUTSIDE).parent.mkdir()
    (tmp_path / OUTSIDE).write_bytes(save({"secret": torch.ones(2)}))
    (tmp_path / "room").mkdir()
    return tmp_path / "room"


def fill(room: Path, config: bytes, index: bytes, extras: Sequence[str]) -> Path:
    for folder in ("m", "out"):
        shutil.rmtree(room / folder, ignore_errors=True)
        (room / folder).mkdir()
    (room / "m/config.json").write_bytes(config)
    (room / "m/model.safetensors.index.json").write_bytes(index)
    (room / "m/a.safetensors").write_bytes(save({"x": torch.ones(2)}))
    (room / "m/b.safetensors").write_bytes(save({"y": torch.ones(2), "z": torch.ones(2)}))
    for name in dict.fromkeys(extras):
        with contextlib.suppress(OSError):  # where the file system has no such names
            EXTRAS[name](room / "m" / name)
    return room / "m"


def listing(folder: Path) -> dict[str, object]:
    """Everything below a folder: content, where links go, and the kind of anything else."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        kind = path.lstat().st_mode
        found[str(path.relative_to(folder))] = (
            str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else kind
        )
    return found


def test_any_folder_and_what_is_written_of_it(room: Path) -> None:
    seen: Counter[bool] = Counter()

    def convert(folder: Path) -> None:
        checkpoint = open_checkpoint(folder)
        for shard in checkpoint.shards:
            read_all(shard)
        copies = [TensorCopy("x", "x.copy")] if "x" in checkpoint.tensors else []
        rewrite_checkpoint(checkpoint, room / "out", {"y": Scaled()}, copies)
        carry_over(checkpoint, room / "out")
        update_config(room / "out", {"tie_word_embeddings": False})

    @fuzz(200)
    @example(placing("../../outside/secret.safetensors"))
    @example(placing("link.safetensors", "link.safetensors"))
    @example(placing("inner.safetensors", "linked.txt"))
    @given(folders())
    def run(given: tuple[bytes, bytes, list[str]]) -> None:
        folder = fill(room, *given)
        before = listing(folder), listing(room.parent / "outside")
        with confined(room):
            line = refusal(lambda: convert(folder))
        assert (listing(folder), listing(room.parent / "outside")) == before
        assert sorted(path.name for path in room.iterdir()) == ["m", "out"]
        assert not any(path.is_symlink() or path.is_fifo() for path in (room / "out").rglob("*"))
        if line is None:
            assert json.loads((room / "out/config.json").read_bytes())["tie_word_embeddings"] is False
            assert set(open_checkpoint(room / "out").tensors) == {*open_checkpoint(folder).tensors, "x.copy"}
        seen[line is None] += 1

    run()
    assert seen[True] > sum(seen.values()) / 20 and seen[False] > sum(seen.values()) / 4, seen


JSON = st.recursive(
    NUMBERS | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.lists(st.tuples(NAMES, inner), max_size=3).map(tuple),
    max_leaves=8,
)


@fuzz(150)
@example((("a", Raw('"é\\ud800"')),))
@given(st.lists(st.tuples(NAMES, JSON | ODD), max_size=3).map(tuple) | JSON)
def test_any_json(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    folder = tmp_path_factory.getbasetemp()
    content = render(value).replace("\\u00e9", "é").encode()
    (folder / "config.json").write_bytes(content)
    before: list[dict[str, Any]] = []
    with confined(folder), little_memory(len(content)):
        line = refusal(lambda: before.append(read_json(folder / "config.json")))
    if line is None:
        update_config(folder, {"tie": True})
        assert repr(read_json(folder / "config.json")) == repr({**before[0], "tie": True})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A whole config.json of two small layers."""
    from transformers import LlamaConfig

    sizes = {"num_hidden_layers": 2, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1).to_dict() | {"num_labels": 2}
    return {key: value for key, value in config.items() if key not in ("id2label", "label2id", "architectures")}


BIG = st.sampled_from([200_000, 2**31, 2**63, 10**400, -1, 0, 0.5, math.nan, "x", None, True, [], {}, [10**6], "../x"])


def test_any_value_in_config(tmp_path: Path, llama: dict[str, Any]) -> None:
    """Models are built without weights: nothing may be allocated, or counted up to, that a number there names."""
    read_blueprint(write(tmp_path / "m", config=llama), llama)
    seen: Counter[bool] = Counter()

    @fuzz(50)
    @example("num_labels", 200_000)
    @example("num_hidden_layers", 10**6)
    @given(st.sampled_from(sorted(llama)), BIG)
    def run(key: str, value: Any) -> None:
        config = {**llama, key: value}
        (tmp_path / "m/config.json").write_text(json.dumps(config))
        with little_memory(0, 20_000_000):
            seen[refusal(lambda: read_blueprint(tmp_path / "m", config)) is None] += 1

    run()
    assert min(seen[True], seen[False]) > 5, seen


def test_any_direction(tmp_path: Path) -> None:
    seen: Counter[bool] = Counter()
    shapes = st.sampled_from([[4], [1, 4], [4, 1, 1]]) | st.lists(st.sampled_from([1, 2, 4]), max_size=3)
    dtypes = st.sampled_from(["F32", "F64", "BF16", "F16"]) | st.sampled_from(sorted(DTYPES))
    vectors = st.tuples(dtypes, shapes, st.binary(max_size=64))

    def file(dtype: str, shape: list[int], data: bytes) -> bytes:
        size = math.prod(shape) * DTYPES[dtype].itemsize
        entry = (("dtype", dtype), ("shape", shape), ("data_offsets", [0, size]))
        return lengthened((("direction", entry),)) + (data + bytes(i % 60 for i in range(size)))[:size]

    @fuzz(200)
    @given(vectors.map(lambda made: file(*made)).flatmap(bent) | shards())
    def run(content: bytes) -> None:
        path, found = tmp_path / "r.safetensors", list[torch.Tensor]()
        path.write_bytes(content)
        with confined(tmp_path), little_memory(len(content)):
            line = refusal(lambda: found.append(load_direction(path, 4)))
        if line is None:
            theirs = dict(deserialize(content))["direction"]
            stored = torch.frombuffer(theirs["data"], dtype=DTYPES[theirs["dtype"]]).double()
            torch.testing.assert_close(found[0].double(), stored / stored.norm(), rtol=0, atol=1e-6)
        seen[line is None] += 1

    run()
    assert min(seen[True], seen[False]) > 5, seen


@st.composite
def manifests(draw: st.DrawFn) -> bytes:
    """One with every part that is read, and any of the values something else."""
    value = {name: draw(st.just(good) | st.just(good) | JSON | ODD) for name, good in GOOD.items()}
    text = manifest(**value)
    return draw(st.just(text) | st.just(text) | bent(text) | JSON.map(lambda other: render(other).encode()))


def manifest(**given: Any) -> bytes:
    """One with these values, and good ones elsewhere."""
    plain: dict[str, Any] = dict.fromkeys(manifest_schema()["required"], ())
    value = GOOD | given
    token, shard = (("id", value["id"]),), (("name", value["name"]), ("sha256", value["sha256"]))
    plain |= {
        "schema": value["schema"],
        "output": (("shards", [shard]),),
        "direction": (("sha256", value["sha256"]),),
        "edit": (("strength", value["strength"]),),
        "calibration": (("refusal_tokens", (("tokens", [token]),)),),
    }
    return render(tuple(plain.items())).encode()


GOOD = {"schema": "abliteration/1", "name": "a.safetensors", "sha256": "0" * 64, "strength": 1.0, "id": 3}


def test_any_manifest(tmp_path: Path) -> None:
    seen: Counter[bool] = Counter()
    embedding = SimpleNamespace(tensors={"embed": SimpleNamespace(shape=(5, 2))})
    subject: Any = SimpleNamespace(folder=tmp_path, checkpoint=embedding, plan=SimpleNamespace(embedding="embed"))

    @fuzz(150)
    @example(manifest(strength=10**400))
    @example(manifest(id=Raw("1E400")))
    @given(manifests())
    def run(content: bytes) -> None:
        (tmp_path / MANIFEST_NAME).write_bytes(content)
        with confined(tmp_path, OWN), little_memory(len(content)):
            line = refusal(lambda: _recorded(tmp_path))
            tokens = _recorded_tokens(subject)
        assert tokens is None or all(0 <= token < 5 for token in tokens)
        seen[line is None] += 1

    run()
    assert min(seen[True], seen[False]) > 5, seen
