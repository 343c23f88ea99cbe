"""What of a model that is fetched as it is needed goes out, and what of it lies on the disk."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.hub_server import Hub

FETCHED = "abliterate/*/*/shards/*"
"""Below HF_HOME."""


def shards(hub: Hub) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in hub.files() if path.name.startswith("model-")}


def least(hub: Hub) -> int:
    """Room for the two shards that a layer may lie in."""
    return 2 * max(shards(hub).values())


def passes(hub: Hub) -> float:
    """How many times the shards went out, without what was read for their headers."""
    return sum(hub.sent[name] for name in shards(hub)) / sum(shards(hub).values())


@contextmanager
def watched(*places: tuple[Path, str]) -> Iterator[list[int]]:
    """The most bytes that are on the disk at any time in files of these folders and patterns."""
    most, stop = [0], threading.Event()

    def look() -> None:
        while not stop.is_set():
            try:
                size = sum(path.stat().st_size for folder, form in places for path in folder.glob(form))
            except FileNotFoundError:
                size = 0  # seen at no one moment: what is there now counts with the next look
            most[0] = max(most[0], size)
            time.sleep(0.0002)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        stop.set()
        thread.join()
