"""Everything of a checkpoint that is not weights: carried over as it is, configuration changed by named keys only."""

import logging
import shutil
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from abliterate.checkpoint.diskio import disk_errors
from abliterate.checkpoint.files import (
    CONFIG,
    DIRECTION_FILE,
    MAX_CONFIG_BYTES,
    OTHER_WEIGHTS,
    Checkpoint,
    check_links,
    files_in,
    read_json,
)
from abliterate.checkpoint.header import read_header
from abliterate.checkpoint.jsontext import dump_like
from abliterate.errors import CheckpointError, OutputError, one_line

log = logging.getLogger(__name__)

OWN_FILES = ("README.md", "abliteration.json", DIRECTION_FILE, "selection.png")
"""Files that a conversion writes itself: those of the base are kept beside them, as NAME.base.SUFFIX."""


def carry_over(checkpoint: Checkpoint, folder: Path, only: Collection[str] | None = None) -> tuple[str, ...]:
    """Copies every file that is not a shard or the index, links as the files they stand for.

    Unedited weights in other formats, or a second time in safetensors, are left out with a warning.

    Args:
        checkpoint: what to copy from.
        folder: the output so far.
        only: names, relative to the checkpoint, of what may be carried; None for all.

    Returns:
        Sorted names in the output, relative to it, with forward slashes.

    Raises:
        CheckpointError: a file cannot be read, or is a link to a place outside the checkpoint.
        OutputError: the disk is full or cannot be written to.
    """
    check_links(checkpoint.folder)
    files = carried_files(checkpoint)
    if only is not None:
        files = {name: path for name, path in files.items() if name in only}
    renamed = renamed_files(files)
    with disk_errors(folder, sum(path.stat().st_size for path in files.values())):
        for name, path in files.items():
            target = folder / renamed.get(name, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():  # another name for it, where the file system takes a and A for the same
                raise OutputError(f"{target} is there already, so {path} cannot be carried over; rename it")
            _copy(path, target)
    return tuple(sorted(renamed.get(name, name) for name in files))


def _copy(path: Path, target: Path) -> None:
    try:
        shutil.copyfile(path, target)
    except OSError as error:
        if str(error.filename) == str(path) and error.filename2 is None:  # what is about both is about writing
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        raise


def update_config(folder: Path, changes: Mapping[str, Any]) -> None:
    """Sets keys of config.json; everything else, the order of keys and the indent stay.

    Args:
        folder: of the checkpoint.
        changes: dotted keys (`text_config.tie_word_embeddings`) to values; new keys go to the end of their part.

    Raises:
        CheckpointError: config.json cannot be read, or has no such part.
        OutputError: it cannot be written.
    """
    path = folder / CONFIG
    config = read_json(path, MAX_CONFIG_BYTES)
    for dotted, value in changes.items():
        *parents, key = dotted.split(".")
        part: Any = config
        for parent in parents:
            part = part.get(parent) if isinstance(part, dict) else None
        if not isinstance(part, dict):
            raise CheckpointError(f"{path} has no part {'.'.join(parents)} to set {dotted} in")
        part[key] = value
    content = dump_like(path.read_bytes(), config)
    with disk_errors(folder, len(content)):
        path.write_bytes(content)


def carried_files(checkpoint: Checkpoint) -> dict[str, Path]:
    """What `carry_over` copies, by its name in the checkpoint; of what it leaves out, the log says why."""
    weights = {shard.path for shard in checkpoint.shards} | {checkpoint.index}
    carried = {}
    for path in files_in(checkpoint.folder):
        if path in weights:
            continue
        reason = _reason_to_leave(path, checkpoint)
        if reason is None:
            carried[path.relative_to(checkpoint.folder).as_posix()] = path
        else:
            log.warning("%s is left out: %s", one_line(str(path.relative_to(checkpoint.folder))), reason)
    return carried


def _reason_to_leave(path: Path, checkpoint: Checkpoint) -> str | None:
    if not path.is_file():
        return "it is not a regular file"
    name = path.relative_to(checkpoint.folder).as_posix()
    if any(fnmatch(f"/{name}", f"*/{pattern}") for pattern in OTHER_WEIGHTS):
        return "unedited weights in another format"
    if path.suffix == ".safetensors" and repeats_weights(path, checkpoint):
        return "it repeats tensors of the checkpoint, unedited"
    if path.name.endswith(".safetensors.index.json"):
        return "an index of weights that are not carried over"
    return None


def repeats_weights(path: Path, checkpoint: Checkpoint) -> bool:
    """Whether a file holds tensors that the checkpoint has in its shards."""
    try:
        return not checkpoint.tensors.keys().isdisjoint(read_header(path).tensors)
    except CheckpointError:
        return False


def renamed_files(names: Mapping[str, Path] | Sequence[str]) -> dict[str, str]:
    """The base's own versions of files that the output writes, and whatever has the names that these then take."""
    renamed = {}
    waiting = [name for name in OWN_FILES if name in names]
    while waiting:
        name = waiting.pop()
        path = PurePosixPath(name)
        renamed[name] = f"{path.stem}.base{path.suffix}"
        waiting += [renamed[name]] if renamed[name] in names else []
    return renamed
