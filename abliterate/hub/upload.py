"""Sends files, and commits them: all of them together, once they are all there.

Why not `upload_folder` of the Hub client (before 2.0: `upload_large_folder`), which can be resumed as well: it commits
in batches, so that a stopped push leaves a repository with some of the shards, which looks like a checkpoint; it pushes
whatever is in the folder; and it cannot begin before the last shard is written. Here every file is sent on its own
with `preupload_lfs_files`, to storage that is addressed by content. Nobody sees it there; a second run asks for the
hash first and finds it. One `create_commit` then names them all.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

from abliterate.checkpoint.patience import is_transport, patiently, status_of
from abliterate.errors import HubError
from abliterate.hub.explain import AGAIN, explained
from abliterate.hub.parcel import Item, Parcel, Placed
from abliterate.hub.repository import Repository, State

log = logging.getLogger(__name__)
Operation = CommitOperationAdd | CommitOperationCopy | CommitOperationDelete
SMALL = 1_000_000
"""Bytes of a file that is gone before anybody waits for it."""
SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
"""What transformers calls weights: those that are replaced go with the commit, or two checkpoints would lie mixed."""


@dataclass(frozen=True)
class Landed:
    """What a push came to.

    Attributes:
        commit: that holds the files. `pull_request`: its address, where one was opened.
        sent: names of the files that were not there before. `removed`: names of shards that they replace.
    """

    commit: str
    pull_request: str | None
    sent: tuple[str, ...]
    removed: tuple[str, ...]


class Upload:
    """Files on their way to one repository.

    Args:
        repository: that may be written to.
        state: of its branch.
    """

    def __init__(self, repository: Repository, state: State) -> None:
        self.repository, self.state = repository, state
        self._sent: dict[str, CommitOperationAdd] = {}

    @property
    def _new_branch(self) -> bool:
        return self.state.commit is None

    def send(self, items: Sequence[Item]) -> None:
        """Sends files that are not there yet; small ones only learn that they will go with the commit.

        Raises:
            HubError: what is not sent by then is sent by the next call.
        """
        waiting = [item for item in items if item.name not in self._sent and not self.has(item)]
        for part in _parts(waiting):
            operations = {item.name: _operation(item) for item in part}
            self._preupload(list(operations.values()))
            self._sent |= operations
            log.info("sent %s", ", ".join(operations))

    def _preupload(self, operations: list[CommitOperationAdd]) -> None:
        with explained(self.repository.name):
            self.repository.api.preupload_lfs_files(
                self.repository.name,
                operations,
                revision=None if self._new_branch else self.repository.destination.branch,
                create_pr=self.repository.destination.create_pr,
                free_memory=False,
            )

    def has(self, item: Item | Placed) -> bool:
        """Whether the branch has that very file."""
        remote = self.state.files.get(item.name)
        return remote is not None and remote.holds(item)

    def commit(self, items: Sequence[Item], message: str, placed: Sequence[Placed] = ()) -> Landed:
        """Sends what was not sent, and commits everything in one; then asks the Hub for what it has.

        Args:
            placed: files that go into the same commit and are in another one already; nothing of them is sent.

        Raises:
            HubError: nothing was committed, or the message says what else.
        """
        self.send(items)
        if self._new_branch:
            self.repository.make_branch()
            self.refresh()
        sent, removed = self.foresee([*items, *placed])
        commit, pull = self.record(items, message, removed, placed)
        return Landed(commit, pull, sent, removed) if sent or removed else Landed(commit, None, (), ())

    def record(
        self, items: Sequence[Item], message: str, removed: Sequence[str], placed: Sequence[Placed] = ()
    ) -> tuple[str, str | None]:
        """Commits files that were sent, and are not there yet, to a branch that is there; see `commit`.

        Args:
            removed: names of files that go.

        Returns:
            The commit that has them all, and the address of the pull request, where one was opened.
        """
        _refuse_changed(items)
        additions = [self._sent[item.name] for item in items if not self.has(item)]
        copies = [_copy(each) for each in placed if not self.has(each)]
        self._refuse_ignored(additions)
        if not additions and not copies and not removed and self.state.commit is not None:
            return self.state.commit, None
        operations: list[Operation] = [*additions, *copies, *map(CommitOperationDelete, removed)]
        wanted: list[Item | Placed] = [*items, *placed]
        info = self._committed(wanted, operations, message)
        commit, pull = (info.oid, info.pr_url) if info else (str(self.repository.state().commit), None)
        self._check(commit, wanted)
        return commit, pull

    def refresh(self) -> None:
        """Looks at the branch again, which others may have changed.

        Raises:
            HubError: it cannot be asked.
        """
        self.state = self.repository.state()

    def foresee(self, items: Sequence[Item | Placed]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of files that a commit adds or changes, and of shards that it removes."""
        names = {item.name for item in items}
        old = (name for name in self.state.files if SHARD.fullmatch(name) and name not in names)
        return tuple(item.name for item in items if not self.has(item)), tuple(sorted(old))

    def _committed(
        self, items: Sequence[Item | Placed], operations: list[Operation], message: str
    ) -> CommitInfo | None:
        """The commit; None where it was made although no answer came."""
        pull = self.repository.destination.create_pr

        def make() -> CommitInfo:
            return self.repository.api.create_commit(
                self.repository.name,
                operations,
                commit_message=message,
                revision=self.repository.destination.branch,
                create_pr=pull,
                # an answer that was lost cannot lead to a second commit, nor can another's be undone
                parent_commit=None if pull else self.state.commit,
            )

        with explained(self.repository.name):
            try:
                return patiently(make, lambda error: status_of(error) == 429 or not pull)
            except Exception as error:
                if pull and (is_transport(error) or (status_of(error) or 0) >= 500):
                    raise HubError(
                        f"no answer came when the pull request was opened; look at {self.repository.url}/discussions "
                        "before running the command again, which may open a second one"
                    ) from error
                if pull or self._missing(self.repository.state(), items):
                    raise
                return None

    def _check(self, commit: str, items: Sequence[Item | Placed]) -> None:
        self.state = self.repository.state(commit)
        missing = self._missing(self.state, items)
        if missing:
            raise HubError(
                f"{self.repository.name} lacks in {commit[:12]} what was pushed: {', '.join(missing[:3])}; {AGAIN}"
            )

    def _missing(self, state: State, items: Iterable[Item | Placed]) -> list[str]:
        return [i.name for i in items if i.name not in state.files or not state.files[i.name].holds(i)]

    def _refuse_ignored(self, additions: Iterable[CommitOperationAdd]) -> None:
        """The client leaves out what a .gitignore names, and says nothing."""
        ignored = [operation.path_in_repo for operation in additions if getattr(operation, "_should_ignore", False)]
        if ignored:
            raise HubError(
                f"a .gitignore keeps {', '.join(ignored[:3])} out of {self.repository.name}; remove those lines from it"
            )


def _parts(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Files to send together: small ones; others on their own, so that each is found again once it has arrived.

    By Xet, what was sent is known to be there from the end of a call on, and not before; without it, Ctrl-C would have
    to wait for all files that are on their way.
    """
    small = [item for item in items if item.size < SMALL]
    if small:
        yield small
    yield from ([item] for item in items if item.size >= SMALL)


def _operation(item: Item) -> CommitOperationAdd:
    operation = CommitOperationAdd(item.name, str(item.path))
    if item.sha256 is not None:
        operation.upload_info.sha256 = bytes.fromhex(item.sha256)  # the client would take it again
    return operation


def _copy(placed: Placed) -> CommitOperationCopy:
    return CommitOperationCopy(placed.name, placed.name, src_revision=placed.commit)


def message_of(parcel: Parcel) -> str:
    """The commit's first line."""
    base, version = parcel.manifest["base"]["id"], parcel.manifest["tool"]["abliterate"]
    return f"{base or 'A checkpoint'}, converted by abliterate {version}"


def _refuse_changed(items: Iterable[Item]) -> None:
    changed = next((item for item in items if item.changed), None)
    if changed is not None:
        raise HubError(f"{changed.path} has changed while it was pushed; {AGAIN}")
