"""Pico models, stored and loaded again as the command does it."""

import functools

import pytest

from abliterate.calibration.model import LanguageModel
from abliterate.checkpoint.locate import Source
from abliterate.subject import RunOptions, load_model, subject_at
from tests import pico
from tests.resident import Load


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Of a family, weights resident or streamed, in float32: each made once."""

    @functools.cache
    def loaded(family: str = "llama", memory: str = "resident", batch_size: int = 3) -> LanguageModel:
        subject = subject_at(Source(pico.save(tmp_path_factory.mktemp("pico") / "m", family), None, None, None))
        return load_model(subject, RunOptions(memory=memory, batch_size=batch_size, dtype="float32"))

    return loaded
