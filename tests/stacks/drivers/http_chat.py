"""A client of an OpenAI-compatible server: real requests over HTTP, some of them at once."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from driver import Answer, Request

AT_ONCE = 8


def post(url: str, body: dict[str, Any], timeout: float = 300) -> dict[str, Any]:
    """The JSON that the server answers with."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=timeout) as response:
        return json.load(response)


def wait_for(url: str, alive: Callable[[], bool], timeout: float) -> None:
    """Until the server answers at `url`."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if not alive():
            raise RuntimeError("the server has ended")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.25)
    raise TimeoutError(f"no answer from {url} within {timeout:.0f} s")


def chats(
    server: str, model: str, request: Request, extra: dict[str, Any], tokens: Callable[[dict[str, Any]], list[int]]
) -> list[Answer]:
    """Greedy answers of `/v1/chat/completions`.

    Args:
        extra: what makes this server tell the tokens, too. `tokens`: takes them out of its response.
    """
    common = {"model": model, "temperature": 0, "max_tokens": request["max_new_tokens"], **extra}

    def ask(chat: list[dict[str, str]]) -> Answer:
        response = post(f"{server}/v1/chat/completions", {**common, "messages": chat})
        text = response["choices"][0]["message"]["content"]
        return {"tokens": tokens(response), "text": text, "prompt_tokens": response["usage"]["prompt_tokens"]}

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(ask, request["conversations"]))
