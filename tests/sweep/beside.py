"""The gradient probe beside the table: both have to find the same writers, with the same axes and gains."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import abliterate
from abliterate import Plan
from abliterate.architecture.table import Table, load_table
from abliterate.errors import AbliterateError
from tests.sweep.twins import Case, save_twin


@dataclass(frozen=True)
class Beside:
    """What the probe finds, beside the table.

    Attributes:
        differences: writers that only one of them has, or that they have otherwise.
        refused: why the probe has nothing to say; empty where it has.
    """

    name: str
    differences: tuple[str, ...] = ()
    refused: str = ""


def beside_table(case: Case, seed: int = 0) -> Beside:
    """Plans one twin by the table, and once more with its entry hidden."""
    with tempfile.TemporaryDirectory() as place:
        twin = save_twin(case, Path(place) / "twin", seed)
        known = abliterate.plan(str(twin))
        hidden = [family for family in load_table().families if known.model_type not in family.types]
        try:
            with mock.patch("abliterate.architecture.entry.load_table", lambda: Table(hidden)):
                found = abliterate.plan(str(twin))
        except AbliterateError as error:
            return Beside(case.name, refused=str(error))
    assert found.probed and not known.probed
    return Beside(case.name, tuple(sorted(_writers(known) ^ _writers(found))))


def _writers(plan: Plan) -> set[str]:
    return {f"{writer.tensor}, axis {writer.axis}, gain {writer.gain}" for writer in plan.writers}
