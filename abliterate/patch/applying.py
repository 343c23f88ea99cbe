"""`abliterate apply`: a base and a patch to the very files of the conversion, or to nothing."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from abliterate.checkpoint.diskio import check_space
from abliterate.checkpoint.files import Checkpoint, open_checkpoint
from abliterate.checkpoint.fingerprint import fingerprint
from abliterate.checkpoint.keeper import unfilled
from abliterate.checkpoint.listing import FileRecord, files_by_name, hashed
from abliterate.checkpoint.locate import Source, find
from abliterate.checkpoint.ondemand import located
from abliterate.checkpoint.output import check_target, tidy
from abliterate.checkpoint.rewrite import ShardRecord, rewrite_checkpoint
from abliterate.errors import PatchError, one_line, some
from abliterate.journal import Journal
from abliterate.patch.file import Patch, read_patch
from abliterate.patch.rebuild import (
    Work,
    base_files,
    differing,
    versions_text,
    work_of,
    write_rest,
)
from abliterate.progress import SILENT, Progress
from abliterate.resume import bytes_in, keep_only, working
from abliterate.subject import Subject, plan_of, versions
from abliterate.traffic import tell_rewrite

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Applied:
    """The result.

    Attributes:
        folder: the checkpoint.
        files: every file of it. `redrawn`: plots that came out otherwise than they were.
    """

    folder: Path
    patch: Patch
    files: Mapping[str, FileRecord]
    redrawn: tuple[str, ...]


def apply_patch(
    patch: Path | str,
    base: str,
    out: Path | str,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    cache_limit: int | None = None,
    progress: Progress = SILENT,
) -> Applied:
    """Rebuilds the files of a conversion; a run that was stopped is continued by the same call.

    Args:
        patch: the file.
        base: a folder, or a Hub id; of the patch's own id the commit that it was made from is taken.
        out: the folder to make; it exists only when every file in it is, by hash, the one that the patch names.
        overwrite: replace what is in `out`.
        cache_limit: bytes of a Hub model's shards that may be on the disk at once; None downloads it whole.

    Raises:
        PatchError: the patch is damaged, the base is another one, or other bytes come out; there is no OUT then.
        AbliterateError: the base cannot be read, or OUT cannot be written.
    """
    read, local = read_patch(Path(patch)), find(base, revision)
    tidy(Path(out))
    check_target(Path(out), overwrite=overwrite, inputs=[local.folder] if local else [])
    wanted = None if local else _revision(base, revision, read)
    with located(base, wanted, cache_limit, progress) as source:
        subject = _subject(source, read, trust_remote_code)
        tell_rewrite(subject)
        return _applied(subject, read, Path(out), overwrite, progress)


def _applied(subject: Subject, read: Patch, out: Path, overwrite: bool, progress: Progress) -> Applied:
    checkpoint = subject.checkpoint
    identity = {"patch": read.sha256, "files of the base": fingerprint(checkpoint), "versions": versions()}
    with working(out, checkpoint, identity, overwrite=overwrite, progress=progress) as (staging, journal):
        folder, shelf = staging.folder, unfilled(checkpoint.keeper, staging.folder)
        size = sum(record.bytes for record in _output(read, checkpoint).values())
        check_space(folder, size - bytes_in(folder) + shelf)
        journal.stage("base", bool, lambda: _check_base(read, subject, progress))
        work = work_of(subject, read)
        keep_only(folder, journal.shards)
        shards = _rewrite(subject, work, folder, journal, progress)
        write_rest(subject, read, work, folder)
        files, redrawn = _check_output(read, shards, folder, progress)
        return Applied(staging.publish(), read, files, redrawn)


def _revision(base: str, revision: str | None, patch: Patch) -> str | None:
    """What is wanted of the Hub: what is asked for, else what the patch was made from."""
    return revision if revision or base != patch.about.base.id else patch.about.base.commit


def _subject(source: Source, patch: Patch, trust_remote_code: bool) -> Subject:
    """The base, once its files have the names and sizes that the patch names: a wrong one is told at once."""
    checkpoint = open_checkpoint(source.folder, source.keeper)
    wanted, files = patch.about.base.files, base_files(checkpoint)
    for name, record in wanted.items():
        if name not in files:
            raise PatchError(f"{source.folder} has no {name}, so it is not the base of the patch, {_base(patch)}")
        size = files[name].stat().st_size
        if size != record.bytes:
            raise _other_base(source.folder, [name], patch, f" ({size} bytes, not {record.bytes})")
    strange = sorted({shard.path.name for shard in checkpoint.shards} - wanted.keys())
    if strange:
        raise _other_base(source.folder, strange, patch)
    for name in sorted(files.keys() - wanted.keys()):
        log.warning("%s is left out: the patch was made without it", one_line(name))
    return Subject(source, checkpoint, plan_of(checkpoint, trust_remote_code, patch.about.edit.inexact))


def _check_base(patch: Patch, subject: Subject, progress: Progress) -> bool:
    """Hashes the base before anything is written.

    Raises:
        PatchError: naming the files that are other ones.
    """
    wanted, checkpoint = patch.about.base.files, subject.checkpoint
    files = {name: path for name, path in base_files(checkpoint).items() if name in wanted}
    wrong = differing(hashed(files, "base", progress, checkpoint.shards), wanted)
    if wrong:
        raise _other_base(subject.folder, wrong, patch)
    return True


def _other_base(folder: Path, names: list[str], patch: Patch, note: str = "") -> PatchError:
    return PatchError(
        f"{folder} is not the base of the patch: {some(names)} is another file{note}; get {_base(patch)}, or the patch "
        "for this one"
    )


def _base(patch: Patch) -> str:
    base = patch.about.base
    return f"{base.id}@{base.commit}" if base.commit else base.id


def _output(patch: Patch, checkpoint: Checkpoint) -> dict[str, FileRecord]:
    """What the patch says of the shards to write.

    Raises:
        PatchError: it does not name one of them.
    """
    missing = [shard.path.name for shard in checkpoint.shards if shard.path.name not in patch.about.output]
    if missing:
        raise PatchError(f"{patch.path} names no hash for {some(missing)}; get it again")
    return {shard.path.name: patch.about.output[shard.path.name] for shard in checkpoint.shards}


def _rewrite(
    subject: Subject, work: Work, folder: Path, journal: Journal, progress: Progress
) -> tuple[ShardRecord, ...]:
    checkpoint, done, skip = subject.checkpoint, journal.finish_shard, journal.shards
    return rewrite_checkpoint(checkpoint, folder, work.edits, work.copies, progress, done=done, skip=skip)


def _check_output(
    patch: Patch, shards: tuple[ShardRecord, ...], folder: Path, progress: Progress
) -> tuple[dict[str, FileRecord], tuple[str, ...]]:
    """Every file, and the plots that are other ones than they were.

    Raises:
        PatchError: another file is not what the patch names, is missing or one too many.
    """
    about = patch.about
    found = {s.name: FileRecord(s.sha256_out or "", s.bytes) for s in shards}
    rest = {name: path for name, path in files_by_name(folder).items() if name not in found}
    found |= hashed(rest, "files", progress)
    wrong = [name for name in sorted({*found, *about.output}) if found.get(name) != about.output.get(name)]
    redrawn = tuple(name for name in wrong if name in about.redrawn and name in found)
    wrong = [name for name in wrong if name not in redrawn]
    if wrong:
        here = ", ".join(f"{name} {versions()[name]}" for name in ("abliterate", "torch"))
        raise PatchError(
            f"{some(wrong)} does not come out as the patch says, so nothing was written: it was made by "
            f"{versions_text(about)}, and this is {here}"
        )
    for name in redrawn:
        log.warning("%s was drawn again and is not the same to the byte; patch --whole keeps it", name)
    return found, redrawn
