"""What a run has finished, on the disk: results of its stages and its shards, so that the next run goes on from there.

Every entry remembers by hash all that came before it. Where something before it comes out differently the next time, it
is not used; nor is a file whose hash is not the one written down.
"""

import dataclasses
import hashlib
import json
import logging
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from abliterate.checkpoint.diskio import sync, write_file
from abliterate.checkpoint.rewrite import ShardRecord
from abliterate.checkpoint.workfolder import WorkFolder
from abliterate.codec import CodecError, decode, encode

log = logging.getLogger(__name__)
T = TypeVar("T")
FORMAT = "abliteration-work/1"


class JournalError(ValueError):
    """The journal is damaged."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """Something finished: the hash of its file, and of all that was finished before it when it was made."""

    sha256: str
    after: str


@dataclasses.dataclass(frozen=True)
class ShardEntry:
    """A finished shard."""

    record: ShardRecord
    after: str


class Journal:
    """The journal of one run, which stands in a work folder that this process holds.

    Args:
        work: the work folder.
        identity: all that the output depends on, as plain JSON values.

    Attributes:
        sent_to: the branch of the Hub that has shards which are finished and not in the work folder.
    """

    def __init__(self, work: WorkFolder, identity: Mapping[str, Any]) -> None:
        self.work = work
        self.identity: Mapping[str, Any] = json.loads(json.dumps(identity))
        self._stages: dict[str, Entry] = {}
        self._shards: dict[str, ShardEntry] = {}
        self._trail = ""
        self._seen: set[str] = set()
        self.sent_to: str | None = None

    @property
    def begun(self) -> bool:
        """Whether anything is finished."""
        return bool(self._stages or self._shards)

    @property
    def summary(self) -> str:
        """What is finished, in words."""
        return f"{len(self._stages)} stages and {len(self._shards)} shards are done"

    @property
    def all_shards(self) -> Mapping[str, ShardRecord]:
        """Every finished shard, whatever came before it."""
        return {name: entry.record for name, entry in self._shards.items()}

    @property
    def shards(self) -> Mapping[str, ShardRecord]:
        """The finished shards that were made after the very stages that this run has gone through."""
        return {name: entry.record for name, entry in self._shards.items() if entry.after == self._trail}

    def stage(self, name: str, kind: Any, make: Callable[[], T]) -> T:
        """See `Stages`; the result is stored before it is given out.

        Raises:
            OutputError: it cannot be written.
        """
        if name in self._seen:
            raise ValueError(f"two stages are called {name}")
        self._seen.add(name)
        before = self._trail
        kept = self._kept(name, kind, before)
        value = kept[0] if kept else self._finish(name, kind, before, make())
        self._trail = _sha256(f"{before} {name} {self._stages[name].sha256}".encode())
        return value

    def _finish(self, name: str, kind: Any, before: str, value: T) -> T:
        """Stores the result of a stage; returns it as the next run will read it."""
        content = encode(value)
        write_file(self._file(name), content)
        sync(self.work.stages)
        self._stages[name] = Entry(_sha256(content), before)
        self._write()
        stored: T = decode(kind, content)
        return stored

    def finish_shard(self, record: ShardRecord) -> None:
        """Writes down a shard that has its final name."""
        self._shards[record.name] = ShardEntry(record, self._trail)
        self._write()

    def drop_shard(self, name: str) -> None:
        """Forgets a shard."""
        del self._shards[name]
        self._write()

    def follow(self, shards: Iterable[ShardRecord]) -> None:
        """What comes now depends on the bytes of these shards; where they were not hashed, nothing is found again."""
        for record in shards:
            digest = record.sha256_out or secrets.token_hex(32)
            self._trail = _sha256(f"{self._trail} {record.name} {digest}".encode())

    def _kept(self, name: str, kind: Any, before: str) -> tuple[Any] | None:
        """The result of a stage that an earlier run has finished, if it is to be trusted."""
        entry = self._stages.get(name)
        if entry is None:
            return None
        if entry.after != before:
            log.warning("stage %s was made from something else: it is done again", name)
            return None
        try:
            content = self._file(name).read_bytes()
            if _sha256(content) == entry.sha256:
                value = decode(kind, content)
                log.info("stage %s is taken from the run before", name)
                return (value,)
        except (OSError, CodecError) as error:
            log.info("%s: %s", self._file(name), error)
        log.warning("stage %s is damaged in %s: it is done again", name, self.work.stages)
        return None

    def _file(self, name: str) -> Path:
        return self.work.stages / (re.sub(r"\W+", "-", name) + ".safetensors")

    def _write(self) -> None:
        body = {
            "format": FORMAT,
            "identity": self.identity,
            "sent to": self.sent_to,
            "stages": {name: dataclasses.asdict(entry) for name, entry in self._stages.items()},
            "shards": {name: dataclasses.asdict(entry) for name, entry in self._shards.items()},
        }
        write_file(self.work.journal, json.dumps({**body, "sha256": _check(body)}, indent=1).encode())
        sync(self.work.path)


def read_journal(work: WorkFolder) -> Journal | None:
    """What an earlier run wrote; None where there is nothing.

    Raises:
        JournalError: it is damaged.
    """
    try:
        body = json.loads(work.journal.read_bytes())
        if body.pop("sha256") != _check(body) or body["format"] != FORMAT:
            raise JournalError("its hash is another")
        journal = Journal(work, body["identity"])
        journal.sent_to = body.get("sent to")
        journal._stages = {name: Entry(**entry) for name, entry in body["stages"].items()}
        journal._shards = {
            name: ShardEntry(ShardRecord(**entry["record"]), entry["after"]) for name, entry in body["shards"].items()
        }
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise JournalError(str(error)) from error
    return journal


def _check(body: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(body, sort_keys=True).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
