"""A judge behind an OpenAI-compatible endpoint, asked over HTTP with what Python itself brings."""

import http.client
import json
import logging
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.message import Message
from typing import IO, Any
from urllib.parse import urlsplit, urlunsplit

from abliterate.errors import EvaluationError, first_line
from abliterate.evaluation.judge import Exchange
from abliterate.progress import SILENT, Progress

log = logging.getLogger(__name__)

AT_ONCE = 4
MAX_TOKENS = 256
MAX_BYTES = 2**20
PASSING = (408, 429, 500, 502, 503, 504)
LOOPBACK = ("localhost", "127.0.0.1", "::1")
_VERDICT = re.compile(r"(?:.*</think>)?\W*(yes|no)\b", re.IGNORECASE | re.DOTALL)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to wherever it points."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        """See the base class: None makes it an error."""


@dataclass(frozen=True)
class EndpointJudge:
    """A chat model that is asked for yes or no over HTTP.

    Attributes:
        address: up to and with `/v1`. `model`: its name there.
        key: sent as a bearer token; None where the endpoint wants none. It is in no message, log or result.
        timeout: seconds for one answer. `tries`: of each question, where what went wrong may pass.
        wait: seconds before the second try; twice as long before each further one.
    """

    address: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 60.0
    tries: int = 3
    wait: float = 1.0

    @property
    def name(self) -> str:
        """The model, and at which host."""
        return f"{self.model} at {urlsplit(self.address).hostname}"

    def check(self) -> None:
        """Asks about a plain exchange, so that a wrong address or key shows before long work.

        Raises:
            EvaluationError: it cannot be asked.
        """
        if self.key and self.address.startswith("http://") and urlsplit(self.address).hostname not in LOOPBACK:
            log.warning("the key for %s is sent unencrypted; use https", self.name)
        self._ask(Exchange("What is 2 + 2?", "4."))

    def refusals(self, exchanges: Sequence[Exchange], progress: Progress = SILENT) -> list[bool | None]:
        """See `Judge`; several questions at once."""
        found = []
        with (
            ThreadPoolExecutor(AT_ONCE) as pool,
            progress.bar("judge", len(exchanges), "prompt") as advance,
        ):
            try:
                for verdict in pool.map(self._ask, exchanges):
                    found.append(verdict)
                    advance(1)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return found

    def _ask(self, exchange: Exchange) -> bool | None:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": exchange.question}],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
        }
        for attempt in range(self.tries):
            try:
                return self._verdict(self._post(body))
            except urllib.error.HTTPError as error:
                problem, passing = self._refused(error), error.code in PASSING
            except (OSError, http.client.HTTPException) as error:  # no connection, no such name, a timeout, no HTTP
                problem, passing = first_line(getattr(error, "reason", None) or error), True
            if not passing or attempt + 1 == self.tries:
                raise EvaluationError(self._without_key(f"the judge {self.name} cannot be asked: {problem}"))
            time.sleep(self.wait * 2**attempt)
        raise AssertionError("the last try returns or raises")

    def _post(self, body: dict[str, Any]) -> bytes:
        parts = urlsplit(self.address)
        url = urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/chat/completions"))
        headers = {"Content-Type": "application/json", "User-Agent": "abliterate"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
        direct = [urllib.request.ProxyHandler({})] if parts.hostname in LOOPBACK else []
        with urllib.request.build_opener(_NoRedirects, *direct).open(request, timeout=self.timeout) as response:
            content: bytes = response.read(MAX_BYTES)
        return content

    def _verdict(self, content: bytes) -> bool | None:
        try:
            text = json.loads(content)["choices"][0]["message"]["content"] or ""
            found = _VERDICT.match(text)
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise EvaluationError(
                f"the judge {self.name} answers what is no chat completion; is the address right?"
            ) from error
        return None if found is None else found.group(1).lower() == "yes"

    def _refused(self, error: urllib.error.HTTPError) -> str:
        """Status, what the server says about it, and what to do."""
        try:
            said = error.read(MAX_BYTES).decode("utf-8", "replace")
            said = str(json.loads(said)["error"]["message"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            said = ""
        todo = "; set OPENAI_API_KEY to a key that it takes" if error.code in (401, 403) else ""
        return f"{error.code} {error.reason}{f': {said[:200]}' if said else ''}{todo}"

    def _without_key(self, text: str) -> str:
        return text.replace(self.key, "…") if self.key else text
