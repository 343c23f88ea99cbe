"""Whether a model of the Hub fits on the disk, looked at before it fills it."""

import logging
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.file_download import repo_folder_name

from abliterate.checkpoint.files import OTHER_WEIGHTS
from abliterate.errors import CheckpointError
from abliterate.sizes import short

log = logging.getLogger(__name__)


def check_room(model_id: str, revision: str | None) -> None:
    """Refuses a download that cannot end well: the Hub client itself warns, and goes on until the disk is full.

    Raises:
        CheckpointError: what is missing in the Hub client's cache is more than what is free there.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        info = huggingface_hub.HfApi().model_info(model_id, revision=revision, files_metadata=True)
    except Exception as error:  # what is wrong, the download says; without a network the cache may do
        log.info("the size of %s is not known: %s", model_id, type(error).__name__)
        return
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    missing = sum(_missing(model_id, info)) - sum(_begun(cache / repo_folder_name(repo_id=model_id, repo_type="model")))
    free = shutil.disk_usage(next(place for place in (cache, *cache.parents) if place.exists())).free
    if missing > free:
        raise CheckpointError(
            f"{short(missing)} of {model_id} have to be fetched, and {short(free)} are free in {cache}: "
            "with --cache-limit SIZE shards are fetched as they are needed, and no more than SIZE of them kept; or "
            "free space, or set HF_HOME to a folder on another disk"
        )


def _missing(model_id: str, info: Any) -> Iterator[int]:
    """Sizes of the files that are wanted and not in the cache."""
    for sibling in info.siblings or ():
        name = sibling.rfilename
        wanted = sibling.size and not any(fnmatch(name, pattern) for pattern in OTHER_WEIGHTS)
        if wanted and not isinstance(huggingface_hub.try_to_load_from_cache(model_id, name, revision=info.sha), str):
            yield sibling.size


def _begun(folder: Path) -> Iterator[int]:
    """Sizes of what an earlier download left unfinished."""
    for path in folder.glob("blobs/*.incomplete"):
        yield path.stat().st_blocks * 512
