"""Checkpoints of pico models, saved once and copied for every test that changes them."""

import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests import pico
from tests.architecture.planned import Checkpoints


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Makes a copy of a family's pico model, changed as `pico.rewrite` says; `made` goes to `pico.save`."""
    models = tmp_path_factory.mktemp("models")

    @functools.cache
    def saved(family: str, made: tuple[tuple[str, Any], ...]) -> Path:
        return pico.save(Path(tempfile.mkdtemp(dir=models)) / "m", family, **dict(made))

    def make(family: str, made: dict[str, Any] | None = None, **changes: Any) -> Path:
        copy = Path(tempfile.mkdtemp(dir=models)) / "m"
        shutil.copytree(saved(family, tuple((made or {}).items())), copy)
        return pico.rewrite(copy, **changes) if changes else copy

    return make
