"""Where OUT may be made: what is in the way is told before anything is touched."""

import os
from collections.abc import Sequence
from pathlib import Path

from abliterate.checkpoint.files import CONFIG
from abliterate.errors import OutputError

MANIFEST = "abliteration.json"
REPORTS = ("audit.json", "comparison.json")
"""Of folders that hold a report instead of a checkpoint."""
FAILED = ".failed"


def check_target(out: Path, *, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Whether OUT may be made, without touching anything.

    Args:
        out: the folder to make.
        overwrite: it may hold a checkpoint, which is then replaced. Anything else is never removed.
        inputs: folders that are read; neither they nor OUT may lie inside the other.

    Raises:
        OutputError: saying what is in the way.
    """
    place = resolved(out)
    for path in inputs:
        _check_apart(out, place, path.resolve())
    try:
        _check_free(out, place, overwrite)
    except OSError as error:
        raise OutputError(f"{out} cannot be used as OUT ({error.strerror}); choose another one") from error


def resolved(out: Path) -> Path:
    """OUT with its links followed.

    Raises:
        OutputError: there can be no such path.
    """
    try:
        return out.resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise OutputError(f"{str(out)[:200]!a} cannot be used as OUT ({error}); choose another one") from error


def _check_apart(out: Path, place: Path, source: Path) -> None:
    if place == source:
        raise OutputError(f"OUT ({out}) is the checkpoint that is read; choose another OUT")
    if place.is_relative_to(source):
        raise OutputError(f"OUT ({out}) lies inside the checkpoint that is read ({source}); choose another OUT")
    if source.is_relative_to(place):
        raise OutputError(f"the checkpoint that is read ({source}) lies inside OUT ({out}); choose another OUT")
    if source.is_relative_to(failed(place)):
        raise OutputError(f"the checkpoint that is read ({source}) is where a failed OUT would go; choose another OUT")


def _check_free(out: Path, place: Path, overwrite: bool) -> None:
    if place.is_mount() or place == place.parent:
        raise OutputError(f"{out} is a mount point, which cannot be replaced as a whole; choose a folder inside it")
    for path in (place, failed(place)):
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path} is a file; OUT names a folder to make: choose another OUT")
    parent = next(parent for parent in place.parents if parent.exists())
    if not parent.is_dir():
        raise OutputError(f"{parent} is a file, so {out} cannot be made in it; choose another OUT")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent} cannot be written to; choose another OUT")
    check_contents(out, place, overwrite)
    check_contents(failed(place), failed(place), True)


def check_contents(shown: Path, place: Path, overwrite: bool) -> None:
    """Only a checkpoint or a report is ever removed: `--overwrite` on a mistyped name must not cost a home folder.

    Args:
        shown: what the message calls it.
        place: the folder that would be replaced.

    Raises:
        OutputError: it is not empty, and may not be replaced or is neither.
    """
    if not place.exists() or not any(place.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{shown} is not empty; choose another OUT, or replace it with --overwrite")
    if not any((place / name).is_file() for name in (CONFIG, MANIFEST, *REPORTS)):
        raise OutputError(
            f"{place} holds no checkpoint and no report, so it is not replaced; remove it, or choose another OUT"
        )


def failed(place: Path) -> Path:
    """Where a result goes whose certificate failed."""
    return place.with_name(place.name + FAILED)
