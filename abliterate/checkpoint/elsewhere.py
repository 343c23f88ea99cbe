"""A folder that has everything of a checkpoint but its weights knows where on the Hub those are."""

import json
import re
from pathlib import Path

from abliterate.checkpoint.diskio import disk_errors
from abliterate.checkpoint.regular import read_regular
from abliterate.errors import CheckpointError

NOTE = Path(".cache") / "abliterate" / "weights.json"
"""Where the Hub client too keeps what it knows of a folder; no part of the checkpoint."""
MAX_BYTES = 10_000
_PLACE = re.compile(r"[\w.-]{1,100}/[\w.-]{1,100}@[0-9a-f]{40}", re.ASCII)


def write_note(folder: Path, repository: str, commit: str) -> None:
    """Notes that the weights are in `repository` (org/name) at `commit`.

    Raises:
        OutputError: the disk is full or cannot be written to.
    """
    content = json.dumps({"weights": f"{repository}@{commit}"}) + "\n"
    with disk_errors(folder, len(content)):
        (folder / NOTE).parent.mkdir(parents=True, exist_ok=True)
        (folder / NOTE).write_text(content, encoding="utf-8")


def weights_at(folder: Path) -> str | None:
    """`org/name@commit` where the weights are; None where the folder does not say so. It is data from outside."""
    try:
        place = json.loads(read_regular(folder / NOTE, MAX_BYTES))["weights"]
        return place if _PLACE.fullmatch(place) else None
    except (OSError, ValueError, TypeError, LookupError, RecursionError, CheckpointError):
        return None
