"""What the Hub's own client does: fetching a repository's files into its cache, with progress bars or without."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from abliterate.progress import Progress


@contextmanager
def client_bars(shown: bool) -> Iterator[None]:
    """The client's progress bars, or none, while this lasts."""
    before = are_progress_bars_disabled()
    if not shown:
        disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


def snapshot(model_id: str, revision: str | None, left_out: Sequence[str]) -> Path:
    """The folder of the client's cache that has a repository's files, but those of some patterns.

    Its bars are shown where ours would be: it shows them in pipes too.
    """
    with client_bars(Progress().visible):
        found = huggingface_hub.snapshot_download(model_id, revision=revision, ignore_patterns=list(left_out))
    return Path(str(found))
