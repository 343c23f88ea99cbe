"""The branch of a repository where shards of one conversion wait for its certificate; nobody's checkpoint until then.

It begins as a copy of the branch that is pushed to, and holds nothing in the end but the checkpoint that is to be
proved. Its name comes from all that the output depends on, so that no other conversion's shards are in it; what is in
it counts only where it has the very hash that the run has written down.
"""

import hashlib
import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from abliterate.checkpoint.rewrite import ShardRecord
from abliterate.errors import HubError, some
from abliterate.hub.explain import AGAIN, how_to_remove
from abliterate.hub.parcel import Item, Placed
from abliterate.hub.repository import Repository, State
from abliterate.hub.upload import Upload

log = logging.getLogger(__name__)
PREFIX = "abliterate-work-"
KEPT = ".gitattributes"
"""Says what goes to large storage; the Hub has it in every repository."""


def branch_of(identity: Mapping[str, Any]) -> str:
    """The name of the work branch of a run."""
    text = json.dumps(identity, sort_keys=True)
    return PREFIX + hashlib.sha256(text.encode()).hexdigest()[:12]


class WorkBranch:
    """Asks the Hub when it is made.

    Args:
        target: the repository, on the branch that is to have the result.
        name: of the work branch.
        shards: names of those that it is to hold.

    Raises:
        HubError: the Hub cannot be asked.
    """

    def __init__(self, target: Repository, name: str, shards: Collection[str]) -> None:
        self.name, self.shards, self._target = name, frozenset(shards), target
        self._repository = target.on(name)
        self._upload = Upload(self._repository, self._repository.state())
        self._found = self._there if self._there.commit is not None else target.state()

    @property
    def _there(self) -> State:
        return self._upload.state

    @property
    def place(self) -> str:
        """`org/name@branch`."""
        return f"{self._target.name}@{self.name}"

    def holds(self, records: Mapping[str, ShardRecord]) -> frozenset[str]:
        """Names of shards that were on the Hub when this was made; where there was no branch, on the one to push to.

        Which is where they all are when a run was stopped between its last commit and its end.
        """
        return frozenset(name for name, record in records.items() if _has(self._found, record))

    def send(self, item: Item) -> None:
        """Sends a shard, so that it can be added at once.

        Raises:
            HubError: it did not arrive.
        """
        with self.noticing():
            self._upload.send([item])

    def add(self, item: Item) -> None:
        """Commits a shard that was sent.

        Raises:
            HubError: it is not there.
        """
        self._commit([item], item.name, {*self.shards, KEPT})
        self._refuse_small([item.name])

    def complete(self, items: Sequence[Item], records: Sequence[ShardRecord]) -> tuple[Placed, ...]:
        """Commits the small files beside the shards.

        Args:
            records: of all shards, which must be there by now.

        Returns:
            The shards, in a commit that holds the checkpoint and nothing else.

        Raises:
            HubError: some are not there.
        """
        commit = self._commit(items, "configuration", {*self.shards, KEPT, *(item.name for item in items)})
        missing = [record.name for record in records if not _has(self._there, record)]
        if missing:
            raise HubError(
                f"{self.place} has lost what was sent to it ({some(missing)}): run the same command again, which makes "
                "that anew"
            )
        return tuple(Placed(record.name, record.bytes, str(record.sha256_out), commit) for record in records)

    def remove(self) -> None:
        """Removes the branch, if that can be done."""
        try:
            self._repository.remove_branch()
        except HubError as error:
            log.warning("%s; all of it is in the result: %s", error, how_to_remove(self.place))

    def _commit(self, items: Sequence[Item], what: str, wanted: Collection[str]) -> str:
        """Has these files on the branch, and of all others those that are wanted."""
        with self.noticing():
            self._upload.send(items)
            if self._there.commit is None:
                self._repository.make_branch(self._target.state().commit)
                self._upload.refresh()
            strays = sorted(self._there.files.keys() - wanted)
            return self._upload.record(items, f"abliterate: {what}", strays)[0]

    @contextmanager
    def noticing(self) -> Iterator[None]:
        """An error where the branch that was there is gone says that.

        Raises:
            HubError: in place of any other.
        """
        made = self._there.commit is not None
        try:
            yield
        except HubError as error:
            if made and self._is_gone():
                raise HubError(f"{self.place} was removed while shards were sent to it; {AGAIN}") from error
            raise

    def _is_gone(self) -> bool:
        try:
            return self._repository.state().commit is None
        except HubError:
            return False

    def _refuse_small(self, names: Sequence[str]) -> None:
        """A file that git itself keeps has no hash to trust."""
        small = [name for name in names if self._there.files[name].sha256 is None]
        if small:
            raise HubError(
                f"{self._target.name} keeps {some(small)} in git and not as a large file, so its hash is not known: "
                f"have {KEPT} there say `*.safetensors filter=lfs diff=lfs merge=lfs -text`"
            )


def _has(state: State, record: ShardRecord) -> bool:
    remote = state.files.get(record.name)
    return remote is not None and remote.sha256 is not None and remote.sha256 == record.sha256_out
