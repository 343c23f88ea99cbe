"""The repository that is pushed to: named, checked before any work, made where it is missing, and looked at."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from abliterate.checkpoint.locate import named
from abliterate.checkpoint.patience import patiently, status_of
from abliterate.errors import CheckpointError, HubError
from abliterate.hub.explain import explained
from abliterate.hub.parcel import Item, Placed

log = logging.getLogger(__name__)
_PASSWORD = re.compile(r"(?<=://)[^/@\s]+@")
MAIN = constants.DEFAULT_REVISION


@dataclass(frozen=True)
class Destination:
    """Where to push.

    Attributes:
        repo: `org/name`.
        branch: made from main where it is missing.
        private: what the user asked for; None makes a new repository private, and takes an old one only if it is.
        create_pr: open a pull request against main instead of committing to it.
    """

    repo: str
    branch: str = MAIN
    private: bool | None = None
    create_pr: bool = False


@dataclass(frozen=True)
class Remote:
    """A file in a repository: its size, and the sha256 of what is in large storage, or git's own name for the rest."""

    size: int
    sha256: str | None
    git_sha1: str

    def holds(self, item: Item | Placed) -> bool:
        """Whether it is that file already."""
        if self.size != item.size:
            return False
        if self.sha256 is not None:
            return self.sha256 == item.sha256
        return isinstance(item, Item) and self.git_sha1 == item.git_sha1()


@dataclass(frozen=True)
class State:
    """A branch as it is now: its commit, and its files; neither where there is no such branch yet."""

    commit: str | None
    files: Mapping[str, Remote]


@dataclass(frozen=True)
class Repository:
    """A repository that may be written to.

    Attributes:
        api: the Hub client. `private`: who sees it. `created`: whether it was made for this push.
    """

    api: HfApi
    destination: Destination
    private: bool
    created: bool

    @property
    def name(self) -> str:
        """`org/name`."""
        return self.destination.repo

    @property
    def url(self) -> str:
        """Of its page, on the branch that is pushed to."""
        return page_of(self.destination)

    def state(self, revision: str | None = None) -> State:
        """The branch, or another revision, as the Hub has it now.

        Raises:
            HubError: it cannot be asked.
        """
        with explained(self.name):
            try:
                return patiently(lambda: self._state(revision or self.destination.branch))
            except RevisionNotFoundError:
                return State(None, {})

    def _state(self, revision: str) -> State:
        info = self.api.repo_info(self.name, revision=revision)
        tree = self.api.list_repo_tree(self.name, recursive=True, revision=info.sha)
        files = {entry.path: _remote(entry) for entry in tree if isinstance(entry, RepoFile)}
        return State(info.sha, files)

    def on(self, branch: str) -> "Repository":
        """The same repository on another branch."""
        return replace(self, destination=replace(self.destination, branch=branch))

    def make_branch(self, start: str | None = None) -> None:
        """Makes the branch, from main, or from the commit `start`.

        Raises:
            HubError: the Hub refuses.
        """
        branch = self.destination.branch
        with explained(self.name):
            patiently(lambda: self.api.create_branch(self.name, branch=branch, revision=start, exist_ok=True))

    def remove_branch(self) -> None:
        """Removes the branch, if it is there.

        Raises:
            HubError: the Hub refuses.
        """
        with explained(self.name):
            try:
                patiently(lambda: self.api.delete_branch(self.name, branch=self.destination.branch))
            except HfHubHTTPError as error:
                if status_of(error) != 404:
                    raise


def _remote(entry: RepoFile) -> Remote:
    return Remote(entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)


def page_of(destination: Destination) -> str:
    """The address of a repository, or of its branch; without a password that HF_ENDPOINT may hold."""
    page = f"{_PASSWORD.sub('', constants.ENDPOINT)}/{destination.repo}"
    return page if destination.branch == MAIN else f"{page}/tree/{destination.branch}"


def destination(
    target: str, branch: str | None = None, private: bool | None = None, create_pr: bool = False
) -> Destination:
    """Where `org/name` or `org/name@branch` is.

    Raises:
        HubError: it is no such name, or the wishes contradict each other.
    """
    try:
        repo, wanted = named(target, branch)
    except CheckpointError as error:
        raise HubError(f"{target[:200]!a} is not a repository to push to: name it as org/name") from error
    if repo.count("/") != 1:
        raise HubError(f"{target[:200]!a} is not a repository to push to: name it as org/name")
    if create_pr and wanted not in (None, MAIN):
        raise HubError("a pull request is opened against main; leave out the branch, or --create-pr")
    return Destination(repo, wanted or MAIN, private, create_pr)


def look(destination: Destination) -> Repository | None:
    """The repository, if it is there and is one to push to; nothing is changed. Says who the token belongs to.

    Raises:
        HubError: offline, no token or one that is not taken, or the repository is not what was asked for.
    """
    # Of this class and not the module's functions: names the tool to the Hub.
    api = HfApi(library_name="abliterate")
    with explained(destination.repo):
        who = patiently(api.whoami)
        log.info("the token is that of %s", who.get("name"))
        info = patiently(lambda: _info(api, destination.repo))
    if info is None:
        if destination.create_pr:
            raise HubError(f"{destination.repo} is not on the Hub, so no pull request can be opened; leave it out")
        return None
    _check_visible(destination, bool(info.private))
    return Repository(api, destination, bool(info.private), created=False)


def prepare(destination: Destination) -> Repository:
    """The repository, made where it is missing; whether it may be written to is known before hours of work.

    Raises:
        HubError: as `look`; or the token may not write to it.
    """
    found = look(destination)
    with explained(destination.repo):
        if found is None:
            api, private = HfApi(library_name="abliterate"), destination.private is not False
            patiently(lambda: api.create_repo(destination.repo, private=private, exist_ok=True))
            return Repository(api, destination, private, created=True)
        patiently(lambda: _ask_to_write(found))
        return found


def _info(api: HfApi, repo: str) -> Any:
    """What the Hub says of a repository; None where there is none (of which it says 401 where it hides others)."""
    try:
        return api.repo_info(repo)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None


def _check_visible(destination: Destination, private: bool) -> None:
    """A repository is private unless the user says otherwise, also one that is there already."""
    if not private and destination.private is not False and not destination.create_pr:
        raise HubError(f"{destination.repo} is there already, and public: say --public, or choose another repository")
    if private and destination.private is False:
        raise HubError(f"{destination.repo} is there already, and private: leave out --public, or change its settings")


def _ask_to_write(repository: Repository) -> None:
    """Asks how a small file would be sent, which is refused to who may not write; nothing is sent."""
    operation = CommitOperationAdd(".gitattributes", b"")
    pull, branch = repository.destination.create_pr, repository.destination.branch
    try:
        repository.api.preupload_lfs_files(repository.name, [operation], revision=branch, create_pr=pull)
    except HfHubHTTPError as error:
        if branch == MAIN or status_of(error) != 404:
            raise
        # a branch that has yet to be made
        fresh = CommitOperationAdd(".gitattributes", b"")
        repository.api.preupload_lfs_files(repository.name, [fresh], create_pr=pull)
