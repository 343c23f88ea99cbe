"""The judge over HTTP, against a server in this process: what is sent and understood, and how failures are told."""

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from abliterate.errors import EvaluationError
from abliterate.evaluation.endpoint import EndpointJudge
from abliterate.evaluation.judge import Exchange
from abliterate.judging import parse_judge, summon
from abliterate.subject import RunOptions

KEY = "sk-secret-123"
Answer = Callable[[dict[str, Any]], tuple[int, Any]]


class Server(ThreadingHTTPServer):
    """Answers as the test says, and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer: Answer = lambda body: (200, completion("no"))
        self.seen: list[tuple[str, dict[str, str], dict[str, Any]]] = []

    def handle_error(self, *_: Any) -> None:
        """Who asked has gone."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, dict(self.headers), body))
        code, content = self.server.answer(body)
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        if 300 <= code < 400:
            self.send_header("Location", "http://127.0.0.1:1/elsewhere")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST  # noqa: N815

    def log_message(self, *_: Any) -> None:
        """Silence."""


def completion(text: str | None) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def judge(server: Server, **settings: Any) -> EndpointJudge:
    return EndpointJudge(server.address, "org/model", **{"key": KEY, "wait": 0.01, **settings})


def test_every_exchange_is_asked_and_its_answer_comes_back_in_order(server: Server) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        number = int(body["messages"][0]["content"].split("<request>\nrequest ")[1].split("\n")[0])
        time.sleep(0.02 * (number % 3))
        return 200, completion("Yes." if number % 2 else "no")

    server.answer = answer
    found = judge(server).refusals([Exchange(f"request {i}", f"answer {i}") for i in range(9)])
    assert found == [bool(i % 2) for i in range(9)] and len(server.seen) == 9
    path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert body["model"] == "org/model" and body["temperature"] == 0
    assert "<answer>\nanswer " in body["messages"][0]["content"]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("yes", True), (" **No**, it helps.", False), ("YES\n", True), ("<think>no, yes</think>\nNo", False),
        ("I can't judge this.", None), ("nothing", None), ("yesterday", None), ("", None), (None, None),
    ],
)  # fmt: skip
def test_what_is_understood(server: Server, text: str | None, verdict: bool | None) -> None:
    server.answer = lambda body: (200, completion(text))
    assert judge(server).refusals([Exchange("a", "b")]) == [verdict]


def test_a_local_server_is_asked_past_any_proxy(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert judge(server).refusals([Exchange("a", "b")]) == [False]


def test_without_a_key_none_is_sent(server: Server) -> None:
    judge(server, key=None).check()
    assert "Authorization" not in server.seen[0][1]


def test_the_key_comes_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    made = summon(parse_judge(f"{server.address}#m"), RunOptions(), ExitStack())()
    assert server.seen[0][1]["Authorization"] == f"Bearer {KEY}", "asked once, before anything else"
    assert made.name == "m at 127.0.0.1" and KEY not in repr(made)
    monkeypatch.setenv("OPENAI_API_KEY", "")
    summon(parse_judge(f"{server.address}#m"), RunOptions(), ExitStack())
    assert "Authorization" not in server.seen[1][1]


@pytest.mark.parametrize(
    ("code", "content", "message"),
    [
        (401, {"error": {"message": f"wrong key {KEY}"}}, "401 .*: wrong key …; set OPENAI_API_KEY"),
        (404, b"<html>", "cannot be asked: 404 "),
        (400, {"error": "odd"}, "cannot be asked: 400 "),
        (302, b"", "cannot be asked: 302 "),
        (200, b"<html>", "no chat completion"),
        (200, {"choices": []}, "no chat completion"),
        (200, [1], "no chat completion"),
        (200, {"choices": [{"message": {"content": 5}}]}, "no chat completion"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_one_line_without_the_key(
    server: Server, caplog: pytest.LogCaptureFixture, code: int, content: Any, message: str
) -> None:
    caplog.set_level(logging.DEBUG)
    server.answer = lambda body: (code, content)
    with pytest.raises(EvaluationError, match=message) as caught:
        judge(server).refusals([Exchange("a", "b")])
    said = f"{caught.value} {caught.value!r} {caught.value.args} {caplog.text}"
    assert KEY not in said and "\n" not in str(caught.value) and len(server.seen) == 1


def test_what_may_pass_is_tried_again(server: Server) -> None:
    codes = iter([500, 429, 200])
    server.answer = lambda body: (next(codes), completion("yes"))
    assert judge(server).refusals([Exchange("a", "b")]) == [True] and len(server.seen) == 3
    server.answer = lambda body: (503, {"error": {"message": "busy\nnow"}})
    with pytest.raises(EvaluationError, match=r"503 .*: busy now"):
        judge(server, tries=2).check()
    assert len(server.seen) == 5


def test_a_server_that_does_not_answer(server: Server) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(0.5)
        return 200, completion("yes")

    server.answer = answer
    start = time.monotonic()
    with pytest.raises(EvaluationError, match=r"cannot be asked: (The read operation )?timed out"):
        judge(server, timeout=0.05, tries=2).check()
    assert time.monotonic() - start < 0.45


def test_what_is_no_http(server: Server) -> None:
    """A status line that nobody understands, and a body that ends early."""
    for broken in (b"odd\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"):
        with socket.create_server(("127.0.0.1", 0)) as listening:
            address = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
            thread = threading.Thread(target=_reply, args=(listening, broken))
            thread.start()
            with pytest.raises(EvaluationError, match="the judge m at"):
                EndpointJudge(address, "m", tries=1).check()
            thread.join()


def _reply(listening: socket.socket, content: bytes) -> None:
    connection, _ = listening.accept()
    with connection:
        connection.recv(65536)
        connection.sendall(content)


def test_no_server() -> None:
    with pytest.raises(EvaluationError, match=r"the judge m at 127\.0\.0\.1 cannot be asked: .*refused"):
        EndpointJudge("http://127.0.0.1:9", "m", tries=1).check()


def test_one_failure_ends_the_questions(server: Server) -> None:
    server.answer = lambda body: (400, {"error": {"message": "no"}})
    with pytest.raises(EvaluationError, match="400"):
        judge(server).refusals([Exchange("a", "b")] * 200)
    assert len(server.seen) < 100


def test_a_key_in_the_open_is_told(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    judge(server).check()
    assert "unencrypted" not in caplog.text
    far = EndpointJudge("http://judge.invalid/v1", "m", KEY, tries=1, timeout=0.5)
    with pytest.raises(EvaluationError, match=r"m at judge\.invalid cannot be asked"):
        far.check()
    assert "sent unencrypted" in caplog.text and KEY not in caplog.text
