"""Shards that are not on the disk until they are asked for, as those see it that read them: hold, read, let go."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from abliterate.checkpoint.allowance import Thing
    from abliterate.checkpoint.header import Header

Check = Callable[[], None]
"""Called often while something takes long; raises where nothing more is to be done."""


def go_on() -> None:
    """A `Check` that never stops anything."""


class Keeper(Protocol):
    """Has the shards of one checkpoint."""

    @property
    def limit(self) -> int:
        """Bytes that may be on the disk at once."""

    @property
    def place(self) -> Path:
        """Where on the disk; a folder that may have to be made yet."""

    @property
    def unfilled(self) -> int:
        """Bytes that may be added to what is there."""

    def size(self, name: str) -> int:
        """Bytes that a shard takes of the limit."""

    def room(self, names: Collection[str]) -> "Mapping[Thing, int]":
        """What holding these shards takes of an `Allowance`."""

    def hold(self, names: Collection[str], check: Check = go_on) -> AbstractContextManager[Mapping[str, Path]]:
        """Has shards on the disk, all at once, for as long as this lasts.

        Args:
            names: of the shards' files.
            check: see `Check`.

        Yields:
            Where each of them is.

        Raises:
            AbliterateError: one cannot be had.
        """

    def sha256(self, name: str) -> str | None:
        """What the bytes of a shard hash to, without reading it; None where that is not known."""

    def fingerprint(self, name: str) -> str:
        """What tells the shard from any other, without reading it."""


def unfilled(keeper: Keeper | None, folder: Path) -> int:
    """Bytes that shards may still take of the file system that `folder` is on."""
    return keeper.unfilled if keeper is not None and shares_disk(keeper, folder) else 0


def shares_disk(keeper: Keeper, folder: Path) -> bool:
    """Whether shards lie on the file system that `folder` is on."""
    place = next(parent for parent in (keeper.place, *keeper.place.parents) if parent.exists())
    return place.stat().st_dev == folder.stat().st_dev


@contextmanager
def held(shards: Sequence["Header"], check: Check = go_on) -> Iterator[list[Path]]:
    """Has shards of one checkpoint on the disk, all at once, for as long as this lasts.

    Yields:
        Where each is, in the order of `shards`.

    Raises:
        AbliterateError: one cannot be had.
    """
    keeper = shards[0].keeper if shards else None
    if keeper is None:
        yield [shard.path for shard in shards]
        return
    with keeper.hold({shard.path.name for shard in shards}, check) as places:
        yield [places[shard.path.name] for shard in shards]
