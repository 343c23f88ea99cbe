"""The output folder: made aside, in a work folder on the same file system, and renamed when it is whole."""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from abliterate.checkpoint.diskio import FULL, sync
from abliterate.checkpoint.target import check_contents, check_target, failed, resolved
from abliterate.checkpoint.workfolder import WorkFolder, held
from abliterate.errors import OutputError

__all__ = ["Staging", "check_target", "staged", "tidy"]

log = logging.getLogger(__name__)


@dataclass
class Staging:
    """A folder on its way to OUT.

    Attributes:
        work: the work folder around it.
        overwrite: a checkpoint that is at OUT by then is replaced.
        kept: unless it was published, the work folder stays for the next run; at first, where one was found.
        published: what it became; None until then.
    """

    work: WorkFolder
    overwrite: bool
    kept: bool
    published: Path | None = field(default=None, init=False)

    @property
    def folder(self) -> Path:
        """Where to write."""
        return self.work.new

    def publish(self) -> Path:
        """Makes the folder OUT, in place of whatever `staged` was allowed to replace; returns OUT.

        Raises:
            OutputError: it could not be renamed, or OUT came to be meanwhile; OUT is as it was before.
        """
        return self._become(self.work.out, self.overwrite)

    def publish_failed(self) -> Path:
        """Makes the folder OUT.failed, in place of an earlier one; OUT stays as it was. Returns OUT.failed.

        Raises:
            OutputError: it could not be renamed.
        """
        return self._become(failed(self.work.out), True)

    def _become(self, target: Path, overwrite: bool) -> Path:
        with _writing(target):
            for parent, _, names in os.walk(self.folder):
                for name in names:
                    sync(Path(parent) / name)
                sync(Path(parent))
            check_contents(target, target, overwrite)
            self._swap(target, self.work.aside(target))
            sync(self.work.path)
            sync(target.parent)
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


@contextmanager
def staged(out: Path, *, overwrite: bool, inputs: Sequence[Path]) -> Iterator[Staging]:
    """Yields a folder in the work folder beside OUT, which is removed in the end unless it is to be kept.

    What a killed run had moved aside is put back first, and what a finished one left is removed.

    Args:
        out: the folder to make.
        overwrite: replace the checkpoint that is there, once the new one is whole.
        inputs: folders that are read.

    Raises:
        OutputError: see `check_target`; another run is writing OUT; or the place cannot be written to.
    """
    work = WorkFolder.of(resolved(out))
    if not os.access(work.path, os.F_OK):
        check_target(out, overwrite=overwrite, inputs=inputs)
    with contextlib.ExitStack() as stack:
        with _writing(work.out):
            staging = _stage(work, overwrite, stack)
        check_target(out, overwrite=overwrite, inputs=inputs)
        with _writing(work.out):
            staging.folder.mkdir(exist_ok=True)
            work.stages.mkdir(exist_ok=True)
        try:
            yield staging
        except OSError as error:
            if error.errno in FULL or _names(error, work.path):
                raise OutputError(
                    f"{work.out} cannot be written ({error.strerror}); free space or mend that"
                ) from error
            raise


def _stage(work: WorkFolder, overwrite: bool, stack: contextlib.ExitStack) -> Staging:
    """Takes the work folder; what is made here is unmade when the stack is closed."""
    for parent in [parent for parent in reversed(work.out.parents) if not parent.exists()]:
        parent.mkdir()
        stack.callback(_remove_if_empty, parent)
    stack.enter_context(held(work))
    staging = Staging(work, overwrite, kept=False)
    stack.callback(_leave, staging)
    _recover(work)
    staging.kept = work.unfinished
    return staging


def tidy(out: Path) -> None:
    """Cleans up after a run that was killed while it published OUT; unfinished work stays as it is.

    Raises:
        OutputError: another run is writing OUT, or something cannot be moved or removed.
    """
    work = WorkFolder.of(resolved(out))
    if not os.access(work.path, os.F_OK):
        return
    with _writing(work.out), held(work):
        _recover(work)
        if not work.unfinished:
            work.remove()


def _recover(work: WorkFolder) -> None:
    for target in (work.out, failed(work.out)):
        _put_back(work, target)
    if work.unfinished:
        return
    if work.journal.exists():
        log.warning("%s is what a run left that was killed after it had finished: it is removed", work.path)
    work.clear()


def _put_back(work: WorkFolder, target: Path) -> None:
    """An OUT that was moved aside by a run that was killed before it had another in its place."""
    aside = work.aside(target)
    if not aside.exists():
        return
    if target.exists():
        log.warning("%s was replaced by a run that was killed before it had removed the old one: it is removed", target)
        shutil.rmtree(aside)
    else:
        log.warning("%s was moved aside by a run that was killed: it is put back", target)
        aside.rename(target)


def _leave(staging: Staging) -> None:
    if staging.published is not None or not staging.kept:
        staging.work.remove()


def _names(error: OSError, folder: Path) -> bool:
    """Whether the error is about a file inside the folder."""
    return isinstance(error.filename, str | Path) and Path(error.filename).is_relative_to(folder)


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{place} cannot be written ({error.strerror or type(error).__name__})") from error


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
