"""Patience with the Hub: which failures may pass, how long to wait after each, and when to give up."""

import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from huggingface_hub.errors import OfflineModeIsEnabled

from abliterate.checkpoint.crew import LOOKS
from abliterate.checkpoint.keeper import Check, go_on
from abliterate.checkpoint.locate import without_secrets

log = logging.getLogger(__name__)
T = TypeVar("T")

PASSING = frozenset({408, 429, 500, 502, 503, 504})
"""Answers after which the same request may succeed."""
WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each further try, a quarter more or less."""
LONGEST_WAIT = 300.0
"""That a server can ask for."""
_TOLD = re.compile(r"HTTP status (?:client|server) error \((\d{3})\b")
"""How hf_xet tells of an answer, in errors without one."""


class CutError(Exception):
    """A connection ended too early, without an error of its own."""


def patiently(call: Callable[[], T], again: Callable[[BaseException], bool] = lambda _: True) -> T:
    """Calls again what failed for a reason that may pass, as often as there are `WAITS`.

    Args:
        again: whether it may be called once more after such an error.

    Raises:
        Exception: of the last call.
    """
    for wait in WAITS:
        try:
            return call()
        except Exception as error:
            if not passes(error) or not again(error):
                raise
            pause(error, wait)
    return call()


def passes(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    status = status_of(error)
    if status is not None:
        return status in PASSING
    return not offline(error) and is_transport(error)


def pause(error: BaseException, seconds: float, check: Check = go_on) -> None:
    """Waits as long as the server asks for (Retry-After, in seconds), else about so long.

    Args:
        check: called while waiting.
    """
    asked = _retry_after(error)
    seconds = seconds * random.uniform(0.75, 1.25) if asked is None else asked
    log.info("the Hub answered with %s: next try in %.0f s", without_secrets(repr(error))[:200], seconds)
    step = seconds if check is go_on else LOOKS
    while seconds > 0:
        check()
        time.sleep(min(step, seconds))
        seconds -= step


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error stands for, or the one that it was raised from does; None without an answer."""
    for cause in _causes(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        if told := _TOLD.search(str(cause)):
            return int(told[1])
    return None


def is_transport(error: BaseException) -> bool:
    """Whether no answer came, or half of one: httpx's errors, whichever generation of it the client is built on."""
    return any(
        isinstance(each, CutError | ConnectionError | TimeoutError) or _of_httpx(each) for each in _causes(error)
    )


def offline(error: BaseException) -> bool:
    """Whether the client was told to stay offline (HF_HUB_OFFLINE)."""
    return isinstance(error, OfflineModeIsEnabled)


def _of_httpx(error: BaseException) -> bool:
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _retry_after(error: BaseException) -> float | None:
    """Seconds that the server wants to be left alone."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        text = response.headers.get("Retry-After", "") if response is not None else ""
        if text.isdigit():
            return min(float(text), LONGEST_WAIT)
    return None
