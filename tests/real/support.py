"""The command line in a process of its own, and what a conversion gave."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def run(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """The command line, as a user runs it."""
    done = subprocess.run([sys.executable, "-m", "abliterate", *words], capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done


@dataclass(frozen=True)
class Converted:
    folder: Path
    manifest: dict[str, Any]
