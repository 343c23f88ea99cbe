"""A few of the kills that `python -m tests.kills` does by the hundred."""

import re
import subprocess
import sys
from pathlib import Path


def test_kills_at_random_moments() -> None:
    """In a process of its own, whose forks find no threads."""
    words = [sys.executable, "-m", "tests.kills", "--pico", "6", "--subject", "0", "--seed", "1"]
    done = subprocess.run(words, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"kills +6 .*\n.*end +[1-9].*\n.*identical +[1-9].*\n *faults +0\n", done.stdout), done.stdout
