"""A conversion that was stopped is continued, unless it is another one; what it left is checked before it is used."""

import errno
import logging
import shutil
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from abliterate.checkpoint.files import Checkpoint
from abliterate.checkpoint.hashing import file_sha256, shard_sha256
from abliterate.checkpoint.output import Staging, staged
from abliterate.checkpoint.rewrite import ShardRecord
from abliterate.checkpoint.target import resolved
from abliterate.checkpoint.workfolder import WorkFolder, in_use
from abliterate.errors import AbliterateError, HubError, OutputError
from abliterate.hub.explain import how_to_remove
from abliterate.identity import what_differs
from abliterate.journal import Journal, JournalError, read_journal
from abliterate.progress import SILENT, Progress, from_any_thread

log = logging.getLogger(__name__)

PASSING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM})
"""What is of this machine and this moment, and not of the input."""


class Sent(Protocol):
    """Where shards are that were sent away when they were finished."""

    @property
    def place(self) -> str:
        """Its name, for people."""

    def holds(self, records: Mapping[str, ShardRecord]) -> Collection[str]:
        """Names of those that are there as they were written."""


@contextmanager
def working(
    out: Path,
    checkpoint: Checkpoint,
    identity: Mapping[str, Any],
    *,
    overwrite: bool,
    progress: Progress = SILENT,
    sent: Sent | None = None,
) -> Iterator[tuple[Staging, Journal]]:
    """Yields the folder to fill, with what an earlier run of the same identity has in it, and the journal.

    Whatever stops the work, what is finished by then stays for the next run; only where an input is at fault, so that
    the same would happen again, nothing does.

    Args:
        sent: where shards go that do not stay in the folder; None where all do.

    Raises:
        OutputError: see `staged`; or the work of another command is there, unfinished.
    """
    with staged(out, overwrite=overwrite, inputs=[checkpoint.folder]) as staging:
        journal = None
        try:
            journal = _open(staging.work, checkpoint, identity, overwrite, progress, sent)
            yield staging, journal
        except BaseException as error:
            if journal is not None:
                staging.kept = journal.begun and not _of_the_input(error)
            if staging.kept and journal is not None and not isinstance(error, KeyboardInterrupt):
                log.warning("what is finished is kept in %s: the same command goes on from there", staging.work.path)
            raise


def outlook(out: Path, identity: Mapping[str, Any], *, overwrite: bool, files: bool = True) -> str:
    """What `working` would make of what is there now, in words; empty where there is nothing. Touches nothing.

    Raises:
        OutputError: it would be refused.
    """
    work = WorkFolder.of(resolved(out))
    if not work.path.is_dir():
        return ""
    if in_use(work):
        raise OutputError(f"another run is writing {work.out}; wait for it, or choose another OUT")
    journal, other = _look(work, identity, files)
    if other is not None:
        _refuse_or_say(work, other, overwrite)
        return "what an earlier command left unfinished would be removed"
    return f"a run that was stopped would be continued ({journal.summary})" if journal else ""


def _open(
    work: WorkFolder,
    checkpoint: Checkpoint,
    identity: Mapping[str, Any],
    overwrite: bool,
    progress: Progress,
    sent: Sent | None,
) -> Journal:
    journal, other = _look(work, identity)
    if journal is not None and other is None:
        changed = _recheck(journal, checkpoint, progress, sent.holds(journal.all_shards) if sent else ())
        other = f"files of the base: {', '.join(changed)}" if changed else None
    if other is not None:
        _refuse_or_say(work, other, overwrite)
        log.warning("what an earlier command left unfinished in %s is removed", work.path)
    if journal is not None and journal.sent_to not in (None, sent.place if sent else None):
        log.warning("an earlier command sent shards that nobody needs now: %s", how_to_remove(journal.sent_to))
    if journal is not None and other is None:
        log.warning("continuing a run that was stopped: %s", journal.summary)
    else:
        work.clear()
        work.new.mkdir()
        work.stages.mkdir()
        journal = Journal(work, identity)
    journal.sent_to = sent.place if sent else None
    return journal


def _look(work: WorkFolder, identity: Mapping[str, Any], files: bool = True) -> tuple[Journal | None, str | None]:
    """The journal that is there, if anything was finished; and why it is not this run's, if so."""
    try:
        journal = read_journal(work)
    except JournalError as error:
        log.info("%s: %s", work.journal, error)
        return None, "its journal is damaged"
    if journal is None or not journal.begun or not work.new.is_dir():
        return None, None
    return journal, what_differs(journal.identity, Journal(work, identity).identity, files)


def _refuse_or_say(work: WorkFolder, other: str, overwrite: bool) -> None:
    if not overwrite:
        raise OutputError(
            f"{work.path} holds unfinished work of another run ({other}); run that command again to finish it, or add "
            "--overwrite to start anew"
        )


def _recheck(journal: Journal, checkpoint: Checkpoint, progress: Progress, sent: Collection[str]) -> list[str]:
    """Hashes every finished shard again, input and output; drops those that were damaged.

    Args:
        sent: names of those that are on the Hub as they were written.

    Returns:
        Names of inputs that have changed.
    """
    changed = []
    records = [(shard, journal.all_shards.get(shard.path.name)) for shard in checkpoint.shards]
    total = sum(2 * record.bytes for _, record in records if record)
    with progress.bar("check shards", total, "B") as advance, ThreadPoolExecutor(1) as threads:
        count = from_any_thread(advance)
        for source, record in records:
            if record is None:
                continue
            target = journal.work.new / record.name
            earlier = threads.submit(shard_sha256, source, count)
            after = file_sha256(target, count)
            before = earlier.result()
            if record.sha256_in is not None and before != record.sha256_in:
                changed.append(record.name)
            elif record.sha256_out is None or after != record.sha256_out:
                if record.name in sent:
                    target.unlink(missing_ok=True)
                    continue
                what = "is not as it was written" if after or not journal.sent_to else f"is not on {journal.sent_to}"
                log.warning("%s %s: it is written again", target, what)
                journal.drop_shard(record.name)
    return changed


def keep_only(folder: Path, shards: Mapping[str, ShardRecord]) -> None:
    """Removes everything from the folder but finished shards: the rest is made anew.

    Raises:
        OSError: something cannot be removed.
    """
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in shards:
            path.unlink()


def bytes_in(folder: Path) -> int:
    """Size of the files that are in a folder already."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _of_the_input(error: BaseException) -> bool:
    """Whether the same would happen again: an error about what was given, and not about this machine as it is now."""
    if not isinstance(error, AbliterateError) or isinstance(error, OutputError | HubError):
        return False
    return not any(_passes(cause) for cause in _causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _passes(error: BaseException) -> bool:
    """Memory, a disk, or a device, of which torch tells in plain RuntimeErrors."""
    if isinstance(error, OSError):
        return error.errno in PASSING
    return isinstance(error, MemoryError | RuntimeError)
