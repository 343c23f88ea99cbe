"""Real models, built once a session out of what packages ship, and one conversion that many tests look at."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from tests.real.support import Converted, run

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("ABLITERATE_TEST_BUILD", ROOT / "build"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Real models' tests come first: they take longest, so that they are not what is left at the end."""
    for item in items:
        if Path(str(item.fspath)).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.real)
    items.sort(key=lambda item: item.get_closest_marker("real") is None)


def _built(script: str, name: str, *options: str) -> Path:
    folder = BUILD / name
    BUILD.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILD / f".{name}.lock"):  # several processes may run tests
        words = [sys.executable, str(ROOT / "tests/models" / script), str(folder), *options]
        subprocess.run(words, check=True)
    return folder


@pytest.fixture(scope="session")
def subject() -> Path:
    """The refusing SmolLM2-135M-Instruct."""
    return _built("subject.py", "refusing-smollm2-135m")


@pytest.fixture(scope="session")
def original() -> Path:
    """SmolLM2-135M-Instruct, before it was taught to refuse."""
    return _built("subject.py", "smollm2-135m", "--base")


@pytest.fixture(scope="session")
def over_refusing() -> Path:
    """The refusing subject, which refuses harmless requests that sound harmful too."""
    return _built("subject.py", "over-refusing-smollm2-135m", "--over-refusing")


@pytest.fixture(scope="session")
def gemma() -> Path:
    """Gemma 3 270M, base: a norm stands behind every writer."""
    return _built("gemma.py", "gemma-3-270m")


@pytest.fixture(scope="session")
def converted(subject: Path, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """The subject through the whole command line, with everything at its default."""
    out = tmp_path_factory.mktemp("converted") / "answering"
    done = run("convert", str(subject), str(out), "--json")
    return Converted(out, json.loads(done.stdout))
