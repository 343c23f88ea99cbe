"""A checkpoint on the Hub as far as its plan needs it: small files whole, and of every shard the header alone."""

import logging
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub

from abliterate.checkpoint.allowance import Thing
from abliterate.checkpoint.client import snapshot
from abliterate.checkpoint.files import OTHER_WEIGHTS
from abliterate.checkpoint.header import LENGTH_BYTES, MAX_HEADER_BYTES
from abliterate.checkpoint.keeper import Check, go_on
from abliterate.checkpoint.locate import Source, explained, find, named, whole
from abliterate.checkpoint.remote import Remote, RemoteFile, look
from abliterate.errors import CheckpointError

log = logging.getLogger(__name__)
SHARDS = "*.safetensors"
READ_BYTES = 1 << 18
"""Read first of a shard: the whole header of most."""


@dataclass(frozen=True)
class Unfetched:
    """A `Keeper` of shards that are told about, and not fetched."""

    remote: Remote
    limit: int

    @property
    def place(self) -> Path:
        """See `Keeper`."""
        return Path(huggingface_hub.constants.HF_HOME)

    @property
    def unfilled(self) -> int:
        """See `Keeper`."""
        return min(self.limit, sum(file.size for file in self.remote.files.values() if is_shard(file.name)))

    def size(self, name: str) -> int:
        """See `Keeper`."""
        return self.remote.files[name].size

    def sha256(self, name: str) -> str | None:
        """See `Keeper`."""
        return self.remote.files[name].sha256

    def fingerprint(self, name: str) -> str:
        """See `Keeper`."""
        return self.remote.files[name].fingerprint

    def room(self, names: Collection[str]) -> Mapping[Thing, int]:
        """See `Keeper`; nothing is held."""
        return {}

    def hold(self, names: Collection[str], check: Check = go_on) -> AbstractContextManager[Mapping[str, Path]]:
        """Raises:
        CheckpointError: always.
        """
        raise CheckpointError(f"{', '.join(names)} of {self.remote.model_id} cannot be read before it is fetched")


@contextmanager
def glimpse(model: str, revision: str | None = None, limit: int | None = None) -> Iterator[Source]:
    """Yields a folder that is good for reading headers, configuration and tokenizer, and only while this lasts.

    A local folder is itself, and offline so is a model in the Hub client's cache. Of any other the shards are sparse
    files of the right size that hold nothing but their headers, so that a plan of any model costs a few megabytes.

    Args:
        limit: bytes of shards that would be on the disk at once, were they fetched as they are needed.

    Raises:
        CheckpointError: as `resolve`.
    """
    local = find(model, revision)
    if local is not None or huggingface_hub.constants.HF_HUB_OFFLINE:
        yield local or whole(model, revision)
        return
    model_id, wanted = named(model, revision)
    remote = look(model_id, wanted)
    with tempfile.TemporaryDirectory(prefix="abliterate-") as folder:
        place = Path(folder) / model_id.rpartition("/")[2]
        gather(remote, place)
        yield Source(place, model_id, wanted, remote.commit, Unfetched(remote, limit) if limit is not None else None)


def gather(remote: Remote, place: Path) -> None:
    """Makes the folder: of files of safetensors the headers, of weights in other formats nothing, all else whole.

    Raises:
        CheckpointError: something cannot be fetched.
    """
    with explained(remote.model_id, remote.commit):
        small = snapshot(remote.model_id, remote.commit, [*OTHER_WEIGHTS, SHARDS])
        for path in sorted(small.rglob("*")):
            if path.is_file() and path.suffix != ".safetensors":
                target = place / path.relative_to(small)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        for file in remote.files.values():
            if is_shard(file.name):
                log.info("fetching the header of %s", file.name)
                target = place / file.name
                target.parent.mkdir(parents=True, exist_ok=True)
                _write_sparse(remote, file, target)


def is_shard(name: str) -> bool:
    """Whether a file of the repository holds weights that may be converted, or else are carried over."""
    return fnmatch(name, SHARDS) and not any(fnmatch(name, pattern) for pattern in OTHER_WEIGHTS)


def _write_sparse(remote: Remote, file: RemoteFile, target: Path) -> None:
    """A file of the right size that holds the header alone; whether it is one, the reader of headers says.

    Raises:
        CheckpointError: no file here can be as large as that.
    """
    if file.size < 0 or not file.digest:
        raise CheckpointError(f"the Hub does not say what {file.name} holds; try again, or download the model")
    raw = remote.read(file.name, 0, min(READ_BYTES, file.size))
    end = LENGTH_BYTES + min(int.from_bytes(raw[:LENGTH_BYTES], "little"), MAX_HEADER_BYTES)
    raw += remote.read(file.name, len(raw), min(end, file.size))
    target.write_bytes(raw[:end])
    try:
        os.truncate(target, max(file.size, len(raw[:end])))
    except OSError as error:
        raise CheckpointError(f"{target.name} claims {file.size} bytes, which no file here can have") from error
