"""What is pushed of a folder: the files that its manifest accounts for, once they are what it says."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha1
from pathlib import Path
from typing import Any

from abliterate.checkpoint.files import DIRECTION_FILE, INDEX_SUFFIX, Checkpoint, files_in, open_checkpoint
from abliterate.checkpoint.hashing import file_sha256
from abliterate.checkpoint.target import FAILED
from abliterate.errors import CheckpointError, some
from abliterate.progress import Advance, Progress
from abliterate.publish.manifest import MANIFEST_NAME, read_manifest

CARD = "README.md"
PLOTS: Mapping[str, str] = {"selection": "selection.png", "search": "search.png"}
"""Files that are there where the manifest has such a part."""


@dataclass(frozen=True)
class Item:
    """A file to push.

    Attributes:
        name: in the repository, with forward slashes.
        path: where it is.
        size: in bytes.
        sha256: of its content, in hexadecimal; None until it was taken.
        stamp: inode and time of the last change, to see whether it has changed since.
    """

    name: str
    path: Path
    size: int
    sha256: str | None
    stamp: tuple[int, int]

    @property
    def changed(self) -> bool:
        """Whether the file is another one than it was when this was made."""
        try:
            return item_of(self.path, self.name).stamp != self.stamp
        except OSError:
            return True

    def git_sha1(self) -> str:
        """The name that git gives to the content; for files that are small enough to be read at once."""
        content = self.path.read_bytes()
        return sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def hashed(self, advance: Advance) -> "Item":
        """The same with its hash taken."""
        return self if self.sha256 else replace(self, sha256=file_sha256(self.path, advance))


@dataclass(frozen=True)
class Placed:
    """A file that is in large storage already, and in another commit of the same repository.

    Attributes:
        name: in the repository. `size`: in bytes. `sha256`: of its content, in hexadecimal.
        commit: that has it under the same name.
    """

    name: str
    size: int
    sha256: str
    commit: str


@dataclass(frozen=True)
class Parcel:
    """What is pushed.

    Attributes:
        folder: where it is.
        items: in the order of their names.
        placed: files that are on the Hub already, and not in the folder.
        left_out: names of other files in the folder, which stay.
        manifest: what the folder says of itself.
    """

    folder: Path
    items: tuple[Item, ...]
    left_out: tuple[str, ...]
    manifest: Mapping[str, Any]
    placed: tuple[Placed, ...] = ()

    @property
    def hashed(self) -> bool:
        """Whether the manifest has hashes of the weights to hold them to."""
        return all(shard["sha256"] for shard in self.manifest["output"]["shards"])

    @property
    def nbytes(self) -> int:
        """Size of all files."""
        return sum(item.size for item in self.items)


def item_of(path: Path, name: str, sha256: str | None = None) -> Item:
    """A file as it is now.

    Raises:
        OSError: it is not there.
    """
    status = path.stat()
    return Item(name, path, status.st_size, sha256, (status.st_ino, status.st_mtime_ns))


def pack(folder: Path, headers: Path | None = None, placed: Sequence[Placed] = ()) -> Parcel:
    """The files of a converted checkpoint, without hashing any.

    Args:
        headers: the folder that has the checkpoint's headers, where `folder` does not have its shards.
        placed: the shards then.

    Raises:
        CheckpointError: it was not converted by this tool, its certificate failed, or files are missing.
    """
    if folder.resolve().name.endswith(FAILED):
        raise CheckpointError(f"{folder} is what a conversion left whose certificate failed; it is not pushed")
    manifest = read_manifest(folder)
    _refuse_unsound(folder, manifest)
    try:
        wanted = set(accounted(manifest, open_checkpoint(headers or folder))) - {each.name for each in placed}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST_NAME} is damaged; convert the base model again") from error
    there = {path.relative_to(folder).as_posix(): path for path in files_in(folder) if path.is_file()}
    missing = sorted(wanted - there.keys())
    if missing:
        raise CheckpointError(
            f"{folder} lacks files that its manifest accounts for: {some(missing)}; convert the base model again"
        )
    items = tuple(item_of(there[name], name) for name in sorted(wanted))
    return Parcel(folder, items, tuple(sorted(there.keys() - wanted)), manifest, tuple(placed))


def checked(parcel: Parcel, progress: Progress) -> Parcel:
    """The same with every file hashed, and found to be what the manifest says.

    Raises:
        CheckpointError: files are not what it says.
    """
    with progress.bar("check files", parcel.nbytes, "B") as advance:
        parcel = replace(parcel, items=tuple(item.hashed(advance) for item in parcel.items))
    differing = list(_differing(parcel))
    if differing:
        raise CheckpointError(
            f"files of {parcel.folder} are not what its manifest says: {some(differing)}; convert the base model again"
        )
    return parcel


def accounted(manifest: Mapping[str, Any], checkpoint: Checkpoint) -> Iterator[str]:
    """Names of the files that the manifest and the checkpoint account for; data from outside, to be compared only."""
    yield from (MANIFEST_NAME, CARD, DIRECTION_FILE)
    yield from (plot for part, plot in PLOTS.items() if manifest[part])
    yield from (str(shard["name"]) for shard in manifest["output"]["shards"])
    yield from (str(name) for name in manifest["output"]["files"])
    shards = [shard.path for shard in checkpoint.shards]
    yield from (path.name for path in shards)
    yield checkpoint.index.name if checkpoint.index else f"{shards[0].stem}{INDEX_SUFFIX}"


def _refuse_unsound(folder: Path, manifest: Mapping[str, Any]) -> None:
    """What a conversion calls failed: a proof that does not hold, or writers that have not lost what they should."""
    try:
        certificate, inexact = manifest["certificate"], manifest["edit"]["inexact"] is not None
        partly = inexact or certificate["claim"].startswith("not exact")
        failed = bool(certificate["writers"]["failed"]) and not inexact
        sound = bool(certificate["holds"]) or (partly and not failed)
        told = any(str(warning).startswith("certificate failed") for warning in manifest["warnings"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST_NAME} is damaged; convert the base model again") from error
    if told or not sound:
        raise CheckpointError(
            f"the certificate of {folder} failed ({certificate['claim']}); it is not pushed: convert the base again"
        )


def _differing(parcel: Parcel) -> Iterator[str]:
    """Files whose size or hash is not the recorded one, and shards that are not among the recorded ones."""
    recorded = {str(shard["name"]): shard for shard in parcel.manifest["output"]["shards"]}
    direction = parcel.manifest["direction"]["sha256"]
    for item in parcel.items:
        shard = recorded.get(item.name)
        if shard is not None:
            if item.size != shard["bytes"] or shard["sha256"] not in (None, item.sha256):
                yield item.name
        elif item.name == DIRECTION_FILE:
            if item.sha256 != direction:
                yield item.name
        elif item.name.endswith(".safetensors") and item.name not in parcel.manifest["output"]["files"]:
            yield item.name
