"""What is tried again, how long after, and what is not."""

import random
import time
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from abliterate.checkpoint import patience
from abliterate.checkpoint.crew import StoppedError
from abliterate.checkpoint.patience import CutError, passes, patiently, pause


def answer(status: int, **headers: str) -> HfHubHTTPError:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    answered: Any = SimpleNamespace(status_code=status, headers=named, request=None, url="http://hub")
    return HfHubHTTPError("no", response=answered)


class TransportError(Exception):
    """Named as that of httpx, whichever generation of it the client is built on."""


class ConnectError(TransportError):
    """One of its kinds."""


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits that were asked for, none of which happens."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        *((answer(status), True) for status in (408, 429, 500, 502, 503, 504)),
        *((answer(status), False) for status in (400, 401, 403, 404, 409, 412, 501)),
        (CutError(), True),
        (ConnectError("no"), True),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (caused(RuntimeError("upload"), ConnectError("no")), True),
        (RuntimeError("HTTP status server error (503 Service Unavailable) for url"), True),
        (RuntimeError("HTTP status client error (403 Forbidden) for url"), False),
        (caused(answer(401), ConnectionError()), False),
        (OfflineModeIsEnabled("offline"), False),
        (ValueError(), False),
    ],
)
def test_what_may_pass(error: Exception, expected: bool) -> None:
    assert passes(error) == expected


def failing(*errors: Exception) -> Any:
    left = [*errors]

    def call() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return call


def test_waits_double_and_end(slept: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: {(0.75, 1.25): 1.0}[low, high])
    assert patiently(failing(*[answer(500)] * 4)) == "done" and slept == [1.0, 2.0, 4.0, 8.0]
    with pytest.raises(HfHubHTTPError):
        patiently(failing(*[answer(500)] * 5))
    assert len(slept) == 8


@pytest.mark.parametrize(("asked", "waited"), [("7", 7.0), ("0", None), ("9999", 300.0)])
def test_what_the_server_asks_for(slept: list[float], asked: str, waited: float | None) -> None:
    assert patiently(failing(answer(429, Retry_After=asked))) == "done"
    assert slept == ([waited] if waited else [])
    assert patiently(failing(caused(RuntimeError("wrapped"), answer(503, Retry_After=asked)))) == "done"


@pytest.mark.parametrize("asked", ["soon", "Wed, 21 Oct 2015 07:28:00 GMT", "-1", "1.5"])
def test_what_cannot_be_told_is_left_aside(slept: list[float], asked: str) -> None:
    assert patiently(failing(answer(429, Retry_After=asked))) == "done"
    assert 0.75 <= slept[0] <= 1.25


def test_what_would_be_done_twice_is_not(slept: list[float]) -> None:
    with pytest.raises(HfHubHTTPError):
        patiently(failing(answer(500)), lambda error: patience.status_of(error) == 429)
    assert not slept
    with pytest.raises(HfHubHTTPError):
        patiently(failing(answer(404)))
    assert not slept


def test_waiting_can_be_stopped(slept: list[float]) -> None:
    def check() -> None:
        if len(slept) == 3:
            raise StoppedError

    with pytest.raises(StoppedError):
        pause(answer(500), 60.0, check)
    assert sum(slept) < 1
