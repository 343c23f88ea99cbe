"""Room for shards that are written and do not stay on the disk: beside the shard that is read, under one limit."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from abliterate.checkpoint.allowance import Allowance
from abliterate.checkpoint.header import Header
from abliterate.checkpoint.keeper import Check


class Berths:
    """The shards of an output that is never whole on the disk (an `Owner`); each keeps its berth until it is freed.

    Args:
        allowance: that they share with the shards of the base, where those are fetched.
        check: raises once nobody will free a berth any more.
    """

    def __init__(self, allowance: Allowance, check: Check) -> None:
        self._allowance, self._check = allowance, check

    @property
    def limit(self) -> int:
        """Bytes that all of them together may take."""
        return self._allowance.limit

    def find(self, folder: Path) -> None:
        """Counts what an earlier run has left in the folder, and nothing else."""
        self._allowance.free_all(self)
        for path in folder.iterdir():
            if path.is_file():
                self._allowance.count((self, path.name), path.stat().st_size, held=True)

    @contextmanager
    def at(self, source: Header, size: int, check: Check) -> Iterator[None]:
        """Has room for the shard that is made of `source`, and holds that, both from the same moment on.

        Whoever had one of them and waited for the other might wait for someone who has the other.

        Args:
            size: of the shard to write, in bytes. It stays taken, unless this ends with an error.
            check: called while it waits; stops that by raising.

        Raises:
            CheckpointError: the limit is too small for both.
            AbliterateError: nobody frees berths any more.
        """
        berth, name = (self, source.path.name), source.path.name
        read = source.keeper.room([name]) if source.keeper is not None else {}

        def both() -> None:
            check()
            self._check()

        self._allowance.take({berth: size, **read}, both)
        try:
            yield
        except BaseException:
            self._allowance.free(berth)
            raise
        finally:
            self._allowance.let_go(read)

    def leave(self, name: str) -> None:
        """Somebody is about to free the berth."""
        self._allowance.leave((self, name))

    def free(self, name: str) -> None:
        """The shard is no longer on the disk."""
        self._allowance.free((self, name))

    def going_first(self, idle: Collection[str], wanted: Collection[str]) -> Sequence[str]:
        """See `Owner`; all are held."""
        return ()

    def drop(self, name: str) -> None:
        """See `Owner`.

        Raises:
            ValueError: always; what is in a berth is nowhere else.
        """
        raise ValueError(f"{name} is not to be dropped")
