"""In one go: the converted SmolLM2 is pushed to a Hub, and what stacks pull from there answers as what was pushed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.commandline import snapshot
from tests.hub.conftest import settings
from tests.hub_store import Store
from tests.hub_uploads import uploads
from tests.stacks.asking import Agreement, Answers, Questions, agreement, ask
from tests.stacks.conftest import PULLED, effort, needed, share
from tests.stacks.stacks import EVERYTHING, LLAMA_CPP, REFERENCE, VLLM_SERVER, Stack, to_gguf

NAME = "org/answering"
Recorder = Callable[[str, object], None]

pytestmark = pytest.mark.skipif(not EVERYTHING, reason="`make stacks` runs it")


@dataclass(frozen=True)
class Shelf:
    """A Hub that holds the converted model alone.

    Attributes:
        weights: their size in bytes.
    """

    hub: Store
    weights: int


@pytest.fixture(scope="module")
def shelf(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    """After `abliterate push` in a process of its own; the repository is private, so that fetching takes the token."""
    with uploads() as hub:
        words = [sys.executable, "-m", "abliterate", "push", str(converted), NAME, "--json"]
        environment = settings(hub, tmp_path_factory.mktemp("pushing"))
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["private"] is True and hub.complete(NAME, snapshot(converted))
        yield Shelf(hub, sum(path.stat().st_size for path in converted.glob("model*.safetensors")))


@pytest.fixture(scope="module")
def expected(converted: Path, asked: Questions) -> Answers:
    """Of transformers in float32, on the folder that was pushed."""
    return ask(REFERENCE, converted, asked.harmless)


@pytest.mark.parametrize("stack", [REFERENCE, VLLM_SERVER, LLAMA_CPP], ids=str)
def test_what_was_pulled_answers_as_the_files_do(
    stack: Stack, shelf: Shelf, expected: Answers, asked: Questions, tmp_path: Path, record_property: Recorder
) -> None:
    needed(stack)
    hub = shelf.hub
    hub.seen.clear()
    hub.unknown.clear()
    hub.sent = 0
    found = pulled(stack, reaching(hub, tmp_path / "home"), asked.harmless, tmp_path)
    alike = agreement(found, expected)
    record_property(PULLED, row(stack, hub, alike, found))
    assert found.knows and found.prompt_tokens == tuple(map(len, asked.harmless.prompts))
    count, least = stack.near
    assert alike.first(count) >= least, alike
    # it had nothing of the model before, and asked for nothing that this Hub cannot answer
    assert hub.sent >= shelf.weights and hub.unknown == []


def reaching(hub: Store, home: Path) -> dict[str, str]:
    """Variables for a process that knows this Hub alone, and has nothing of it yet."""
    given = settings(hub, home)
    own = {name: given[name] for name in ("HF_ENDPOINT", "HF_HOME", "HF_TOKEN", "HF_HUB_OFFLINE")}
    return own | {"HF_HUB_DISABLE_UPDATE_CHECK": "1"}


def pulled(stack: Stack, home: Mapping[str, str], asked: Questions, work: Path) -> Answers:
    """By its name; llama.cpp, whose converter takes folders, from what `hf download` fetched."""
    if stack is not LLAMA_CPP:
        return ask(stack, NAME, asked, home)
    words = [str(Path(sys.executable).with_name("hf")), "download", NAME, "--quiet"]
    done = subprocess.run(words, env={**os.environ, **home}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ask(stack, to_gguf(stack, Path(done.stdout.strip()), work), asked)


def row(stack: Stack, hub: Store, alike: Agreement, found: Answers) -> dict[str, str]:
    """For the table."""
    return {
        "stack": stack.name,
        "weights": stack.form,
        "requests": str(len(hub.seen)),
        "fetched": f"{hub.sent / 2**20:.0f} MiB",
        "same first token": share(alike, 1),
        "same first 16": share(alike, 16),
        "leading tokens": f"{alike.mean:.1f}",
        **effort(found),
    }
