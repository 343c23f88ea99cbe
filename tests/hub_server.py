"""A local server that speaks as much of the Hub's API as fetching a model takes, and remembers what was read."""

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

BLOCK = 1 << 16
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """One model repository served from a folder.

    Attributes:
        sent: bytes of each file that went out.
        status: answered instead of everything, where not 200.
        commit: what branches stand for, with the files in `folder`. `commits`: folders of other commits.
        small: names of safetensors files that are not stored as large ones.
        cuts: by file, after how many bytes the next answers end with the connection.
        faults: by file, what the next requests for it are answered with.
        altered: files whose last byte goes out as another one.
        ranges: whether parts of files are sent where they are asked for. `tokens`: that came with requests.
        seen: asked with every block that goes out, by the file's name; may raise to cut the connection.
    """

    model_id: str
    folder: Path
    url: str = ""
    status: int = 200
    sent: Counter[str] = field(default_factory=Counter)
    commit: str = COMMIT
    commits: dict[str, Path] = field(default_factory=dict)
    small: set[str] = field(default_factory=set)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    faults: dict[str, list[int]] = field(default_factory=dict)
    altered: set[str] = field(default_factory=set)
    ranges: bool = True
    seen: Callable[[str], None] = lambda _: None
    tokens: set[str] = field(default_factory=set)

    def at(self, revision: str | None) -> "Hub":
        """The repository as it is at a commit of its own; else at what branches stand for."""
        return replace(self, folder=self.commits[revision], commit=revision) if revision in self.commits else self

    def entry(self, path: Path) -> dict[str, Any]:
        """A file as the API lists it."""
        content = path.read_bytes()
        name = path.relative_to(self.folder).as_posix()
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def sibling(self, path: Path) -> dict[str, Any]:
        """A file as the API lists it with `blobs`."""
        content, name = path.read_bytes(), path.relative_to(self.folder).as_posix()
        blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        found = {"rfilename": name, "size": len(content), "blobId": blob}
        if path.suffix == ".safetensors" and name not in self.small:
            digest = hashlib.sha256(content).hexdigest()
            found["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
        return found

    def files(self) -> list[Path]:
        """Every file of the repository."""
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer in two pieces waits 40 ms

    def log_message(self, *_args: Any) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length", 0))
        wanted = json.loads(self.rfile.read(length) or b"{}").get("paths", [])
        entries = [self.hub.entry(path) for path in self.hub.files()]
        self._json([entry for entry in entries if entry["path"] in wanted])

    def _answer(self, body: bool) -> None:
        path, hub = unquote(urlsplit(self.path).path), self.hub
        hub.tokens.add(self.headers.get("authorization", "").removeprefix("Bearer "))
        if hub.status != 200:
            self._send(hub.status, b"{}", body, {"X-Error-Code": "GatedRepo" if hub.status == 403 else "RepoNotFound"})
        elif found := re.fullmatch(rf"/{hub.model_id}/resolve/([^/]+)/(.+)", path):
            self._file(hub.at(found[1]), found[2], body)
        elif found := re.fullmatch(rf"/api/models/{hub.model_id}(?:/revision/([^/]+))?", path):
            there = hub.at(found[1])
            files = [there.sibling(entry) for entry in there.files()]
            self._json({"id": hub.model_id, "sha": there.commit, "siblings": files, "tags": []})
        elif found := re.fullmatch(rf"/api/models/{hub.model_id}/tree/([^/]+)/?.*", path):
            there = hub.at(found[1])
            self._json([there.entry(entry) for entry in there.files()])
        else:
            self._send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})

    def _file(self, there: Hub, name: str, body: bool) -> None:
        path = there.folder / name
        if not path.is_file():
            self._send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
            return
        if self.hub.faults.get(path.name):
            self._send(self.hub.faults[path.name].pop(0), b"{}", body, {"X-Error-Code": "Fault"})
            return
        content = path.read_bytes()
        digest = hashlib.sha1(content).hexdigest()
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": there.commit, "Accept-Ranges": "bytes"}
        if path.name in self.hub.altered:
            content = content[:-1] + bytes([content[-1] ^ 1])
        status, asked = 200, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        if asked and self.hub.ranges:
            first, last = int(asked[1]), int(asked[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
            status, content = 206, content[first : last + 1]
        self._send(status, b"", False, {**headers, "Content-Length": str(len(content))})
        if body:
            self._blocks(path.name, content)

    def _blocks(self, name: str, content: bytes) -> None:
        """The body, as far as the connection is not to be cut."""
        cuts = self.hub.cuts.get(name)
        end = cuts.pop(0) if cuts else len(content)
        try:
            for start in range(0, min(end, len(content)), BLOCK):
                block = content[start : min(end, start + BLOCK)]
                self.hub.seen(name)
                self.wfile.write(block)
                self.hub.sent[name] += len(block)
        except OSError:
            end = -1
        if end < len(content):
            self.close_connection = True
            self.connection.close()

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), True, {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@contextmanager
def serving(model_id: str, folder: Path) -> Iterator[Hub]:
    """Serves the folder as a model repository on a port of the loopback interface."""
    hub = Hub(model_id, folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
