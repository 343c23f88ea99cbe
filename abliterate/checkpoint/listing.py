"""Files of a folder by their names, with hash and size."""

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from abliterate.checkpoint.files import files_in
from abliterate.checkpoint.hashing import file_sha256, shard_sha256
from abliterate.checkpoint.header import Header
from abliterate.errors import CheckpointError
from abliterate.progress import Progress, from_any_thread

AT_ONCE = 2


@dataclass(frozen=True)
class FileRecord:
    """A file's sha256, in hexadecimal, and size."""

    sha256: str
    bytes: int


def record_of(content: bytes) -> FileRecord:
    """Of what is in memory."""
    return FileRecord(hashlib.sha256(content).hexdigest(), len(content))


def hashed(
    files: Mapping[str, Path], what: str, progress: Progress, shards: Sequence[Header] = ()
) -> dict[str, FileRecord]:
    """Hash and size of files.

    Args:
        what: for the progress bar.
        shards: of a checkpoint, those among the files that may have to be fetched (see `shard_sha256`).

    Raises:
        CheckpointError: one is no regular file.
        OSError: one cannot be read.
    """
    sizes, headers = {name: path.stat().st_size for name, path in files.items()}, {each.path: each for each in shards}
    with progress.bar(f"hash {what}", sum(sizes.values()), "B") as advance, ThreadPoolExecutor(AT_ONCE) as threads:
        count = from_any_thread(advance)

        def record(path: Path) -> FileRecord:
            digest = shard_sha256(headers[path], count) if path in headers else file_sha256(path, count)
            if digest is None:
                raise CheckpointError(f"{path} is no regular file")
            return FileRecord(digest, path.stat().st_size)

        return dict(zip(files, threads.map(record, files.values()), strict=True))


def files_by_name(folder: Path) -> dict[str, Path]:
    """Every file of a folder, by its name in it, with forward slashes."""
    return {path.relative_to(folder).as_posix(): path for path in files_in(folder)}
