"""Screening against the exhaustive search, on the test subject."""

import json
from pathlib import Path

from tests.real.support import Converted, run


def test_the_screened_pick_is_the_exhaustive_one(converted: Converted, subject: Path, tmp_path: Path) -> None:
    done = run("direction", str(subject), "-o", str(tmp_path / "d.safetensors"), "--exhaustive", "--json")
    exhaustive, screened = json.loads(done.stdout)["selection"], converted.manifest["selection"]
    assert (screened["method"], exhaustive["method"]) == ("screened", "exhaustive")
    places = [[found["pick"][key] for key in ("position", "layer")] for found in (screened, exhaustive)]
    assert places[0] == places[1]
    assert screened["forward_passes"] <= exhaustive["forward_passes"] / 5
    assert screened["relaxed"] == exhaustive["relaxed"]
