"""The output folder: made aside under a hidden name on the same file system, and renamed when it is whole."""

import contextlib
import fcntl
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from abliterate.checkpoint.carry import carry_over, update_config
from abliterate.checkpoint.diskio import FULL, sync
from abliterate.checkpoint.files import CONFIG
from abliterate.errors import OutputError

__all__ = ["Staging", "carry_over", "check_target", "staged", "update_config"]

log = logging.getLogger(__name__)

MANIFEST = "abliteration.json"
FAILED = ".failed"
OLD = ".old"


@dataclass
class Staging:
    """A folder on its way to OUT.

    Attributes:
        folder: where to write.
        out: what it becomes, with links resolved.
        overwrite: a checkpoint that is there by then is replaced.
        published: what it became; None until then.
    """

    folder: Path
    out: Path
    overwrite: bool
    published: Path | None = field(default=None, init=False)

    def publish(self) -> Path:
        """Makes the folder OUT, in place of whatever `staged` was allowed to replace; returns OUT.

        Raises:
            OutputError: it could not be renamed, or OUT came to be meanwhile; OUT is as it was before.
        """
        return self._become(self.out, self.overwrite)

    def publish_failed(self) -> Path:
        """Makes the folder OUT.failed, in place of an earlier one; OUT stays as it was. Returns OUT.failed.

        Raises:
            OutputError: it could not be renamed.
        """
        return self._become(_failed(self.out), True)

    def _become(self, target: Path, overwrite: bool) -> Path:
        with _writing(target):
            for parent, _, names in os.walk(self.folder):
                for name in names:
                    sync(Path(parent) / name)
                sync(Path(parent))
            aside = self.folder.with_name(f"{self.folder.name}{OLD}{FAILED if target != self.out else ''}")
            _check_contents(target, target, overwrite)
            self._swap(target, aside)
            sync(target.parent)
        shutil.rmtree(aside, ignore_errors=True)
        return target

    def _swap(self, target: Path, aside: Path) -> None:
        """Moves what is at `target` aside and the folder there; puts the old one back where that fails."""
        try:
            if target.exists():
                target.rename(aside)
            self.folder.rename(target)
            self.published = target
        except BaseException:
            if aside.exists() and not target.exists():
                aside.rename(target)
            raise


def check_target(out: Path, *, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Whether OUT may be made, without touching anything.

    Args:
        out: the folder to make.
        overwrite: it may hold a checkpoint, which is then replaced. Anything else is never removed.
        inputs: folders that are read; neither they nor OUT may lie inside the other.

    Raises:
        OutputError: saying what is in the way.
    """
    place = _resolved(out)
    for path in inputs:
        _check_apart(out, place, path.resolve())
    try:
        _check_free(out, place, overwrite)
    except OSError as error:
        raise OutputError(f"{out} cannot be used as OUT ({error.strerror}); choose another one") from error


@contextmanager
def staged(out: Path, *, overwrite: bool, inputs: Sequence[Path]) -> Iterator[Staging]:
    """Yields a hidden folder beside OUT, which is removed unless it was published, whatever happens.

    What a killed run left behind is removed first, and an OUT that it had moved aside is put back.

    Args:
        out: the folder to make.
        overwrite: replace the checkpoint that is there, once the new one is whole.
        inputs: folders that are read.

    Raises:
        OutputError: see `check_target`; or the place cannot be written to.
    """
    place = _resolved(out)
    with _writing(place):
        _recover(place)
    check_target(out, overwrite=overwrite, inputs=inputs)
    with contextlib.ExitStack() as stack:
        with _writing(place):
            staging = _stage(place, overwrite, stack)
        try:
            yield staging
        except OSError as error:
            if error.errno in FULL or _names(error, staging.folder):
                raise OutputError(f"{place} cannot be written ({error.strerror}); free space or mend that") from error
            raise


def _stage(place: Path, overwrite: bool, stack: contextlib.ExitStack) -> Staging:
    """Makes the hidden folder; what is made here is unmade when the stack is closed."""
    for parent in _missing_parents(place):
        parent.mkdir()
        stack.callback(_remove_if_empty, parent)
    staging = Staging(place.with_name(f"{_prefix(place)}{secrets.token_hex(4)}"), place, overwrite)
    stack.callback(_discard, staging)
    staging.folder.mkdir()
    stack.enter_context(_locked(staging.folder))
    return staging


def _names(error: OSError, folder: Path) -> bool:
    """Whether the error is about a file inside the folder."""
    return isinstance(error.filename, str | Path) and Path(error.filename).is_relative_to(folder)


def _resolved(out: Path) -> Path:
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
    if source.is_relative_to(_failed(place)):
        raise OutputError(f"the checkpoint that is read ({source}) is where a failed OUT would go; choose another OUT")


def _check_free(out: Path, place: Path, overwrite: bool) -> None:
    if place.is_mount() or place == place.parent:
        raise OutputError(f"{out} is a mount point, which cannot be replaced as a whole; choose a folder inside it")
    for path in (place, _failed(place)):
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path} is a file; OUT names a folder to make: choose another OUT")
    parent = next(parent for parent in place.parents if parent.exists())
    if not parent.is_dir():
        raise OutputError(f"{parent} is a file, so {out} cannot be made in it; choose another OUT")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent} cannot be written to; choose another OUT")
    _check_contents(out, place, overwrite)
    _check_contents(_failed(place), _failed(place), True)


def _check_contents(shown: Path, place: Path, overwrite: bool) -> None:
    """Only a checkpoint is ever removed: `--overwrite` on a mistyped name must not cost a home folder."""
    if not place.exists() or not any(place.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{shown} is not empty; choose another OUT, or replace it with --overwrite")
    if not any((place / name).is_file() for name in (CONFIG, MANIFEST)):
        raise OutputError(
            f"{place} holds no checkpoint, so it is not replaced; remove it yourself or choose another OUT"
        )


def _failed(place: Path) -> Path:
    return place.with_name(place.name + FAILED)


def _prefix(place: Path) -> str:
    return f".{place.name}.abliterate-"


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{place} cannot be written ({error.strerror or type(error).__name__})") from error


def _missing_parents(place: Path) -> list[Path]:
    return [parent for parent in reversed(place.parents) if not parent.exists()]


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _discard(staging: Staging) -> None:
    if staging.published is None:
        shutil.rmtree(staging.folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Marks the folder as in use for as long as this process lives."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: nothing is ever recovered there
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def _recover(place: Path) -> None:
    """Cleans up after runs that were killed: no process holds their folders any more."""
    if not place.parent.is_dir():
        return
    pattern = re.compile(re.escape(_prefix(place)) + r"([0-9a-f]{8})(\.old)?(\.failed)?")
    for folder in sorted(place.parent.iterdir()):
        found = pattern.fullmatch(folder.name)
        if not found or folder.is_symlink() or _in_use(folder.with_name(_prefix(place) + found[1])):
            continue
        target = place.with_name(place.name + (found[3] or ""))
        if found[2] and not target.exists():
            log.warning("%s was moved aside by a run that was killed: it is put back", target)
            folder.rename(target)
        else:
            log.warning("%s is what a killed run left: it is removed", folder)
            shutil.rmtree(folder, ignore_errors=True)


def _in_use(folder: Path) -> bool:
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False
