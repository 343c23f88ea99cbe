"""Shards in, shards out: untouched bytes copied in the kernel, edited tensors in blocks, headers byte for byte."""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from abliterate.checkpoint.berths import Berths
from abliterate.checkpoint.crew import crew, each
from abliterate.checkpoint.diskio import check_space, disk_errors, new_file, sync, write_all
from abliterate.checkpoint.extend import TensorCopy, check_copies, extended_header, extended_index
from abliterate.checkpoint.files import Checkpoint
from abliterate.checkpoint.header import DTYPES, Header
from abliterate.checkpoint.shard import ShardJob, ShardRecord, TensorEdit, write_shard
from abliterate.errors import CheckpointError
from abliterate.malloc import give_back
from abliterate.progress import SILENT, Advance, Progress, from_any_thread

__all__ = ["ShardRecord", "TensorCopy", "TensorEdit", "rewrite_checkpoint"]

log = logging.getLogger(__name__)

AT_ONCE = 3
"""Shards on their way together: while one is hashed to its end or waits for the disk, others are worked on."""

Done = Callable[[ShardRecord], None]


def rewrite_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    edits: Mapping[str, TensorEdit],
    copies: Sequence[TensorCopy] = (),
    progress: Progress = SILENT,
    hash_files: bool = True,
    done: Done | None = None,
    skip: Mapping[str, ShardRecord] | None = None,
    berths: Berths | None = None,
) -> tuple[ShardRecord, ...]:
    """Writes every shard, and the index, into the folder `out`; each file has its name only when it is whole.

    Args:
        checkpoint: what to read.
        out: an existing folder without files of those names, but for shards to skip.
        edits: by tensor; every other tensor is copied byte for byte.
        copies: tensors to add, each at the end of the shard that holds its source.
        progress: counts bytes read for measuring and bytes written.
        hash_files: take sha256 of every shard, in and out, along the way.
        done: told of every shard that has its name, one at a time and from several threads.
        skip: shards that are finished already, by name: they are left alone, and these are their records.
        berths: where shards do not stay in `out`: the room that each waits for, until somebody has freed another's.

    Returns:
        One record a shard, in the order of `checkpoint.shards`.

    Raises:
        CheckpointError: an edit or copy does not fit the checkpoint, a tensor to edit is not finite (before or after),
            or a file changed meanwhile. Shards that were done by then stay in `out`.
        EditError: an edit returned another shape or dtype.
        OutputError: there is too little space (with `berths` nobody looks), or `out` cannot be written.
    """
    _check_edits(checkpoint, edits)
    check_copies(checkpoint, copies)
    records = {shard.path.name: (skip or {}).get(shard.path.name) for shard in checkpoint.shards}
    shards = [shard for shard in checkpoint.shards if records[shard.path.name] is None]
    needed, measured = _bytes(shards, edits, copies)
    room = min(needed, berths.limit) if berths else needed
    with disk_errors(out, room), progress.bar("rewrite", needed + measured, "B") as advance:
        if berths is None:
            check_space(out, needed)
        count = from_any_thread(advance)
        jobs = [_job(shard, edits, copies, count, hash_files) for shard in shards]
        for record in _written(jobs, out, done, berths):
            records[record.name] = record
        if checkpoint.index is not None:
            _write_index(extended_index(checkpoint, checkpoint.index, copies), out / checkpoint.index.name)
        sync(out)
    return tuple(record for record in records.values() if record is not None)


def _written(jobs: Sequence[ShardJob], out: Path, done: Done | None, berths: Berths | None) -> Iterator[ShardRecord]:
    """The shards as they are done, a few at once."""
    lock = threading.Lock()
    with crew() as workers:

        def write(job: ShardJob) -> ShardRecord:
            with berths.at(job.source, job.target.file_size, workers.check) if berths else nullcontext():
                record = write_shard(job, out / job.source.path.name, workers)
                give_back()  # what is left of many small pieces would else grow with the number of shards
                log.info("wrote %s: %d tensors edited", record.name, record.edited)
                if done is not None:
                    with lock:
                        done(record)
            return record

        yield from each(workers, AT_ONCE, write, jobs)


def _check_edits(checkpoint: Checkpoint, edits: Mapping[str, TensorEdit]) -> None:
    for name in edits:
        shard = checkpoint.shard_of(name)
        dtype = shard.tensors[name].dtype
        if not DTYPES[dtype].is_floating_point:
            raise CheckpointError(f"{shard.path}: tensor {name} is stored as {dtype}, which cannot be edited")


def _bytes(shards: Sequence[Header], edits: Mapping[str, TensorEdit], copies: Sequence[TensorCopy]) -> tuple[int, int]:
    """How many bytes will be written, and how many read for measuring."""
    tensors = {name: info for shard in shards for name, info in shard.tensors.items()}
    added = sum(tensors[copy.source].nbytes for copy in copies if copy.source in tensors)
    measured = sum(edit.passes * tensors[name].nbytes for name, edit in edits.items() if name in tensors)
    return sum(shard.file_size for shard in shards) + added, measured


def _job(
    shard: Header,
    edits: Mapping[str, TensorEdit],
    copies: Sequence[TensorCopy],
    advance: Advance,
    hash_files: bool,
) -> ShardJob:
    mine = [copy for copy in copies if copy.source in shard.tensors]
    own = {name: edits[name] for name in shard.tensors if name in edits}
    return ShardJob(shard, extended_header(shard, mine), own, mine, advance, hash_files)


def _write_index(content: bytes, final: Path) -> None:
    with new_file(final) as fd:
        write_all(fd, content, 0)
