"""Shards of a conversion go up as they are finished; the commit waits for the certificate."""

import logging
import queue
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from abliterate.checkpoint.crew import LOOKS
from abliterate.checkpoint.rewrite import ShardRecord
from abliterate.errors import AbliterateError
from abliterate.hub.explain import client_log
from abliterate.hub.parcel import Item, Parcel, item_of, pack
from abliterate.hub.repository import Repository
from abliterate.hub.upload import Landed, Upload, client_bars, message_of
from abliterate.progress import Advance, Progress, unseen

log = logging.getLogger(__name__)


class Courier:
    """A thread that sends files while others are still being written.

    Args:
        upload: to the repository.
        progress: counts bytes that are there.
        total: of the bytes that there will be.
    """

    def __init__(self, upload: Upload, progress: Progress, total: int) -> None:
        self._upload, self._progress, self._total = upload, progress, total
        self._taken: dict[str, Item] = {}
        self._waiting: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._ended = threading.Event()
        self._bar = ExitStack()
        # A daemon: what ends the process does not wait for gigabytes; the next run finds what had arrived.
        self._thread = threading.Thread(target=self._run, name="push", daemon=True)

    @property
    def repository(self) -> Repository:
        """Where to."""
        return self._upload.repository

    def take(self, folder: Path, record: ShardRecord) -> None:
        """Sends a finished shard soon."""
        item = item_of(folder / record.name, record.name, record.sha256_out)
        self._taken[record.name] = item
        self._waiting.put(item)
        if not self._thread.is_alive() and not self._ended.is_set():
            self._thread.start()

    def deliver(self, folder: Path) -> tuple[Parcel, Landed]:
        """Waits for what was taken, sends the rest, and commits everything.

        Args:
            folder: the finished checkpoint, whose certificate holds.

        Raises:
            HubError: nothing was committed.
            CheckpointError: it is not fit to be pushed.
        """
        self._waiting.put(None)
        while self._thread.is_alive() and not self._ended.wait(LOOKS):
            pass
        self._bar.close()
        parcel = pack(folder)
        items = tuple(self._known(item).hashed(unseen) for item in parcel.items)
        parcel = replace(parcel, items=items)
        self._upload.refresh()
        with client_bars(self._progress.visible):
            return parcel, self._upload.commit(items, message_of(parcel))

    def _known(self, item: Item) -> Item:
        taken = self._taken.get(item.name)
        return taken if taken is not None and taken.stamp == item.stamp else item

    def stop(self) -> None:
        """No further file is begun."""
        self._stopped.set()
        self._bar.close()

    def _run(self) -> None:
        try:
            advance = self._bar.enter_context(self._progress.bar("push", self._total, "B"))
            while (item := self._waiting.get()) is not None and not self._stopped.is_set():
                self._send(item, advance)
        except AbliterateError as error:
            if not self._stopped.is_set():
                log.warning("%s; the conversion goes on, and sends what is missing in the end", error)
        finally:
            self._ended.set()

    def _send(self, item: Item, advance: Advance) -> None:
        if item.sha256 is None:
            item = self._taken[item.name] = item.hashed(unseen)
        self._upload.send([item])
        advance(item.size)


@contextmanager
def courier(repository: Repository | None, progress: Progress, total: int) -> Iterator[Courier | None]:
    """Yields who sends to the repository; None where there is none to push to.

    Raises:
        HubError: the repository cannot be looked at.
    """
    if repository is None:
        yield None
        return
    with client_log(), client_bars(False):
        sender = Courier(Upload(repository, repository.state()), progress, total)
        try:
            yield sender
        finally:
            sender.stop()
