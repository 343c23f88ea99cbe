"""The audit of a model of which the answer is known: it refuses along one direction."""

import json
import time
from pathlib import Path

from tests.real.support import run

RECIPE = """
name: few
calibration: {train: 10, validation: 4, test: 1}
direction: {positions: 1, filter: false}
"""


def test_one_direction_carries_it(subject: Path, tmp_path: Path) -> None:
    (tmp_path / "few.yaml").write_text(RECIPE)
    start = time.monotonic()
    words = ("--recipe", str(tmp_path / "few.yaml"), "--prompts", "1", "--directions", "2", "--json")
    record = json.loads(run("audit", str(subject), "-o", str(tmp_path / "out"), *words).stdout)
    print(f"audited in {time.monotonic() - start:.0f} s")
    before, steps = record["base"]["refusal_rate"], record["directions"]["steps"]
    assert before >= 0.5 and steps[0]["refusal_rate"] <= before / 4 and record["directions"]["enough"] == 1
    assert record["verdict"][0].startswith("Refusal is concentrated: one direction carries")
    doses = [dose["score"] for dose in record["strengths"]["doses"]]
    assert doses == sorted(doses, reverse=True), "the more is removed, the less it refuses"
    assert 0 < record["strengths"]["halving"]["strength"] < 1
    assert record["strengths"]["halving"]["kl"] < steps[0]["kl"]
    assert len(record["grid"]["bypass"][0]) == 30 and record["grid"]["bypass"][0][0] is None
    assert min(score for score in record["grid"]["bypass"][0][12:20]) < 0 < record["grid"]["baseline"]["harmful"]
    assert (tmp_path / "out" / "audit.html").stat().st_size > 100_000
