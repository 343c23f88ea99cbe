"""What all drivers share: a request comes in on stdin, answers go out on stdout, what libraries print goes to
stderr. A driver runs in the environment of its stack, where nothing of this project is installed.

    DRIVER MODEL FORM < request.json > answers.json

The request holds `prompts` (token ids), `conversations` (the same as chat messages) and `max_new_tokens`. A stack
that renders chats itself is given the conversations. An answer holds `tokens` (what ended it included), `text`, and
`prompt_tokens`, how many tokens the stack read. Nothing is written to disk.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

Request = dict[str, Any]
Answer = dict[str, Any]


class Clock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, name: str) -> None:
        """Ends a stage."""
        now = time.perf_counter()
        self.seconds[name] = now - self._since
        self._since = now


def run(answer: Callable[[str, str, Request, Clock], list[Answer]], packages: Sequence[str]) -> None:
    """Reads the request, lets a stack answer it, and says which versions did.

    Args:
        answer: takes the model, the form its weights have when served, the request, and a clock.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    model, form = sys.argv[1:3]
    clock = Clock()
    answers = answer(model, form, json.load(sys.stdin), clock)
    versions = {name: version(name) for name in packages}
    json.dump({"answers": answers, "versions": versions, "seconds": clock.seconds}, out)
    out.close()


def until(tokens: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The tokens up to the first that ends an answer, that one included."""
    for count, token in enumerate(tokens, start=1):
        if token in ends:
            return list(tokens[:count])
    return list(tokens)
