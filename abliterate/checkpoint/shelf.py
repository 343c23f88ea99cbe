"""Shards of the Hub on a shelf of limited room: fetched when they are asked for, dropped when others need the place."""

import logging
import shutil
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from abliterate.checkpoint.crew import LOOKS, StoppedError
from abliterate.checkpoint.keeper import Check, go_on
from abliterate.checkpoint.remote import RemoteFile
from abliterate.checkpoint.turns import going_first
from abliterate.errors import CheckpointError
from abliterate.progress import SILENT, Progress
from abliterate.sizes import enough

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
    """The shards of one checkpoint (a `Keeper`).

    Args:
        folder: has the shards, and nothing else; it is used by one process at a time.
        shards: in the order in which passes read them.
        limit: bytes that they may take there, partly fetched ones included.
        elsewhere: those that are on the disk already, and stay there.

    Attributes:
        limit: see above. `fetched`: bytes so far.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[Shard],
        limit: int,
        fetch: Fetch,
        verify: Verify,
        elsewhere: Mapping[str, Path] | None = None,
        progress: Progress = SILENT,
    ) -> None:
        self._folder, self.limit, self._fetch, self._verify = folder, limit, fetch, verify
        self._files = {shard.file.name: shard.file for shard in shards}
        self._headers = {shard.file.name: shard.header for shard in shards}
        self._turn = {name: number for number, name in enumerate(self._files)}
        self._elsewhere, self._progress = dict(elsewhere or {}), progress
        self._taken: dict[str, int] = {}
        self._checked: set[str] = set()
        self._holders: Counter[str] = Counter()
        self._threads: Counter[int] = Counter()
        self._waiting: set[int] = set()
        self._fetching = {name: threading.Lock() for name in self._files}
        self._news, self._closed = threading.Condition(), threading.Event()
        self.fetched = 0
        self._find_again()

    @property
    def place(self) -> Path:
        """See `Keeper`."""
        return self._folder

    @property
    def bytes(self) -> int:
        """Of what is on the shelf, or has its room there."""
        return sum(self._taken.values())

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

    @contextmanager
    def hold(self, names: Collection[str], check: Check = go_on) -> Iterator[Mapping[str, Path]]:
        """See `Keeper`.

        Raises:
            CheckpointError: the limit is too small for all of them at once.
            HubError: one cannot be fetched.
        """
        wanted, me = sorted(names, key=self._turn.__getitem__), threading.get_ident()

        def both() -> None:
            check()
            if self._closed.is_set():
                raise StoppedError

        self._take(wanted, me, both)
        try:
            yield {name: self._brought(name, both) for name in wanted}
        finally:
            self._let_go(wanted, me)

    def close(self) -> None:
        """Whoever still fetches stops."""
        self._closed.set()

    def _find_again(self) -> None:
        """What an earlier run left counts, and is looked at before it is used; what is no shard of these goes."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.iterdir():
            name = path.name.removesuffix(PARTIAL)
            if name in self._files and path.is_file() and not path.is_symlink():
                self._taken[name] = self._taken.get(name, 0) + path.stat().st_size
            else:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for name in sorted(self._taken, key=self._turn.__getitem__, reverse=True):
            if self.bytes > self.limit:
                self._drop(name)

    def _take(self, names: Sequence[str], me: int, check: Check) -> None:
        """Counts as a holder of the shards, once there is room for those that are missing."""
        with self._news:
            while not self._make_room(names):
                check()
                busy = {thread for thread, count in self._threads.items() if count and thread != me} - self._waiting
                if not busy:  # whoever holds what is in the way waits as well
                    raise self._too_small(names)
                self._waiting.add(me)
                self._news.wait(LOOKS)
                self._waiting.discard(me)
            self._taken.update({name: self._files[name].size for name in names if name not in self._elsewhere})
            self._holders.update(names)
            self._threads[me] += 1

    def _make_room(self, names: Sequence[str]) -> bool:
        """Drops what has to go; nothing where that would not do."""
        own = [name for name in names if name not in self._elsewhere]
        needed = sum(self._files[name].size - self._taken.get(name, 0) for name in own)
        free = self.limit - self.bytes
        idle = {self._turn[name]: name for name in self._taken if not self._holders[name] and name not in names}
        if free + sum(self._taken[name] for name in idle.values()) < needed:
            return False
        for number in going_first(idle, self._turn[names[0]], len(self._turn)) if needed else ():
            if free >= needed:
                break
            free += self._taken[idle[number]]
            self._drop(idle[number])
        return True

    def _drop(self, name: str) -> None:
        for path in (self._folder / name, self._folder / f"{name}{PARTIAL}"):
            path.unlink(missing_ok=True)
        self._checked.discard(name)
        del self._taken[name]

    def _let_go(self, names: Sequence[str], me: int) -> None:
        with self._news:
            self._holders.subtract(names)
            self._threads[me] -= 1
            self._news.notify_all()

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
                with self._news:
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

    def _too_small(self, names: Sequence[str]) -> CheckpointError:
        together = sum(self._files[name].size for name in self._files if self._holders[name] or name in names)
        return CheckpointError(
            f"--cache-limit {self.limit} is too little: {together:,} bytes of shards are needed at once; give "
            f"{enough(together)} or more"
        )
