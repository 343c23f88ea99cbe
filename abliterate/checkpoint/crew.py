"""Threads that work on pieces of several shards at once; the first error, or Ctrl-C, stops them all."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass
class _Run:
    """Pieces of one shard: those to begin, in their order, how many are being done, and what failed."""

    waiting: deque[Callable[[], None]]
    active: int = 0
    error: BaseException | None = None

    def fail(self, error: BaseException) -> None:
        """Keeps what says most: not that work was given up, where something else was first."""
        if self.error is None or isinstance(self.error, StoppedError):
            self.error = error


class Crew:
    """Workers, each with a buffer that is used again and again.

    They spread over the shards: writing into one file, one would wait for the other.
    """

    def __init__(self) -> None:
        self._own = threading.local()
        self._stopped = threading.Event()
        self._runs: list[_Run] = []
        self._news = threading.Condition()
        count = min(WORKERS, os.cpu_count() or 1)
        names = [f"rewrite {number}" for number in range(count)]
        # daemons: `stop` waits for them, and where nobody could call it, nothing waits for them in vain
        self._threads = [threading.Thread(target=self._work, name=name, daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

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
            Exception: of a piece that failed; the others are given up.
            StoppedError: other work failed.
        """
        run = _Run(deque(pieces))
        with self._news:
            self._runs.append(run)
            self._news.notify_all()
            self._news.wait_for(lambda: not run.active and (not run.waiting or self._stopped.is_set()))
            self._runs.remove(run)
        if run.error is not None:
            raise run.error
        if run.waiting:
            raise StoppedError

    def _work(self) -> None:
        while (found := self._next()) is not None:
            run, piece = found
            try:
                piece()
            except BaseException as error:
                run.fail(error)
                self._stopped.set()
            with self._news:
                run.active -= 1
                self._news.notify_all()

    def _next(self) -> tuple[_Run, Callable[[], None]] | None:
        """The next piece, of the shard that the fewest are at, and of these the first; None at the end."""
        with self._news:
            self._news.wait_for(lambda: self._stopped.is_set() or any(run.waiting for run in self._runs))
            if self._stopped.is_set():
                return None
            run = min((run for run in self._runs if run.waiting), key=lambda run: run.active)
            run.active += 1
            return run, run.waiting.popleft()

    def stop(self) -> None:
        """Gives up what is not begun, and waits for what is."""
        with self._news:
            self._stopped.set()
            self._news.notify_all()
        for thread in self._threads:
            thread.join()


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
