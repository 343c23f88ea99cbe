"""A part of the sweep, streamed beside in memory; `python -m tests.sweep --streamed` runs all of it."""

import os
from collections.abc import Mapping

import pytest

from tests.sweep.pool import each
from tests.sweep.streamed import Comparison, compare_streamed
from tests.sweep.twins import cases

CHOSEN = [name for name, case in cases().items() if case.ci and not case.refused][::3]


@pytest.fixture(scope="module")
def compared() -> Mapping[str, Comparison]:
    chosen = [cases()[name] for name in CHOSEN]
    return {found.name: found for found in each(compare_streamed, chosen, os.cpu_count() or 1)}


@pytest.mark.parametrize("name", CHOSEN)
def test_the_same_bits(name: str, compared: Mapping[str, Comparison]) -> None:
    assert compared[name].same or (compared[name].same is None and "positions cannot be told" in compared[name].said)


def test_nearly_all_can_be_compared(compared: Mapping[str, Comparison]) -> None:
    assert sum(bool(found.same) for found in compared.values()) > 0.9 * len(CHOSEN) > 30
