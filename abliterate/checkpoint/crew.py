"""Threads that work on pieces of several shards at once; the first error, or Ctrl-C, stops them all."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from abliterate.malloc import frugal

Given = TypeVar("Given")
Made = TypeVar("Made")

WORKERS = 4
"""At most: memory goes with them, and a few keep a disk busy."""
KEPT_BYTES = 4 << 20
"""Freed memory of workers in larger pieces goes back to the system: kept, pieces of all sizes come to lie apart, and a
checkpoint of 16 GB took 100 MB more than one of 4 GB. Smaller ones are reused, which is faster."""
LOOKS = 0.2
"""Seconds after which the main thread looks up from waiting: a Ctrl-C just before it waits would else go unseen."""


class StoppedError(Exception):
    """Work that is given up because other work failed; never what the user is told."""


class Crew:
    """Workers, each with a buffer that is used again and again."""

    def __init__(self) -> None:
        self._count = min(WORKERS, os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(self._count, thread_name_prefix="rewrite")
        self._own = threading.local()
        self._stopped = threading.Event()

    def check(self) -> None:
        """Raises:
        StoppedError: nothing more is to be done.
        """
        if self._stopped.is_set():
            raise StoppedError

    def buffer(self, size: int) -> Tensor:
        """This worker's memory, uint8 of at least that many bytes."""
        buffer: Tensor | None = getattr(self._own, "buffer", None)
        if buffer is None or len(buffer) < size:
            buffer = self._own.buffer = torch.empty(size, dtype=torch.uint8)
        return buffer

    def run(self, pieces: Iterable[Callable[[], None]]) -> None:
        """Does pieces of work, begun in their order, and waits for them.

        Raises:
            Exception: of the first piece that failed; the others are given up.
        """
        futures: list[Future[None]] = []
        try:
            futures += map(self._submit, pieces)
            for future in as_completed(futures):
                future.result()
        except BaseException as error:
            # None is cancelled: of a queue that is emptied nobody tells those who wait. Stopped pieces end at once.
            self._stopped.set()
            wait(futures)
            raise _reason(futures, error) from None

    def _submit(self, piece: Callable[[], None]) -> "Future[None]":
        self.check()
        try:
            return self._threads.submit(self._do, piece)
        except RuntimeError:  # stopped in between
            self.check()
            raise

    def _do(self, piece: Callable[[], None]) -> None:
        self.check()
        try:
            piece()
        except BaseException:
            self._stopped.set()
            raise

    def stop(self) -> None:
        """Gives up what is not begun, and waits for what is."""
        self._stopped.set()
        self._threads.shutdown()


@contextmanager
def crew() -> Iterator[Crew]:
    """Yields workers; torch's own threads rest meanwhile, since work is parallel over pieces."""
    before, workers = torch.get_num_threads(), Crew()
    torch.set_num_threads(1)
    try:
        with frugal(KEPT_BYTES):
            yield workers
    finally:
        workers.stop()
        torch.set_num_threads(before)


def each(workers: Crew, at_once: int, make: Callable[[Given], Made], given: Iterable[Given]) -> Iterator[Made]:
    """What `make` makes of each, a few at once, as they are done.

    Raises:
        Exception: of the first that failed, once the others have been given up.
    """
    with ThreadPoolExecutor(at_once, thread_name_prefix="shard") as threads:
        futures: list[Future[Made]] = []
        try:
            # Work begins with the first: from here on Ctrl-C has to stop it.
            futures += [threads.submit(make, item) for item in given]
            waiting = set(futures)
            while waiting:
                finished, waiting = wait(waiting, LOOKS, FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
        except BaseException as error:
            workers.stop()
            threads.shutdown(cancel_futures=True)
            raise _reason(futures, error) from None


def _reason(futures: Iterable[Future[Made]], error: BaseException) -> BaseException:
    """Why work failed: not that other work was given up, where one of these says more."""
    if not isinstance(error, (StoppedError, CancelledError)):
        return error
    found = [future.exception() for future in futures if not future.cancelled()]
    return next((other for other in found if other is not None and not isinstance(other, StoppedError)), StoppedError())
