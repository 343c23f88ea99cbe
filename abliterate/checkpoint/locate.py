"""Where a checkpoint is: a folder, or a Hub id that huggingface_hub brings into its cache."""

import errno
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from abliterate.checkpoint.client import snapshot
from abliterate.checkpoint.crew import StoppedError
from abliterate.checkpoint.files import HOW_TO_CONVERT, OTHER_WEIGHTS
from abliterate.checkpoint.keeper import Keeper
from abliterate.checkpoint.room import check_room
from abliterate.errors import AbliterateError, CheckpointError

log = logging.getLogger(__name__)

_SECRET = re.compile(r"hf_\w+|(?<=://)[^/@\s]+@|(?i:bearer)\s+\S+|\?\S*")


@dataclass(frozen=True)
class Source:
    """A located checkpoint.

    Attributes:
        folder: where its files are.
        model_id: its Hub id; None for a local folder.
        revision: the branch, tag or commit that was asked for.
        commit: the commit that it stood for.
        keeper: fetches shards when they are asked for; None where they are in the folder.
    """

    folder: Path
    model_id: str | None
    revision: str | None
    commit: str | None
    keeper: Keeper | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """The Hub id, or the folder's name (never a path: it goes into what is published)."""
        return self.model_id or self.folder.resolve().name

    @property
    def called(self) -> str:
        """The name, and the revision where one was asked for."""
        return f"{self.name}@{self.revision}" if self.revision else self.name


def resolve(model: str, revision: str | None = None) -> Source:
    """Finds a checkpoint, downloading it where needed; without a network the Hub client's cache is used.

    Args:
        model: an existing folder (which wins), or a Hub id `org/name` or `org/name@revision`.
        revision: branch, tag or commit on the Hub.

    Raises:
        CheckpointError: it cannot be found or fetched, or `model` and `revision` contradict each other.
    """
    return find(model, revision) or whole(model, revision)


def find(model: str, revision: str | None = None) -> Source | None:
    """The local folder that `model` names, or None.

    Raises:
        CheckpointError: it is a file, or a revision is asked for.
    """
    if not _is_folder(model):
        return None
    if revision is not None:
        raise CheckpointError(f"{model} is a folder here and has no revisions; leave out the revision {revision!r}")
    return Source(Path(model), None, None, None)


def named(model: str, revision: str | None = None) -> tuple[str, str | None]:
    """The Hub id and the revision that is wanted.

    Raises:
        CheckpointError: it is no Hub id, or names another revision than the one asked for.
    """
    model_id, _, own = model.partition("@")
    if own and revision is not None and own != revision:
        raise CheckpointError(
            f"{model} names the revision {own!r} and the revision {revision!r} is asked for; give one"
        )
    _check_id(model, model_id, own)
    return model_id, own or revision


def whole(model: str, revision: str | None = None) -> Source:
    """Downloads a model of the Hub, or what is missing of it; see `resolve`."""
    model_id, wanted = named(model, revision)
    log.info("fetching %s%s", model_id, f"@{wanted}" if wanted else "")
    with explained(model_id, wanted):
        check_room(model_id, wanted)
        folder = snapshot(model_id, wanted, OTHER_WEIGHTS)
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{model_id} has no safetensors weights on the Hub; {HOW_TO_CONVERT}")
    return Source(folder, model_id, wanted, folder.name if re.fullmatch("[0-9a-f]{40}", folder.name) else None)


def _is_folder(model: str) -> bool:
    try:
        if Path(model).is_file():
            raise CheckpointError(f"{model} is a file; give the folder of a checkpoint or a Hub id")
        return model != "" and Path(model).is_dir()
    except OSError:  # too long for a name, a folder that may not be entered
        return False


def _check_id(model: str, model_id: str, revision: str) -> None:
    try:
        validate_repo_id(model_id)
    except HFValidationError as error:
        raise CheckpointError(
            f"{model[:200]!a} is not a folder here, and not a Hub id (org/name or org/name@revision)"
        ) from error
    if model.endswith("@") or "@" in revision:
        raise CheckpointError(f"{model[:200]!a} is not a folder here, and its revision after the @ is not one")


@contextmanager
def explained(model_id: str, revision: str | None, kind: type[AbliterateError] = CheckpointError) -> Iterator[None]:
    """Turns whatever the Hub client raises into one line, without tokens.

    Raises:
        AbliterateError: of that kind, instead of any error.
    """
    try:
        yield
    except (AbliterateError, StoppedError):
        raise
    except Exception as error:  # the client's own transport errors have no common base
        raise kind(_explain(error, model_id, revision)) from error


def without_secrets(text: str) -> str:
    """One line without tokens, passwords and signed queries of addresses."""
    token = huggingface_hub.get_token()
    return " ".join(_SECRET.sub("…", text.replace(token, "…") if token else text).split())


def _explain(error: Exception, model_id: str, revision: str | None) -> str:
    """One line about what the Hub client raised. GatedRepoError is a RepositoryNotFoundError, so it comes first."""
    if isinstance(error, GatedRepoError):
        return f"{model_id} is gated: accept its terms on its Hub page, then log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return f"{model_id} is not a folder here, and not on the Hub or private: check the name, or `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return f"{model_id} has no revision {revision!r} on the Hub; name a branch, tag or full commit"
    if isinstance(error, LocalEntryNotFoundError | ConnectionError | TimeoutError) or _unreached(error):
        missing = f"{model_id} is not a folder here, not whole in the Hub's cache, and the Hub"
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            return f"{missing} is not asked, since HF_HUB_OFFLINE is set: unset it"
        return f"{missing} cannot be reached: go online"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return (
            f"disk full while fetching {model_id}: free space, set HF_HOME to a folder on another disk, or give a "
            "(smaller) --cache-limit"
        )
    reason = without_secrets(str(error))[:200]
    return f"{model_id} cannot be fetched from the Hub ({type(error).__name__}: {reason}); try again"


def _unreached(error: Exception) -> bool:
    """Whether no connection came about: httpx's errors, whichever generation of it the client is built on."""
    return any(kind.__name__ in ("ConnectError", "ConnectTimeout") for kind in type(error).__mro__)
