"""A patch file: safetensors that is a direction file too, with all that the base does not hold of a conversion.

Beside the tensors of the direction file (see `direction_bytes`) there are `files/NAME`, what the conversion wrote of
its own, and `targets`, names of the edited tensors, both compressed by zlib; the metadata's `patch` is JSON. It is data
from strangers: sizes are bounded before anything is unpacked, and no name in it is ever a path that is opened.
"""

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abliterate.checkpoint.files import DIRECTION_FILE
from abliterate.checkpoint.hashing import file_sha256
from abliterate.checkpoint.header import Header, TensorInfo, read_header
from abliterate.checkpoint.jsontext import is_shallow
from abliterate.checkpoint.listing import FileRecord
from abliterate.checkpoint.read import bytes_of, read_tensor
from abliterate.direction.files import saved
from abliterate.errors import AbliterateError, PatchError, first_line
from abliterate.progress import unseen
from abliterate.publish.manifest import MANIFEST_NAME, MAX_BYTES
from abliterate.publish.plots import PLOTS

SCHEMA = "abliteration-patch/1"
KEY, TARGETS, FILES = "patch", "targets", "files/"
CARD = "README.md"
OWN = (CARD, MANIFEST_NAME, *PLOTS)
"""Files that may be in a patch: what a conversion writes of its own, but for the direction file."""
MOST_BYTES, MOST_FILES = 1 << 28, 100_000
"""Of a patch, and files that it may list."""
HEADS = ("tied", "untied", "separate")
_SHA256, _COMMIT = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class Base:
    """The checkpoint that is patched.

    Attributes:
        id: Hub id, or the folder's name. `commit`: on the Hub; None for a folder.
        files: those that are read, by their names in it.
    """

    id: str
    commit: str | None
    files: Mapping[str, FileRecord]


@dataclass(frozen=True)
class Edit:
    """What the direction file leaves open of the edit.

    Attributes:
        recipe: its name.
        head: tied, untied or separate. `inexact`: no direction is exact on the architecture.
        strength, keep_norms: for a direction file with a single direction.
        tensors: how many are edited.
    """

    recipe: str
    head: str
    strength: float
    keep_norms: bool
    inexact: bool
    tensors: int


@dataclass(frozen=True)
class Description:
    """What a patch says of itself.

    Attributes:
        tool: versions that made the output.
        output: every file of the result; `redrawn`: plots that are drawn again from the manifest and may come out
            otherwise, where another version draws them.
        whole: the direction file has the candidate grid that the conversion wrote.
    """

    tool: Mapping[str, str]
    base: Base
    edit: Edit
    output: Mapping[str, FileRecord]
    redrawn: tuple[str, ...]
    whole: bool


@dataclass(frozen=True)
class Patch:
    """A patch in memory.

    Attributes:
        path: of the file; a direction file to `load_cut`. `sha256`: of the file.
        targets: names of the edited tensors.
        own: content of the files that the conversion wrote of its own, the direction file among them.
    """

    path: Path
    sha256: str
    about: Description
    targets: frozenset[str]
    own: Mapping[str, bytes]


def patch_bytes(
    about: Description, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], targets: Sequence[str],
    own: Mapping[str, bytes],
) -> bytes:  # fmt: skip
    """The file's bytes.

    Args:
        tensors, metadata: of the direction file.
        own: see `Patch`, without the direction file.
    """
    packed = {f"{FILES}{name}": _packed(content) for name, content in own.items()}
    packed[TARGETS] = _packed("\n".join(targets).encode())
    text = json.dumps({"schema": SCHEMA, **asdict(about)}, ensure_ascii=False, separators=(",", ":"))
    return saved({**tensors, **packed}, {**metadata, KEY: text})


def read_patch(path: Path) -> Patch:
    """Reads and checks a patch.

    Raises:
        PatchError: it is none, is damaged, or of another version.
    """
    if not path.exists():
        raise PatchError(f"no patch file {path}; make one with `abliterate patch`")
    try:
        header = read_header(path)
        if header.file_size > MOST_BYTES:
            raise PatchError(f"{path} has {header.file_size} bytes, too many for a patch")
        if KEY not in header.metadata:
            raise PatchError(f"{path} is no patch: it has no entry `{KEY}`; make one with `abliterate patch`")
        return _read(path, header)
    except PatchError:
        raise
    except (AbliterateError, OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise PatchError(f"{path} is damaged or no patch ({first_line(error)}); get it again") from error


def _read(path: Path, header: Header) -> Patch:
    about = _description(json.loads(header.metadata[KEY]))
    own, direction = {}, {}
    for name, info in header.tensors.items():
        if name.startswith(FILES):
            own[name.removeprefix(FILES)] = _unpacked(header, info, MAX_BYTES)
        elif name != TARGETS:
            direction[name] = read_tensor(header, info)
    strange = sorted(own.keys() - OWN)
    if strange or CARD not in own or MANIFEST_NAME not in own:
        raise ValueError(f"it holds {strange[0]!a}" if strange else f"it lacks {CARD} or {MANIFEST_NAME}")
    metadata = {key: text for key, text in header.metadata.items() if key != KEY}
    own[DIRECTION_FILE] = saved(direction, metadata)
    targets = _unpacked(header, header.tensors[TARGETS], MAX_BYTES).decode().split("\n")
    return Patch(path, file_sha256(path, unseen) or "", about, frozenset(targets), own)


def _packed(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(zlib.compress(content, 9)), dtype=torch.uint8)


def _unpacked(header: Header, info: TensorInfo, most: int) -> bytes:
    if info.dtype != "U8" or len(info.shape) != 1:
        raise ValueError(f"{info.name} is no packed file")
    unpack = zlib.decompressobj()
    try:
        content = unpack.decompress(bytes(bytes_of(read_tensor(header, info))), most)
    except zlib.error as error:
        raise ValueError(f"{info.name} cannot be unpacked") from error
    if not unpack.eof or unpack.unused_data:
        raise ValueError(f"{info.name} is too large, or cut off")
    return content


def _description(content: Any) -> Description:
    if not isinstance(content, dict) or not is_shallow(content):
        raise ValueError("its description is no JSON object")
    if content.get("schema") != SCHEMA:
        raise ValueError(f"its schema is not {SCHEMA}: use the version that made it")
    base, edit = content["base"], content["edit"]
    commit = base["commit"]
    if commit is not None and not _COMMIT.fullmatch(commit):
        raise ValueError("its commit is none")
    if edit["head"] not in HEADS:
        raise ValueError("its head is neither tied, untied nor separate")
    return Description(
        {_text(key): _text(value) for key, value in content["tool"].items()},
        Base(_text(base["id"]), commit, _files(base["files"])),
        Edit(
            _text(edit["recipe"]),
            edit["head"],
            float(edit["strength"]),
            edit["keep_norms"] is True,
            edit["inexact"] is True,
            int(edit["tensors"]),
        ),
        _files(content["output"]),
        tuple(name for name in PLOTS if name in content["redrawn"]),
        content["whole"] is True,
    )


def _files(content: Any) -> dict[str, FileRecord]:
    if not isinstance(content, dict) or not 0 < len(content) <= MOST_FILES:
        raise ValueError("it lists no files, or too many")
    return {name: _file(name, record) for name, record in content.items()}


def _file(name: str, record: Any) -> FileRecord:
    digest, size = record["sha256"], record["bytes"]
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest) or type(size) is not int or size < 0:
        raise ValueError(f"it has no hash and size for {name!a}")
    return FileRecord(digest, size)


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 1000:
        raise ValueError("a name in it is no text, or too long")
    return value
