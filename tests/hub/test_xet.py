"""Pushes by Xet, which the Hub client prefers where hf_xet is there: in processes of their own, for its threads."""

import hashlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from abliterate.conversion import convert
from tests import pico
from tests.commandline import snapshot
from tests.hub.conftest import settings
from tests.hub_store import Fault, Store

pytest.importorskip("hf_xet")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model in files that are each sent on their own."""
    room = tmp_path_factory.mktemp("xet")
    base = pico.save(room / "base", "llama", shards=6, vocab_size=20_000, intermediate_size=4000)
    direction = pico.direction_file(room / "r.safetensors")
    return convert(str(base), room / "out", direction=direction, evaluate=False).folder


def start(folder: Path, hub: Store, cache: Path) -> "subprocess.Popen[str]":
    hub.awaited = {hashlib.sha256(content).hexdigest(): content for content in snapshot(folder).values()}
    words = [sys.executable, "-m", "abliterate", "push", str(folder), "org/name"]
    environment = settings(hub, cache) | {"HF_HUB_DISABLE_XET": "0"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, env=environment, text=True, **pipes)


def push(folder: Path, hub: Store, cache: Path) -> tuple[int, str, str]:
    with start(folder, hub, cache) as process:
        out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_what_has_arrived_is_not_sent_twice(large: Path, hub: Store, tmp_path: Path) -> None:
    code, out, err = push(large, hub, tmp_path)
    assert (code, err) == (0, "") and out.splitlines()[-1] == f"{hub.url}/org/name"
    assert hub.complete("org/name", snapshot(large)) and len(hub.repositories["org/name"].log) == 1
    assert any("/cas/v1/shards" in request for request in hub.seen) and hub.received == 0
    came = hub.xorb_bytes
    hub.repositories.clear()
    assert push(large, hub, tmp_path)[0] == 0 and hub.xorb_bytes == came
    assert hub.complete("org/name", snapshot(large))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_push_goes_on(large: Path, hub: Store, tmp_path: Path, number: signal.Signals) -> None:
    with start(large, hub, tmp_path) as process:
        while process.poll() is None and len(hub.large) < 4:
            time.sleep(0.001)
        arrived = list(hub.large)[:-1]  # of the last one, the client may not know
        process.send_signal(number)
        said = process.communicate(timeout=60)[1].strip()
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert number != signal.SIGINT or said == "interrupted: run the same command again to continue"
    assert hub.repositories["org/name"].log == []
    before = hub.xorb_bytes
    assert push(large, hub, tmp_path)[0] == 0 and hub.complete("org/name", snapshot(large))
    left = sum(len(content) for name, content in hub.large.items() if name not in arrived)
    assert hub.xorb_bytes - before <= left


def test_a_token_that_may_not_write_is_told(large: Path, hub: Store, tmp_path: Path) -> None:
    hub.faults = [Fault("/cas/v1/xorbs/", 403, times=-1)]
    code, out, err = push(large, hub, tmp_path)
    assert (code, out, err.count("\n")) == (1, "", 1) and "may not write to org/name (403)" in err
    assert "s3cr3t" not in err and hub.repositories["org/name"].log == []
