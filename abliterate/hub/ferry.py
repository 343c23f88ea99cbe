"""Shards of a conversion that do not stay here: sent as they are finished, removed, and read back to be proved."""

import logging
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from abliterate.checkpoint.allowance import Allowance
from abliterate.checkpoint.berths import Berths
from abliterate.checkpoint.client import client_bars
from abliterate.checkpoint.elsewhere import write_note
from abliterate.checkpoint.files import files_in
from abliterate.checkpoint.locate import Source
from abliterate.checkpoint.ondemand import on_demand
from abliterate.checkpoint.rewrite import ShardRecord
from abliterate.checkpoint.workfolder import WorkFolder
from abliterate.hub.explain import how_to_remove
from abliterate.hub.outbox import Outbox
from abliterate.hub.parcel import Item, Parcel, Placed, item_of, pack
from abliterate.hub.repository import Repository
from abliterate.hub.upload import Landed, Upload, message_of
from abliterate.hub.workbranch import WorkBranch
from abliterate.progress import Progress, unseen

log = logging.getLogger(__name__)
PATIENCE = 5.0
"""Seconds to wait for a commit that is under way when the run ends: what it leaves is then known."""


class Ferry:
    """Brings shards to a work branch, and from there to where they are wanted (a `Sender`).

    Args:
        repository: on the branch that is to have the result.
        branch: for the time until then.
        work: the run's work folder; shards that are read back are in it too.
        allowance: bytes of shards that may be on the disk at once, those of the base included.
        progress: counts bytes that are there.
        total: of the bytes that there will be.
    """

    def __init__(
        self,
        repository: Repository,
        branch: WorkBranch,
        work: WorkFolder,
        allowance: Allowance,
        progress: Progress,
        total: int,
    ) -> None:
        self.repository, self._branch, self._cache = repository, branch, work.path / "hub"
        self._allowance, self._progress = allowance, progress
        self._outbox = Outbox(self._send, self._fail, progress, total)
        self._error: Exception | None = None
        self._placed: tuple[Placed, ...] = ()
        self._headers = work.new
        self.berths: Berths = Berths(allowance, self.check)
        self.berths.find(work.new)

    def check(self) -> None:
        """Raises:
        HubError: nothing can be sent any more.
        """
        if self._error is not None:
            raise self._error

    def begin(self, folder: Path, done: Collection[str]) -> None:
        """Looks at what there is before shards are written.

        Args:
            folder: that they are written to; of shards it has those of `done` that were not sent.
            done: names of shards that are finished.
        """
        self.berths.find(folder)
        if not self._branch.shards <= set(done):
            shutil.rmtree(self._cache, ignore_errors=True)  # of a checkpoint that now becomes another one

    def take(self, folder: Path, record: ShardRecord) -> None:
        """Sends a finished shard soon, and removes it then; one that is not here has been sent."""
        path = folder / record.name
        if path.exists():
            self.berths.leave(record.name)
            self._outbox.put(item_of(path, record.name, record.sha256_out))

    @contextmanager
    def arrived(self, folder: Path, records: Sequence[ShardRecord]) -> Iterator[Source]:
        """Waits until all shards are sent, and yields the checkpoint as the Hub has it, to be read while this lasts.

        Args:
            folder: has everything of it but the shards.

        Raises:
            HubError: not all of it is there.
        """
        self._outbox.finish()
        self.check()
        paths = [path for path in files_in(folder) if path.is_file()]
        items = [item_of(path, path.relative_to(folder).as_posix()).hashed(unseen) for path in paths]
        self._placed = self._branch.complete(items, records)
        place = f"{self.repository.name}@{self._placed[0].commit}"
        with on_demand(place, None, self._allowance, self._cache, self._progress) as source:
            self._headers = source.folder
            yield source

    def deliver(self, folder: Path) -> tuple[Parcel, Landed]:
        """Commits everything where it is wanted: shards by their hashes, which takes none of their bytes.

        Args:
            folder: the finished checkpoint without its shards, whose certificate holds; it is told where those are.

        Raises:
            HubError: nothing was committed.
            CheckpointError: it is not fit to be pushed.
        """
        parcel = pack(folder, self._headers, self._placed)
        parcel = replace(parcel, items=tuple(item.hashed(unseen) for item in parcel.items))
        with client_bars(self._progress.visible), self._branch.noticing():
            upload = Upload(self.repository, self.repository.state())
            landed = upload.commit(parcel.items, message_of(parcel), parcel.placed)
        write_note(folder, self.repository.name, landed.commit)
        self._branch.remove()
        return parcel, landed

    def leave(self, folder: Path) -> None:
        """What is to be said and noted where the certificate failed: the shards stay where they are."""
        log.warning(
            "its weights are on %s, and nowhere else; once you have seen enough of them, %s",
            self._branch.place,
            how_to_remove(self._branch.place),
        )
        write_note(folder, self.repository.name, self._placed[0].commit)

    def stop(self) -> None:
        """No further file is begun, and none that is on its way is committed or removed."""
        self._outbox.stop(PATIENCE)

    def _send(self, item: Item) -> None:
        for step in (self._branch.send, self._branch.add, self._drop):
            if not self._outbox.stopped:
                step(item)

    def _drop(self, item: Item) -> None:
        item.path.unlink()
        self.berths.free(item.name)

    def _fail(self, error: Exception) -> None:
        self._error = error
