"""Bytes that a conversion has yet to put on the disk that OUT is on."""

from pathlib import Path

from abliterate.checkpoint.keeper import shares_disk, unfilled
from abliterate.job import Job, output_bytes


def space_needed(job: Job, place: Path, there: int = 0, drops: bool = False) -> int:
    """Bytes, at most, beside what is there already.

    Args:
        place: a folder on that disk.
        there: bytes of the output that are on it.
        drops: shards of the output do not stay: what is to be there at once keeps within the cache limit.
    """
    checkpoint, limit = job.subject.checkpoint, job.options.cache_limit
    out, room = output_bytes(job), unfilled(checkpoint.keeper, place)
    if not drops or limit is None:
        return out - there + room
    base = 0
    if checkpoint.keeper is not None and shares_disk(checkpoint.keeper, place):
        base = sum(checkpoint.keeper.size(shard.path.name) for shard in checkpoint.shards)
    fetched = min(limit, base) - room
    return max(0, min(limit, base + out) - fetched - there)
