"""`abliterate push`: a converted checkpoint to the Hub, checked before, in one commit, and checked after."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from abliterate.checkpoint.client import client_bars
from abliterate.hub.explain import client_log, explained
from abliterate.hub.parcel import CARD, Item, Parcel, Placed, checked, pack
from abliterate.hub.repository import Destination, Repository, look, page_of, prepare
from abliterate.hub.sending import Sender
from abliterate.hub.upload import Landed, Upload, message_of
from abliterate.progress import SILENT, Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pushed:
    """A checkpoint on the Hub, or what would be pushed.

    Attributes:
        repository: `org/name`. `branch`: that holds it. `url`: of its page. `private`: who sees it.
        created: whether the repository was made for it.
        commit: that holds the files; None where nothing was pushed, only looked at.
        pull_request: its address, where one was opened.
        files: size by name. `sent`: those that were not there before. `left_out`: others in the folder.
        removed: shards that were there and are not part of this checkpoint.
        hashed: whether the weights could be held to hashes in the manifest, instead of their sizes alone.
    """

    repository: str
    branch: str
    url: str
    private: bool
    created: bool
    commit: str | None
    pull_request: str | None
    files: dict[str, int]
    sent: tuple[str, ...]
    left_out: tuple[str, ...]
    removed: tuple[str, ...]
    hashed: bool

    @property
    def link(self) -> str:
        """Where to look: at the pull request, or the page."""
        return self.pull_request or self.url

    @property
    def summary(self) -> str:
        """One line of it."""
        would = "to be " if self.commit is None else ""
        facts = [
            f"{self.repository} ({'private' if self.private else 'public'}, {self.branch})",
            f"{len(self.files)} files, {sum(self.files.values()) / 1e6:,.1f} MB",
            f"{len(self.sent)} {would}sent, {len(self.files) - len(self.sent)} there before",
            f"{len(self.removed)} replaced shards {would}removed" if self.removed else "",
            f"commit {self.commit[:12]}" if self.commit else "",
        ]
        return "; ".join(filter(None, facts))

    def as_dict(self) -> dict[str, Any]:
        """For scripts."""
        return asdict(self) | {"link": self.link}


def push(folder: Path | str, to: Destination, *, progress: Progress = SILENT, dry_run: bool = False) -> Pushed:
    """Pushes a converted checkpoint in one commit; what stopped it, the same call goes on from there.

    Args:
        folder: made by `convert`.
        to: see `abliterate.hub.repository.destination`.
        dry_run: check everything, ask the Hub, and change nothing there.

    Raises:
        CheckpointError: the folder is not fit to be pushed: see `abliterate.hub.parcel`.
        HubError: the Hub refuses, or cannot be reached; nothing was committed.
    """
    with client_log(), client_bars(progress.visible):
        parcel = pack(Path(folder))
        if dry_run:
            return _foreseen(checked(parcel, progress), to)
        repository = prepare(to)
        parcel = checked(parcel, progress)
        say_what_is_special(parcel)
        _check_card(parcel, repository)
        landed = Upload(repository, repository.state()).commit(parcel.items, message_of(parcel))
    return pushed(parcel, repository, landed)


def deliver(sender: Sender | None, sound: bool, folder: Path) -> Pushed | None:
    """Commits what a conversion has made, before it becomes OUT: after that, a stopped push could not be continued.

    Args:
        sender: who has sent shards by then; None where nothing is pushed.
        sound: whether the certificate holds; nothing is committed where it does not.
        folder: the finished checkpoint.

    Raises:
        HubError: nothing was committed.
    """
    if sender is None:
        return None
    if not sound:
        sender.stop()
        log.warning("nothing was committed to %s", sender.repository.name)
        sender.leave(folder)
        return None
    parcel, landed = sender.deliver(folder)
    return pushed(parcel, sender.repository, landed)


def pushed(parcel: Parcel, repository: Repository, landed: Landed) -> Pushed:
    """What a finished push came to."""
    files: list[Item | Placed] = [*parcel.items, *parcel.placed]
    return Pushed(
        repository=repository.name,
        branch=repository.destination.branch,
        url=repository.url,
        private=repository.private,
        created=repository.created,
        commit=landed.commit,
        pull_request=landed.pull_request,
        files={file.name: file.size for file in files},
        sent=landed.sent,
        left_out=parcel.left_out,
        removed=landed.removed,
        hashed=parcel.hashed,
    )


def say_what_is_special(parcel: Parcel) -> None:
    """What a user would else find out later: files that stay, and weights that nothing was held against."""
    for name in parcel.left_out:
        log.warning("%s is left out: neither the manifest nor the checkpoint accounts for it", name)
    if not parcel.hashed:
        log.warning(
            "the manifest has no hashes of the weights (--no-hash): only their sizes were compared; "
            "`abliterate verify` measures the certificate again"
        )


def _foreseen(parcel: Parcel, to: Destination) -> Pushed:
    say_what_is_special(parcel)
    found = look(to)
    state = found.state() if found else None
    plan = Upload(found, state).foresee(parcel.items) if found and state else None
    return Pushed(
        repository=to.repo,
        branch=to.branch,
        url=page_of(to),
        private=found.private if found else to.private is not False,
        created=found is None,
        commit=None,
        pull_request=None,
        files={item.name: item.size for item in parcel.items},
        sent=plan[0] if plan else tuple(item.name for item in parcel.items),
        left_out=parcel.left_out,
        removed=plan[1] if plan else (),
        hashed=parcel.hashed,
    )


def _check_card(parcel: Parcel, repository: Repository) -> None:
    """The Hub checks a card's metadata when it commits, which is after gigabytes; so it is asked before.

    Raises:
        HubError: it does not take them.
    """
    with explained(repository.name):
        ModelCard((parcel.folder / CARD).read_text(encoding="utf-8"), ignore_metadata_errors=True).validate()
