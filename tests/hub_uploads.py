"""A server on this machine that speaks the Hub's API over HTTP: repositories are made, written, listed and read."""

import base64
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import ceil
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_store import GIT_BYTES, Blob, Fault, Files, Repository, Store

BLOCK = 1 << 14


class _GoneError(Exception):
    """The connection is cut."""


class _RefusedError(Exception):
    """Another answer than what was asked for."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    store: Store
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args: Any) -> None:
        """Says nothing."""

    def handle_one_request(self) -> None:
        with suppress(ConnectionError, _GoneError, TimeoutError):
            super().handle_one_request()
            return
        self.close_connection = True

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        path, self.query = parts.path, parse_qs(parts.query)
        request = f"{self.command} {unquote(path)}"
        with self.store.lock:
            self.store.seen.append(request)
        fault = self.store.fault(request)
        try:
            body = self._body(fault)
            if fault is not None and fault.status:
                self._send(fault.status, fault.body, fault.headers)
                return
            self._route(path, body, lost=fault is not None and fault.late)
        except _RefusedError as no:
            headers = {"X-Error-Code": no.code, "X-Error-Message": no.message}
            self._send(no.status, json.dumps({"error": no.message}).encode(), {k: v for k, v in headers.items() if v})

    def _body(self, fault: Fault | None) -> bytes:
        if self.headers.get("transfer-encoding") == "chunked":
            return self._chunks()
        left, large = int(self.headers.get("content-length", 0)), self.command == "PUT"
        cut = fault.cut if fault is not None and not fault.status and not fault.late else None
        content = bytearray()
        while len(content) < left:
            block = self.rfile.read(min(BLOCK, left - len(content)))
            if not block:
                raise _GoneError
            content += block
            if large:
                self.store.pace.wait(self.store.slow)
                with self.store.lock:
                    self.store.received += len(block)
            if cut is not None and len(content) >= cut:
                break
        if cut is not None:
            self._hang_up()
        return bytes(content)

    def _chunks(self) -> bytes:
        """A body of unknown length."""
        content = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _hang_up(self) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)
        raise _GoneError

    def _route(self, path: str, body: bytes, lost: bool) -> None:
        for pattern, method in ROUTES.items():
            verb, _, form = pattern.partition(" ")
            found = re.fullmatch(form, path)
            if found and self.command in verb.split("|"):
                answer = method(self, *map(unquote, found.groups()), body)
                if lost:
                    self._hang_up()
                self._send(*answer)
                return
        raise _RefusedError(404, message="no such page")

    def _send(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _authorized(self) -> bool:
        given = self.headers.get("authorization")
        if given is not None and given != f"Bearer {self.store.token}":
            raise _RefusedError(401, message="Invalid credentials in Authorization header")
        return given is not None

    def repository(self, name: str, write: bool = False) -> Repository:
        """What may be read, or written, with the token that came."""
        known, found = self._authorized(), self.store.repositories.get(name)
        if found is None or (found.private and not known):
            raise _RefusedError(404 if known else 401, "RepoNotFound", "Repository not found")
        if write and not (known and re.fullmatch(self.store.writable, name)):
            raise _RefusedError(403, message="You don't have the rights")
        return found

    def revision(self, repository: Repository, revision: str) -> str:
        commit = repository.resolve(revision)
        if commit is None:
            raise _RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit


Answer = tuple[int, bytes, dict[str, str]]


def _json(value: Any, status: int = 200, **headers: str) -> Answer:
    return status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers}


def _whoami(on: _Handler, _body: bytes) -> Answer:
    if not on._authorized():
        raise _RefusedError(401, message="Invalid username or password.")
    return _json({"type": "user", "name": "tester", "orgs": [{"name": "org"}]})


def _create(on: _Handler, body: bytes) -> Answer:
    wanted = json.loads(body)
    name = f"{wanted['organization']}/{wanted['name']}"
    if not on._authorized():
        raise _RefusedError(401, message="Invalid username or password.")
    if not re.fullmatch(on.store.writable, name):
        raise _RefusedError(403, message=f"You don't have the rights to create a model under {wanted['organization']}")
    with on.store.lock:
        if name in on.store.repositories:
            raise _RefusedError(409, message="You already created this model repo")
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        on.store.repositories[name] = Repository(private)
    return _json({"url": f"{on.store.url}/{name}"})


def _info(on: _Handler, name: str, revision: str | bytes, _body: bytes = b"") -> Answer:
    repository = on.repository(name)
    commit = on.revision(repository, revision if isinstance(revision, str) else "main")
    names = [{"rfilename": path} for path in repository.files(commit)]
    return _json({"id": name, "sha": commit, "private": repository.private, "siblings": names, "tags": []})


def _tree(on: _Handler, name: str, revision: str, _body: bytes) -> Answer:
    repository = on.repository(name)
    files = repository.files(on.revision(repository, revision))
    return _json([blob.entry(path) for path, blob in sorted(files.items())])


def _folder(on: _Handler, name: str, revision: str, folder: str, _body: bytes) -> Answer:
    repository = on.repository(name)
    files = repository.files(on.revision(repository, revision))
    inside = {path: blob for path, blob in sorted(files.items()) if path.startswith(f"{folder}/")}
    if not inside:
        raise _RefusedError(404, "EntryNotFound", "no such folder")
    return _json([blob.entry(path) for path, blob in inside.items()])


def _branch(on: _Handler, name: str, branch: str, body: bytes) -> Answer:
    repository = on.repository(name, write=True)
    if branch in repository.branches:
        raise _RefusedError(409, message="Reference already exists")
    repository.branches[branch] = on.revision(repository, json.loads(body or b"{}").get("startingPoint", "main"))
    return _json({})


def _preupload(on: _Handler, name: str, revision: str, body: bytes) -> Answer:
    repository = on.repository(name, write="create_pr" not in on.query)
    there = repository.files(on.revision(repository, revision))
    answers = []
    for file in json.loads(body)["files"]:
        path, old = file["path"], there.get(file["path"])
        large = path.endswith(".safetensors") or file["size"] > GIT_BYTES
        ignored = bool(re.fullmatch(on.store.ignored, path))
        answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": ignored}
        answers.append(answer | ({"oid": old.sha256 if old.large else old.git_sha1} if old else {}))
    return _json({"files": answers})


def _batch(on: _Handler, name: str, body: bytes) -> Answer:
    on.repository(name)
    asked, store = json.loads(body), on.store
    objects = []
    for item in asked["objects"]:
        oid, size = item["oid"], item["size"]
        if oid not in store.large:
            upload: dict[str, Any] = {"href": f"{store.url}/lfs/{oid}?signature=s3cr3t"}
            if store.part_bytes and size > store.part_bytes:
                numbers = range(1, ceil(size / store.part_bytes) + 1)
                urls = {str(number): f"{store.url}/part/{oid}/{number}" for number in numbers}
                upload = {
                    "href": f"{store.url}/complete/{oid}",
                    "header": {"chunk_size": str(store.part_bytes), **urls},
                }
            item["actions"] = {"upload": upload, "verify": {"href": f"{store.url}/verify/{name}"}}
        objects.append(item)
    return _json({"transfer": "basic", "objects": objects})


def _put(on: _Handler, oid: str, body: bytes) -> Answer:
    return (200, b"", {}) if on.store.keep(oid, body) else _json({"error": "not what its name says"}, 400)


def _put_part(on: _Handler, oid: str, number: str, body: bytes) -> Answer:
    with on.store.lock:
        on.store.parts.setdefault(oid, {})[int(number)] = body
    return 200, b"", {"ETag": f'"{number}"'}


def _complete(on: _Handler, oid: str, body: bytes) -> Answer:
    wanted = [part["partNumber"] for part in json.loads(body)["parts"]]
    parts = on.store.parts.pop(oid, {})
    whole = b"".join(parts.get(number, b"") for number in wanted)
    return _json({}) if on.store.keep(oid, whole) else _json({"error": "parts do not fit"}, 400)


def _verify(on: _Handler, name: str, body: bytes) -> Answer:
    on.repository(name)
    asked = json.loads(body)
    held = on.store.large.get(asked["oid"])
    return _json({}, 200 if held is not None and len(held) == asked["size"] else 404)


def _commit(on: _Handler, name: str, branch: str, body: bytes) -> Answer:
    pull = "create_pr" in on.query
    repository = on.repository(name, write=not pull)
    head, *lines = (json.loads(line) for line in body.splitlines())
    with on.store.lock:
        on.revision(repository, branch)
        if head["value"].get("parentCommit", repository.branches[branch]) != repository.branches[branch]:
            raise _RefusedError(412, message="A commit has happened since")
        files = dict(repository.files(branch))
        for line in lines:
            _apply(on.store, files, line["key"], line["value"])
        made = repository.commit(branch, files, pull)
    answer = {"commitUrl": f"{on.store.url}/{name}/commit/{made}", "commitOid": made}
    return _json(answer | ({"pullRequestUrl": f"{on.store.url}/{name}/discussions/{repository.pulls}"} if pull else {}))


def _apply(store: Store, files: Files, key: str, value: dict[str, Any]) -> None:
    path = value["path"]
    if key == "file":
        files[path] = Blob(base64.b64decode(value["content"]), False)
    elif key == "lfsFile":
        if value["oid"] not in store.large:
            raise _RefusedError(400, message=f"{path} was not uploaded")
        files[path] = Blob(store.large[value["oid"]], True)
    elif key == "deletedFile":
        files.pop(path)
    else:
        raise _RefusedError(400, message=f"unknown operation {key}")


def _validate(_on: _Handler, body: bytes) -> Answer:
    bad = "license: nonsense" in json.loads(body)["content"]
    errors = [{"message": '"license" must be one of …'}] if bad else []
    return _json({"errors": errors, "warnings": []}, 400 if bad else 200)


def _xet_token(on: _Handler, name: str, _revision: str, _body: bytes) -> Answer:
    on.repository(name, write="create_pr" not in on.query)
    end = int(time.time()) + 3600
    facts = {"casUrl": f"{on.store.url}/cas", "exp": end, "accessToken": "xet-s3cr3t"}
    headers = {"X-Xet-Cas-Url": facts["casUrl"], "X-Xet-Token-Expiration": str(end), "X-Xet-Access-Token": "xet-s3cr3t"}
    return _json(facts, 200, **headers)


def _xorb(on: _Handler, _hash: str, body: bytes) -> Answer:
    with on.store.lock:
        on.store.xorb_bytes += len(body)
    return _json({"was_inserted": True})


def _shard(on: _Handler, body: bytes) -> Answer:
    """What was sent by Xet, chunk by chunk, is put together here: known by its name, taken from what is awaited."""
    for oid, content in on.store.awaited.items():
        words = struct.pack(">4Q", *struct.unpack("<4Q", bytes.fromhex(oid)))
        if words in body and oid not in on.store.large:
            on.store.keep(oid, content)
    return _json({"result": 1})


def _resolve(on: _Handler, name: str, revision: str, path: str, _body: bytes) -> Answer:
    repository = on.repository(name)
    commit = on.revision(repository, revision)
    blob = repository.files(commit).get(path)
    if blob is None:
        raise _RefusedError(404, "EntryNotFound", "Entry not found")
    tag = blob.sha256 if blob.large else blob.git_sha1
    headers = {"ETag": f'"{tag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", on.headers.get("range", ""))
    if not asked:
        return 200, blob.content, headers
    first, last = int(asked[1]), min(int(asked[2] or len(blob.content) - 1), len(blob.content) - 1)
    headers["Content-Range"] = f"bytes {first}-{last}/{len(blob.content)}"
    return 206, blob.content[first : last + 1], headers


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: dict[str, Callable[..., Answer]] = {
    r"GET /api/whoami-v2": _whoami,
    r"POST /api/repos/create": _create,
    r"POST /api/validate-yaml": _validate,
    rf"GET /api/models/{NAME}": _info,
    rf"GET /api/models/{NAME}/revision/([^/]+)": _info,
    rf"GET /api/models/{NAME}/tree/([^/]+)/?": _tree,
    rf"GET /api/models/{NAME}/tree/([^/]+)/(.+)": _folder,
    rf"POST /api/models/{NAME}/branch/([^/]+)": _branch,
    rf"POST /api/models/{NAME}/preupload/([^/]+)": _preupload,
    rf"POST /api/models/{NAME}/commit/([^/]+)": _commit,
    rf"POST /{NAME}\.git/info/lfs/objects/batch": _batch,
    r"PUT /lfs/([0-9a-f]+)": _put,
    r"PUT /part/([0-9a-f]+)/(\d+)": _put_part,
    r"POST /complete/([0-9a-f]+)": _complete,
    rf"POST /verify/{NAME}": _verify,
    rf"GET /api/models/{NAME}/xet-write-token/([^/]+)": _xet_token,
    r"POST /cas/v1/xorbs/default/([0-9a-f]+)": _xorb,
    r"POST /cas/v1/shards": _shard,
    rf"GET|HEAD /{NAME}/resolve/([^/]+)/(.+)": _resolve,
}


@contextmanager
def uploads() -> Iterator[Store]:
    """Serves an empty Hub on a port of the loopback interface."""
    store = Store()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": store}))
    store.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
