"""What the Hub client raises and logs, in one line without tokens."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from abliterate.checkpoint.locate import without_secrets
from abliterate.checkpoint.patience import is_transport, offline, status_of
from abliterate.errors import AbliterateError, HubError, one_line

log = logging.getLogger(__name__)

AGAIN = "run the same command again: what has arrived is not sent twice"
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


@contextmanager
def explained(repo: str) -> Iterator[None]:
    """Turns whatever the Hub client raises into one line, without tokens.

    Raises:
        HubError: instead of any error that is not the tool's own.
    """
    try:
        yield
    except AbliterateError:
        raise
    except Exception as error:  # the client's own transport errors have no common base
        raise HubError(_explain(error, repo)) from error


def _explain(error: Exception, repo: str) -> str:
    """One line about what the Hub client raised. GatedRepoError is a RepositoryNotFoundError, so it comes first."""
    if offline(error):
        return "the Hub is not asked (HF_HUB_OFFLINE is set), so nothing can be pushed; unset it"
    if isinstance(error, LocalTokenNotFoundError):
        return f"there is no token to push to {repo} with: {LOGIN}"
    status = status_of(error)
    if isinstance(error, GatedRepoError):
        return f"{repo} is gated, and the token has no access to it; accept its terms on its Hub page"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no such revision on the Hub; name a branch"
    if isinstance(error, RepositoryNotFoundError) and status != 401:
        return f"{repo} is not on the Hub, or the token may not see it; check the name, or {LOGIN}"
    if status is not None:
        return _of_status(status, error, repo)
    if is_transport(error):
        return f"the connection to {without_secrets(constants.ENDPOINT)} broke ({_reason(error)}); {AGAIN}"
    return f"{repo} cannot be pushed to ({_reason(error)})"


def _of_status(status: int, error: Exception, repo: str) -> str:
    known = {
        401: f"the Hub does not take the token (401); {LOGIN} to a valid one",
        402: f"the Hub has no room for {repo} unpaid (402); make room there, or choose another repository",
        403: f"the token may not write to {repo} (403); use one with write access to it, or choose another repository",
        409: f"another change to {repo} is under way (409); {AGAIN}",
        412: f"{repo} has changed meanwhile (412); {AGAIN}",
        429: f"the Hub asks to slow down (429); wait, then {AGAIN}",
    }
    if status in known:
        return known[status]
    if status >= 500:
        return f"the Hub failed ({status}); {AGAIN}"
    return f"the Hub does not take it ({status}: {_reason(error)})"


def _reason(error: BaseException) -> str:
    """The innermost cause, which says most; the client wraps it in lines of its own."""
    cause = error
    while cause.__cause__ is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    said = getattr(cause, "server_message", None) or str(cause)
    return one_line(f"{type(cause).__name__}: {without_secrets(said)[:200]}")


def how_to_remove(branch: str) -> str:
    """The command that removes a branch of the Hub, `org/name@branch`."""
    return f"`hf repos branch delete {branch.replace('@', ' ', 1)}` removes {branch}"


class _Forward(logging.Handler):
    """What the client logs, in the tool's own log: addresses without signatures, and only waiting is worth a line."""

    def emit(self, record: logging.LogRecord) -> None:
        """Passes a record on."""
        text = without_secrets(record.getMessage())
        log.log(logging.WARNING if "Rate limited" in text else logging.INFO, "Hub client: %s", text)


@contextmanager
def client_log() -> Iterator[None]:
    """The Hub client's messages go through the tool's log while this lasts."""
    client = logging.getLogger("huggingface_hub")
    handlers, propagate = client.handlers[:], client.propagate
    client.handlers[:], client.propagate = [_Forward()], False
    try:
        yield
    finally:
        client.handlers[:], client.propagate = handlers, propagate
