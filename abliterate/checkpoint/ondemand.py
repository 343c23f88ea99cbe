"""A model of the Hub whose shards are fetched as passes need them, so that it need not fit on the disk; docs/hub.md."""

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import huggingface_hub

from abliterate.checkpoint.allowance import Allowance
from abliterate.checkpoint.carry import repeats_weights
from abliterate.checkpoint.download import fetch, is_right
from abliterate.checkpoint.files import open_checkpoint
from abliterate.checkpoint.glimpse import gather, is_shard
from abliterate.checkpoint.keeper import go_on
from abliterate.checkpoint.locate import Source, find, named, resolve, whole
from abliterate.checkpoint.remote import Remote, look
from abliterate.checkpoint.shelf import PARTIAL, Shard, Shelf
from abliterate.checkpoint.workfolder import WorkFolder, held, in_use
from abliterate.errors import CheckpointError
from abliterate.progress import SILENT, Progress
from abliterate.sizes import short

log = logging.getLogger(__name__)


Wanted = tuple[str, str | None]
"""A folder or a Hub id, and the revision that is asked for."""


@contextmanager
def located(
    model: str,
    revision: str | None = None,
    limit: int | Allowance | None = None,
    progress: Progress = SILENT,
) -> Iterator[Source]:
    """Yields a checkpoint that can be read while this lasts.

    Args:
        limit: bytes of fetched shards that may be on the disk at once, or what they share with others; None downloads
            a model of the Hub whole into the Hub client's cache, as `resolve` does.

    Raises:
        CheckpointError: see `resolve`.
        HubError: the Hub fails.
    """
    with located_together([(model, revision)], limit, progress) as (source,):
        yield source


@contextmanager
def located_together(
    models: Sequence[Wanted], limit: int | Allowance | None = None, progress: Progress = SILENT
) -> Iterator[list[Source]]:
    """`located` for several checkpoints, which have the limit in common: room is whoever's needs it.

    One that is asked for twice is fetched once.
    """
    if limit is None:
        yield [resolve(model, revision) for model, revision in models]
        return
    allowance = Allowance(limit) if isinstance(limit, int) else limit
    fetched, sources = dict[tuple[str, str], Source](), list[Source]()
    with ExitStack() as stack:
        for model, revision in models:
            source = _at_hand(model, revision)
            if source is None:
                model_id, wanted = named(model, revision)
                remote = look(model_id, wanted)
                key = model_id, remote.commit
                if key not in fetched:
                    fetched[key] = stack.enter_context(_fetching(remote, wanted, allowance, _cache(), progress))
                source = fetched[key]
            sources.append(source)
        if not fetched and allowance is not limit:
            names = " and ".join(dict.fromkeys(model for model, _ in models))
            where = "offline and in the Hub's cache" if any(source.model_id for source in sources) else "here"
            log.warning("nothing is fetched, since %s is %s: --cache-limit changes nothing", names, where)
        yield sources


def _at_hand(model: str, revision: str | None) -> Source | None:
    """What needs no fetching: a folder, or offline the Hub client's cache."""
    local = find(model, revision)
    if local is None and huggingface_hub.constants.HF_HUB_OFFLINE:
        return whole(model, revision)
    return local


def _cache() -> Path:
    """Where what is fetched stays for the next run."""
    return Path(huggingface_hub.constants.HF_HOME) / "abliterate"


@contextmanager
def on_demand(
    model: str, revision: str | None, limit: int | Allowance, cache: Path, progress: Progress
) -> Iterator[Source]:
    """`located` for a model of the Hub. What was fetched stays for the next run, unless this one comes to its end.

    Args:
        cache: the folder where it stays.
    """
    model_id, wanted = named(model, revision)
    with _fetching(look(model_id, wanted), wanted, limit, cache, progress) as source:
        yield source


@contextmanager
def _fetching(
    remote: Remote, wanted: str | None, limit: int | Allowance, cache: Path, progress: Progress
) -> Iterator[Source]:
    model_id = remote.model_id
    with _alone(remote, cache) as home:
        folder = _folder(remote, home.path / "checkpoint" / model_id.rpartition("/")[2], progress)
        shelf = _shelf(remote, folder, home.path / "shards", limit, progress)
        try:
            yield Source(folder, model_id, wanted, remote.commit, shelf)
        except BaseException:
            if shelf.bytes:
                log.warning(
                    "%s of shards stay in %s for the same command to go on with; if it is not to, remove the folder",
                    short(shelf.bytes),
                    home.path,
                )
            raise
        finally:
            shelf.close()
            log.info("%s of shards of %s were fetched", short(shelf.fetched), model_id)
        home.remove()
        with suppress(OSError):  # another commit's is there
            home.path.parent.rmdir()


@contextmanager
def _alone(remote: Remote, cache: Path) -> Iterator[WorkFolder]:
    """Makes the folder for this commit, and keeps other processes out of it.

    Raises:
        CheckpointError: another one is there, or it cannot be made.
    """
    path = cache / "--".join(["models", *remote.model_id.split("/")]) / remote.commit
    home = WorkFolder(path, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if in_use(home):
            raise CheckpointError(
                f"another run reads {remote.model_id} with --cache-limit; wait for it, or set HF_HOME to another folder"
            )
        with held(home):
            yield home
    except OSError as error:
        if not str(error.filename).startswith(str(cache)):
            raise
        raise CheckpointError(f"{path} cannot be written ({error.strerror}); set HF_HOME to another folder") from error


def _folder(remote: Remote, folder: Path, progress: Progress) -> Path:
    """Headers of shards, and whole whatever is no shard; made whole or not at all."""
    if not folder.is_dir():
        making = folder.with_name(f".{folder.name}{PARTIAL}")
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        gather(remote, making)
        _fetch_others(remote, making, progress)
        making.rename(folder)
    return folder


def _fetch_others(remote: Remote, folder: Path, progress: Progress) -> None:
    """Files of safetensors that are no shards and no second copy of them: the result has them too."""
    checkpoint = open_checkpoint(folder)
    shards = {shard.path for shard in checkpoint.shards}
    for file in remote.files.values():
        path = folder / file.name
        if is_shard(file.name) and path not in shards and not repeats_weights(path, checkpoint):
            fetch(remote, file, path.with_name(f"{path.name}{PARTIAL}"), path, progress, go_on)


def _shelf(remote: Remote, folder: Path, place: Path, limit: int | Allowance, progress: Progress) -> Shelf:
    """The shards, those in the Hub client's cache where they are."""
    headers = open_checkpoint(folder).shards
    shards = [Shard(remote.files[header.path.name], header.raw) for header in headers]
    elsewhere = {}
    for header in headers:
        name = header.path.name
        cached = huggingface_hub.try_to_load_from_cache(remote.model_id, name, revision=remote.commit)
        if isinstance(cached, str):
            elsewhere[name] = Path(cached)
    return Shelf(place, shards, limit, partial(fetch, remote), is_right, elsewhere, progress)
