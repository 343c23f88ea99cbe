"""Bytes that may be on the disk at once: who has how much of them, and who waits for room."""

import threading
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from abliterate.checkpoint.crew import LOOKS
from abliterate.checkpoint.keeper import Check
from abliterate.errors import CheckpointError
from abliterate.sizes import enough


class Owner(Protocol):
    """Has things that take room."""

    def going_first(self, idle: Collection[str], wanted: Collection[str]) -> Sequence[str]:
        """Names of things that nobody holds, in the order in which they go to make room.

        Args:
            wanted: what is to come of this owner's; may be empty.
        """

    def drop(self, name: str) -> None:
        """Removes a thing from the disk."""


Thing = tuple[Owner, str]


class Allowance:
    """One limit for things of several owners.

    Attributes:
        limit: bytes that all of them together may take.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._taken: dict[Thing, int] = {}
        self._holders: Counter[Thing] = Counter()
        self._leaving: set[Thing] = set()
        self._threads: Counter[int] = Counter()
        self._waiting: set[int] = set()
        self._news = threading.Condition()

    @property
    def taken(self) -> int:
        """Bytes that are on the disk, or have their room there."""
        with self._news:
            return sum(self._taken.values())

    def of(self, owner: Owner) -> int:
        """The same of one owner."""
        with self._news:
            return sum(size for (whose, _), size in self._taken.items() if whose is owner)

    def count(self, thing: Thing, size: int, held: bool = False) -> None:
        """Takes note of what is there already, whether there is room for it or not.

        Args:
            held: it stays until it is freed.
        """
        with self._news:
            self._taken[thing] = size
            self._holders[thing] = int(held)

    def take(self, sizes: Mapping[Thing, int], check: Check) -> None:
        """Holds things, all at once, as soon as there is room for what is missing of them.

        Args:
            check: called while it waits; stops that by raising.

        Raises:
            CheckpointError: there will never be room.
        """
        me = threading.get_ident()
        with self._news:
            while not self._make_room(sizes):
                check()
                busy = {thread for thread, count in self._threads.items() if count and thread != me} - self._waiting
                if not busy and not self._leaving:  # whoever holds what is in the way waits as well
                    raise self._too_small(sizes)
                self._waiting.add(me)
                self._news.wait(LOOKS)
                self._waiting.discard(me)
            self._taken.update(sizes)
            self._holders.update(sizes.keys())
            self._threads[me] += 1

    def let_go(self, things: Iterable[Thing]) -> None:
        """Ends a `take`, by the same thread; the things stay until their room is needed."""
        with self._news:
            for thing in things:
                self._holders[thing] = max(0, self._holders[thing] - 1)  # it may have been freed meanwhile
            self._threads[threading.get_ident()] -= 1
            self._news.notify_all()

    def leave(self, thing: Thing) -> None:
        """Another thread is about to free it: those who wait for room may wait for that."""
        with self._news:
            self._leaving.add(thing)

    def free(self, thing: Thing) -> None:
        """It is no longer on the disk, whoever held it."""
        with self._news:
            self._forget(thing)
            self._news.notify_all()

    def free_all(self, owner: Owner) -> None:
        """Nothing of this owner counts any longer."""
        with self._news:
            for thing in [thing for thing in self._taken if thing[0] is owner]:
                self._forget(thing)
            self._news.notify_all()

    def _forget(self, thing: Thing) -> None:
        self._taken.pop(thing, None)
        self._holders.pop(thing, None)
        self._leaving.discard(thing)

    def _make_room(self, sizes: Mapping[Thing, int]) -> bool:
        """Drops what has to go; nothing where that would not do."""
        needed = sum(size - self._taken.get(thing, 0) for thing, size in sizes.items())
        free = self.limit - sum(self._taken.values())
        idle = [thing for thing in self._taken if not self._holders[thing] and thing not in sizes]
        if free + sum(self._taken[thing] for thing in idle) < needed:
            return False
        for owner, name in self._going_first(idle, sizes) if needed else ():
            if free >= needed:
                break
            free += self._taken[owner, name]
            self._forget((owner, name))
            owner.drop(name)
        return True

    def _going_first(self, idle: Iterable[Thing], sizes: Iterable[Thing]) -> Iterator[Thing]:
        """Those of owners of whom nothing is wanted now come first."""
        wanted: dict[Owner, list[str]] = {}
        for owner, name in sizes:
            wanted.setdefault(owner, []).append(name)
        there: dict[Owner, list[str]] = {}
        for owner, name in idle:
            there.setdefault(owner, []).append(name)
        for owner in sorted(there, key=lambda owner: owner in wanted):
            yield from ((owner, name) for name in owner.going_first(there[owner], wanted.get(owner, ())))

    def _too_small(self, sizes: Mapping[Thing, int]) -> CheckpointError:
        held = {thing: size for thing, size in self._taken.items() if self._holders[thing]}
        together = sum({**held, **sizes}.values())
        return CheckpointError(
            f"--cache-limit {self.limit} is too little: {together:,} bytes of shards are needed at once; give "
            f"{enough(together)} or more"
        )
