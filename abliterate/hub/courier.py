"""Shards of a conversion go up as they are finished; the commit waits for the certificate."""

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from abliterate.checkpoint.berths import Berths
from abliterate.checkpoint.client import client_bars
from abliterate.checkpoint.locate import Source
from abliterate.checkpoint.rewrite import ShardRecord
from abliterate.hub.outbox import Outbox
from abliterate.hub.parcel import Item, Parcel, item_of, pack
from abliterate.hub.repository import Repository
from abliterate.hub.upload import Landed, Upload, message_of
from abliterate.progress import Progress, unseen

log = logging.getLogger(__name__)


class Courier:
    """Sends files while others are still being written (a `Sender`).

    Args:
        upload: to the repository.
        progress: counts bytes that are there.
        total: of the bytes that there will be.
    """

    def __init__(self, upload: Upload, progress: Progress, total: int) -> None:
        self._upload, self._progress = upload, progress
        self.berths: Berths | None = None
        self._taken: dict[str, Item] = {}
        self._outbox = Outbox(self._send, _missed, progress, total)

    @property
    def repository(self) -> Repository:
        """Where to."""
        return self._upload.repository

    def begin(self, folder: Path, done: Collection[str]) -> None:
        """See `Sender`."""

    def take(self, folder: Path, record: ShardRecord) -> None:
        """Sends a finished shard soon."""
        item = item_of(folder / record.name, record.name, record.sha256_out)
        self._taken[record.name] = item
        self._outbox.put(item)

    @contextmanager
    def arrived(self, folder: Path, records: Sequence[ShardRecord]) -> Iterator[Source]:
        """See `Sender`; shards are where they were written, and need not have been sent by then."""
        yield Source(folder, None, None, None)

    def deliver(self, folder: Path) -> tuple[Parcel, Landed]:
        """Waits for what was taken, sends the rest, and commits everything.

        Args:
            folder: the finished checkpoint, whose certificate holds.

        Raises:
            HubError: nothing was committed.
            CheckpointError: it is not fit to be pushed.
        """
        self._outbox.finish()
        parcel = pack(folder)
        items = tuple(self._known(item).hashed(unseen) for item in parcel.items)
        parcel = replace(parcel, items=items)
        self._upload.refresh()
        with client_bars(self._progress.visible):
            return parcel, self._upload.commit(items, message_of(parcel))

    def _known(self, item: Item) -> Item:
        taken = self._taken.get(item.name)
        return taken if taken is not None and taken.stamp == item.stamp else item

    def leave(self, folder: Path) -> None:
        """See `Sender`."""

    def stop(self) -> None:
        """No further file is begun."""
        self._outbox.stop()

    def _send(self, item: Item) -> None:
        if item.sha256 is None:
            item = self._taken[item.name] = item.hashed(unseen)
        self._upload.send([item])


def _missed(error: Exception) -> None:
    log.warning("%s; the conversion goes on, and sends what is missing in the end", error)
