"""A patch from a base and what it was converted to: proved to rebuild that before it is given out."""

import hashlib
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from abliterate.checkpoint.carry import renamed_files
from abliterate.checkpoint.diskio import check_file_target, disk_errors, write_file
from abliterate.checkpoint.extend import extended_index
from abliterate.checkpoint.files import DIRECTION_FILE, INDEX_SUFFIX
from abliterate.checkpoint.header import read_header
from abliterate.checkpoint.listing import FileRecord, files_by_name, hashed, record_of
from abliterate.checkpoint.read import read_tensor
from abliterate.checkpoint.rewrite import rewrite_checkpoint
from abliterate.direction.files import saved
from abliterate.errors import OutputError, PatchError, one_line, some
from abliterate.patch.file import CARD, KEY, OWN, Base, Description, Edit, Patch, patch_bytes, read_patch
from abliterate.patch.rebuild import (
    Work,
    base_files,
    versions_text,
    work_of,
    write_rest,
)
from abliterate.progress import SILENT, Progress
from abliterate.publish.manifest import MANIFEST_NAME, read_manifest
from abliterate.publish.plots import PLOTS
from abliterate.subject import RunOptions, Subject, opened
from abliterate.traffic import tell_rewrite

log = logging.getLogger(__name__)

GRID = ("directions", "bypass", "induce", "kl")
"""Of a direction file, what says how the direction was picked."""


def make_patch(
    base: str,
    edited: Path | str,
    out: Path | str,
    *,
    revision: str | None = None,
    whole: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    cache_limit: int | None = None,
    progress: Progress = SILENT,
) -> Patch:
    """Writes the patch that turns a base into what it was converted to, once it has done so here.

    Args:
        base: a folder, or a Hub id (`org/name`, `org/name@revision`).
        edited: the folder that `convert` made of it.
        out: the file to write.
        whole: with the candidate grid and the plots, so that those are rebuilt byte for byte as well.
        cache_limit: bytes of a Hub model's shards that may be on the disk at once; None downloads it whole.

    Raises:
        PatchError: the folder is no conversion of the base, was changed since, or does not come out the same again.
        OutputError: the file cannot be written.
    """
    folder, path = Path(edited), Path(out)
    check_patch_target(path, folder, overwrite)
    manifest = read_manifest(folder)
    options = RunOptions(trust_remote_code=trust_remote_code, cache_limit=cache_limit, progress=progress)
    with opened(base, revision, options, _of(manifest, "edit", "inexact") is not None) as subject:
        tell_rewrite(subject)
        records = _Records.taken(subject, folder, manifest, progress)
        return write_patch(subject, folder, path, records, whole=whole, prove=True, progress=progress)


def check_patch_target(path: Path, out: Path, overwrite: bool) -> None:
    """Whether the patch of a conversion, which may be to come, can be written.

    Raises:
        OutputError: it cannot, or would lie in OUT.
    """
    if path.resolve().is_relative_to(out.resolve()):
        raise OutputError(f"the patch {path} would lie in {out}, which it is there to replace; choose another place")
    check_file_target(path, overwrite)


def write_patch(
    subject: Subject,
    folder: Path,
    out: Path,
    records: "_Records | None" = None,
    *,
    whole: bool = False,
    prove: bool = False,
    progress: Progress = SILENT,
) -> Patch:
    """Writes the patch of a folder that was just converted; see `make_patch`.

    Args:
        records: hashes of all files; None takes those of the shards from the manifest.
        prove: rebuild the weights as well, a shard at a time.
    """
    manifest = read_manifest(folder)
    records = records or _Records.trusted(subject, folder, manifest, progress)
    content = _content(subject, folder, manifest, records, whole)
    with disk_errors(out.parent, len(content)), tempfile.TemporaryDirectory(dir=out.parent, prefix=".patch-") as place:
        draft = Path(place) / out.name
        draft.write_bytes(content)
        patch = read_patch(draft)
        work = work_of(subject, patch)
        _prove_rest(subject, patch, work, Path(place))
        if prove:
            _prove_shards(subject, patch, work, Path(place), progress)
    write_file(out, content)
    return replace(patch, path=out)


@dataclass(frozen=True)
class _Records:
    """Hashes of the files of the base, and of those of the conversion."""

    base: Mapping[str, FileRecord]
    output: Mapping[str, FileRecord]

    @classmethod
    def taken(cls, subject: Subject, folder: Path, manifest: Mapping[str, Any], progress: Progress) -> "_Records":
        """From the files, held against the manifest."""
        checkpoint = subject.checkpoint
        records = cls(
            hashed(base_files(checkpoint), "base", progress, checkpoint.shards),
            hashed(_output_files(folder), "edited", progress),
        )
        for found, part, what in (
            (records.base, "base", f"{subject.name} is not what {folder} was made from"),
            (records.output, "output", f"{folder} was changed since it was made"),
        ):
            said = {shard["name"]: shard["sha256"] for shard in _of(manifest, part, "shards") if shard["sha256"]}
            other = [name for name, digest in said.items() if name not in found or found[name].sha256 != digest]
            if other:
                raise PatchError(f"{what}: {some(other)} is not as its manifest says")
        return records

    @classmethod
    def trusted(cls, subject: Subject, folder: Path, manifest: Mapping[str, Any], progress: Progress) -> "_Records":
        """Those of the shards from the manifest."""
        found = []
        for part, files in (("base", base_files(subject.checkpoint)), ("output", _output_files(folder))):
            shards = {s["name"]: FileRecord(s["sha256"], s["bytes"]) for s in _of(manifest, part, "shards")}
            rest = {name: path for name, path in files.items() if name not in shards}
            found.append(shards | hashed(rest, part, progress))
        return cls(*found)


def _output_files(folder: Path) -> dict[str, Path]:
    missing = [name for name in (CARD, MANIFEST_NAME, DIRECTION_FILE) if not (folder / name).is_file()]
    if missing:
        raise PatchError(f"{folder} has no {missing[0]}, so it is not whole; convert the base again")
    return files_by_name(folder)


def _of(manifest: Mapping[str, Any], *keys: str) -> Any:
    """A value of a manifest, which is data from outside."""
    value: Any = manifest
    for key in keys:
        if not isinstance(value, Mapping) or key not in value:
            raise PatchError(f"the manifest has no {'.'.join(keys)}; convert the base again")
        value = value[key]
    return value


def _content(subject: Subject, folder: Path, manifest: Mapping[str, Any], records: _Records, whole: bool) -> bytes:
    tensors, metadata = _direction(folder, manifest, whole)
    direction = saved(tensors, metadata)
    own = {name: (folder / name).read_bytes() for name in OWN if (folder / name).is_file()}
    redrawn = () if whole else tuple(name for name in PLOTS if name in own)
    own = {name: content for name, content in own.items() if name not in redrawn}
    said, digest = _of(manifest, "direction", "sha256"), hashlib.sha256(direction).hexdigest()
    own[MANIFEST_NAME] = own[MANIFEST_NAME].replace(said.encode(), digest.encode())
    changed = {name: record_of(content) for name, content in (*own.items(), (DIRECTION_FILE, direction))}
    edit = manifest["edit"]
    removes = edit.get("removes", {})
    about = Description(
        manifest["tool"],
        Base(subject.name, subject.source.commit or manifest["base"]["commit"], dict(sorted(records.base.items()))),
        Edit(
            str(_of(manifest, "recipe", "name")),
            _of(edit, "head"),
            1.0 if edit["strength"] is None else edit["strength"],
            removes.get("norms") == "kept",
            edit["inexact"] is not None,
            len(_of(edit, "writers")),
        ),
        dict(sorted({**_made(subject, folder, records), **changed}.items())),
        redrawn,
        whole,
    )
    return patch_bytes(about, tensors, metadata, [writer["tensor"] for writer in edit["writers"]], own)


def _direction(folder: Path, manifest: Mapping[str, Any], whole: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of the direction file, without the grid unless it is to be whole."""
    path = folder / DIRECTION_FILE
    if hashlib.sha256(path.read_bytes()).hexdigest() != _of(manifest, "direction", "sha256"):
        raise PatchError(f"{path} is not as the manifest says; convert the base again")
    header = read_header(path)
    kept = {name: info for name, info in header.tensors.items() if whole or name not in GRID}
    return {name: read_tensor(header, info) for name, info in kept.items()}, {
        key: text for key, text in header.metadata.items() if key != KEY
    }


def _made(subject: Subject, folder: Path, records: _Records) -> dict[str, FileRecord]:
    """The files of a folder that a conversion makes; others are left out, and the log says so."""
    checkpoint = subject.checkpoint
    weights = [shard.path.name for shard in checkpoint.shards]
    index = checkpoint.index.name if checkpoint.index else f"{checkpoint.shards[0].path.stem}{INDEX_SUFFIX}"
    carried = [name for name in records.base if not _is_weights(subject, name)]
    renamed = renamed_files(carried)
    made = {*weights, index, *(renamed.get(name, name) for name in carried), *OWN, DIRECTION_FILE}
    for name in sorted(records.output.keys() - made):
        log.warning("%s is not in the patch: no conversion makes it", one_line(str(folder / name)))
    return {name: record for name, record in records.output.items() if name in made}


def _prove_rest(subject: Subject, patch: Patch, work: Work, place: Path) -> None:
    """Every file but shards comes out as it is in the folder; plots may differ where they are drawn again."""
    folder, index = place / "rest", subject.checkpoint.index
    folder.mkdir()
    write_rest(subject, patch, work, folder)
    if index is not None:
        (folder / index.name).write_bytes(extended_index(subject.checkpoint, index, work.copies))
    found = hashed(files_by_name(folder), "files", SILENT)
    shards = {shard.path.name for shard in subject.checkpoint.shards}
    wanted = {name: record for name, record in patch.about.output.items() if name not in shards}
    redrawn = patch.about.redrawn
    wrong = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name) and name not in redrawn]
    if wrong:
        raise PatchError(f"{some(wrong)} would come out otherwise: changed since the conversion, or not made by it")


def _is_weights(subject: Subject, name: str) -> bool:
    index = subject.checkpoint.index
    return name in {shard.path.name for shard in subject.checkpoint.shards} or (
        index is not None and name == index.name
    )


def _prove_shards(subject: Subject, patch: Patch, work: Work, place: Path, progress: Progress) -> None:
    """Rebuilds the weights a shard at a time, so that they need the room of one."""
    checkpoint = subject.checkpoint
    for shard in checkpoint.shards:
        folder = place / "shard"
        folder.mkdir()
        one = replace(checkpoint, shards=(shard,), index=None)
        edits = {name: edit for name, edit in work.edits.items() if name in shard.tensors}
        copies = [copy for copy in work.copies if copy.source in shard.tensors]
        (record,) = rewrite_checkpoint(one, folder, edits, copies, progress)
        wanted = patch.about.output.get(record.name)
        if wanted is None or record.sha256_out != wanted.sha256:
            raise PatchError(
                f"{record.name} does not come out as it is: it was made by {versions_text(patch.about)}; use that, or "
                "convert the base again"
            )
        (folder / record.name).unlink()
        folder.rmdir()
