"""A thread that sends one file after another, while others are still being written."""

import queue
import threading
from collections.abc import Callable
from contextlib import ExitStack

from abliterate.checkpoint.crew import LOOKS
from abliterate.hub.parcel import Item
from abliterate.progress import Progress


class Outbox:
    """Files on their way.

    Args:
        send: does it, in the thread.
        failed: told of what stopped the thread; not of what comes once it was to stop.
        progress: counts bytes that are there.
        total: of the bytes that there will be.
    """

    def __init__(
        self, send: Callable[[Item], None], failed: Callable[[Exception], None], progress: Progress, total: int
    ) -> None:
        self._send, self._failed, self._progress, self._total = send, failed, progress, total
        self._waiting: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._stopped, self._ended = threading.Event(), threading.Event()
        self._bar = ExitStack()
        # A daemon: what ends the process does not wait for gigabytes; the next run finds what had arrived.
        self._thread = threading.Thread(target=self._run, name="push", daemon=True)

    @property
    def stopped(self) -> bool:
        """Whether nothing more is to be begun."""
        return self._stopped.is_set()

    def put(self, item: Item) -> None:
        """Sends a file soon; by one thread at a time."""
        self._waiting.put(item)
        if not self._thread.is_alive() and not self._ended.is_set():
            self._thread.start()

    def finish(self) -> None:
        """Waits for everything that was put, or for what stopped the thread."""
        self._waiting.put(None)
        while self._thread.is_alive() and not self._ended.wait(LOOKS):
            pass
        self._bar.close()

    def stop(self, patience: float = 0.0) -> None:
        """No further file is begun.

        Args:
            patience: seconds to wait for what is under way.
        """
        self._stopped.set()
        self._waiting.put(None)
        if self._thread.is_alive():
            self._thread.join(patience)
        self._bar.close()

    def _run(self) -> None:
        try:
            advance = self._bar.enter_context(self._progress.bar("push", self._total, "B"))
            while (item := self._waiting.get()) is not None and not self.stopped:
                self._send(item)
                advance(item.size)
        except Exception as error:
            if not self.stopped:
                self._failed(error)
        finally:
            self._ended.set()
