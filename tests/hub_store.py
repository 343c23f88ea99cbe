"""Repositories in memory, with their commits, branches and large files, as a Hub keeps them."""

import hashlib
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

COMMIT = re.compile(r"[0-9a-f]{40}")
GIT_BYTES = 20_000
"""Larger files go to large storage, whatever they are called."""


@dataclass(frozen=True)
class Blob:
    """A file's content, and whether it is in large storage."""

    content: bytes
    large: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_sha1(self) -> str:
        content = self.content
        if self.large:
            content = f"version x\noid sha256:{self.sha256}\nsize {len(content)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        """As the API lists it."""
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": self.git_sha1}
        if self.large:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}
        return entry

    def sibling(self, path: str) -> dict[str, Any]:
        """As the API lists it with a repository, where sizes are asked for."""
        sibling = {"rfilename": path, "size": len(self.content), "blobId": self.git_sha1}
        if self.large:
            sibling["lfs"] = {"sha256": self.sha256, "size": len(self.content), "pointerSize": 134}
        return sibling


Files = dict[str, Blob]


@dataclass
class Repository:
    """One model repository.

    Attributes:
        commits: files of each. `branches`: the commit that each name stands for. `log`: commits after the first, but
            for those on branches where shards of a conversion wait.
    """

    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    pulls: int = 0

    def __post_init__(self) -> None:
        self.branches["main"] = self.add({".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "first")

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, a pull request or a commit."""
        return revision if revision in self.commits else self.branches.get(revision)

    def files(self, revision: str = "main") -> Files:
        commit = self.resolve(revision)
        return self.commits[commit] if commit else {}

    def commit(self, branch: str, files: Files, pull: bool = False) -> str:
        """Adds a commit to a branch, or as a pull request beside it."""
        made = self.add(files, f"{self.branches[branch]} {len(self.commits)}")
        if pull:
            self.pulls += 1
            branch = f"refs/pr/{self.pulls}"
        self.branches[branch] = made
        if not branch.startswith("abliterate-work-"):
            self.log.append(made)
        return made

    def add(self, files: Files, salt: str) -> str:
        listed = sorted((name, blob.sha256) for name, blob in files.items())
        name = hashlib.sha1(f"{salt} {listed}".encode()).hexdigest()
        self.commits[name] = files
        return name


@dataclass
class Fault:
    """What goes wrong instead of an answer.

    Attributes:
        request: a pattern for `METHOD path`. `times`: that it happens, after `after` requests that go well.
        status, headers, body: the answer; with status 0 the connection is cut once `cut` bytes of the body have come.
        late: the request is served, and only its answer is lost.
    """

    request: str
    status: int = 0
    times: int = 1
    after: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b"{}"
    cut: int = 0
    late: bool = False

    def hits(self, request: str) -> bool:
        if self.times == 0 or not re.search(self.request, request):
            return False
        if self.after:
            self.after -= 1
            return False
        self.times -= 1
        return True


@dataclass
class Store:
    """All that the server has.

    Attributes:
        token: that is taken.
        writable: names that it may write to. `part_bytes`: larger files come in pieces of that size; 0 for none do.
        awaited: files that may come by Xet, by sha256. `xorb_bytes`: that came so.
        slow: seconds for every block that comes. `ignored`: names that the .gitignore has.
        large: large files by sha256. `stored`: how often each came whole. `parts`: of files that come in pieces.
        seen: requests, as `METHOD path`. `received`: bytes of large files, whole or not. `sent`: the same of answers.
        unknown: requests that no page answers, of which the real Hub may know more.
    """

    url: str = ""
    token: str = "hf_testtesttesttesttesttesttesttest"
    writable: str = r"org/.*"
    part_bytes: int = 0
    slow: float = 0.0
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    stored: Counter[str] = field(default_factory=Counter)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    received: int = 0
    sent: int = 0
    unknown: list[str] = field(default_factory=list)
    ignored: str = r"(?!)"
    pace: threading.Event = field(default_factory=threading.Event)
    awaited: dict[str, bytes] = field(default_factory=dict)
    xorb_bytes: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def cdn(self) -> str:
        """Where large files are fetched from: another host, which is sent no token."""
        return self.url.replace("127.0.0.1", "localhost")

    def fault(self, request: str) -> Fault | None:
        with self.lock:
            return next((fault for fault in self.faults if fault.hits(request)), None)

    def serve(self, name: str, folder: Path) -> Repository:
        """A repository with the files of a folder, safetensors as large ones."""
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        made = self.repositories[name] = Repository(private=False)
        made.branches["main"] = made.add(
            {key: Blob(path.read_bytes(), path.suffix == ".safetensors") for key, path in files.items()}, name
        )
        return made

    def find(self, oid: str) -> bytes:
        """A large file, whether it was sent or was there from the beginning."""
        with self.lock:
            if oid in self.large:
                return self.large[oid]
            commits = [files for one in self.repositories.values() for files in one.commits.values()]
        return next(b.content for files in commits for b in files.values() if b.large and b.sha256 == oid)

    def complete(self, name: str, wanted: dict[str, bytes], revision: str = "main") -> bool:
        """Whether a repository holds those files, to the byte, beside what it began with."""
        found = {path: blob.content for path, blob in self.repositories[name].files(revision).items()}
        first = {".gitattributes": found.get(".gitattributes", b"")}
        return found == first | wanted

    def half_made(self, name: str, wanted: dict[str, bytes]) -> list[str]:
        """Commits after the first that hold less, or something else."""
        repository = self.repositories.get(name)
        return [commit for commit in (repository.log if repository else []) if not self.complete(name, wanted, commit)]

    def keep(self, oid: str, content: bytes) -> bool:
        """Keeps a large file, if it is what its name says."""
        with self.lock:
            if hashlib.sha256(content).hexdigest() != oid:
                return False
            self.large[oid] = content
            self.stored[oid] += 1
            return True
