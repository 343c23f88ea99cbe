"""Progress bars on stderr: shown on a terminal, silent when piped or when the user asks for quiet."""

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from tqdm import tqdm

T = TypeVar("T")


class Advance(Protocol):
    """Moves a bar forward by `amount` of its unit."""

    def __call__(self, amount: int = 1, /) -> object:
        """Advances."""


def from_any_thread(advance: Advance) -> Advance:
    """The same bar, moved by several threads."""
    lock = threading.Lock()

    def locked(amount: int = 1, /) -> None:
        with lock:
            advance(amount)

    return locked


@dataclass(frozen=True)
class Progress:
    """Makes progress bars. `enabled` None shows them only where stderr is a terminal; False never."""

    enabled: bool | None = None

    @property
    def visible(self) -> bool:
        """Whether bars are shown."""
        return sys.stderr.isatty() if self.enabled is None else self.enabled

    @contextmanager
    def bar(self, description: str, total: int, unit: str = "it") -> Iterator[Advance]:
        """A bar of `total` units (bytes when `unit` is "B"); yields the function that advances it."""
        hidden = None if self.enabled is None else not self.enabled
        scale = unit == "B"
        with tqdm(
            total=total,
            desc=description,
            unit=unit,
            unit_scale=scale,
            unit_divisor=1024 if scale else 1000,
            disable=hidden,
            leave=False,
            dynamic_ncols=True,
        ) as bar:
            yield bar.update

    def track(self, items: Iterable[T], description: str, total: int, unit: str = "it") -> Iterator[T]:
        """Yields the items, advancing a bar by one after each."""
        with self.bar(description, total, unit) as advance:
            for item in items:
                yield item
                advance(1)


def unseen(_amount: int = 1, /) -> None:
    """An `Advance` that moves no bar."""


SILENT = Progress(enabled=False)
