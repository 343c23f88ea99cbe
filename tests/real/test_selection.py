"""Screening against the exhaustive search, on the test subject."""

import json
from pathlib import Path

from tests.real.support import Converted, run


def test_the_screened_pick_is_the_exhaustive_one(converted: Converted, subject: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "exhaustive.yaml"
    recipe.write_text("selection: {exhaustive: true}\n")
    done = run("direction", str(subject), "-o", str(tmp_path / "d.safetensors"), "--recipe", str(recipe), "--json")
    exhaustive = json.loads(done.stdout)["selection"]
    screened = converted.manifest["selection"]
    assert exhaustive["method"] == "exhaustive"
    assert screened["method"] == "screened"
    assert [screened["pick"][key] for key in ("position", "layer")] == [
        exhaustive["pick"][key] for key in ("position", "layer")
    ]
    assert screened["forward_passes"] <= exhaustive["forward_passes"] / 5
    assert screened["relaxed"] == exhaustive["relaxed"]
