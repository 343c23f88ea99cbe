"""A converted pico model, and a Hub on this machine that this process takes for the real one."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from abliterate.conversion import convert
from tests import pico
from tests.hub_store import Store
from tests.hub_uploads import uploads


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    room = tmp_path_factory.mktemp("hub")
    base = pico.save(room / "base", "llama", tied=True, shards=3, tokenizer=True)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    direction = pico.direction_file(room / "r.safetensors")
    return convert(str(base), room / "out", direction=direction, evaluate=False).folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The Hub."""
    with uploads() as store:
        reach(store, monkeypatch)
        yield store


def reach(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process takes it for the real one, and sends without Xet, which the server does not speak."""
    monkeypatch.setattr(constants, "ENDPOINT", store.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", store.token)


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been waited."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


def settings(store: Store, cache: Path) -> dict[str, str]:
    """The environment of a process of its own."""
    own = {"HF_ENDPOINT": store.url, "HF_HOME": str(cache), "HF_TOKEN": store.token, "HF_HUB_OFFLINE": "0"}
    return {**os.environ, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(Path(__file__).parents[2]), **own}
