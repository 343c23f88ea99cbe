"""The output folder: built aside under a hidden name, and renamed into place only when it is whole."""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterate.checkpoint.files import INDEX_SUFFIX, Checkpoint, read_json
from abliterate.errors import OutputError

log = logging.getLogger(__name__)
RENAMED = {"README.md": "README.base.md", "abliteration.json": "abliteration.base.json"}
OTHER_WEIGHTS = (".bin", ".pth", ".pt", ".gguf", ".ckpt", ".h5", ".msgpack", ".onnx")
LEFT_OUT_FOLDERS = (".git", ".cache", "__pycache__", "onnx", "original")


@dataclass
class Staging:
    """A folder on its way to be `out`; gone when the block ends without publishing."""

    folder: Path
    out: Path
    published: bool = False

    def publish(self) -> Path:
        """Renames the folder to OUT, in place of whatever `staged` was allowed to replace."""
        return self._rename(self.out)

    def publish_failed(self) -> Path:
        """Renames the folder to OUT.failed, in place of an earlier one; OUT stays as it was."""
        return self._rename(self.out.with_name(f"{self.out.name}.failed"))

    def _rename(self, target: Path) -> Path:
        _sync_tree(self.folder)
        aside = None
        if target.exists():
            aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
            target.rename(aside / "old")
        try:
            self.folder.rename(target)
        except BaseException:
            if aside is not None:
                (aside / "old").rename(target)
                aside.rmdir()
            raise
        self.published = True
        _sync(target.parent)
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        return target


def check_target(out: Path, *, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Whether OUT may be made.

    Raises:
        OutputError: it is a file, is not empty, or lies inside an input (or the other way round).
    """
    place = out.resolve()
    for source in (path.resolve() for path in inputs):
        if place == source or place.is_relative_to(source) or source.is_relative_to(place):
            raise OutputError(f"OUT ({out}) and MODEL ({source}) may not lie inside one another; choose another OUT")
    if place.exists() and not place.is_dir():
        raise OutputError(f"{out} is a file; OUT is the name of a folder to make")
    if place.is_dir() and any(place.iterdir()) and not overwrite:
        raise OutputError(f"{out} is not empty; choose another OUT, or --overwrite")


@contextmanager
def staged(out: Path, *, overwrite: bool, inputs: Sequence[Path]) -> Iterator[Staging]:
    """Yields a hidden folder beside OUT; it is removed unless it was published, whatever happens.

    Raises:
        OutputError: see `check_target`; or the place cannot be written to.
    """
    check_target(out, overwrite=overwrite, inputs=inputs)
    place = out.resolve()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{place.name}.abliterate-", dir=place.parent))
        folder.chmod(0o777 & ~_umask())
    except OSError as error:
        raise OutputError(f"cannot write to {place.parent}: {error.strerror or error}") from error
    staging = Staging(folder, place)
    try:
        yield staging
    except OSError as error:
        raise OutputError(f"cannot write {place}: {error.strerror or error}") from error
    finally:
        if not staging.published:
            shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def carry_over(checkpoint: Checkpoint, folder: Path) -> tuple[str, ...]:
    """Copies every file that is not a shard, the index, or a copy of the weights in another format.

    Returns:
        Names relative to the folder, sorted, as they are in the output.
    """
    skipped = {header.path.name for header in checkpoint.shards}
    skipped |= {checkpoint.index.name} if checkpoint.index else set()
    carried = []
    for path in sorted(checkpoint.folder.rglob("*")):
        name = path.relative_to(checkpoint.folder)
        if path.is_dir() or any(part in LEFT_OUT_FOLDERS for part in name.parts[:-1]):
            continue
        if len(name.parts) == 1 and name.name in skipped:
            continue
        if path.suffix in OTHER_WEIGHTS or path.name.endswith(INDEX_SUFFIX):
            log.warning("%s is left out: it holds or lists unedited weights", name)
            continue
        carried.append(_carry(path, folder, name))
    return tuple(carried)


def _carry(path: Path, folder: Path, name: Path) -> str:
    renamed = Path(RENAMED.get(str(name), str(name)))
    target = folder / renamed
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)
    return renamed.as_posix()


def update_config(folder: Path, changes: Mapping[str, Any]) -> None:
    """Sets dotted keys in config.json; the order of keys and the indent stay."""
    path = folder / "config.json"
    text = path.read_text(encoding="utf-8")
    config = read_json(path)
    for dotted, value in changes.items():
        *parents, key = dotted.split(".")
        part = config
        for parent in parents:
            part = part.setdefault(parent, {})
        part[key] = value
    indent = next((len(line) - len(line.lstrip()) for line in text.splitlines()[1:] if line.strip()), 2)
    path.write_text(json.dumps(config, indent=indent or 2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    """Everything reaches the disk before the name does."""
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)
