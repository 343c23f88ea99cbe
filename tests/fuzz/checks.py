"""What must hold for any content of a checkpoint's files; shared by the tests and by the long run.

Either the files are refused in one line, or they are read, and then as the safetensors library reads them. Nothing
outside the folder is opened meanwhile.
"""

import json
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
from safetensors import SafetensorError, deserialize

from abliterate.checkpoint.files import open_checkpoint, read_json
from abliterate.checkpoint.header import Header, read_header
from abliterate.checkpoint.read import bytes_of, read_tensor
from abliterate.errors import AbliterateError
from tests.fuzz.seeds import SEPARATOR

LONGEST = 1000
NAMES = ("config.json", "model.safetensors", "model.safetensors.index.json", "a.safetensors", "b.safetensors")
_OPENING = frozenset(
    ("open", "os.scandir", "os.listdir", "os.rename", "os.link", "os.symlink", "os.mkdir", "os.remove", "os.truncate")
)
_MODULES = [Path(sysconfig.get_path("stdlib")).resolve(), Path(safetensors.__file__).resolve().parents[1]]
"""Python itself opens files there whenever something is imported for the first time."""
_fence: list[Path] = []
_escaped: list[str] = []
_watching: list[bool] = []
REASONS = (
    "appears twice",
    "unprintable",
    "and nothing else",
    "which is not known",
    "at most 64 whole numbers",
)
"""Why a file may be refused that the library reads: names given twice or made of control characters, more keys than the
format has, dtypes that torch or this program lacks, and absurd numbers of dimensions."""


def refusal(read: Callable[[], object]) -> str | None:
    """The one line that refuses; None where it is read. Any other exception goes through."""
    try:
        read()
    except AbliterateError as error:
        line = str(error)
        assert line and line.isprintable() and len(line) <= LONGEST, ascii(line)
        return line
    return None


def check_header(path: Path, content: bytes) -> str | None:
    """One file as a shard; returns why it is refused."""
    path.write_bytes(content)
    found: list[Header] = []
    line = refusal(lambda: found.append(read_header(path)))
    theirs = _library(content)
    if line is None:
        assert theirs is not None, "read, and the library refuses it"
        _same(found[0], theirs)
    elif theirs is not None:
        assert any(reason in line for reason in REASONS), line
    return line


def _library(content: bytes) -> Mapping[str, Any] | None:
    try:
        return dict(deserialize(content))
    except SafetensorError:
        return None


def _same(header: Header, theirs: Mapping[str, Any]) -> None:
    assert header.tensors.keys() == theirs.keys()
    for name, info in header.tensors.items():
        other = theirs[name]
        assert (info.dtype, list(info.shape)) == (other["dtype"], other["shape"]), name
        assert bytes(bytes_of(read_tensor(header, info))) == bytes(other["data"]), name


def check_json(path: Path, content: bytes) -> str | None:
    """One file as an index or a configuration."""
    path.write_bytes(content)
    found: list[dict[str, Any]] = []
    line = refusal(lambda: found.append(read_json(path)))
    if line is None:
        json.dumps(found[0], indent=2, sort_keys=True)
    return line


def check_index(path: Path, content: bytes) -> str | None:
    """An index beside two shards that are well-formed."""
    from safetensors.torch import save

    from tests.fuzz.seeds import CONFIG, MADE

    check_json(path / "any.json", content)
    shards = [save({"x": MADE["d"]}), save({"y": MADE["b"]})]
    return check_folder(path, [json.dumps(CONFIG).encode(), b"", content, *shards])


def check_folder(place: Path, contents: list[bytes]) -> str | None:
    """A folder with these files in it, an empty content for none."""
    folder = place / "m"
    folder.mkdir(exist_ok=True)
    for name, content in zip(NAMES, [*contents, b"", b"", b"", b"", b""], strict=False):
        if content:
            (folder / name).write_bytes(content)
        else:
            (folder / name).unlink(missing_ok=True)
    return refusal(lambda: list(map(read_all, open_checkpoint(folder).shards)))


def read_all(header: Header) -> None:
    """Every byte of every tensor."""
    assert sum(read_tensor(header, info).nbytes for info in header.tensors.values()) == header.data_bytes


@contextmanager
def confined(*places: Path) -> Iterator[None]:
    """Notes every file that is opened outside of these folders meanwhile, and fails at the end."""
    if not _watching:
        sys.addaudithook(_watch)  # for the life of the process; without a fence it does nothing
        _watching.append(True)
    _escaped.clear()
    _fence.extend(place.resolve() for place in places)
    try:
        yield
    finally:
        _fence.clear()
    assert_confined()


def assert_confined() -> None:
    """Nothing outside was opened so far."""
    assert not _escaped, list(_escaped)


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in _OPENING or not _fence or not isinstance(arguments[0], str | bytes | os.PathLike):
        return
    path = Path(os.path.realpath(os.fsdecode(arguments[0])))
    if not any(path.is_relative_to(place) for place in (*_fence, *_MODULES)):
        _escaped.append(str(path))


def _header(place: Path, content: bytes) -> None:
    check_header(place / "any.safetensors", content)


def _entries(place: Path, content: bytes) -> None:
    """The header's text up to its last brace, then data; the length in front is right."""
    end = content.rfind(b"}") + 1
    check_header(place / "any.safetensors", end.to_bytes(8, "little") + content)


def _folder(place: Path, content: bytes) -> None:
    check_folder(place, content.split(SEPARATOR, len(NAMES) - 1))


def _index(place: Path, content: bytes) -> None:
    check_index(place, content)


TARGETS: Mapping[str, Callable[[Path, bytes], None]] = {
    "header": _header,
    "entries": _entries,
    "index": _index,
    "checkpoint": _folder,
}
