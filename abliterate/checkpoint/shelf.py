"""Shards of the Hub on a shelf of limited room: fetched when they are asked for, dropped when others need the place."""

import logging
import shutil
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from abliterate.checkpoint.allowance import Allowance, Thing
from abliterate.checkpoint.crew import StoppedError
from abliterate.checkpoint.keeper import Check, go_on
from abliterate.checkpoint.remote import RemoteFile
from abliterate.checkpoint.turns import going_first
from abliterate.errors import CheckpointError
from abliterate.progress import SILENT, Progress

log = logging.getLogger(__name__)

PARTIAL = ".partial"


@dataclass(frozen=True)
class Shard:
    """A shard as the Hub has it: the file, and the header that was read of it.

    What is read by range is held against no hash; so the header is, once the whole shard is there.
    """

    file: RemoteFile
    header: bytes


class Fetch(Protocol):
    """Brings files."""

    def __call__(self, file: RemoteFile, partial: Path, final: Path, progress: Progress, check: Check) -> int:
        """Makes `final`, whole and as the Hub says it is; goes on from what is in `partial`. Returns bytes fetched."""


class Verify(Protocol):
    """Looks at files."""

    def __call__(self, file: RemoteFile, path: Path, check: Check) -> bool:
        """Whether the file at `path` is what the Hub says of it."""


class Shelf:
    """The shards of one checkpoint (a `Keeper`, and an `Owner` of what is on the disk).

    Args:
        folder: has the shards, and nothing else; it is used by one process at a time.
        shards: in the order in which passes read them.
        allowance: bytes that they may take there, partly fetched ones included; or what they share with others.
        elsewhere: those that are on the disk already, and stay there.

    Attributes:
        fetched: bytes so far.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[Shard],
        allowance: int | Allowance,
        fetch: Fetch,
        verify: Verify,
        elsewhere: Mapping[str, Path] | None = None,
        progress: Progress = SILENT,
    ) -> None:
        self._allowance = Allowance(allowance) if isinstance(allowance, int) else allowance
        self._folder, self._fetch, self._verify = folder, fetch, verify
        self._files = {shard.file.name: shard.file for shard in shards}
        self._headers = {shard.file.name: shard.header for shard in shards}
        self._turn = {name: number for number, name in enumerate(self._files)}
        self._elsewhere, self._progress = dict(elsewhere or {}), progress
        self._checked: set[str] = set()
        self._fetching = {name: threading.Lock() for name in self._files}
        self._counting, self._closed = threading.Lock(), threading.Event()
        self._last, self.fetched = 0, 0
        self._find_again()

    @property
    def place(self) -> Path:
        """See `Keeper`."""
        return self._folder

    @property
    def limit(self) -> int:
        """See `Keeper`."""
        return self._allowance.limit

    @property
    def bytes(self) -> int:
        """Of what is on the shelf, or has its room there."""
        return self._allowance.of(self)

    @property
    def unfilled(self) -> int:
        """See `Keeper`."""
        return max(0, min(self.limit, sum(map(self.size, self._files))) - self.bytes)

    def size(self, name: str) -> int:
        """See `Keeper`."""
        return 0 if name in self._elsewhere else self._files[name].size

    def sha256(self, name: str) -> str | None:
        """See `Keeper`."""
        return self._files[name].sha256

    def fingerprint(self, name: str) -> str:
        """See `Keeper`."""
        return self._files[name].fingerprint

    def room(self, names: Collection[str]) -> Mapping[Thing, int]:
        """See `Keeper`."""
        return {(self, name): self._files[name].size for name in names if name not in self._elsewhere}

    @contextmanager
    def hold(self, names: Collection[str], check: Check = go_on) -> Iterator[Mapping[str, Path]]:
        """See `Keeper`.

        Raises:
            CheckpointError: the limit is too small for all of them at once.
            HubError: one cannot be fetched.
        """
        wanted = sorted(names, key=self._turn.__getitem__)
        room = self.room(wanted)

        def both() -> None:
            check()
            if self._closed.is_set():
                raise StoppedError

        self._allowance.take(room, both)
        self._last = min((self._turn[name] for name in wanted), default=self._last)
        try:
            yield {name: self._brought(name, both) for name in wanted}
        finally:
            self._allowance.let_go(room)

    def going_first(self, idle: Collection[str], wanted: Collection[str]) -> Sequence[str]:
        """See `Owner`."""
        turn = min((self._turn[name] for name in wanted), default=self._last)
        there = {self._turn[name]: name for name in idle}
        return [there[number] for number in going_first(there, turn, len(self._turn))]

    def drop(self, name: str) -> None:
        """See `Owner`."""
        for path in (self._folder / name, self._folder / f"{name}{PARTIAL}"):
            path.unlink(missing_ok=True)
        self._checked.discard(name)

    def close(self) -> None:
        """Whoever still fetches stops; what is there counts no longer."""
        self._closed.set()
        self._allowance.free_all(self)

    def _find_again(self) -> None:
        """What an earlier run left counts, and is looked at before it is used; what is no shard of these goes."""
        self._folder.mkdir(parents=True, exist_ok=True)
        found: dict[str, int] = {}
        for path in self._folder.iterdir():
            name = path.name.removesuffix(PARTIAL)
            if name in self._files and path.is_file() and not path.is_symlink():
                found[name] = found.get(name, 0) + path.stat().st_size
            else:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for name in sorted(found, key=self._turn.__getitem__):
            if self._allowance.taken + found[name] <= self.limit:
                self._allowance.count((self, name), found[name])
            else:
                self.drop(name)

    def _brought(self, name: str, check: Check) -> Path:
        """Where a shard is that has room; fetched by the first that comes."""
        file, final = self._files[name], self._elsewhere.get(name, self._folder / name)
        with self._fetching[name]:
            if name in self._checked:
                return final
            if final.exists() and not self._verify(file, final, check):
                self._refuse_or_remove(name, final)
            if not final.exists():
                count = self._fetch(file, self._folder / f"{name}{PARTIAL}", final, self._progress, check)
                with self._counting:
                    self.fetched += count
            self._check_header(name, final)
            self._checked.add(name)
        return final

    def _check_header(self, name: str, path: Path) -> None:
        header = self._headers[name]
        with path.open("rb") as file:
            if file.read(len(header)) != header:
                raise CheckpointError(f"{name} has another header on the Hub than was read at first; start again")

    def _refuse_or_remove(self, name: str, path: Path) -> None:
        """What to do with a shard that an earlier run left, or another program, and that is not what the Hub has."""
        if name in self._elsewhere:
            raise CheckpointError(f"{path} is not what the Hub has: remove it, so that it is fetched again")
        log.warning("%s is not as it was fetched: it is fetched again", path)
        path.unlink()
