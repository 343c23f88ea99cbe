"""How a conversion's shards go to the Hub while it goes on: as copies, or for good."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from abliterate.checkpoint.allowance import Allowance
from abliterate.checkpoint.berths import Berths
from abliterate.checkpoint.client import client_bars
from abliterate.checkpoint.locate import Source
from abliterate.checkpoint.rewrite import ShardRecord
from abliterate.checkpoint.workfolder import WorkFolder
from abliterate.hub.courier import Courier
from abliterate.hub.explain import client_log
from abliterate.hub.ferry import Ferry
from abliterate.hub.parcel import Parcel
from abliterate.hub.repository import Repository
from abliterate.hub.upload import Landed, Upload
from abliterate.hub.workbranch import WorkBranch
from abliterate.progress import Progress


class Sender(Protocol):
    """Sends a conversion's shards as they are finished, and in the end commits all of it."""

    @property
    def repository(self) -> Repository:
        """Where to."""

    @property
    def berths(self) -> Berths | None:
        """What shards wait for before they are written, where they do not stay; None where they do."""

    def begin(self, folder: Path, done: Collection[str]) -> None:
        """Shards are about to be written to the folder, all but those that are `done`."""

    def take(self, folder: Path, record: ShardRecord) -> None:
        """Sends a finished shard soon."""

    def arrived(self, folder: Path, records: Sequence[ShardRecord]) -> AbstractContextManager[Source]:
        """All shards are written: yields the checkpoint as it is to be proved.

        Args:
            folder: has everything but shards that do not stay.

        Raises:
            HubError: not all of it is where it is read from.
        """

    def deliver(self, folder: Path) -> tuple[Parcel, Landed]:
        """Commits the finished checkpoint, whose certificate holds.

        Raises:
            HubError: nothing was committed.
            CheckpointError: it is not fit to be pushed.
        """

    def leave(self, folder: Path) -> None:
        """The certificate has failed: notes and says what stays on the Hub."""

    def stop(self) -> None:
        """No further file is begun."""


@dataclass(frozen=True)
class Dropping:
    """What it takes to send shards for good.

    Attributes:
        branch: where they wait for the certificate.
        allowance: bytes of shards that may be on the disk at once, those of the base included.
    """

    branch: WorkBranch
    allowance: Allowance


@contextmanager
def sending(
    repository: Repository | None, dropping: Dropping | None, work: WorkFolder, progress: Progress, total: int
) -> Iterator[Sender | None]:
    """Yields who sends to the repository; None where there is none to push to.

    Args:
        dropping: shards do not stay; None where they do.
        work: the run's work folder.
        progress: counts bytes that are there.
        total: of the bytes that there will be.

    Raises:
        HubError: the repository cannot be looked at.
    """
    if repository is None:
        yield None
        return
    with client_log(), client_bars(False):
        sender: Sender = (
            Courier(Upload(repository, repository.state()), progress, total)
            if dropping is None
            else Ferry(repository, dropping.branch, work, dropping.allowance, progress, total)
        )
        try:
            yield sender
        finally:
            sender.stop()


def stored(sender: Sender | None, folder: Path, records: Sequence[ShardRecord]) -> AbstractContextManager[Source]:
    """`Sender.arrived`; where nothing is sent, the folder itself."""
    return sender.arrived(folder, records) if sender else nullcontext(Source(folder, None, None, None))
