"""Models on the Hub, through the real client and a server on this machine."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import pico
from tests.hub_server import COMMIT, Hub, serving


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    pico.save(tmp_path / "repository", "llama", shards=3, vocab_size=50_000)
    with serving("org/pico", tmp_path / "repository") as hub:
        yield hub


def run(hub: Hub, cache: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment = {**os.environ, **settings, **more}
    command = [sys.executable, "-m", "abliterate", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_a_plan_fetches_headers_and_no_weights(hub: Hub, tmp_path: Path) -> None:
    done = run(hub, tmp_path / "cache", "plan", "org/pico", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model_type"] == "llama"
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    sizes = {path.name: path.stat().st_size for path in hub.files() if path.suffix == ".safetensors"}
    largest = max(sizes, key=lambda name: sizes[name])
    assert sizes[largest] > 8 << 20
    assert 0 < hub.sent[largest] < 3 << 20


def test_a_conversion_from_the_hub_records_the_commit(hub: Hub, tmp_path: Path) -> None:
    file = pico.direction_file(tmp_path / "r.safetensors", 48, 1)
    out = tmp_path / "out"
    words = ("convert", "org/pico@main", str(out), "--direction", str(file), "--no-evaluate", "--json")
    done = run(hub, tmp_path / "cache", *words)
    assert done.returncode == 0, done.stderr
    base = json.loads(done.stdout)["base"]
    assert (base["id"], base["source"], base["revision"], base["commit"]) == ("org/pico", "hub", "main", COMMIT)
    again = run(hub, tmp_path / "cache", "plan", "org/pico@main", "--json", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(("status", "words"), [(403, "gated"), (404, "not on the Hub or private")])
def test_what_the_hub_refuses_is_said_in_one_line(hub: Hub, tmp_path: Path, status: int, words: str) -> None:
    hub.status = status
    done = run(hub, tmp_path / "cache", "plan", "org/pico", HF_TOKEN="hf_secretsecretsecret")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert words in done.stderr
    assert "secretsecret" not in done.stderr
