"""Requests to the tests' Hub: bodies, tokens and faults; what is answered is found in a table of routes."""

import json
import re
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_store import Fault, Repository, Store

BLOCK = 1 << 14
Answer = tuple[int, bytes, dict[str, str]]


class GoneError(Exception):
    """The connection is cut."""


class RefusedError(Exception):
    """Another answer than what was asked for."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Handler(BaseHTTPRequestHandler):
    store: Store
    routes: Mapping[str, Callable[..., Answer]]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer in two pieces waits 40 ms

    def log_message(self, *_args: Any) -> None:
        """Says nothing."""

    def handle_one_request(self) -> None:
        with suppress(ConnectionError, GoneError, TimeoutError):
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

    def do_DELETE(self) -> None:
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
        except RefusedError as no:
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
                raise GoneError
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
        raise GoneError

    def _route(self, path: str, body: bytes, lost: bool) -> None:
        for pattern, method in self.routes.items():
            verb, _, form = pattern.partition(" ")
            found = re.fullmatch(form, path)
            if found and self.command in verb.split("|"):
                answer = method(self, *map(unquote, found.groups()), body)
                if lost:
                    self._hang_up()
                self._send(*answer)
                return
        self.store.unknown.append(f"{self.command} {path}")
        raise RefusedError(404, message="no such page")

    def _send(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def authorized(self) -> bool:
        given = self.headers.get("authorization")
        if given is not None and given != f"Bearer {self.store.token}":
            raise RefusedError(401, message="Invalid credentials in Authorization header")
        return given is not None

    def repository(self, name: str, write: bool = False) -> Repository:
        """What may be read, or written, with the token that came."""
        known, found = self.authorized(), self.store.repositories.get(name)
        if found is None or (found.private and not known):
            raise RefusedError(404 if known else 401, "RepoNotFound", "Repository not found")
        if write and not (known and re.fullmatch(self.store.writable, name)):
            raise RefusedError(403, message="You don't have the rights")
        return found

    def revision(self, repository: Repository, revision: str) -> str:
        commit = repository.resolve(revision)
        if commit is None:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit


def as_json(value: Any, status: int = 200, **headers: str) -> Answer:
    return status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers}


def in_part(on: Handler, content: bytes, headers: dict[str, str]) -> Answer:
    """A file, or as much of it as was asked for."""
    headers = {**headers, "Accept-Ranges": "bytes"}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", on.headers.get("range", ""))
    if not asked:
        return 200, content, headers
    first, last = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
    headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
    return 206, content[first : last + 1], headers
