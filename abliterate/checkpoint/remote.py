"""A repository of the Hub at one commit: its files by size and hash, and their bytes by range."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import huggingface_hub
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

from abliterate.checkpoint import patience
from abliterate.checkpoint.keeper import Check, go_on
from abliterate.checkpoint.locate import explained
from abliterate.checkpoint.patience import CutError, passes, patiently, pause
from abliterate.errors import CheckpointError

RANGE_BYTES = 1 << 30
"""Of one request: addresses are signed for a limited time."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of the repository.

    Attributes:
        name: its path there.
        size: in bytes.
        sha256: of its content, where it is stored as a large file.
        blob: its id in git, of a small one: sha1 of a head and the content.
    """

    name: str
    size: int
    sha256: str | None
    blob: str | None

    def hasher(self) -> "hashlib._Hash":
        """Takes the content, and comes to `digest`."""
        if self.sha256 is not None:
            return hashlib.sha256()
        return hashlib.sha1(f"blob {self.size}\0".encode(), usedforsecurity=False)

    @property
    def fingerprint(self) -> str:
        """What tells it from any other."""
        return f"{self.size} {self.digest}"

    @property
    def digest(self) -> str:
        """What the Hub says the content hashes to."""
        return self.sha256 or self.blob or ""


@dataclass(frozen=True)
class Remote:
    """A repository at one commit.

    Attributes:
        model_id: org/name. `commit`: all that is read is of this one, wherever branches move meanwhile.
        files: by name.
    """

    model_id: str
    commit: str
    files: Mapping[str, RemoteFile]

    def read(self, name: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file.

        Raises:
            Exception: of the Hub client; see `locate.explained`.
        """
        return b"".join(block for at, block in self.stream(name, start, end))

    def stream(self, name: str, start: int, end: int, check: Check = go_on) -> Iterator[tuple[int, bytes]]:
        """Bytes [start, end) of a file as they arrive, connections that are cut taken up where they were cut.

        Bytes that arrive start the tries anew.

        Args:
            check: called with every block, and while waiting.

        Yields:
            The offset of each block, one after another, and the block.

        Raises:
            Exception: see `read`.
        """
        at, tries = start, 0
        while at < end:
            try:
                for block in self._request(name, at, min(end, at + RANGE_BYTES)):
                    check()
                    yield at, block
                    at, tries = at + len(block), 0
            except Exception as error:
                if tries == len(patience.WAITS) or not passes(error):
                    raise
                pause(error, patience.WAITS[tries], check)
                tries += 1

    def _request(self, name: str, start: int, end: int) -> Iterator[bytes]:
        """One request for bytes [start, end), which may bring fewer."""
        url = huggingface_hub.hf_hub_url(self.model_id, name, revision=self.commit)
        headers = build_hf_headers() | {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        timeout = huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
            hf_raise_for_status(response)
            skip = start if response.status_code == 200 else 0  # a server that knows no ranges sends all of it
            left = end - start
            for block in response.iter_bytes():  # as they arrive: what a full block waits for is lost with a cut
                part = block[min(skip, len(block)) :][:left]
                skip -= min(skip, len(block))
                left -= len(part)
                if part:
                    yield part
                if not left:
                    return
            raise CutError(f"{name} ended {left} bytes early")


def look(model_id: str, revision: str | None) -> Remote:
    """What a branch, tag or commit of a repository stands for now.

    Raises:
        CheckpointError: it cannot be found or reached, or the Hub says too little of its files.
    """
    with explained(model_id, revision):
        info = patiently(lambda: huggingface_hub.HfApi().model_info(model_id, revision=revision, files_metadata=True))
    files = {sibling.rfilename: _file(sibling) for sibling in info.siblings or () if _is_plain(sibling.rfilename)}
    if info.sha is None or not re.fullmatch("[0-9a-f]{40}", info.sha):
        raise CheckpointError(f"the Hub names no commit of {model_id}; give --revision a full commit, or download it")
    return Remote(model_id, info.sha, files)


def _file(sibling: Any) -> RemoteFile:
    lfs = sibling.lfs
    return RemoteFile(
        sibling.rfilename,
        int(sibling.size if sibling.size is not None else -1),
        str(lfs.sha256) if lfs is not None else None,
        sibling.blob_id,
    )


def _is_plain(name: str) -> bool:
    """Whether it names a file inside the repository: what a server says is data, not a path to trust."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name and "\0" not in name
