"""Real models, the command line in a process of its own, and what a conversion gave."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("ABLITERATE_TEST_BUILD", ROOT / "build"))


def run(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """The command line, as a user runs it."""
    done = subprocess.run([sys.executable, "-m", "abliterate", *words], capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done


def built(script: str, name: str, *options: str) -> Path:
    """A real model, made if it is not there."""
    folder = BUILD / name
    BUILD.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILD / f".{name}.lock"):  # several processes may run tests
        words = [sys.executable, str(ROOT / "tests/models" / script), str(folder), *options]
        subprocess.run(words, check=True)
    return folder


@dataclass(frozen=True)
class Converted:
    folder: Path
    manifest: dict[str, Any]


def converted_once(subject: Path, factory: pytest.TempPathFactory) -> Converted:
    """The subject through the whole command line: once for all processes of a run.

    Everything is at its default, but answers are shorter, which is most of the time: 32 tokens show a refusal.
    """
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    result = root / "answering.json"
    with FileLock(root / "answering.lock"):
        if not result.exists():
            done = run("convert", str(subject), str(root / "answering"), "--max-new-tokens", "32", "--json")
            result.write_text(done.stdout, encoding="utf-8")
    return Converted(root / "answering", json.loads(result.read_text(encoding="utf-8")))
