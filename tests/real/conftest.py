"""Real models, built once out of what packages ship, and one conversion that many tests look at."""

from pathlib import Path

import pytest

from tests.real.support import Converted, built, converted_once

FIRST = ("test_push.py", "test_gemma.py", "test_audit.py", "test_selection.py")
"""While one process makes the subject, converts it and goes on with the third of these, the other has something to do
that needs no conversion: the second and the fourth."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Real models' tests come first: they take longest, so that they are not what is left at the end."""
    for item in items:
        if Path(str(item.fspath)).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.real)
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> int:
    name = Path(str(item.fspath)).name
    if item.get_closest_marker("real") is None:
        return len(FIRST) + 1
    return FIRST.index(name) if name in FIRST else len(FIRST)


@pytest.fixture(scope="session")
def subject() -> Path:
    """The refusing SmolLM2-135M-Instruct."""
    return built("subject.py", "refusing-smollm2-135m")


@pytest.fixture(scope="session")
def original() -> Path:
    """SmolLM2-135M-Instruct, before it was taught to refuse."""
    return built("subject.py", "smollm2-135m", "--base")


@pytest.fixture(scope="session")
def over_refusing() -> Path:
    """The refusing subject, which refuses harmless requests that sound harmful too."""
    return built("subject.py", "over-refusing-smollm2-135m", "--over-refusing")


@pytest.fixture(scope="session")
def gemma() -> Path:
    """Gemma 3 270M, base: a norm stands behind every writer."""
    return built("gemma.py", "gemma-3-270m")


@pytest.fixture(scope="session")
def converted(subject: Path, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """The subject through the whole command line; see `converted_once`."""
    return converted_once(subject, tmp_path_factory)
