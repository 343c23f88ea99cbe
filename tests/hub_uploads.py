"""A server on this machine that speaks the Hub's API over HTTP: repositories are made, written, listed and read."""

import base64
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

from tests import hub_large as large
from tests.hub_request import Answer, Handler, RefusedError, as_json, in_part
from tests.hub_store import GIT_BYTES, Blob, Files, Repository, Store


def _whoami(on: Handler, _body: bytes) -> Answer:
    if not on.authorized():
        raise RefusedError(401, message="Invalid username or password.")
    return as_json({"type": "user", "name": "tester", "orgs": [{"name": "org"}]})


def _harnesses(_on: Handler, _body: bytes) -> Answer:
    """What the client asks for once a day, to say which program it runs in."""
    return as_json({"standardEnvVars": [], "harnesses": {}})


def _create(on: Handler, body: bytes) -> Answer:
    wanted = json.loads(body)
    name = f"{wanted['organization']}/{wanted['name']}"
    if not on.authorized():
        raise RefusedError(401, message="Invalid username or password.")
    if not re.fullmatch(on.store.writable, name):
        raise RefusedError(403, message=f"You don't have the rights to create a model under {wanted['organization']}")
    with on.store.lock:
        if name in on.store.repositories:
            raise RefusedError(409, message="You already created this model repo")
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        on.store.repositories[name] = Repository(private)
    return as_json({"url": f"{on.store.url}/{name}"})


def _info(on: Handler, name: str, revision: str | bytes, _body: bytes = b"") -> Answer:
    repository = on.repository(name)
    commit = on.revision(repository, revision if isinstance(revision, str) else "main")
    sizes = "blobs" in on.query
    files = repository.files(commit).items()
    names = [blob.sibling(path) if sizes else {"rfilename": path} for path, blob in files]
    return as_json({"id": name, "sha": commit, "private": repository.private, "siblings": names, "tags": []})


def _tree(on: Handler, name: str, revision: str, _body: bytes) -> Answer:
    repository = on.repository(name)
    files = repository.files(on.revision(repository, revision))
    return as_json([blob.entry(path) for path, blob in sorted(files.items())])


def _folder(on: Handler, name: str, revision: str, folder: str, _body: bytes) -> Answer:
    repository = on.repository(name)
    files = repository.files(on.revision(repository, revision))
    inside = {path: blob for path, blob in sorted(files.items()) if path.startswith(f"{folder}/")}
    if not inside:
        raise RefusedError(404, "EntryNotFound", "no such folder")
    return as_json([blob.entry(path) for path, blob in inside.items()])


def _branch(on: Handler, name: str, branch: str, body: bytes) -> Answer:
    repository = on.repository(name, write=True)
    if branch in repository.branches:
        raise RefusedError(409, message="Reference already exists")
    repository.branches[branch] = on.revision(repository, json.loads(body or b"{}").get("startingPoint", "main"))
    return as_json({})


def _remove_branch(on: Handler, name: str, branch: str, _body: bytes) -> Answer:
    repository = on.repository(name, write=True)
    if branch == "main":
        raise RefusedError(403, message="Cannot delete the main branch")
    if repository.branches.pop(branch, None) is None:
        raise RefusedError(404, message="Reference does not exist")
    return as_json({})


def _paths(on: Handler, name: str, revision: str, body: bytes) -> Answer:
    """Of the paths that are asked for, as a form, those that are there."""
    repository = on.repository(name)
    files = repository.files(on.revision(repository, revision))
    asked = parse_qs(body.decode()).get("paths", [])
    return as_json([files[path].entry(path) for path in asked if path in files])


def _preupload(on: Handler, name: str, revision: str, body: bytes) -> Answer:
    repository = on.repository(name, write="create_pr" not in on.query)
    there = repository.files(on.revision(repository, revision))
    answers = []
    for file in json.loads(body)["files"]:
        path, old = file["path"], there.get(file["path"])
        big = path.endswith(".safetensors") or file["size"] > GIT_BYTES
        ignored = bool(re.fullmatch(on.store.ignored, path))
        answer = {"path": path, "uploadMode": "lfs" if big else "regular", "shouldIgnore": ignored}
        answers.append(answer | ({"oid": old.sha256 if old.large else old.git_sha1} if old else {}))
    return as_json({"files": answers})


def _commit(on: Handler, name: str, branch: str, body: bytes) -> Answer:
    pull = "create_pr" in on.query
    repository = on.repository(name, write=not pull)
    head, *lines = (json.loads(line) for line in body.splitlines())
    with on.store.lock:
        on.revision(repository, branch)
        if head["value"].get("parentCommit", repository.branches[branch]) != repository.branches[branch]:
            raise RefusedError(412, message="A commit has happened since")
        files = dict(repository.files(branch))
        for line in lines:
            _apply(on.store, files, line["key"], line["value"])
        made = repository.commit(branch, files, pull)
    answer = {"commitUrl": f"{on.store.url}/{name}/commit/{made}", "commitOid": made}
    return as_json(
        answer | ({"pullRequestUrl": f"{on.store.url}/{name}/discussions/{repository.pulls}"} if pull else {})
    )


def _apply(store: Store, files: Files, key: str, value: dict[str, Any]) -> None:
    path = value["path"]
    if key == "file":
        files[path] = Blob(base64.b64decode(value["content"]), False)
    elif key == "lfsFile":
        if value["oid"] not in store.large:
            raise RefusedError(400, message=f"{path} was not uploaded")
        files[path] = Blob(store.large[value["oid"]], True)
    elif key == "deletedFile":
        files.pop(path)
    else:
        raise RefusedError(400, message=f"unknown operation {key}")


def _validate(_on: Handler, body: bytes) -> Answer:
    bad = "license: nonsense" in json.loads(body)["content"]
    errors = [{"message": '"license" must be one of …'}] if bad else []
    return as_json({"errors": errors, "warnings": []}, 400 if bad else 200)


def _resolve(on: Handler, name: str, revision: str, path: str, _body: bytes) -> Answer:
    repository = on.repository(name)
    commit = on.revision(repository, revision)
    blob = repository.files(commit).get(path)
    if blob is None:
        raise RefusedError(404, "EntryNotFound", "Entry not found")
    if blob.large:
        return large.redirected(on, blob, commit)
    return in_part(on, blob.content, {"ETag": f'"{blob.git_sha1}"', "X-Repo-Commit": commit})


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: dict[str, Callable[..., Answer]] = {
    r"GET /api/whoami-v2": _whoami,
    r"GET /api/agent-harnesses": _harnesses,
    r"POST /api/repos/create": _create,
    r"POST /api/validate-yaml": _validate,
    rf"GET /api/models/{NAME}": _info,
    rf"GET /api/models/{NAME}/revision/([^/]+)": _info,
    rf"GET /api/models/{NAME}/tree/([^/]+)/?": _tree,
    rf"GET /api/models/{NAME}/tree/([^/]+)/(.+)": _folder,
    rf"POST /api/models/{NAME}/branch/([^/]+)": _branch,
    rf"DELETE /api/models/{NAME}/branch/([^/]+)": _remove_branch,
    rf"POST /api/models/{NAME}/paths-info/([^/]+)": _paths,
    rf"POST /api/models/{NAME}/preupload/([^/]+)": _preupload,
    rf"POST /api/models/{NAME}/commit/([^/]+)": _commit,
    rf"POST /{NAME}\.git/info/lfs/objects/batch": large.batch,
    r"PUT /lfs/([0-9a-f]+)": large.put,
    r"PUT /part/([0-9a-f]+)/(\d+)": large.put_part,
    r"GET|HEAD /cdn/([0-9a-f]+)": large.get,
    r"POST /complete/([0-9a-f]+)": large.complete,
    rf"POST /verify/{NAME}": large.verify,
    rf"GET /api/models/{NAME}/xet-write-token/([^/]+)": large.xet_token,
    r"POST /cas/v1/xorbs/default/([0-9a-f]+)": large.xorb,
    r"POST /cas/v1/shards": large.shard,
    rf"GET|HEAD /{NAME}/resolve/([^/]+)/(.+)": _resolve,
}


@contextmanager
def uploads() -> Iterator[Store]:
    """Serves an empty Hub on a port of the loopback interface."""
    store = Store()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Served", (Handler,), {"store": store, "routes": ROUTES}))
    store.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
