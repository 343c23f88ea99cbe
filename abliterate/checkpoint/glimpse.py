"""A checkpoint on the Hub as far as its plan needs it: small files whole, and of every shard the header alone."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import huggingface_hub

from abliterate.checkpoint.files import OTHER_WEIGHTS, is_plain_shard
from abliterate.checkpoint.header import LENGTH_BYTES, MAX_HEADER_BYTES
from abliterate.checkpoint.locate import Source, explained, find, named, whole
from abliterate.errors import CheckpointError

log = logging.getLogger(__name__)
SHARDS = "*.safetensors"
READ_BYTES = 1 << 20


@contextmanager
def glimpse(model: str, revision: str | None = None) -> Iterator[Source]:
    """Yields a folder that is good for reading headers, configuration and tokenizer, and only while this lasts.

    A local folder is itself, and offline so is a model in the Hub client's cache. Of any other the shards are sparse
    files of the right size that hold nothing but their headers, so that a plan of any model costs a few megabytes.

    Raises:
        CheckpointError: as `resolve`.
    """
    local = find(model, revision)
    if local is not None or huggingface_hub.constants.HF_HUB_OFFLINE:
        yield local or whole(model, revision)
        return
    model_id, wanted = named(model, revision)
    with tempfile.TemporaryDirectory(prefix="abliterate-") as folder:
        place = Path(folder) / model_id.rpartition("/")[2]
        place.mkdir()
        with explained(model_id, wanted):
            commit = _gather(model_id, wanted, place)
        yield Source(place, model_id, wanted, commit)


def _gather(model_id: str, revision: str | None, place: Path) -> str | None:
    """Fills the folder; returns the commit that it shows."""
    ignored = [*OTHER_WEIGHTS, SHARDS]
    small = Path(str(huggingface_hub.snapshot_download(model_id, revision=revision, ignore_patterns=ignored)))
    info = huggingface_hub.HfApi().model_info(model_id, revision=revision)
    for name in sorted(sibling.rfilename for sibling in info.siblings or ()):
        if is_plain_shard(name):
            log.info("fetching the header of %s", name)
            address = f"{model_id}@{info.sha}/{name}" if info.sha else f"{model_id}/{name}"
            with huggingface_hub.HfFileSystem().open(address, "rb", block_size=READ_BYTES) as remote:
                _write_sparse(remote, int(remote.size), place / name)
    for path in sorted(small.rglob("*")):
        if path.is_file() and path.suffix != ".safetensors":
            target = place / path.relative_to(small)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    return info.sha


def _write_sparse(remote: BinaryIO, size: int, target: Path) -> None:
    """A file of `size` bytes that holds the header alone; one that is no header is for the reader of headers to refuse.

    Raises:
        CheckpointError: no file here can be as large as that.
    """
    raw = remote.read(LENGTH_BYTES)
    raw += remote.read(min(int.from_bytes(raw, "little"), MAX_HEADER_BYTES))
    target.write_bytes(raw)
    try:
        os.truncate(target, max(size, len(raw)))
    except OSError as error:
        raise CheckpointError(f"{target.name} claims {size} bytes, which no file here can have") from error
