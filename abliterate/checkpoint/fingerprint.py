"""What tells a checkpoint's files from another's without reading them whole: small ones by hash, large by samples."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from abliterate.checkpoint.files import Checkpoint, files_in
from abliterate.errors import CheckpointError

WHOLE_BYTES = 1 << 20
"""Up to here a file is hashed whole."""
SAMPLES, SAMPLE_BYTES = 64, 4096
"""Of a larger one: blocks at even distances, its first and its last bytes among them."""


def fingerprint(checkpoint: Checkpoint) -> dict[str, str]:
    """Size, time of the last change and a hash of every file, by its name in the checkpoint.

    Of one whose shards come and go, the shards are told by what the Hub says of them, and times do not count: its files
    belong to a commit, and may be fetched anew.

    Raises:
        CheckpointError: a file cannot be read.
    """
    shards, keeper = {shard.path: shard for shard in checkpoint.shards}, checkpoint.keeper
    found = {}
    for path in files_in(checkpoint.folder):
        if path.is_file():
            name = path.relative_to(checkpoint.folder).as_posix()
            if keeper is not None and path in shards:
                found[name] = keeper.fingerprint(path.name)
            else:
                found[name] = _fingerprint(path, shards[path].raw if path in shards else b"", keeper is None)
    return found


def _fingerprint(path: Path, header: bytes, timed: bool) -> str:
    digest = hashlib.sha256(header)
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            for block in _blocks(file, status.st_size):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    time = f"{status.st_mtime_ns} " if timed else ""
    return f"{status.st_size} {time}{digest.hexdigest()}"


def _blocks(file: BinaryIO, size: int) -> Iterator[bytes]:
    if size <= WHOLE_BYTES:
        yield file.read()
        return
    for number in range(SAMPLES):
        file.seek((size - SAMPLE_BYTES) * number // (SAMPLES - 1))
        yield file.read(SAMPLE_BYTES)
