"""Where a room asks for something that takes long, so that whoever keeps results between runs can keep it."""

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")


class Stages(Protocol):
    """Keeps what takes long to compute."""

    def stage(self, name: str, kind: Any, make: Callable[[], T]) -> T:
        """The result of `make`, which is called unless an earlier run has kept it.

        Args:
            name: of the stage; each of a run has its own.
            kind: the type of the result, see `codec`.
        """


class NoStages:
    """For work that keeps nothing."""

    def stage(self, name: str, kind: Any, make: Callable[[], T]) -> T:
        """See `Stages`."""
        return make()


NO_STAGES: Stages = NoStages()


class Once(Generic[T]):
    """Something costly that is made when it is first asked for, if ever.

    Attributes:
        made: what was made; None before.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self.made: T | None = None

    def __call__(self) -> T:
        """What is wanted."""
        if self.made is None:
            self.made = self._make()
        return self.made
