"""A few of the interruptions that `python -m tests.interrupts` makes by the dozen."""

import json
import subprocess
import sys
from pathlib import Path


def test_interruptions_at_random_points() -> None:
    words = [sys.executable, "-m", "tests.interrupts", "--pushes", "2", "--converts", "1"]
    words += ["--drops", "1", "--seed", "1"]
    done = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    decoder, text, found = json.JSONDecoder(), done.stdout.strip(), []
    while text:
        tally, end = decoder.raw_decode(text)
        found.append((tally["command"], tally["faults"], sum(tally["kinds"].values()), tally["complete"] > 0))
        text = text[end:].strip()
    assert found == [("push", [], 2, True), ("convert", [], 1, True), ("drop", [], 1, True)]
